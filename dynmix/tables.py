"""Rows of the journal, and the mixers there are, as tables for a terminal.

Knows the journal's rows and the registry alone; the HTML report is `dynmix.report`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from dynmix.journal import Row
from dynmix.mixers.base import Proposal
from dynmix.mixers.registry import find_mixer, mixer_names
from dynmix.observation import Influence, Weights


def stage_table(row: Row) -> Table:
    """Return one stage: a line per domain with its weights, its influence on each task, and its tokens so far."""
    kind = f"stage {row['stage']}" if row["kind"] == "stage" else "end of the run"
    losses = ", ".join(f"{task} {_number(loss)}" for task, loss in (row["task_loss"] or {}).items())
    # Narrow, because seven domains and four tasks should fit into 80 columns.
    table = Table(
        title=f"{kind}, from sample {row['start']:,}",
        caption=escape(f"task losses, nats/token: {losses}"),
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
        table.add_column(f"helps\n{escape(task)}", justify="right")
    table.add_column("tokens", justify="right")
    for j, domain in enumerate(row["domains"]):
        weights = [] if row["weights"] is None else [_change(row["weights_before"], row["weights"], domain)]
        scores = [
            _measured(scores[j], None if errors is None else errors[i][j]) for i, scores in enumerate(influence or [])
        ]
        table.add_row(escape(domain), *weights, *scores, f"{row['tokens'][domain]:,}")
    if influence is not None:
        table.caption = f"{table.caption}\ninfluence: nats/token per unit of weight ± standard error"
    if words := row["error"] or row["message"]:
        table.caption = f"{table.caption}\n{escape(words)}"
    return table


def influence_table(influence: Influence) -> Table:
    """Return the scores with their standard errors: a line per domain, a column per task."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        caption="nats/token per unit of weight ± standard error; positive helps",
    )
    table.add_column("domain", no_wrap=True)
    for task in influence.tasks:
        table.add_column(escape(f"{task}\n(guard)" if task in influence.guards else task), justify="right")
    errors = influence.standard_error
    for j, domain in enumerate(influence.domains):
        cells = [
            _measured(float(score), None if errors is None else float(errors[i, j]))
            for i, score in enumerate(influence.scores[:, j])
        ]
        table.add_row(escape(domain), *cells)
    if influence.task_loss is not None:
        table.add_section()
        table.add_row("task loss", *(f"{loss:.4f}" for loss in influence.task_loss))
    return table


def proposal_table(proposal: Proposal, prior: Weights) -> Table:
    """Return the weights beside the prior's, with the bounds that bind."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("domain", "prior", "weight", "change", "bound"):
        table.add_column(heading, justify="left" if heading in ("domain", "bound") else "right")
    for name, weight in proposal.weights.items():
        bound = [key.partition(":")[0] for key in proposal.multipliers if key.partition(":")[2] == name]
        before = prior.get(name, 0.0)
        table.add_row(escape(name), f"{before:.4f}", f"{weight:.4f}", f"{weight - before:+.4f}", ", ".join(bound))
    return table


def mixer_facts() -> list[dict[str, Any]]:
    """Return every registered mixer: its name, what it needs, what it is in a line, its arguments."""
    found: list[dict[str, Any]] = []
    for name in mixer_names():
        try:
            mixer = find_mixer(name)
        except ValueError as problem:  # another distribution's, that cannot be imported
            found.append({"name": name, "needs": None, "what": str(problem), "arguments": []})
            continue
        line = (inspect.getdoc(mixer) or "").partition("\n")[0]
        given = [str(p.replace(annotation=p.empty)) for p in inspect.signature(mixer).parameters.values()]
        found.append({"name": name, "needs": sorted(getattr(mixer, "needs", ())), "what": line, "arguments": given})
    return found


def mixer_table() -> Table:
    """Return them as a table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("name", "needs", "what it is, and its arguments"):
        table.add_column(heading, no_wrap=heading == "name")
    for each in mixer_facts():
        needs = "?" if each["needs"] is None else ", ".join(each["needs"]) or "-"
        arguments = f"\n[{', '.join(each['arguments'])}]" if each["arguments"] else ""
        table.add_row(each["name"], needs, escape(each["what"] + arguments))
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
        table.add_row(escape(task), *cells, f"{losses[0] - losses[1]:+.4f}" if len(losses) == 2 else "-")
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
