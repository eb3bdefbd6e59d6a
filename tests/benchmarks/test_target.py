"""What the benchmarks of sample influence and of its target runs keep, and for whom."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module


def test_checkpoints_of_other_sizes_are_refused(script: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    sizes = {"hidden": 128, "depth": 4, "steps": 2400, "batch": 8, "rate": 3e-3}
    (tmp_path / "settings.json").write_text(json.dumps(sizes))
    with pytest.raises(SystemExit, match="steps was 2400 and is 800"):
        script("sample_influence").proxy(tmp_path, **sizes | {"steps": 800})


def test_a_cell_is_of_its_learning_rate_and_seed(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, asked = script("target"), list[Any]()

    def mixed(*given: Any) -> Any:
        asked.append(given[-1])
        raise LookupError

    monkeypatch.setattr(target, "mixed", mixed)
    monkeypatch.setattr(target, "halves", lambda half: {})
    (tmp_path / "target").mkdir()
    (tmp_path / "target/stores-natural-3-10x2-32x1-0.003.json").write_text('{"gsm8k": 5.0}')
    given = {"arm": "natural", "seed": 3, "steps": 10, "batch": 2, "hidden": 32, "depth": 1, "batch_tokens": 64}
    given |= {"paths": {"web": tmp_path / "stores/web"}}
    assert target.cell(tmp_path, rate=3e-3, **given) == {"gsm8k": 5.0}
    with pytest.raises(LookupError):
        target.cell(tmp_path, rate=1e-3, **given)
    assert asked == [3]


@pytest.mark.parametrize(
    ("name", "command", "given"),
    [
        ("target", "main", {"arms": "natural,tenn"}),
        ("sample_influence", "precision", {"curvature": "EKFAC"}),
        ("sample_influence", "precision", {"unit": "sequences"}),
        ("sample_influence", "precision", {"blend": "late"}),
        ("sample_influence", "precision", {"at": "240,100"}),
    ],
)
def test_a_name_that_is_not_known_is_refused_before_anything_is_trained(
    script: Any, name: str, command: str, given: dict[str, Any], tmp_path: Path
) -> None:
    (value,) = given.values()
    with pytest.raises(SystemExit, match=str(value)):
        getattr(script(name), command)(tmp_path, **given)
    assert not [*tmp_path.iterdir()]
