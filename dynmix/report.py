"""The report of a run: one HTML page that opens with no network, drawn from the journal alone.

It must not know how anything was measured or decided: no torch, no model, no mixer. The same journal gives the same
bytes. Lines and areas are figures (SVG inside the page); the influence heat maps and bars are tables, so that their
numbers can be read, copied and wrapped on a narrow screen. Colours are Okabe and Ito's, for every kind of eyesight.
"""

import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dynmix.journal import Journal, Row
from dynmix.report_figures import drawing, gain_figure, inline_svg, loss_figure, percent, power_of_1000, weights_figure
from dynmix.report_rows import PARTS, RunRows
from dynmix.whole_file import write_whole

TITLE = "Dynamic data mixing"
NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


def write_report(
    journal: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    baseline: str | os.PathLike[str] | None = None,
    title: str = TITLE,
) -> Path:
    """Draw the run of `journal` as one self-contained HTML page at `output`, beside the run of `baseline` if given.

    `baseline` is the journal of a run to compare with (the static prior on the same budget). Returns the path of the
    page, which appears whole or not at all. Raises ValueError for a journal that is missing, empty or broken.
    """
    run = RunRows.read(Path(journal))
    return _write(run, None if baseline is None else RunRows.read(Path(baseline)), Path(output), title)


def watch_report(
    journal: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    baseline: str | os.PathLike[str] | None = None,
    title: str = TITLE,
    every: float = 5.0,
) -> Iterator[Row | None]:
    """Draw the page anew whenever a journal has changed, until the final row of `journal` is in it.

    Looks every so many seconds and yields after each look: the last row that is drawn, None while the run has not
    written one. Meanwhile an open page loads itself again; the last page does not, whether the run ended, the caller
    stopped or something failed. Raises ValueError as `write_report` does, but waits for a journal that is not there.
    """
    files = [Path(journal), *([] if baseline is None else [Path(baseline)])]
    run, other, seen, page = None, None, None, Path(output)
    try:
        while True:
            if (now := [_stamp(file) for file in files]) != seen:
                seen = now
                run, *others = (RunRows(rows) if (rows := Journal(file).rows()) else None for file in files)
                other = others[0] if others else None
                if run is not None:
                    _write(run, other, page, title, reload=None if run.finished else every)
            yield None if run is None else run.rows[-1]
            if run is not None and run.finished:
                return
            time.sleep(every)
    finally:
        if run is not None and not run.finished:
            _write(run, other, page, title)


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _write(run: RunRows, other: RunRows | None, output: Path, title: str, reload: float | None = None) -> Path:
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    env.filters.update(percent=percent, number=_number, name=_name, scaled=_scaled)
    weights_words = "Weight of each domain over the run, stacked; the table below has the numbers"
    gain_words = "Predicted against realised gain of the task {}, one point a stage"
    with drawing():
        weights = weights_figure(run)
        page = env.get_template("report.html").render(
            title=title,
            reload=None if reload is None else max(1, math.ceil(reload)),
            run=run,
            baseline=other,
            last=run.rows[-1],
            parts=PARTS,
            weights=None if weights is None else inline_svg(weights, weights_words),
            losses=[
                (task, inline_svg(loss_figure(task, run, other), f"Loss of the task {task} over the run"))
                for task in run.sets
                if len(run.losses(task)) > 1
            ],
            comparison=[_compare(task, run, other) for task in run.sets if run.losses(task)],
            heatmaps=[(row, _heatmap(row)) for row in run.rows if row["influence"] is not None],
            gains=[
                (task, gains, inline_svg(gain_figure(gains), gain_words.format(task)))
                for task in run.sets
                if (gains := run.gains(task))
            ],
        )
    write_whole(output, page.encode(errors="replace"))
    return output


def _heatmap(row: Row) -> dict[str, Any]:
    """One stage's influence as a table: a scale for each task, a row of cells for each domain."""
    scores = np.array(row["influence"], dtype=float)
    errors = np.full_like(scores, np.nan) if row["standard_error"] is None else np.array(row["standard_error"], float)
    largest = [max((abs(x) for x in task if math.isfinite(x)), default=0.0) for task in scores]
    units = [power_of_1000(top) for top in largest]
    columns = [
        [_cell(score, error, top, unit) for score, error in zip(*column, strict=True)]
        for *column, top, (unit, _) in zip(scores, errors, largest, units, strict=True)
    ]
    missing = row["left_out"] or {}
    return {
        "tasks": [(task, power, missing.get(task)) for task, (_, power) in zip(row["tasks"], units, strict=True)],
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


def _compare(task: str, run: RunRows, other: RunRows | None) -> dict[str, Any]:
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


def _number(pair: tuple[float, float], form: str = ".4f") -> str:
    """A value with its standard error, where that is known."""
    value, error = pair
    spread = f" ±{NBSP}{error:{form.lstrip('+')}}" if math.isfinite(error) else ""
    return f"{value:{form}}{spread}".replace("-", MINUS)


def _scaled(pair: tuple[float, float]) -> str:
    """A value of any size with its standard error, over one power of 1000."""
    unit, power = power_of_1000(np.nanmax(np.abs(pair)))
    number = _number((pair[0] / unit, pair[1] / unit), "+.2f").replace(" ", NBSP)
    return f"({number}) \N{MULTIPLICATION SIGN}{NBSP}10{power}" if power else number


def _name(name: str) -> Markup:
    """A name that may be wrapped after its underscores, slashes and hyphens."""
    return Markup(re.sub(r"(?<=[_/-])(?=.)", Markup("<wbr>"), str(escape(name))))
