"""An influence matrix as a picture for papers: blue helps, orange hurts, and what the error covers is hatched.

Knows an `Influence` and matplotlib; no run and no model.
"""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dynmix.observation import Influence
from dynmix.whole_file import whole_file

HELPS, HURTS = "#0072b2", "#d55e00"  # Okabe and Ito's, for every kind of eyesight


def draw_influence(influence: Influence, paths: list[Path]) -> None:
    """Draw the matrix into files, by their suffix (.png, .svg, .pdf), each whole or not at all.

    A row is coloured by its own largest score: tasks' scores are not of one size. Every cell has its score and, after
    ±, the standard error; a cell whose score is below twice its error is hatched.
    """
    n_tasks, n_domains = influence.scores.shape
    errors = influence.standard_error
    settings: Any = {"font.size": 8, "text.parse_math": False, "svg.hashsalt": "dynmix", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(0.95 * n_domains, 0.38 * n_tasks))  # of the cells; names take what they need beside
        axes = figure.add_axes((0, 0, 1, 1))
        known = np.where(np.isfinite(influence.scores), influence.scores, 0.0)
        shade = known / np.maximum(np.abs(known).max(axis=1, keepdims=True), 1e-300)
        colours = matplotlib.colors.LinearSegmentedColormap.from_list("influence", [HURTS, "#ffffff", HELPS])
        axes.imshow(shade, cmap=colours, vmin=-1, vmax=1, aspect="auto")
        for i, j in np.ndindex(n_tasks, n_domains):
            score, error = influence.scores[i, j], math.nan if errors is None else errors[i, j]
            text = f"{score:.2g}" + ("" if math.isnan(error) else f" ± {error:.1g}")
            axes.text(j, i, text, ha="center", va="center", color="white" if abs(shade[i, j]) > 0.6 else "black")
            if not math.isnan(error) and not abs(score) >= 2 * error:
                box = matplotlib.patches.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", linewidth=0)
                box.set_edgecolor("#00000030")
                axes.add_patch(box)
        axes.set_xticks(range(n_domains), influence.domains, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n_tasks), [f"{t} (guard)" if t in influence.guards else t for t in influence.tasks])
        axes.tick_params(length=0)
        axes.set_title("influence ± standard error, nats/token", fontsize=8)
        for path in paths:
            kind = path.suffix[1:]
            metadata = {"Date": None} if kind == "svg" else None
            with whole_file(path) as beside:
                figure.savefig(beside, format=kind, dpi=200, metadata=metadata, bbox_inches="tight")
