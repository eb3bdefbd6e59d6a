"""The benchmark of in-run influence, on a small model."""

import importlib
from pathlib import Path

import pytest


def test_what_the_hooks_see_is_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script = importlib.import_module("in_run")
    llama = script.llama
    monkeypatch.setattr(script, "llama", lambda vocab, hidden, layers, length: llama(vocab, 16, 1, length))
    script.cost(rounds=2, sequences=16, folds=2, folder=tmp_path)
    assert "a step that is looked at" in capsys.readouterr().out
