"""The journal of a run: one JSON line per stage, readable by anything, whole after a kill at any moment.

It knows the shape of a row and how to keep a file of them honest. It must not know what measured or decided them:
no torch, no mixer, no framework.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

from dynmix.whole_file import finite, write_whole

logger = logging.getLogger(__name__)


class Seconds(TypedDict):
    """Wall-clock seconds a stage boundary took, by part, and what the training before it took."""

    measure: float
    propose: float
    snapshot: float
    training: NotRequired[float]  # since the row before; absent where another process wrote that one


class Row(TypedDict):
    """What is written down at a stage boundary, and once more (`kind="final"`) when the run ends.

    Every key is always present. A number that was NaN or infinite is `None`: JSON has no other word for it.
    Losses and gains are in nats per token; influence is in nats per token per unit of weight, and positive helps.
    """

    kind: Literal["stage", "final"]
    stage: int
    step: int  # optimizer step at which it was measured
    start: int  # first position (in samples) these weights serve; of a final row: where the run ended
    end: int | None  # first position they no longer serve; None while that is not decided
    weights_before: dict[str, float] | None  # None for stage 0
    weights: dict[str, float] | None  # None for a final row
    tasks: list[str]  # rows of what was measured: the tasks, then the guards
    guards: list[str]  # those of them that a mixture is held to and not optimised for
    domains: list[str]
    influence: list[list[float | None]] | None  # [n_tasks][n_domains]
    standard_error: list[list[float | None]] | None  # [n_tasks][n_domains]
    task_loss: dict[str, float | None] | None
    task_loss_standard_error: dict[str, float | None] | None
    tokens: dict[str, int]  # trained on before `start`, a domain
    epochs: dict[str, float]
    new_epochs: dict[str, list[tuple[int, int]]]  # domain -> (2 for its second epoch, position) in this stage
    predicted_gain: dict[str, float | None] | None
    predicted_gain_standard_error: dict[str, float | None] | None
    multipliers: dict[str, float | None] | None  # constraint -> Lagrange multiplier, of those that bind
    mixer: str
    solver: str | None
    message: str  # the decision in words
    error: str | None  # why the previous weights were kept
    seconds: Seconds
    scored_tokens: dict[str, float | None] | None  # domain -> mean number in a probe sequence
    decided_influence: list[list[float | None]] | None  # what decided, where it is not `influence` alone
    decided_standard_error: list[list[float | None]] | None
    left_out: dict[str, float | None] | None  # task -> share of its gradient that a low rank leaves out
    left_out_bound: list[list[float | None]] | None  # [n_tasks][n_domains], what a score can be wrong by
    warnings: list[str]  # what was logged as such while it was measured and decided


class Journal:
    """An append-only file of `Row`s, one JSON object per line. One process writes; any number may read.

    A row counts once its newline is on disk. What a kill left after the last newline is not a row: reading skips it,
    with a warning, and the next `append` removes it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, row: Row) -> None:
        """Write one row; it is on disk when this returns. Raises ValueError that names a missing or unknown key."""
        line = _line(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            if file.read(1) not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[Row]:
        """Every row, in order; none where there is no file. Raises ValueError with file and line for a broken one."""
        if not self.path.exists():
            return []
        *lines, tail = self.path.read_bytes().split(b"\n")
        if tail:
            logger.warning("%s:%d: left out a half-written row", self.path, len(lines) + 1)
        rows: list[Row] = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                _check(row)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path}:{number}: not a row of a journal, mend or remove it: {error}") from error
            rows.append(row)
        return rows

    def truncate(self, stages: int) -> None:
        """Keep the rows of the first `stages` stages; drop later ones and the final row (on resuming)."""
        rows = self.rows()
        kept = [row for row in rows if row["kind"] == "stage" and row["stage"] < stages]
        if len(kept) < len(rows):
            write_whole(self.path, b"".join(map(_line, kept)))


def _line(row: Row) -> bytes:
    _check(row)
    return json.dumps(finite(row), allow_nan=False).encode() + b"\n"


def _check(row: Any) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is an object with named values, got {type(row).__name__}")
    if missing := Row.__required_keys__ - row.keys():
        raise ValueError(f"a journal row lacks {', '.join(map(repr, sorted(missing)))}")
    if unknown := row.keys() - Row.__required_keys__:
        raise ValueError(f"a journal row has no place for {', '.join(map(repr, sorted(unknown)))}")
    if row["kind"] not in ("stage", "final"):
        raise ValueError(f"a journal row's 'kind' is 'stage' or 'final', got {row['kind']!r}")
    shape = (len(row["tasks"]), len(row["domains"]))
    for key in ("influence", "standard_error", "decided_influence", "decided_standard_error"):
        if (found := row[key]) is not None and np.shape(found) != shape:
            raise ValueError(f"a journal row's {key!r} has shape {np.shape(found)}; tasks x domains is {shape}")
