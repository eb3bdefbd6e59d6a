"""The paper's claims on gains that are known."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.pretraining import claims
from benchmarks.pretraining.__main__ import app
from benchmarks.pretraining.claims import additivity, figure4, overhead
from benchmarks.pretraining.tables import Cells
from dynmix import Influence, TokenStore


class Foreseen:
    """Windows whose gains are as predicted, but for noise that the next window's takes back."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(window=2, probes=4)
        self.natural = {"books": 0.25, "web": 0.75}

    def influence(self, curvature: str) -> tuple[Influence, float]:
        return Influence([[1.0, 0.0], [0.5, -0.5]], ("qa", "code"), tuple(self.natural)), 0.0

    def gains(self, scores: np.ndarray, weights: dict[str, float], domains: list[str]) -> np.ndarray:
        return scores @ np.array([weights[name] - self.natural[name] for name in domains])

    def base(self, seed: int) -> dict[str, float]:
        return {"qa": 3.0, "code": 2.0}

    def mixed(self, name: str, weights: dict[str, float], seed: int) -> dict[str, float]:
        luck = (-1) ** seed * np.random.default_rng(int(name.split("-")[1])).normal()
        gained = self.gains(self.influence("")[0].scores, weights, list(self.natural))
        return {task: loss - gain - luck for (task, loss), gain in zip(self.base(seed).items(), gained, strict=True)}


def test_figure_4_averages_over_the_windows_of_a_mixture() -> None:
    found = figure4(Foreseen(), 24, "EKFAC:1", repeats=2)  # type: ignore[arg-type]
    assert found["here"].startswith("Pearson 1.000, Spearman 1.000")
    assert found["points"][0] == pytest.approx(found["points"][1])
    one = figure4(Foreseen(), 24, "EKFAC:1", repeats=1)  # type: ignore[arg-type]
    assert float(one["here"].split()[1].strip(",")) < 0.7
    assert ["on single windows" in claim["here"] for claim in (found, one)] == [True, False]


LENGTH, ROWS = 8, 400


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Three domains, in which the first half of what is read does the opposite of the second."""
    names, own = ("books", "code", "web"), np.array([[1.0, -1.0], [2.0, 0.0], [-3.0, 4.0]])
    stores = {name: tmp_path / name for name in names}
    for path in stores.values():
        TokenStore.write(path, [np.zeros(ROWS * LENGTH, np.uint16)])

    def scored(model: None, probes: dict[str, int], *args: object, **how: object) -> SimpleNamespace:
        signs = {name: np.where(np.arange(count) < count // 2, 1.0, -1.0) for name, count in probes.items()}
        scores = {name: np.outer(signs[name], own[k]) * LENGTH for k, name in enumerate(names)}
        return SimpleNamespace(scores=scores, tokens={name: np.full(len(s), LENGTH) for name, s in signs.items()})

    monkeypatch.setattr(claims, "scored_groups", scored)
    return SimpleNamespace(
        corpus=SimpleNamespace(domains=names, stores=stores),
        settings=SimpleNamespace(size=SimpleNamespace(length=LENGTH), curvature_sequences=4),
        folder=tmp_path,
        tasks={"qa": None, "arc": None},
        natural=dict.fromkeys(names, 1 / 3),
        influence=lambda curvature: (Influence(own.T, ("qa", "arc"), names), 0.0),
        checkpoint=lambda: SimpleNamespace(model=None),
        task_batches=lambda: None,
        sequences=lambda weights, count, seed: count,
    )


def test_samples_share_no_sequence_with_what_foretells_them(pools: SimpleNamespace) -> None:
    found = additivity(pools, 32, [150], 190, "EKFAC:1")
    assert all(float(part.split()[1]) < -0.8 for part in found["here"].split("sequences: ")[1].split(", "))


def test_a_pool_is_half_of_its_domain_at_most(pools: SimpleNamespace) -> None:
    assert "drawn from 200 sequences a domain" in additivity(pools, 32, [150], 10**6, "EKFAC:1")["on"]
    TokenStore.write(pools.corpus.stores["web"], [np.zeros(LENGTH, np.uint16)])
    found = additivity(pools, 32, [150], 10**5, "EKFAC:1")
    assert "drawn from 1 to 200 sequences a domain" in found["on"]


def test_the_overhead_says_which_budget_it_is_of() -> None:
    def spent(before: float, mixing: float) -> dict[int, Any]:
        return {0: {"spent": {"flops": {"before": before, "mixing": mixing}}}}

    found = overhead(Cells({}, {"tikmix-d": spent(0, 1), "regmix": spent(4, 0)}), "swift")
    assert found is not None
    assert found["here"] == "25 % of the operations"
    assert found["on"] == "`swift`, 1 and 1 seeds"
    assert overhead(Cells({}, {"tikmix-d": spent(0, 1)}), "swift") is None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("sequences=64,x", "--sequences '64,x': whole numbers of at least 1"),
        ("sequences=0", "--sequences '0': whole numbers of at least 1"),
        ("mixtures=1", "--mixtures"),
        ("repeats=0", "--repeats"),
        ("samples=1", "--samples"),
        ("steps=2", "--steps"),
        ("window=0", "--window"),
        ("probes=0", "--probes"),
        ("pool=0", "--pool"),
    ],
)
def test_what_claims_cannot_be_made_of_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, message: str
) -> None:
    monkeypatch.setattr("benchmarks.pretraining.__main__.Corpus", lambda *_, **__: pytest.fail("read"))
    shown = CliRunner().invoke(app, ["claims", f"--output={tmp_path / 'out'}", f"--{option}"], env={"COLUMNS": "200"})
    assert shown.exit_code
    assert message in shown.output + str(shown.exception)
    assert not (tmp_path / "out").exists()
