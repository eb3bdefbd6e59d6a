"""Rows of the journal, and the mixers there are, as tables for a terminal.

Knows the journal's rows and the registry alone; the HTML report is `dynmix.report`.
"""

import inspect
from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from dynmix.journal import Row
from dynmix.mixers.registry import find_mixer, mixer_names


def stage_table(row: Row) -> Table:
    """Return one stage: a line a domain with its weights, its influence on each task, and its tokens so far."""
    kind = f"stage {row['stage']}" if row["kind"] == "stage" else "end of the run"
    losses = ", ".join(f"{task} {_number(loss)}" for task, loss in (row["task_loss"] or {}).items())
    # Narrow, because seven domains and four tasks should fit into 80 columns.
    table = Table(
        title=f"{kind}, from sample {row['start']:,}",
        caption=f"task losses, nats/token: {losses}",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
        min_width=60,
    )
    table.add_column("domain", no_wrap=True)
    if row["weights"] is not None:
        table.add_column("weight", justify="right")
    influence, errors = row["influence"], row["standard_error"]
    for task in row["tasks"] if influence is not None else []:
        table.add_column(f"helps\n{task}", justify="right")
    table.add_column("tokens", justify="right")
    for j, domain in enumerate(row["domains"]):
        weights = [] if row["weights"] is None else [_change(row["weights_before"], row["weights"], domain)]
        scores = [
            _measured(scores[j], None if errors is None else errors[i][j]) for i, scores in enumerate(influence or [])
        ]
        table.add_row(domain, *weights, *scores, f"{row['tokens'][domain]:,}")
    if influence is not None:
        table.caption = f"{table.caption}\ninfluence: nats/token per unit of weight ± standard error"
    if words := row["error"] or row["message"]:
        table.caption = f"{table.caption}\n{words}"
    return table


def mixer_table() -> Table:
    """Return every registered mixer: its name, what it needs, what it is in a line, its arguments."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("name", "needs", "what it is, and its arguments"):
        table.add_column(heading, no_wrap=heading == "name")
    for name in mixer_names():
        try:
            mixer = find_mixer(name)
        except ValueError as problem:  # another distribution's, that cannot be imported
            table.add_row(name, "?", escape(str(problem)))
            continue
        line = (inspect.getdoc(mixer) or "").partition("\n")[0]
        given = [str(p.replace(annotation=p.empty)) for p in inspect.signature(mixer).parameters.values()]
        needs = ", ".join(sorted(getattr(mixer, "needs", ()))) or "-"
        table.add_row(name, needs, escape(line + (f"\n[{', '.join(given)}]" if given else "")))
    return table


def comparison_table(dynamic: Sequence[Row], static: Sequence[Row]) -> Table:
    """Return the final task losses of two runs side by side, in nats per token; a negative difference: dynamic won."""
    table = Table(
        title="the same budget side by side: final task losses, nats/token",
        caption="± standard error over a task's sequences; negative: the dynamic mixture is better",
    )
    for heading in ("task", "dynamic", "static prior", "difference"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    differences = []
    for task in dynamic[-1]["tasks"]:
        cells, losses = [], []
        for end in (dynamic[-1], static[-1]):
            loss, error = (end["task_loss"] or {}).get(task), (end["task_loss_standard_error"] or {}).get(task)
            cells.append(f"{_number(loss)} ± {_number(error)}")
            losses += [] if loss is None else [loss]
        if len(losses) == 2 and task not in dynamic[-1]["guards"]:
            differences.append(losses[0] - losses[1])
        table.add_row(task, *cells, f"{losses[0] - losses[1]:+.4f}" if len(losses) == 2 else "-")
    if differences:
        table.add_row("mean", "", "", f"{sum(differences) / len(differences):+.4f}")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _measured(score: float | None, error: float | None) -> str:
    if score is None:
        return "-"
    return _short(score, 2) if error is None else f"{_short(score, 2)}±{_short(error, 1)}"


def _short(value: float, digits: int) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.{digits}g}"


def _change(before: dict[str, float] | None, after: dict[str, float], domain: str) -> str:
    new = f"{100 * after[domain]:.1f}%"
    return new if before is None else f"{100 * before[domain]:.1f}→{new}"
