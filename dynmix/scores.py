"""Sample influence of a raw corpus, as plain arrays: what a scoring hands to the mixer that regroups it.

This module is the border between measuring and deciding. It knows numpy alone: no torch, no model, no files, no mixer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Metric = Literal["loss", "bits_per_byte", "accuracy"]
"""What a task can be evaluated by."""

METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True, order=True)
class Column:
    """One column of scores: a task, and the checkpoint that scored for it, by name and by optimizer steps done.

    Raises ValueError for a step below 0.
    """

    task: str
    checkpoint: str
    step: int

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"checkpoint {self.checkpoint!r} of task {self.task!r} has step {self.step}: at least 0")


@dataclass(frozen=True)
class SamplePlan:
    """How a mixer wants the raw corpus scored.

    Attributes:
        every: optimizer steps from one evaluation of the tasks to the next; None: a quarter of a stage.
        metric: what a task peaks by, for all tasks or by name; all but "loss" need `dynmix.Task`s.
        min_delta: by how much a later step must be better to be the peak.
        checkpoints: "peak": each task is scored by the checkpoint in which it peaks; "last": all by the model as it is;
            a number: each by that many evenly spaced ones, of which every one is kept on the disk until no boundary
            ahead asks for scores. (The others are what AutoMixer compares itself with.)

    Raises ValueError for values out of range.
    """

    every: int | None = None
    metric: Metric | Mapping[str, Metric] = "loss"
    min_delta: float = 0.0
    checkpoints: Literal["peak", "last"] | int = "peak"

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every}: at least 1 step")
        named = {self.metric} if isinstance(self.metric, str) else set(self.metric.values())
        if unknown := sorted(named - {*METRICS}):
            raise ValueError(f"metric={unknown[0]!r}: one of {', '.join(map(repr, METRICS))}")
        if self.checkpoints not in ("peak", "last") and not (
            isinstance(self.checkpoints, int) and self.checkpoints >= 1
        ):
            raise ValueError(f"checkpoints={self.checkpoints!r}: 'peak', 'last' or a number from 1")


@dataclass(frozen=True)
class SampleScores:
    """Scores of n samples (sequences, or documents) of a raw corpus.

    Attributes:
        domains: names of the raw domains.
        domain: int[n], index into `domains`.
        row: int64[n], number of the sequence, or document, within its domain.
        tokens: int64[n], tokens of the sample, > 0. A sequence takes its whole length of a run, and counts with its
            padding here, in `tokens_left` and wherever else tokens of a run are.
        columns: what each column of `scores` is of; all different.
        scores: float[n, n_columns]; positive helps, NaN where it could not be measured.
        tokens_left: tokens that the run which asks will still train on; None where there is none.
        max_epochs: how often that run lets a domain be seen that enters it; None where it does not say.

    Raises ValueError for arrays that do not fit together, no columns or no samples.
    """

    domains: tuple[str, ...]
    domain: NDArray[np.integer]
    row: NDArray[np.integer]
    tokens: NDArray[np.integer]
    columns: tuple[Column, ...]
    scores: NDArray[np.floating]
    tokens_left: int | None = None
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        n = len(self.row)
        if not n or not self.columns:
            raise ValueError(f"there are {n} scored samples and {len(self.columns)} columns: nothing to decide from")
        for name in ("domain", "tokens"):
            if getattr(self, name).shape != (n,):
                raise ValueError(f"{name} has shape {list(getattr(self, name).shape)}, row has [{n}]")
        if self.scores.shape != (n, len(self.columns)):
            raise ValueError(f"scores has shape {list(self.scores.shape)}, want [{n}, {len(self.columns)}]")
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"columns: one of {self.columns} occurs twice")
        if self.domain.min() < 0 or self.domain.max() >= len(self.domains):
            raise ValueError(f"domain has numbers beyond the {len(self.domains)} domains")
        if (bad := np.flatnonzero(self.tokens < 1)).size:
            raise ValueError(f"sample {bad[0]} has {self.tokens[bad[0]]} tokens: at least 1")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of their first columns."""
        return tuple(dict.fromkeys(column.task for column in self.columns))

    def of(self, columns: Sequence[Column]) -> SampleScores:
        """The same samples with these of the columns. Raises ValueError for one that is not there."""
        if unknown := [column for column in columns if column not in self.columns]:
            raise ValueError(f"no column {unknown[0]}; there are {list(self.columns)}")
        numbers = [self.columns.index(column) for column in columns]
        return replace(self, columns=tuple(columns), scores=self.scores[:, numbers])
