"""What the benchmark of fidelity does before it trains."""

import importlib
from itertools import combinations
from pathlib import Path

import pytest


def test_few_domains_have_few_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    halves = importlib.import_module("fidelity").halves
    assert sorted(halves(list("abcd"), 10)) == [list(pair) for pair in combinations("abcd", 2)]
    assert len(halves(list("abcdefgh"), 10)) == 10
