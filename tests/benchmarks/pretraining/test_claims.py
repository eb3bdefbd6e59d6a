"""The paper's claims on gains that are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.pretraining.claims import figure4
from dynmix import Influence


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
