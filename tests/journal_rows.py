"""A whole row of a journal, for the tests of what writes, reads and draws them."""

from collections.abc import Sequence
from typing import Any

from dynmix.journal import Row


def journal_row(
    stage: int = 0, *, domains: Sequence[str] = ("web", "code"), tasks: Sequence[str] = ("qa",), **given: Any
) -> Row:
    """The row of a stage for which nothing was measured: what is not said here or `given` is None."""
    row: Any = dict.fromkeys(Row.__required_keys__) | {
        "kind": "stage",
        "stage": stage,
        "step": 10 * stage,
        "start": 100 * stage,
        "end": 100 * stage + 100,
        "weights": dict.fromkeys(domains, 1 / len(domains)),
        "tasks": list(tasks),
        "guards": [],
        "domains": list(domains),
        "tokens": dict.fromkeys(domains, 1000 * stage),
        "epochs": dict.fromkeys(domains, stage / 8),
        "new_epochs": {},
        "mixer": "TiKMiXD",
        "message": "",
        "seconds": {"measure": 1.0, "propose": 0.0, "snapshot": 0.5},
        "warnings": [],
    }
    return row | given
