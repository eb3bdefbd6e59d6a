"""The figures, as what is drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.pretraining import figures
from benchmarks.pretraining.tables import Cells

SPLIT = {"optimised": ["t"], "unseen_tasks": ["u"], "domains": ["a"], "unseen_domains": []}


def test_no_two_methods_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, file: drawn.append(figure))

    def cell(loss: float) -> dict[str, Any]:
        return {
            "final": {name: {"loss": loss} for name in ("t", "u", "text/a")},
            "curve": [{"tokens": 10, "loss": {"t": loss, "u": loss}}, {"tokens": 20, "loss": {"t": loss, "u": loss}}],
        }

    names = ["natural", *(f"method-{k:02d}" for k in range(14))]
    cells = Cells({"split": SPLIT}, {name: {0: cell(k / 2)} for k, name in enumerate(names)})
    figures.curves(cells, Path("curves"))
    figures.trade(cells, Path("trade"))
    lines, points = drawn[0].axes[0].get_lines(), drawn[1].axes[0].collections
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(names)
    paths = [np.asarray(dots.get_paths()[0].vertices).tobytes() for dots in points]
    looks = {(np.asarray(dots.get_facecolor()).tobytes(), path) for dots, path in zip(points, paths, strict=True)}
    assert len(looks) == len(names)
    assert [tuple(np.asarray(dots.get_offsets())[0]) for dots in points] == [(k / 2, k / 2) for k in range(len(names))]
