"""AutoMixer's regrouping: from sample influence by checkpoint to groups of data, one per task, and their weights.

Knows arrays of scores and names; no model, no files, no dataset. Where the paper (a summary is all that is public of
some steps) leaves a choice open, the docstrings say which was made.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dynmix.mixers.simplex import cap
from dynmix.observation import Array
from dynmix.scores import Column, SampleScores
from dynmix.shown import Bar

logger = logging.getLogger("dynmix.mixers")

REST = "rest"
"""Name of the group of what helps no task."""

Blend = Literal["step", "early", "equal"]
"""How checkpoints are blended, see `blending`."""


@dataclass(frozen=True)
class Group:
    """Samples that go together.

    Attributes:
        name: the task they help most, or `REST`: those that help no task more than the average sample does.
        members: int64[n_members], numbers of the samples, the most influential first.
        joint: float64[n_members], their joint influence; minus infinity where it could not be measured.
        tokens: of the members.
        cut: tokens of the samples that this task would have had, beyond what was kept.
    """

    name: str
    members: NDArray[np.int64]
    joint: Array
    tokens: int
    cut: int = 0

    @property
    def density(self) -> float:
        """rho: the sum over the members of max(I_joint, 0), a token."""
        return float(np.maximum(self.joint, 0).sum()) / self.tokens


def regroup(
    scores: SampleScores, *, keep: float = 0.5, blend: Blend = "step", budget: int | Mapping[str, int] | None = None
) -> list[Group]:
    """Group samples by the task that they help most, and keep of each group what has the most joint influence.

    Every column is standardised over the samples (mean 0, deviation 1). A sample's score for a task is the blend of
    that task's columns, and its joint influence that of all columns: I_joint = sum_j alpha_j I_j. It goes to the task
    with the highest score; where no score is above 0, which is the average sample's, it helps no task and goes to
    `rest`, as does a sample with a score that is not finite. Within a task's group samples are sorted by I_joint, and
    kept from the first on while they hold at most `keep` of the group's tokens, and `budget`: one that would exceed it
    is passed over, and those that fit after it are taken. The others are in no group. `rest` is kept whole.

    Args:
        scores: of the raw corpus.
        keep: share of a group's tokens, in (0, 1]: the paper's top K %. Where no sample fits, the first is kept.
        blend: as in `blending`.
        budget: most tokens of a group, one number for all tasks or by task.

    Returns:
        Groups with at least one member, in the order of the tasks, `rest` last.

    Raises:
        ValueError: arguments out of range, a task called `rest`, a column in which nothing is finite.
    """
    tasks = scores.tasks
    if REST in tasks:
        raise ValueError(f"a task is called {REST!r}, as is the group of what helps no task: rename it")
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: a share of a group's tokens, above 0 and at most 1")
    limits = _limits(budget, tasks)
    by_task, joint = blended(scores, blend)
    best = by_task.argmax(axis=1)
    helps = by_task[np.arange(len(best)), best] > 0
    groups = []
    for number, task in enumerate(Bar(tasks, desc="grouping", unit="task")):
        members = _sorted(np.flatnonzero(helps & (best == number)), joint)
        tokens = scores.tokens[members].astype(np.int64)
        whole = int(tokens.sum())
        kept = members[_filled(tokens, min(keep * whole + 1e-6, limits[task]))]
        if not len(kept) and len(members) and tokens[0] <= limits[task]:
            kept = members[:1]
        if not len(kept):
            why = f"its budget of {limits[task]:.0f} tokens holds none" if len(members) else "it helps by none"
            logger.warning("task %r gets no group: %s of the samples", task, why)
            continue
        group = _group(task, kept, scores, joint)
        groups.append(replace(group, cut=whole - group.tokens))
    rest = _sorted(np.flatnonzero(~helps), joint)
    return [*groups, _group(REST, rest, scores, joint)] if len(rest) else groups


def group_weights(
    groups: Sequence[Group], *, max_epochs: float | None = None, tokens: int | None = None
) -> dict[str, float] | None:
    """Weights in proportion to the groups' influence density: w = rho / sum rho.

    Args:
        groups: as `regroup` returns them.
        max_epochs: how often a group's tokens may be seen; the excess goes to the others in proportion (water-filling),
            and to those of density 0, `rest` among them, only if the others cannot hold it.
        tokens: that are trained on; needed with `max_epochs`.

    Returns:
        name -> weight; None, with a warning, when every density is 0: then there is nothing to go by.

    Raises:
        ValueError: no groups, `max_epochs` without `tokens`, groups too small for `tokens` within `max_epochs`.
    """
    if not groups:
        raise ValueError("there are no groups: every sample helps a task whose budget holds none of them; raise budget")
    upper = np.ones(len(groups))
    if max_epochs is not None:
        if tokens is None or not tokens > 0 or not max_epochs > 0:
            raise ValueError(f"max_epochs={max_epochs}, tokens={tokens}: both must be above 0")
        upper = np.array([min(1.0, max_epochs * group.tokens / tokens) for group in groups])
        if upper.sum() < 1 - 1e-12:
            held = sum(group.tokens for group in groups)
            raise ValueError(
                f"the groups hold {held:,} tokens, seen {max_epochs:g} times at most, and {tokens:,} are trained on: "
                "raise keep or max_epochs, or train on fewer tokens"
            )
    density = np.array([group.density for group in groups])
    if not density.sum() > 0:  # asked after the bounds, which no fallback can keep either if they do not fit
        logger.warning("no group has positive joint influence: it gives no weights")
        return None
    weights = cap(density / density.sum(), upper)
    return dict(zip((group.name for group in groups), weights.tolist(), strict=True))


def blending(columns: Sequence[Column], blend: Blend) -> Array:
    """alpha of each column, float64[n_columns], summing to 1: by how many steps its checkpoint had trained.

    The paper derives alpha "from its normalized step number, reflecting its task acquisition speed". "step", the
    default, is that number: alpha_j = step_j / sum of steps, so late checkpoints, which know more, count for more.
    "early" is the other reading: the reciprocals of the steps, normalised, so skills that came early count for more.
    "equal" makes no difference. A checkpoint of step 0 has no share in the first and counts as step 1 in the second.

    Raises:
        ValueError: another `blend`.
    """
    steps = np.array([column.step for column in columns], dtype=np.float64)
    if blend == "early":
        parts = 1 / np.maximum(steps, 1)
    elif blend == "step" and steps.any():
        parts = steps
    elif blend in ("step", "equal"):
        parts = np.ones_like(steps)
    else:
        raise ValueError(f"blend={blend!r}: 'step', 'early' or 'equal'")
    return np.asarray(parts / max(parts.sum(), 1e-300), dtype=np.float64)


def blended(scores: SampleScores, blend: Blend) -> tuple[Array, Array]:
    """Standardised scores by task, float64[n, n_tasks], and joint influence, float64[n].

    The first blends a task's own columns, alpha being normalised over them; the second all columns.

    A column's mean and deviation are over its finite scores; a column without spread says nothing and counts as 0, with
    a warning. A sample with a score that is not finite gets minus infinity everywhere.
    """
    n, tasks, columns = len(scores.row), scores.tasks, scores.columns
    by_task, joint, broken = np.zeros((n, len(tasks))), np.zeros(n), np.zeros(n, dtype=bool)
    alpha = blending(columns, blend)
    for task, name in enumerate(Bar(tasks, desc="blending scores", unit="task")):
        own = [number for number, column in enumerate(columns) if column.task == name]
        for number, share in zip(own, blending([columns[i] for i in own], blend), strict=True):
            z, finite = _standardised(scores.scores[:, number], columns[number])
            broken |= ~finite
            joint += alpha[number] * z
            by_task[:, task] += share * z
    if broken.any():
        logger.warning(
            "%d of %d samples have scores that are not finite: they go to %r", broken.sum(), len(joint), REST
        )
        by_task[broken], joint[broken] = -math.inf, -math.inf
    return by_task, joint


def _standardised(values: NDArray[np.floating], column: Column) -> tuple[Array, NDArray[np.bool_]]:
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(
            f"no sample has a finite score for task {column.task!r} by checkpoint {column.checkpoint!r}: its loss or "
            "gradients are not finite; leave it out"
        )
    known = values[finite]
    spread = known.std()
    if not spread > 1e-12 * np.abs(known).max():
        logger.warning("all scores for task %r by %r are equal: they say nothing", column.task, column.checkpoint)
        return np.zeros_like(values), finite
    return np.where(finite, (values - known.mean()) / spread, 0.0), finite


def _sorted(members: NDArray[np.int64], joint: Array) -> NDArray[np.int64]:
    return members[np.argsort(-joint[members], kind="stable")]


def _filled(tokens: NDArray[np.int64], limit: float) -> NDArray[np.intp]:
    """Which samples are taken when each, in turn, is taken if it still fits."""
    left, taken = np.arange(len(tokens)), [np.zeros(0, np.intp)]
    while len(left := left[tokens[left] <= limit]):
        n = int(np.searchsorted(np.cumsum(tokens[left]), limit, side="right"))
        taken.append(left[:n])
        limit -= tokens[left[:n]].sum()
        left = left[n + 1 :]  # the next one did not fit
    return np.concatenate(taken)


def _group(name: str, members: NDArray[np.int64], scores: SampleScores, joint: Array) -> Group:
    return Group(name, members, joint[members], int(scores.tokens[members].sum(dtype=np.int64)))


def _limits(budget: int | Mapping[str, int] | None, tasks: Sequence[str]) -> dict[str, float]:
    if not isinstance(budget, Mapping):
        budget = {} if budget is None else dict.fromkeys(tasks, budget)
    if unknown := sorted(set(budget) - set(tasks)):
        raise ValueError(f"budget: no task {unknown[0]!r}; the tasks are {list(tasks)}")
    if bad := [task for task, limit in budget.items() if not limit > 0]:
        raise ValueError(f"budget[{bad[0]!r}]={budget[bad[0]]}: at least 1 token")
    return {task: budget.get(task, math.inf) for task in tasks}
