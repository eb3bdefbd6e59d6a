"""Cells as numbers and the tables that are made of them, in Markdown. Knows results; runs nothing."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from dynmix.whole_file import write_whole

from .criteria import PAIRS
from .kept import read_json

CONTROLS = ("noise", "web_dup")  # domains that nobody wants learnt
PRIOR = "natural"
TASKS = ("optimised tasks", "unseen tasks")  # columns that have a curve

Cell = dict[str, Any]
Measure = Callable[[Cell], float]


@dataclass(frozen=True)
class Cells:
    """All results of a budget.

    Attributes:
        settings: that all of them were made with.
        cells: method -> seed -> what `run_cell` returned.
    """

    settings: dict[str, Any]
    cells: dict[str, dict[int, Cell]]

    @classmethod
    def read(cls, folder: Path) -> "Cells":
        """Read a budget's folder."""
        found: dict[str, dict[int, Cell]] = {}
        for file in sorted(folder.glob("*/*/cell.json")):
            cell = read_json(file)
            found.setdefault(cell["method"], {})[int(cell["seed"])] = cell
        return cls(read_json(folder / "settings.json"), dict(sorted(found.items())))

    @classmethod
    def read_lines(cls, file: Path) -> "Cells":
        """Read what `write_lines` wrote."""
        settings, *lines = map(json.loads, file.read_text().splitlines())
        found: dict[str, dict[int, Cell]] = {}
        for cell in lines:
            found.setdefault(cell["method"], {})[cell["seed"]] = cell
        return cls(settings, found)

    def write_lines(self, file: Path) -> None:
        """Write the settings and each cell as a line, for who doubts a table, or makes another."""
        cells = [cell for own in self.cells.values() for _, cell in sorted(own.items())]
        write_whole(file, "".join(json.dumps(line) + "\n" for line in (self.settings, *cells)))

    def joined(self, later: "Cells") -> "Cells":
        """These and later ones of the same settings, which take the place of those of their method and seed."""
        every = {n: self.cells.get(n, {}) | later.cells.get(n, {}) for n in sorted({*self.cells, *later.cells})}
        return Cells(later.settings, every)

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Column -> the sets whose mean it is, of those that were judged; a column that has none is left out."""
        split = self.settings["split"]
        own = [name for name in split["domains"] if name not in CONTROLS]
        found = {
            "optimised tasks": split["optimised"],
            "unseen tasks": split["unseen_tasks"],
            "domains' own text": [f"text/{name}" for name in own],
            "unseen domains' text": [f"text/{name}" for name in split["unseen_domains"]],
        }
        judged = {name for own in self.cells.values() for cell in own.values() for name in cell["final"]}
        kept = {column: [name for name in sets if name in judged] for column, sets in found.items()}
        return {column: sets for column, sets in kept.items() if sets}

    def mean(self, group: str) -> Measure:
        """Mean loss of a group's sets."""
        return lambda cell: float(np.mean([cell["final"][name]["loss"] for name in self.groups[group]]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; NaN of a single value."""
    n = len(values)
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return float(np.mean(values)), float(half)


def against_prior(cells: Cells, method: str, measure: Measure) -> str:
    """Mean of a method, and its difference to the prior over the seeds that both have."""
    text = f"{np.mean([measure(cell) for cell in cells.cells[method].values()]):.3f}"
    apart = difference(cells, method, PRIOR, measure)
    return f"{text} ({apart})" if apart and method != PRIOR else text


def difference(cells: Cells, method: str, other: str, measure: Measure) -> str:
    """A method's mean difference to another, with the interval over the seeds that both have; empty if none."""
    own, theirs = cells.cells[method], cells.cells.get(other, {})
    if not (both := sorted(set(own) & set(theirs))):
        return ""
    mean, half = interval([measure(own[seed]) - measure(theirs[seed]) for seed in both])
    return f"{mean:+.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "")


def share_of_tokens(cell: Cell, prior: Cell, names: Sequence[str]) -> float:
    """Tokens at which a run's mean loss first is the prior's final one, over the prior's tokens; NaN: never."""

    def curve(of: Cell) -> tuple[list[float], list[float]]:
        points = of["curve"]
        return [p["tokens"] for p in points], [float(np.mean([p["loss"][name] for name in names])) for p in points]

    aim = curve(prior)[1][-1]
    tokens, losses = curve(cell)
    for k, loss in enumerate(losses):
        if loss <= aim:
            if k == 0:
                return float(tokens[0] / prior["tokens"])
            part = (losses[k - 1] - aim) / (losses[k - 1] - loss)
            return float((tokens[k - 1] + part * (tokens[k] - tokens[k - 1])) / prior["tokens"])
    return float("nan")


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(head)
    return "\n".join([line(head), "|" + "---|" + "---:|" * (len(head) - 1), *map(line, rows)])


def line(cells: Iterable[str]) -> str:
    """A row of a table, whose cells may have a `|` in the name of a domain or a task."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def order(cells: Cells) -> list[str]:
    """Methods, the best on the optimised tasks first."""
    mean = cells.mean("optimised tasks")
    return sorted(cells.cells, key=lambda name: float(np.mean([mean(cell) for cell in cells.cells[name].values()])))


def overview(cells: Cells) -> str:
    """A row a method: losses by group, pairs, tokens, cost."""
    rows = []
    for name in order(cells):
        own = list(cells.cells[name].values())
        row = [f"`{name}`", str(len(own)), *(against_prior(cells, name, cells.mean(group)) for group in cells.groups)]
        right = [cell["final"][PAIRS]["accuracy"] for cell in own if PAIRS in cell["final"]]
        if right and None not in right:  # of examples without choices there is none
            row.append(f"{100 * np.mean(right):.1f} %")
        row.append(f"{np.mean([cell['tokens'] for cell in own]) / 1e6:.2f}M")
        rows.append(row)
    pairs = [f"{PAIRS} pairs"] if rows and len(rows[0]) == len(cells.groups) + 4 else []
    return markdown(["method", "seeds", *cells.groups, *pairs, "tokens trained"], rows)


def sweeps(cells: Cells, base: str, variants: Mapping[str, Sequence[str]]) -> str:
    """A row a variant that was run: by how much it differs from what it varies; empty if there is none."""
    rows = []
    for title, names in variants.items():
        for name in names:
            if both := set(cells.cells.get(name, {})) & set(cells.cells.get(base, {})):
                apart = [difference(cells, name, base, cells.mean(group)) for group in cells.groups]
                varied = f"[{name.removeprefix(base[:-1] + ',')}" if name.startswith(base[:-1]) else name
                rows.append([title, f"`{varied}`", str(len(both)), *apart])
    return markdown(["sweep", "variant", "seeds", *cells.groups], rows) if rows else ""


def by_set(cells: Cells, unit: str) -> str:
    """A column a method, a row a set."""
    names = order(cells)
    rows = [
        [f"`{s}`", *(f"{np.mean([c['final'][s][unit] for c in cells.cells[name].values()]):.3f}" for name in names)]
        for group in cells.groups.values()
        for s in group
    ]
    return markdown(["set", *names], rows)


def efficiency(cells: Cells) -> str:
    """Share of the prior's tokens at which methods are where it ends, by group of tasks."""
    prior, groups = cells.cells.get(PRIOR, {}), [group for group in TASKS if group in cells.groups]
    rows = []
    for name in order(cells):
        both = sorted(set(cells.cells[name]) & set(prior))
        if name == PRIOR or not both:
            continue
        row = [f"`{name}`"]
        for group in groups:
            shares = [share_of_tokens(cells.cells[name][s], prior[s], cells.groups[group]) for s in both]
            reached = [share for share in shares if np.isfinite(share)]
            missed = len(both) - len(reached)
            text = f"{100 * np.mean(reached):.0f} %" if reached else "-"
            row.append(text + (f" (not reached on {missed} of {len(both)} seeds)" if missed else ""))
        rows.append(row)
    return markdown(["method", *groups], rows)


def by_budget(budgets: Mapping[str, Cells], group: str) -> str:
    """A row a method, a column a budget: whole runs of another length, each with its own learning rates."""
    names = sorted({name for cells in budgets.values() for name in cells.cells})
    rows = [
        [
            f"`{name}`",
            *(
                against_prior(cells, name, cells.mean(group)) if name in cells.cells else "-"
                for cells in budgets.values()
            ),
        ]
        for name in names
    ]
    return markdown(["method", *budgets], rows)


def costs(cells: Cells) -> str:
    """What methods spend on their mixture, in operations and seconds."""
    rows = []
    for name in order(cells):
        own = [cell["spent"] for cell in cells.cells[name].values()]
        row = [f"`{name}`"]
        for unit, scale in (("flops", 1e9), ("seconds", 1.0)):
            parts = {key: np.mean([spent[unit][key] for spent in own]) for key in ("training", "before", "mixing")}
            extra = parts["before"] + parts["mixing"]
            row += [f"{parts[key] / scale:,.1f}" for key in parts] + [f"{100 * extra / sum(parts.values()):.1f} %"]
        rows.append(row)
    head = [f"{what}, {unit}" for unit in ("GFLOP", "s") for what in ("training", "beforehand", "in the run", "share")]
    return markdown(["method", *head], rows)


def overspent(cells: Cells) -> str:
    """Says which methods went over their budget by more than 1 %, in the mean; empty if none did."""
    over = {
        name: np.mean([sum(cell["spent"]["flops"].values()) / cell["budget"] for cell in cells.cells[name].values()])
        for name in order(cells)
    }
    found = [f"`{name}` {100 * (share - 1):.0f} %" for name, share in over.items() if share > 1.01]
    return f"Over the budget, by what was bought last: {', '.join(found)}.\n" if found else ""


def sampled(cells: Cells) -> str:
    """Share of what was trained on, by domain."""
    names = [name for name in order(cells) if name != "automixer"]
    domains = cells.settings["split"]["domains"]
    rows = [
        [f"`{d}`", *(f"{100 * np.mean([c['sampled'].get(d, 0) for c in cells.cells[n].values()]):.1f}" for n in names)]
        for d in domains
    ]
    return markdown(["domain, %", *names], rows)
