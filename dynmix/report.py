"""The report of a run: one HTML page that opens with no network, drawn from the journal alone.

It must not know how anything was measured or decided: no torch, no model, no mixer. The same journal gives the same
bytes. Lines and areas are figures (SVG inside the page); the influence heat maps and bars are tables, so that their
numbers can be read, copied and wrapped on a narrow screen. Colours are Okabe and Ito's, for every kind of eyesight.
"""

import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynmix.journal import Journal, Row

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c8c8c")
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
# Stand-ins for the page's own colours: `_svg` turns them into CSS variables, so one figure serves light and dark.
INK, PAPER, RULE = "#010203", "#fdfcfb", "#a1a2a3"
STYLE: Any = {  # Any: matplotlib types the keys as one literal a version
    "svg.fonttype": "none",
    "svg.hashsalt": "dynmix",
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


@dataclass(frozen=True)
class Run:
    """The rows of one journal, and what several figures ask of them."""

    rows: list[Row]

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Raises ValueError where there is no whole row to draw."""
        rows = Journal(path).rows()
        if not rows:
            raise ValueError(f"{path}: no journal with at least one whole row; a run writes it in its run folder")
        return cls(rows)

    @property
    def stages(self) -> list[Row]:
        """The rows that set weights."""
        return [row for row in self.rows if row["weights"] is not None]

    @property
    def finished(self) -> bool:
        """Whether the run wrote its final row."""
        return self.rows[-1]["kind"] == "final"

    @property
    def domains(self) -> list[str]:
        """Names, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row["domains"]))

    @property
    def tasks(self) -> list[str]:
        """Names of what is optimised for, in order of first appearance."""
        return [name for name in self.sets if name not in self.guards]

    @property
    def guards(self) -> list[str]:
        """Names of what only holds the mixture back, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row["guards"]))

    @property
    def sets(self) -> list[str]:
        """Names of tasks and guards whose losses are measured throughout, on the same sequences each time.

        The domains' held-out text is others at every boundary: its losses are not put beside each other.
        """
        later = (name for row in self.rows for name in row["tasks"] if name not in row["guards"])
        return list(dict.fromkeys([*self.rows[0]["tasks"], *later]))

    @property
    def tokens_per_sample(self) -> float | None:
        """None while nothing has been trained on; sequences all have one length, so the last row's mean is exact."""
        tokens, start = sum(self.rows[-1]["tokens"].values()), self.rows[-1]["start"]
        return tokens / start if tokens and start else None

    def losses(self, task: str) -> list[tuple[int, float, float]]:
        """(position in samples, loss, standard error) of every measurement of the task that gave a number."""
        points = [(row["start"], *_pair(row["task_loss"], row["task_loss_standard_error"], task)) for row in self.rows]
        return [point for point in points if math.isfinite(point[1])]

    def gains(self, task: str) -> list[dict[str, Any]]:
        """What each stage was predicted to gain on the task, and by how much the task's loss fell over it."""
        gains = []
        for row, after in pairwise(self.rows):
            predicted = _pair(row["predicted_gain"], row["predicted_gain_standard_error"], task)
            loss, loss_error = _pair(row["task_loss"], row["task_loss_standard_error"], task)
            later, later_error = _pair(after["task_loss"], after["task_loss_standard_error"], task)
            if math.isfinite(predicted[0]) and math.isfinite(loss - later):
                realised = (loss - later, math.hypot(loss_error, later_error))
                gains.append({"stage": row["stage"], "predicted": predicted, "realised": realised})
        return gains


