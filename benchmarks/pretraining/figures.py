"""The figures of RESULTS.md, as SVG. Knows results; runs nothing."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .tables import TASKS, Cells, order


def save(figure: Figure, file: Path) -> None:
    """Write an SVG that is the same bytes for the same figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "dynmix"}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def _look(number: int) -> tuple[str, str, str]:
    """Color, line and marker of a method: there are ten colors, and more methods."""
    return f"C{number % 10}", ("-", "--", ":")[number // 10 % 3], ("o", "x", "^")[number // 10 % 3]


def curves(cells: Cells, file: Path) -> None:
    """Mean loss of optimised and of unseen tasks by tokens."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    groups = [group for group in TASKS if group in cells.groups]
    for k, group in enumerate(groups):
        axes = figure.add_subplot(1, len(groups), k + 1)
        for number, name in enumerate(order(cells)):
            color, line, _ = _look(number)
            for seed, cell in enumerate(cells.cells[name].values()):
                loss = [np.mean([p["loss"][task] for task in cells.groups[group]]) for p in cell["curve"]]
                tokens = [p["tokens"] / 1e6 for p in cell["curve"]]
                axes.plot(tokens, loss, color=color, linestyle=line, linewidth=1, label=None if seed else name)
        axes.set_title(f"{group}, nats a token")
        axes.set_xlabel("million tokens")
    figure.axes[0].legend(fontsize=7)
    save(figure, file)


def trade(cells: Cells, file: Path) -> None:
    """Change against the prior on the optimised tasks, and on the text that nobody describes, or the domains' own."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    prior = cells.cells.get("natural", {})
    text = next((group for group in ("unseen domains' text", "domains' own text") if group in cells.groups), TASKS[0])
    x, y = cells.mean(TASKS[0]), cells.mean(text)
    for number, name in enumerate(order(cells)):
        both = sorted(set(cells.cells[name]) & set(prior))
        points = [(x(cells.cells[name][s]) - x(prior[s]), y(cells.cells[name][s]) - y(prior[s])) for s in both]
        if points:
            color, _, marker = _look(number)
            x_of, y_of = zip(*points, strict=True)
            axes.scatter(x_of, y_of, s=14, color=color, marker=marker, label=name)
    axes.axhline(0, color="#8c8c8c", linewidth=0.8)
    axes.axvline(0, color="#8c8c8c", linewidth=0.8)
    axes.set_xlabel("optimised tasks, nats a token against natural")
    axes.set_ylabel(text)
    axes.legend(fontsize=7)
    save(figure, file)


def scatter(x: list[float], y: list[float], labels: tuple[str, str, str], file: Path) -> None:
    """One against the other."""
    figure = Figure(figsize=(4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(x, y, s=12)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(labels[2], fontsize=9)
    save(figure, file)
