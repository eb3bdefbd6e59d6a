"""How a measurement is shared over ranks; that the parts make the whole is proven in processes of their own."""

from pathlib import Path
from typing import Any

import pytest

from dynmix.influence.dealing import dealt_by_cost


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_measure_together_what_one_measures_alone(processes: Any, ranks: int) -> None:
    status, printed = processes.run(Path(__file__).with_name("shared_worker.py"), ranks=ranks)
    assert status == 0, printed


def test_the_dearest_is_dealt_first() -> None:
    costs = {"a": 8.0, "b": 27.0, "c": 8.0, "d": 8.0, "e": 1.0}
    assert dealt_by_cost(costs, 1) == dict.fromkeys(costs, 0)
    assert dealt_by_cost(costs, 2) == {"b": 0, "a": 1, "c": 1, "d": 1, "e": 1}
    assert set(dealt_by_cost(costs, 8).values()) == set(range(5))
