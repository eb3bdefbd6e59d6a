"""The figures of the report: lines and areas, for the page and as files for papers.

It must not know how anything was measured or decided: no torch, no model, no mixer. The same journal gives the same
figures. Colours are Okabe and Ito's, for every kind of eyesight.
"""

import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynmix.heatmap import draw_influence
from dynmix.observation import Influence
from dynmix.report_rows import RunRows
from dynmix.whole_file import whole_file

FORMATS = ("svg", "png", "pdf")
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c8c8c")
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Ink on white paper in a file; on the page `inline_svg` turns them into its CSS variables, so one figure serves light
# and dark.
INK, PAPER, RULE = "#010203", "#fdfcfb", "#a1a2a3"
STYLE: Any = {  # Any: matplotlib types the keys as one literal a version
    "svg.fonttype": "none",
    "svg.hashsalt": "dynmix",
    "pdf.fonttype": 42,  # TrueType: publishers refuse matplotlib's default, Type 3
    "text.parse_math": False,  # a "$" in a name is a "$"
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.alpha": 0.3,
    "hatch.color": PAPER,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Within it figures look the same whatever the process has set."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def write_figures(
    journal: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    formats: Sequence[str] = ("svg",),
    *,
    baseline: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Draw each figure of the report of `journal` into files of `folder`, for papers: dark on white, no page needed.

    They are `weights`, `loss-<task>`, `gain-<task>` and `influence-stage-<number>`, as far as the journal has them, in
    each of `formats` (svg, png, pdf). What a file system cannot hold of a name is an underscore. Returns the paths.
    Raises ValueError for a journal that is missing, empty or broken and for another format.
    """
    if unknown := [kind for kind in formats if kind not in FORMATS]:
        raise ValueError(f"no format {unknown[0]!r} of a figure: one of {', '.join(FORMATS)}")
    run, folder = RunRows.read(Path(journal)), Path(folder)
    other = None if baseline is None else RunRows.read(Path(baseline))
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def paths(name: str) -> list[Path]:
        name = re.sub(r"[^\w.=+-]", "_", name)[:60]
        taken = {path.stem.lower() for path in written}  # some file systems do not tell cases apart
        name = next(
            each for n in range(len(taken) + 1) if (each := f"{name}-{n + 1}" if n else name).lower() not in taken
        )
        written.extend(own := [folder / f"{name}.{kind}" for kind in formats])
        return own

    with drawing():
        if (weights := weights_figure(run)) is not None:
            _save(weights, paths("weights"))
        for task in run.sets:
            if len(run.losses(task)) > 1:
                figure = loss_figure(task, run, other)
                if other is not None:
                    figure.axes[0].legend(frameon=False)
                _save(figure, paths(f"loss-{task}"))
            if gains := run.gains(task):
                _save(gain_figure(gains), paths(f"gain-{task}"))
        matplotlib.rcdefaults()
        matplotlib.rcParams["pdf.fonttype"] = STYLE["pdf.fonttype"]
        for row in run.rows:
            if row["influence"] is not None:
                errors = None if row["standard_error"] is None else np.array(row["standard_error"], float)
                influence = Influence(
                    np.array(row["influence"], float), row["tasks"], row["domains"], errors, guards=row["guards"]
                )
                draw_influence(influence, paths(f"influence-stage-{row['stage']:04d}"))
    return written


def inline_svg(figure: Figure, description: str) -> Markup:
    """The figure as an inline SVG element in the page's own colours and fonts."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser sets the text, in its own fonts
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # ids would repeat from figure to figure
    for stand_in, variable in ((INK, "ink"), (PAPER, "paper"), (RULE, "rule")):
        text = re.sub(rf"\b(fill|stroke): {stand_in}", rf"\1: var(--{variable})", text)
    return Markup(text.replace("<svg ", Markup('<svg role="img" aria-label="{}" ').format(description), 1))


def weights_figure(run: RunRows) -> Figure | None:
    """Weights over the tokens trained on, stacked, a step a stage; beyond eight domains the smallest are one band."""
    stages, scale = run.stages, run.tokens_per_sample or 1
    if not stages:
        return None
    edges = [row["start"] for row in stages]
    if run.finished and run.rows[-1]["start"] > edges[0]:
        edges = [min(edge, run.rows[-1]["start"]) for edge in edges]  # a stage may be decided and never trained on
        edges.append(run.rows[-1]["start"])
    else:  # a run that is under way: the last stage up to its declared end, or as long as the one before it
        edges.append(stages[-1]["end"] or edges[-1] + (edges[-1] - edges[-2] if len(edges) > 1 else 1))
    shares = {name: np.array([(row["weights"] or {}).get(name, 0.0) for row in stages]) for name in run.domains}
    shown = sorted(shares, key=lambda name: -shares[name].sum())
    shown = shown if len(shown) <= len(PALETTE) else shown[: len(PALETTE) - 1]
    bands = [(name, shares[name], PALETTE[i]) for i, name in enumerate(n for n in run.domains if n in shown)]
    if rest := [shares[name] for name in shares if name not in shown]:
        bands.append((f"{len(rest)} others", np.sum(rest, axis=0), PALETTE[-1]))

    figure, axes = _axes(4.0, 3.0)
    bottom, middles = np.zeros(len(stages)), []
    for _, share, colour in bands:
        hatch = "//" if rest and colour == PALETTE[-1] else None
        axes.stairs(
            bottom + share, np.array(edges) * scale, baseline=bottom, fill=True, fc=colour, ec=PAPER, hatch=hatch
        )
        middles.append(bottom[-1] + share[-1] / 2)
        bottom = bottom + share
    for (label, share, colour), middle, height in zip(bands, middles, _apart(middles, 0.085), strict=True):
        axes.annotate(
            f"{_short(label)} {percent(share[-1])}",
            xy=(1, middle),
            xytext=(1.06, height),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 1.5, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
        )
    axes.set(xlim=(edges[0] * scale, edges[-1] * scale), ylim=(0, 1), ylabel="weight")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _position_axis(axes, run.tokens_per_sample is not None)
    return figure


def loss_figure(task: str, run: RunRows, other: RunRows | None) -> Figure:
    """Loss over the tokens trained on, with the baseline's beside it."""
    runs = {"this run": run} if other is None else {"this run": run, "baseline": other}
    in_tokens = all(each.tokens_per_sample for each in runs.values())
    figure, axes = _axes(3.2, 2.1)
    for (label, each), colour, marker, line in zip(runs.items(), PALETTE, "os", ("-", "--"), strict=False):
        if points := each.losses(task):
            position, loss, error = np.array(points).T
            position = position * (each.tokens_per_sample or 1) if in_tokens else position
            axes.errorbar(
                position, loss, np.nan_to_num(error), color=colour, marker=marker, ls=line, ms=4, elinewidth=1,
                label=label,
            )  # fmt: skip
    axes.set(ylabel="loss (nats per token)")
    axes.grid(axis="y")
    _position_axis(axes, in_tokens)
    return figure


def gain_figure(gains: Sequence[dict[str, Any]]) -> Figure:
    """Predicted against realised gains of one task, as `RunRows.gains` has them."""
    figure, axes = _axes(3.2, 2.3)
    axes.axhline(0, color=RULE, lw=0.8)
    axes.axvline(0, color=RULE, lw=0.8)
    (x, x_error), (y, y_error) = (np.array([gain[key] for gain in gains]).T for key in ("predicted", "realised"))
    x_error, y_error = np.nan_to_num(x_error), np.nan_to_num(y_error)
    unit, power = power_of_1000(max(abs(x) + x_error))
    axes.errorbar(x / unit, y, xerr=x_error / unit, yerr=y_error, color=PALETTE[0], fmt="o", ms=4)
    for gain, across, up in zip(gains, x / unit, y, strict=True):
        axes.annotate(str(gain["stage"]), (across, up), xytext=(4, 3), textcoords="offset points")
    axes.margins(0.12)
    axes.set(xlabel=f"predicted ({power and f'10{power} '}nats per token)", ylabel="realised (nats per token)")
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _position_axis(axes: Axes, in_tokens: bool) -> None:
    """Positions along x, in a unit that keeps the numbers short."""
    top = axes.get_xlim()[1]
    power = min(12, 3 * math.floor(math.log10(top) / 3)) if top >= 1e4 else 0
    unit = {0: "", 3: " (thousands)", 6: " (millions)", 9: " (billions)", 12: " (trillions)"}[power]
    axes.set_xlabel(("tokens" if in_tokens else "samples") + " trained on" + unit)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 10**power:.4g}")


def _save(figure: Figure, paths: Sequence[Path]) -> None:
    for path in paths:
        kind = path.suffix[1:]
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        with warnings.catch_warnings(), whole_file(path) as beside:
            if kind == "svg":
                warnings.filterwarnings("ignore", "Glyph .* missing")  # its text is set where it is looked at
            figure.savefig(beside, format=kind, dpi=300, facecolor="white", metadata=metadata)


def power_of_1000(largest: float) -> tuple[float, str]:
    """A power of 1000 that keeps numbers up to `largest` short, and how it is written after a 10 ("" for 1)."""
    exponent = 3 * math.floor(math.log10(largest) / 3) if largest else 0
    return 10.0**exponent, str(exponent).translate(SUPERSCRIPT) if exponent else ""


def _apart(heights: Iterable[float], gap: float) -> list[float]:
    """The heights (ascending), moved as little as one sweep each way needs for neighbours to be `gap` apart."""
    placed = list(heights)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def percent(share: float) -> str:
    """A share in words of a fixed width."""
    return f"{100 * share:.{1 if share >= 0.001 or not share else 4}f}\N{NARROW NO-BREAK SPACE}%"


def _short(name: str, length: int = 14) -> str:
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1] + "…"
