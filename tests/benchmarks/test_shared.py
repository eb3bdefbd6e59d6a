"""Benchmarks of a corpus say where they look for it, before they begin."""

import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("script", "given"), [("mde", ["runs/mde"]), ("regmix", []), ("sample_influence", ["precision", "runs/precision"])]
)
def test_a_missing_corpus_is_named(
    script: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setenv("DYNMIX_SHARED", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("sys.argv", [script, *given])
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as ended:
        (module.app if script == "sample_influence" else module.main)()
    assert "elsewhere has no" in str(ended.value)
    assert "set $DYNMIX_SHARED" in str(ended.value)


@pytest.mark.parametrize("script", ["mde", "mixers_m"])
def test_help_is_all_that_is_done(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--help"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    assert capsys.readouterr().out.startswith("usage: ")
    assert not [*tmp_path.iterdir()]
