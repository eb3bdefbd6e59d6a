"""What a measurement tells a mixer: influence scores, their uncertainty, losses by task and domain, as plain arrays.

This module is the border between measuring and deciding. It knows numpy alone: no torch, no model, no mixer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, init=False, eq=False)
class Influence:
    """Influence of every domain on every task. Arrays are copies and read-only.

    Attributes:
        scores: float64[n_tasks, n_domains]. `scores[i, j]` is the predicted decrease of task i's loss (nats per token)
            per unit of extra weight on domain j, so positive helps: + g_i^T H^-1 g_j, the negative of Eq. 3 of TiKMiX
            (arXiv 2508.17677). NaN where it could not be measured.
        tasks: names of the rows.
        domains: names of the columns.
        standard_error: float64[n_tasks, n_domains], of the scores over the probe sequences, or None if it is not known.
            Infinity where one side had a single sequence, NaN where the score is NaN.
        task_loss: float64[n_tasks], nats per token, or None.
        task_loss_standard_error: float64[n_tasks], over the task's sequences, or None.
        guards: those of `tasks` that a mixture must not do worse on but is not optimised for.
        left_out: float64[n_tasks], where the tasks' gradients were held low-rank the share of each one's norm that is
            missing, or None.
        left_out_bound: float64[n_tasks, n_domains], the most that a score can be wrong for it, or None.
        scored_tokens: float64[n_domains], mean number of them in a sequence of each domain; None: taken as the same.

    Raises ValueError for shapes that do not fit the names, names that are empty or occur twice, negative errors, a
    number of scored tokens that is not above 0.
    """

    scores: Array
    tasks: tuple[str, ...]
    domains: tuple[str, ...]
    standard_error: Array | None
    task_loss: Array | None
    task_loss_standard_error: Array | None
    guards: tuple[str, ...]
    left_out: Array | None
    left_out_bound: Array | None
    scored_tokens: Array | None

    def __init__(
        self,
        scores: ArrayLike,
        tasks: Sequence[str],
        domains: Sequence[str],
        standard_error: ArrayLike | None = None,
        task_loss: ArrayLike | None = None,
        task_loss_standard_error: ArrayLike | None = None,
        guards: Sequence[str] = (),
        left_out: ArrayLike | None = None,
        left_out_bound: ArrayLike | None = None,
        scored_tokens: ArrayLike | None = None,
    ) -> None:
        tasks, domains = _names("tasks", tasks), _names("domains", domains)
        matrix, row = (len(tasks), len(domains)), (len(tasks),)
        error = None if standard_error is None else _array("standard_error", standard_error, matrix)
        loss = None if task_loss is None else _array("task_loss", task_loss, row)
        loss_error = (
            None
            if task_loss_standard_error is None
            else _array("task_loss_standard_error", task_loss_standard_error, row)
        )
        for name, values in (("standard_error", error), ("task_loss_standard_error", loss_error)):
            if values is not None and (values < 0).any():
                raise ValueError(f"{name} has a negative entry: {values.min()}")
        guards = _names("guards", guards)
        if unknown := [name for name in guards if name not in tasks]:
            raise ValueError(f"guards: {unknown} are no rows of the influence, which are {list(tasks)}")
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "scores", _array("scores", scores, matrix))
        set_field(self, "tasks", tasks)
        set_field(self, "domains", domains)
        set_field(self, "standard_error", error)
        set_field(self, "task_loss", loss)
        set_field(self, "task_loss_standard_error", loss_error)
        set_field(self, "guards", guards)
        set_field(self, "left_out", None if left_out is None else _array("left_out", left_out, row))
        bound = None if left_out_bound is None else _array("left_out_bound", left_out_bound, matrix)
        set_field(self, "left_out_bound", bound)
        scored = None if scored_tokens is None else _array("scored_tokens", scored_tokens, (len(domains),))
        if scored is not None and (scored <= 0).any():
            raise ValueError(f"scored_tokens has an entry that is not above 0: {scored.min()}")
        set_field(self, "scored_tokens", scored)

    def of_sequences(self, weights: Array) -> Influence:
        """Return the influence of extra sequences in place of extra tokens, around a mixture of sequences.

        A mixture w of sequences with T_j scored tokens each trains on tokens in proportion to w_j T_j, so that its
        influence is m_i(w) = sum_j w_j T_j S_ij / sum_j w_j T_j. To first order around `weights`, where the sum is n,
        that is the influence w has by the scores m_i + (S_ij - m_i) T_j / n: a domain whose sequences have few scored
        tokens moves little by a change of its weight. Errors are scaled alike; that of m_i is left out.

        Args:
            weights: float64[n_domains], shares of sequences.

        Returns the influence itself where all domains have as many scored tokens.
        """
        T, S, E = self.scored_tokens, self.scores, self.standard_error
        if T is None or np.ptp(T) == 0:
            return self
        share = T / (weights @ T)
        mean = (S @ (weights * share))[:, None]
        error = None if E is None else E * share
        # The result is of sequences already; asked again it has nothing to change.
        return replace(self, scores=mean + (S - mean) * share, standard_error=error, scored_tokens=None)

    @property
    def optimised(self) -> NDArray[np.bool_]:
        """Which rows are tasks to optimise for, bool[n_tasks]: all that are no guards."""
        return np.array([name not in self.guards for name in self.tasks], dtype=np.bool_)

    @property
    def not_finite(self) -> list[str]:
        """Tasks with a score that is no finite number. A mixture must not be changed by those."""
        return [task for task, row in zip(self.tasks, self.scores, strict=True) if not np.isfinite(row).all()]

    @property
    def finite(self) -> bool:
        """Whether every score is a finite number."""
        return not self.not_finite

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and floats for strict JSON, which has no NaN or infinity: those become "nan", "inf", "-inf"."""
        arrays = {
            "scores": self.scores,
            "standard_error": self.standard_error,
            "task_loss": self.task_loss,
            "task_loss_standard_error": self.task_loss_standard_error,
            "left_out": self.left_out,
            "left_out_bound": self.left_out_bound,
            "scored_tokens": self.scored_tokens,
        }
        lists = {name: _plain(values.tolist()) for name, values in arrays.items() if values is not None}
        return {"tasks": list(self.tasks), "domains": list(self.domains), "guards": list(self.guards), **lists}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Influence:
        """The inverse of `to_dict`, bit for bit. Raises ValueError if a needed key is missing."""
        missing = [key for key in ("scores", "tasks", "domains") if key not in plain]
        if missing:
            raise ValueError(f"not a saved Influence: no {missing} among the keys {sorted(plain)}")
        return cls(
            scores=plain["scores"],
            tasks=plain["tasks"],
            domains=plain["domains"],
            standard_error=plain.get("standard_error"),
            task_loss=plain.get("task_loss"),
            task_loss_standard_error=plain.get("task_loss_standard_error"),
            guards=plain.get("guards", ()),
            left_out=plain.get("left_out"),
            left_out_bound=plain.get("left_out_bound"),
            scored_tokens=plain.get("scored_tokens"),
        )


