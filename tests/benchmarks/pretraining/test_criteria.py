"""What mixers are told of, whatever the order it is asked for in."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.pretraining.criteria import Split


def test_unseen_tasks_are_a_set_in_any_order() -> None:
    corpus: Any = SimpleNamespace(root=Path("."), tasks=["a", "b", "c"], domains=["one"], texts=["one", "two"])
    assert Split.of(corpus, ("c", "a")) == Split.of(corpus, ("a", "c")) == Split(("b",), ("a", "c"), ("one",), ("two",))
