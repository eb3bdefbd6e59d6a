"""Tables of runs, as laboratories write them: which columns are weights, which are losses, and what is wrong where.

Layouts that are understood as they are: RegMix's (`w_<domain>` and `loss_<target>`; or `train_...` in one file and
`valid_...` in another, joined by their index), `weight/<domain>` and `loss/<target>`, and columns without prefixes of
which some, side by side, sum to 1 in every row. Knows files and arrays; what is done about a doubt goes to `notes`.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import compress, pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np

from dynmix.laws.base import SUM_TOLERANCE, Array

WEIGHT_PREFIXES = ("weight/", "weights/", "weight_", "w_", "w/", "mixture/", "mixture_", "train_")
LOSS_PREFIXES = ("loss/", "loss_", "valid_", "validation_", "val_", "eval/", "eval_")
MISSING = {"", "nan", "na", "n/a", "none", "null", "-"}
HIGHER_IS_BETTER = ("acc", "score", "exact_match", "f1", "bleu", "rouge", "win_rate")
INDICES = {
    "", "index", "idx", "id", "run", "run_id", "name", "step", "steps", "seed", "model", "experiment", "unnamed: 0",
}  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """Runs as arrays.

    Attributes:
        domains, targets: names, in the order of the columns of W and L.
        W: weights float64[n_runs, n_domains], as they are in the table; rows sum to 1 within 1 %.
        L: losses float64[n_runs, n_targets], NaN where a run was not evaluated.
        notes: what was understood, mended or left out, in words.
    """

    domains: tuple[str, ...]
    targets: tuple[str, ...]
    W: Array
    L: Array
    notes: list[str] = field(default_factory=list)

    def ordered(self, domains: Sequence[str], targets: Sequence[str]) -> "Runs":
        """Return the runs with their columns in that order.

        Raises:
            ValueError: other names than theirs.
        """
        for what, own, wanted in (("domains", self.domains, domains), ("targets", self.targets, targets)):
            if set(own) != set(wanted):
                raise ValueError(f"the runs' {what} are {', '.join(own)}; wanted are {', '.join(wanted)}")
        W, L = self.W[:, [*map(self.domains.index, domains)]], self.L[:, [*map(self.targets.index, targets)]]
        return replace(self, domains=tuple(domains), targets=tuple(targets), W=W, L=L)


def read_runs(
    path: Path | str, losses: Path | str | None = None, *, weights: str | None = None, targets: str | None = None
) -> Runs:
    """Read a CSV file (`,`, `;` or tabs; a header; a row per run).

    Args:
        path: of the table.
        losses: of a second table with the losses, whose first column is the same index as the first one's.
        weights, targets: which columns are: names or patterns with `*`, joined by commas. None: found by their
            prefixes, or weights by their sum and targets as what else is a number and no index.

    Raises:
        ValueError: a table that cannot be understood; says file, line, column and remedy.
        OSError: a file that cannot be read.
    """
    table = _Table.read(Path(path))
    if losses is not None:
        table = table.joined(_Table.read(Path(losses)))
    own = table.chosen(weights, "weights") if weights is not None else table.find_weights()
    W = table.weights(own)
    rest = [name for name in table.names if name not in own]
    of_targets = table.chosen(targets, "targets") if targets is not None else table.find_targets(rest)
    if both := [name for name in of_targets if name in own]:
        raise ValueError(f"{table.path}: column {both[0]!r} is chosen as a weight and as a target: leave it out of one")
    L = table.losses(of_targets)
    known = np.isfinite(L).sum(axis=0)
    for name, count in zip(of_targets, known, strict=True):
        if count < 2:
            table.notes.append(f"target {name!r} has {count} loss(es): left out")
    kept = np.flatnonzero(known >= 2)
    if not len(kept):
        table.fail("no target has losses of two runs or more: nothing can be fitted")
    names = _short(own, WEIGHT_PREFIXES), _short([of_targets[j] for j in kept], LOSS_PREFIXES)
    if scores := [name for name in names[1] if any(word in name.lower() for word in HIGHER_IS_BETTER)]:
        table.notes.append(f"{', '.join(scores)}: taken as a loss, lower is better; give minus it if higher is")
    _describe(names[0], W, L, table.notes)
    return Runs(*names, W, L[:, kept], table.notes)


def _describe(domains: Sequence[str], W: Array, L: Array, notes: list[str]) -> None:
    off = np.abs(W.sum(axis=1) - 1)
    if (off > 1e-6).any():
        notes.append(
            f"weights of {int((off > 1e-6).sum())} runs sum to 1 only within {off.max():.2g}: made to sum to 1"
        )
    if absent := [name for name, seen in zip(domains, W.max(axis=0) > 0, strict=True) if not seen]:
        notes.append(f"no run had {', '.join(absent)}: nothing is known of it, and it gets no weight")
    if twice := len(W) - len(np.unique(W.round(9), axis=0)):
        notes.append(f"{twice} runs repeat another's mixture: they tell the noise, and are left out together")
    if missing := int((~np.isfinite(L)).sum()):
        notes.append(f"{missing} of {L.size} losses are missing: each target is fitted to its own runs")
    if len(W) < W.shape[1]:
        notes.append(
            f"{len(W)} runs are fewer than the {W.shape[1]} domains: trust the error bars more than the mixture"
        )


@dataclass(frozen=True)
class _Table:
    """Cells of a file; `lines` are the rows' line numbers in it."""

    path: Path
    names: list[str]
    rows: list[list[str]]
    lines: list[int]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "_Table":
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no UTF-8 text: a CSV file is needed") from None
        first = text.split("\n", 1)[0]
        reader = csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count))
        found = [([cell.strip() for cell in row], reader.line_num) for row in reader if any(map(str.strip, row))]
        if len(found) < 2:
            raise ValueError(f"{path} has {len(found)} lines that are not empty: a header and a row a run are needed")
        (names, _), *found = found
        if sum(_number(name) is not None and name.lower() not in MISSING for name in names) > len(names) / 2:
            raise ValueError(f"{path} begins with numbers: its first line must name the columns")
        for name, count in Counter(name for name in names if name).items():
            if count > 1:
                raise ValueError(f"{path}: {count} columns are called {name!r}: rename all but one")
        for row, line in found:
            if len(row) != len(names):
                raise ValueError(f"{path}, line {line}: {len(row)} cells, the header has {len(names)}: mend the line")
        return cls(path, names, [row for row, _ in found], [line for _, line in found])

    def joined(self, other: "_Table") -> "_Table":
        """Return the table with the other's columns beside it, matched by the first column of both."""
        keys = []
        for table in (self, other):
            keys.append({row[0]: i for i, row in enumerate(table.rows)})
            if len(keys[-1]) != len(table.rows):
                table.fail(f"its first column {table.names[0]!r} is no index (values repeat), to join {other.path} by")
        if both := set(self.names[1:]) & set(other.names[1:]):
            other.fail(f"{self.path} has a column {min(both)!r} too: rename one")
        common = [row for row in self.rows if row[0] in keys[1]]
        if not common:
            other.fail(f"no value of its first column {other.names[0]!r} is in that of {self.path}")
        lost = len(self.rows) + len(other.rows) - 2 * len(common)
        notes = [f"{lost} rows are in only one of the two files: left out"] if lost else []
        lines = [self.lines[keys[0][row[0]]] for row in common]
        rows = [row + other.rows[keys[1][row[0]]][1:] for row in common]
        return _Table(self.path, self.names + other.names[1:], rows, lines, notes)

    def chosen(self, patterns: str, what: str) -> list[str]:
        """Return the columns that one of the patterns names, in the table's order."""
        wanted = [pattern.strip() for pattern in patterns.split(",")]
        for pattern in wanted:
            if pattern not in self.names and not any(fnmatchcase(name, pattern) for name in self.names):
                self.fail(f"no column for {what} is called {pattern!r}; there are {', '.join(self.names)}")
        return [n for n in self.names if any(n == pattern or fnmatchcase(n, pattern) for pattern in wanted)]

    def find_weights(self) -> list[str]:
        """Return the columns with a weight's prefix that are shares in most runs, or some side by side in all."""
        prefixed = {p: [name for name in self.names if name.startswith(p)] for p in WEIGHT_PREFIXES}
        found = {p: names for p, names in prefixed.items() if len(names) > 1}
        good = {p: names for p, names in found.items() if self._are_shares(names)}
        if len(good) > 1:
            self.fail(
                f"columns with {' and with '.join(map(repr, good))} both look like weights: choose with --weights"
            )
        if good:
            return next(iter(good.values()))
        if names := self._side_by_side():
            self.notes.append(f"weights are the columns {names[0]!r} to {names[-1]!r}, which sum to 1 in every row")
            return names
        if found:  # so that what is wrong with them is said
            return next(iter(found.values()))
        self.fail(
            "no columns are called weight/<domain> or w_<domain>, and none side by side sum to 1 in every row: name "
            "them with --weights"
        )

    def _side_by_side(self) -> list[str]:
        """Return the most columns in a row that are shares in every run; none: empty."""
        numeric = [self._is_data(name) for name in self.names]
        values = np.zeros((len(self.rows), len(self.names)))
        values[:, numeric] = np.nan_to_num(self._cells(list(compress(self.names, numeric))))
        usable = np.array(numeric) & (values >= 0).all(axis=0) & (values <= 100).all(axis=0)
        for length in range(len(self.names), 1, -1):
            for first in range(len(self.names) - length + 1):
                part = slice(first, first + length)
                if usable[part].all() and any(
                    (np.abs(values[:, part].sum(axis=1) / whole - 1) <= SUM_TOLERANCE).all() for whole in (1, 100)
                ):
                    return self.names[part]
        return []

    def find_targets(self, rest: Sequence[str]) -> list[str]:
        """Return the columns with a loss's prefix, or else all that are numbers and no index."""
        if found := [name for name in rest if name.startswith(LOSS_PREFIXES)]:
            return found
        found = [name for name in rest if self._is_data(name)]
        if not found:
            self.fail("no columns are called loss/<target> or loss_<target>, and no others are numbers: use --targets")
        self.notes.append(f"targets are what is left that is a number: {', '.join(found)}")
        return found

    def weights(self, names: Sequence[str]) -> Array:
        """Return the weights, float64[n_runs, len(names)]; an empty cell is 0 if the others sum to 1."""
        if len(names) < 2:
            self.fail(f"{len(names)} column of weights, {', '.join(names)}: a mixture has at least two domains")
        W = self._cells(names)
        total = np.nansum(W, axis=1)
        if np.median(total) > 50:
            W, total = W / 100, total / 100
            self.notes.append("weights sum to 100: read as per cent")
        for i, j in np.argwhere((W < 0) | np.isinf(W)):
            self.fail(f"a weight of {W[i, j]:g}: weights are shares of the training tokens, at least 0", i, names[j])
        for i in np.flatnonzero(np.abs(total - 1) > SUM_TOLERANCE):
            if np.isnan(W[i]).any():
                j = int(np.argmax(np.isnan(W[i])))
                self.fail(
                    f"is empty and the other weights sum to {total[i]:.4g}: fill it in, or drop the run", i, names[j]
                )
            remedy = "these must be all the domains' shares; choose the columns with --weights, or mend the line"
            self.fail(f"the weights sum to {total[i]:.6g}, not 1: {remedy}", i)
        if empty := int(np.isnan(W).sum()):
            self.notes.append(f"{empty} empty cells of weights are 0: the others of their run sum to 1")
        return np.nan_to_num(W)

    def losses(self, names: Sequence[str]) -> Array:
        """Return the losses, float64[n_runs, len(names)]; of a diverged run NaN."""
        L = self._cells(names)
        if diverged := int(np.isinf(L).sum()):
            self.notes.append(f"{diverged} losses are infinite: taken as missing")
        return np.where(np.isfinite(L), L, np.nan)

    def _cells(self, names: Sequence[str]) -> Array:
        columns = [self.names.index(name) for name in names]
        found = np.empty((len(self.rows), len(names)))
        for i, row in enumerate(self.rows):
            for j, column in enumerate(columns):
                value = _number(row[column])
                if value is None:
                    self.fail(f"{row[column]!r} is no number: mend the cell, or empty it if it is missing", i, names[j])
                found[i, j] = value
        return found

    def _is_numeric(self, name: str) -> bool:
        """Return whether most cells are numbers: a column with a few bad ones is to be mended, not passed over."""
        column = self.names.index(name)
        cells = [row[column] for row in self.rows if row[column].lower() not in MISSING]
        return sum(_number(cell) is not None for cell in cells) > len(cells) / 2

    def _is_data(self, name: str) -> bool:
        """Return whether the column has numbers and is no index, nor counts the rows, as one by another name does."""
        column = self.names.index(name)
        values = [_number(row[column]) for row in self.rows]
        counts = len(values) > 2 and all(a is not None and b is not None and b - a == 1 for a, b in pairwise(values))
        return name.lower() not in INDICES and self._is_numeric(name) and not counts

    def _are_shares(self, names: Sequence[str]) -> bool:
        if not all(map(self._is_numeric, names)):
            return False
        W = self._cells(names)
        total = np.nansum(W, axis=1) / (100 if np.nanmedian(np.nansum(W, axis=1)) > 50 else 1)
        fine = (np.abs(total - 1) <= SUM_TOLERANCE) & ~(W < 0).any(axis=1)
        return bool(fine.mean() > 0.5)

    def fail(self, problem: str, row: int | np.intp | None = None, column: str | None = None) -> NoReturn:
        place = "" if row is None else f", line {self.lines[int(row)]}"
        raise ValueError(f"{self.path}{place}{'' if column is None else f', column {column!r}'}: {problem}")


def _number(cell: str) -> float | None:
    if cell.lower() in MISSING:
        return float("nan")
    try:
        return float(cell)
    except ValueError:
        return None


def _short(names: Sequence[str], prefixes: Sequence[str]) -> tuple[str, ...]:
    """Return the names without their prefixes, or as they are if two would be alike."""
    short = [next((n[len(p) :] for p in prefixes if n.startswith(p) and len(n) > len(p)), n) for n in names]
    return tuple(short if len(set(short)) == len(short) else names)
