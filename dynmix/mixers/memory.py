"""What earlier stages said of the same influences: a precision-weighted average that forgets.

A measurement at a boundary is noisy, and what helps a task changes slowly (the premise of TiKMiX, arXiv 2508.17677:
the ranking of influences is stable over long stretches of training), so that the boundaries before have something to
say. Knows influences; no mixture and no model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dynmix.observation import Influence


class Memory:
    """The average over a run's influences, each task's in units of its largest score.

    At each boundary what was known counts `kept` times as much as before, and a row of the new influence by its
    precision, 1 / mean squared standard error (1 where there are no errors): a measurement that is mostly noise moves
    little. The boundaries' errors count as independent. The noise of the tasks' sequences is not, which are the same at
    each: where it is much of all, the error of the average is too small. Influences shrink while a model trains, so
    that nats of several stages cannot be averaged; the average is given back in the nats of the last.

    Args:
        kept: in [0, 1). 0 remembers nothing.
    """

    def __init__(self, kept: float):
        self.kept = kept
        self._names: list[list[str]] = []
        self._sums: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}

    def add(self, influence: Influence) -> Influence:
        """Return the average with this influence, with its standard errors.

        A score whose error is not finite (its domain or task has a single sequence) adds nothing: what was known of it
        stays, and where nothing was it is given back as it is. A task whose scores are all 0 adds nothing and is given
        back as it is. An influence with scores that are not finite, or of other tasks or domains than before, is given
        back whole; the latter, and nothing before it, is remembered.
        """
        E = influence.standard_error
        if self.kept == 0 or influence.not_finite:
            return influence
        names = [list(influence.tasks), list(influence.domains)]
        if names != self._names:
            self._names, self._sums = names, {}
        largest = np.abs(influence.scores).max(axis=1, keepdims=True)
        scale = np.where(largest > 0, largest, 1.0)
        known = np.isfinite(np.zeros_like(influence.scores) if E is None else E) & (largest > 0)
        with np.errstate(over="ignore"):  # an error that is beyond all scores leaves no precision
            variance = np.zeros_like(influence.scores) if E is None else (np.where(known, E, 0) / scale) ** 2
        noise = variance.sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)
        precision = known / np.maximum(noise, 1e-12) if E is not None else known.astype(np.float64)
        squares = np.where(precision > 0, variance, 0.0) * precision**2
        new = {"weight": precision, "score": precision * influence.scores / scale, "variance": squares}
        for key, value in new.items():
            decay = self.kept**2 if key == "variance" else self.kept
            self._sums[key] = decay * self._sums[key] + value if key in self._sums else value
        some = (self._sums["weight"] > 0) & (largest > 0)
        weight = np.where(some, self._sums["weight"], 1.0)
        scores = np.where(some, scale * self._sums["score"] / weight, influence.scores)
        errors = None if E is None else np.where(some, scale * np.sqrt(self._sums["variance"]) / weight, E)
        return replace(influence, scores=scores, standard_error=errors)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, JSON-able; empty where nothing is."""
        if not self._sums:
            return {}
        return {"names": self._names} | {key: value.tolist() for key, value in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._names = [list(names) for names in state.get("names", [])]
        self._sums = {key: np.array(value, np.float64) for key, value in state.items() if key != "names"}
