"""What a measurement tells a mixer: influence scores, their uncertainty, losses by task and domain, as plain arrays.

This module is the border between measuring and deciding. It knows numpy alone: no torch, no model, no mixer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

Weights = Mapping[str, float]
"""Domain -> weight: its share of the sequences, or a bound of it."""


@dataclass(frozen=True, init=False, eq=False)
class Influence:
    """Influence of every domain on every task. Arrays are copies and read-only.

    Attributes:
        scores: float64[n_tasks, n_domains]. `scores[i, j]` is the predicted decrease of task i's loss (nats per token)
            per unit of extra weight on domain j, so positive helps: + g_i^T H^-1 g_j, the negative of Eq. 3 of TiKMiX
            (arXiv 2508.17677). NaN where it could not be measured.
        tasks: names of the rows.
        domains: names of the columns.
        standard_error: float64[n_tasks, n_domains], of the scores over the probe sequences, or None if unknown.
            Infinite where one side had a single sequence, NaN where the score is NaN.
        task_loss: float64[n_tasks], nats per token, or None.
        task_loss_standard_error: float64[n_tasks], over the task's sequences, or None.
        guards: those of `tasks` that a mixture is not optimised for but must not make worse.
        left_out: float64[n_tasks], if the tasks' gradients were held in low rank: the share of each one's norm that is
            missing. None otherwise.
        left_out_bound: float64[n_tasks, n_domains], the largest error of a score because of that, or None.
        scored_tokens: float64[n_domains], mean number of scored tokens in a sequence of each domain; None: all equal.

    Raises ValueError for shapes that do not match the names, names that are empty or occur twice, negative errors, a
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
        names = {key: _names(key, given) for key, given in (("tasks", tasks), ("domains", domains), ("guards", guards))}
        if unknown := [name for name in names["guards"] if name not in names["tasks"]]:
            raise ValueError(f"guards: {unknown} are no rows of the influence, which are {list(names['tasks'])}")
        row, column = (len(names["tasks"]),), (len(names["domains"]),)
        given = {
            "standard_error": (standard_error, row + column),
            "task_loss": (task_loss, row),
            "task_loss_standard_error": (task_loss_standard_error, row),
            "left_out": (left_out, row),
            "left_out_bound": (left_out_bound, row + column),
            "scored_tokens": (scored_tokens, column),
        }
        arrays = {key: None if values is None else _array(key, values, shape) for key, (values, shape) in given.items()}
        for key in ("standard_error", "task_loss_standard_error"):
            if (errors := arrays[key]) is not None and (errors < 0).any():
                raise ValueError(f"{key} has a negative entry: {errors.min()}")
        if (scored := arrays["scored_tokens"]) is not None and (scored <= 0).any():
            raise ValueError(f"scored_tokens has an entry that is not above 0: {scored.min()}")
        for key, value in {"scores": _array("scores", scores, row + column), **names, **arrays}.items():
            object.__setattr__(self, key, value)  # the dataclass is frozen

    def of_sequences(self, weights: Array) -> Influence:
        """Return the influence per extra weight in sequences instead of tokens, around a mixture of sequences.

        A mixture w of sequences with T_j scored tokens each trains on tokens in proportion to w_j T_j, so its influence
        is m_i(w) = sum_j w_j T_j S_ij / sum_j w_j T_j. To first order around `weights`, where that sum is n, this is
        the influence of w by the scores m_i + (S_ij - m_i) T_j / n: a domain whose sequences have few scored tokens
        changes little with its weight. Errors are scaled alike; that of m_i is neglected.

        Args:
            weights: float64[n_domains], shares of sequences.

        Returns the influence itself if all domains have the same number of scored tokens.
        """
        T, S, E = self.scored_tokens, self.scores, self.standard_error
        if T is None or np.ptp(T) == 0:
            return self
        share = T / (weights @ T)
        mean = (S @ (weights * share))[:, None]
        error = None if E is None else E * share
        # Without scored_tokens, as the result is of sequences already: asked again it does not change.
        return replace(self, scores=mean + (S - mean) * share, standard_error=error, scored_tokens=None)

    @property
    def optimised(self) -> NDArray[np.bool_]:
        """Which rows are tasks to optimise for, bool[n_tasks]: all but the guards."""
        return np.array([name not in self.guards for name in self.tasks], dtype=np.bool_)

    @property
    def not_finite(self) -> list[str]:
        """Tasks with a score that is not finite: they must not change a mixture."""
        return [task for task, row in zip(self.tasks, self.scores, strict=True) if not np.isfinite(row).all()]

    @property
    def finite(self) -> bool:
        """Whether every score is a finite number."""
        return not self.not_finite

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and floats for strict JSON, which has no NaN or infinity: those become "nan", "inf", "-inf"."""
        arrays = {key: values for key, values in vars(self).items() if isinstance(values, np.ndarray)}
        lists = {key: _plain(values.tolist()) for key, values in arrays.items()}
        return {"tasks": list(self.tasks), "domains": list(self.domains), "guards": list(self.guards), **lists}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Influence:
        """The inverse of `to_dict`, bit for bit. Raises ValueError if a needed key is missing."""
        missing = [key for key in ("scores", "tasks", "domains") if key not in plain]
        if missing:
            raise ValueError(f"not a saved Influence: no {missing} among the keys {sorted(plain)}")
        return cls(**{each.name: plain[each.name] for each in fields(cls) if each.name in plain})


@dataclass(frozen=True)
class Observation:
    """What a mixer sees during training: the losses of one step, or at a stage boundary the products of gradients.

    Attributes:
        step: optimizer steps done.
        tokens: domain -> scored tokens of this step's batch, over all processes; domains not in it are absent.
        loss: domain -> mean training loss of those tokens, nats per token.
        reference_loss: domain -> mean loss of the reference model on the same tokens; empty unless asked for.
        excess_loss: domain -> mean over those tokens of max(0, loss - reference loss); empty unless asked for.
        gradient: at a boundary, the products of the domains' gradients with the tasks' (an influence with the identity
            as curvature); None after a step.
        steps: optimizer steps since the last observation of this kind, all of which it stands for.
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