@dataclass(frozen=True)
class Observation:
    """What a mixer sees in passing: the training loss of one step, or at a stage boundary the gradients' products.

    Attributes:
        step: optimizer steps done.
        tokens: domain -> scored tokens of this step's batch, over all processes; domains it does not hold are absent.
        loss: domain -> mean training loss of those tokens, nats per token.
        reference_loss: domain -> mean loss of the reference model on the same tokens; empty if it is not asked for.
        excess_loss: domain -> mean over those tokens of max(0, loss - reference loss); empty likewise.
        gradient: at a boundary, the products of the domains' gradients with the tasks' (an influence with the identity
            as curvature); None after a step.
        steps: optimizer steps since the last observation of this kind: how many of them it stands for.
    """

    step: int
    tokens: Mapping[str, int] = field(default_factory=dict)
    loss: Mapping[str, float] = field(default_factory=dict)
    reference_loss: Mapping[str, float] = field(default_factory=dict)
    excess_loss: Mapping[str, float] = field(default_factory=dict)
    gradient: Influence | None = None
    steps: int = 1


def _names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ValueError(f"{what} must be a sequence of names, got the single string {names!r}")
    result = tuple(names)
    wrong = [name for name in result if not isinstance(name, str) or not name]
    if wrong:
        raise ValueError(f"{what} must be non-empty strings, got {wrong[0]!r}")
    if len(set(result)) != len(result):
        raise ValueError(f"{what} has a name twice: {sorted({name for name in result if result.count(name) > 1})}")
    return result


def _array(what: str, values: ArrayLike, shape: tuple[int, ...]) -> Array:
    try:
        result = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is not an array of numbers: {error}") from None
    if result.shape != shape:
        raise ValueError(f"{what} has shape {list(result.shape)}, but the tasks and domains say {list(shape)}")
    result.setflags(write=False)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if math.isfinite(value) else str(value)