def write_report(
    journal: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    baseline: str | os.PathLike[str] | None = None,
    title: str = "Dynamic data mixing",
) -> Path:
    """Draw the run of `journal` as one self-contained HTML page at `output`, beside the run of `baseline` if given.

    `baseline` is the journal of a run to compare with (the static prior on the same budget). Returns the path of the
    page, which appears whole or not at all. Raises ValueError for a journal that is missing, empty or broken.
    """
    run, output = Run.read(Path(journal)), Path(output)
    other = None if baseline is None else Run.read(Path(baseline))
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    env.filters.update(percent=_percent, number=_number, name=_name, scaled=_scaled)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        page = env.get_template("report.html").render(
            title=title,
            run=run,
            baseline=other,
            last=run.rows[-1],
            weights=_weights_figure(run),
            losses=[(task, _loss_figure(task, run, other)) for task in run.sets if len(run.losses(task)) > 1],
            comparison=[_compare(task, run, other) for task in run.sets if run.losses(task)],
            heatmaps=[(row, _heatmap(row)) for row in run.rows if row["influence"] is not None],
            gains=[(task, gains, _gain_figure(task, gains)) for task in run.sets if (gains := run.gains(task))],
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(output.name + ".tmp")
    beside.write_text(page, encoding="utf-8", errors="replace")
    os.replace(beside, output)
    return output


def _weights_figure(run: Run) -> Markup | None:
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

    figure, axes = _axes(4.7, 3.1)
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
            f"{_short(label)} {_percent(share[-1])}",
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
    return _svg(figure, "Weight of each domain over the run, stacked; the table below has the numbers")


def _loss_figure(task: str, run: Run, other: Run | None) -> Markup:
    runs = [run] if other is None else [run, other]
    in_tokens = all(each.tokens_per_sample for each in runs)
    figure, axes = _axes(3.2, 2.1)
    for each, colour, marker, line in zip(runs, PALETTE, "os", ("-", "--"), strict=False):
        if points := each.losses(task):
            position, loss, error = np.array(points).T
            position = position * (each.tokens_per_sample or 1) if in_tokens else position
            axes.errorbar(
                position, loss, np.nan_to_num(error), color=colour, marker=marker, ls=line, ms=4, elinewidth=1
            )
    axes.set(ylabel="loss (nats per token)")
    axes.grid(axis="y")
    _position_axis(axes, in_tokens)
    return _svg(figure, f"Loss of the task {task} over the run")


def _gain_figure(task: str, gains: Sequence[dict[str, Any]]) -> Markup:
    figure, axes = _axes(3.2, 2.3)
    axes.axhline(0, color=RULE, lw=0.8)
    axes.axvline(0, color=RULE, lw=0.8)
    (x, x_error), (y, y_error) = (np.array([gain[key] for gain in gains]).T for key in ("predicted", "realised"))
    x_error, y_error = np.nan_to_num(x_error), np.nan_to_num(y_error)
    unit, power = _unit(max(abs(x) + x_error))
    axes.errorbar(x / unit, y, xerr=x_error / unit, yerr=y_error, color=PALETTE[0], fmt="o", ms=4)
    for gain, across, up in zip(gains, x / unit, y, strict=True):
        axes.annotate(str(gain["stage"]), (across, up), xytext=(4, 3), textcoords="offset points")
    axes.margins(0.12)
    axes.set(xlabel=f"predicted ({power and f'10{power} '}nats per token)", ylabel="realised (nats per token)")
    return _svg(figure, f"Predicted against realised gain of the task {task}, one point a stage")


def _heatmap(row: Row) -> dict[str, Any]:
    """One stage's influence as a table: a scale for each task, a row of cells for each domain."""
    scores = np.array(row["influence"], dtype=float)
    errors = np.full_like(scores, np.nan)
    if row["standard_error"] is not None:
        errors = np.array(row["standard_error"], dtype=float)
    largest = [max((abs(x) for x in task if math.isfinite(x)), default=0.0) for task in scores]
    units = [_unit(top) for top in largest]
    columns = [
        [_cell(score, error, top, unit) for score, error in zip(*column, strict=True)]
        for *column, top, (unit, _) in zip(scores, errors, largest, units, strict=True)
    ]
    return {
        "tasks": zip(row["tasks"], (power for _, power in units), strict=True),
        "domains": zip(row["domains"], zip(*columns, strict=True), strict=True),
    }


def _cell(score: float, error: float, largest: float, unit: float) -> dict[str, Any]:
    if not math.isfinite(score):
        return {"classes": "missing", "value": "\N{EN DASH}", "error": "", "strength": 0}
    decimals = 2 - math.floor(math.log10(largest / unit)) if largest else 2
    classes = ("helps" if score >= 0 else "hurts") + (" uncertain" if abs(score) < 2 * error else "")
    value, spread = (f"{x / unit:{sign}.{decimals}f}" for x, sign in ((score, "+"), (error, "")))
    return {
        "classes": classes,
        "value": value.replace("-", MINUS),
        "error": f"± {spread}" if math.isfinite(error) else "",
        "strength": round(abs(score) / largest, 3) if largest else 0,
    }


def _compare(task: str, run: Run, other: Run | None) -> dict[str, Any]:
    """First and last loss of a task, and the last one's distance from the baseline's last one."""
    first, last = run.losses(task)[0], run.losses(task)[-1]
    entry: dict[str, Any] = {"task": task, "first": first[1:], "last": last[1:], "baseline": None}
    if other is not None and other.losses(task):
        base = other.losses(task)[-1]
        difference, error = last[1] - base[1], math.hypot(last[2], base[2])
        verdict = "lower" if difference < 0 else "higher" if difference > 0 else "equal"
        if difference and not abs(difference) >= 2 * error:
            verdict += ", within the noise" if math.isfinite(error) else ", noise unknown"
        entry |= {"baseline": base[1:], "difference": (difference, error), "verdict": verdict}
    return entry


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


def _unit(largest: float) -> tuple[float, str]:
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


def _svg(figure: Figure, description: str) -> Markup:
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


def _pair(values: Any, errors: Any, key: str) -> tuple[float, float]:
    """(value, standard error) of one name; NaN where the journal has none."""
    value, error = ((numbers or {}).get(key) for numbers in (values, errors))
    return (math.nan if value is None else float(value), math.nan if error is None else float(error))


def _number(pair: tuple[float, float], form: str = ".4f") -> str:
    """A value with its standard error, where that is known."""
    value, error = pair
    spread = f" ±{NBSP}{error:{form.lstrip('+')}}" if math.isfinite(error) else ""
    return f"{value:{form}}{spread}".replace("-", MINUS)


def _scaled(pair: tuple[float, float]) -> str:
    """A value of any size with its standard error, over one power of 1000."""
    unit, power = _unit(np.nanmax(np.abs(pair)))
    number = _number((pair[0] / unit, pair[1] / unit), "+.2f").replace(" ", NBSP)
    return f"({number}) \N{MULTIPLICATION SIGN}{NBSP}10{power}" if power else number


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share >= 0.001 or not share else 4}f}\N{NARROW NO-BREAK SPACE}%"


def _name(name: str) -> Markup:
    """A name that may be wrapped after its underscores, slashes and hyphens."""
    return Markup(re.sub(r"(?<=[_/-])(?=.)", Markup("<wbr>"), str(escape(name))))


def _short(name: str, length: int = 16) -> str:
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1] + "…"
