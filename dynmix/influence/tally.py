"""Sums over micro-batches by domain, small enough for a checkpoint, and the influence that they make.

Knows arrays; nothing of where the products come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynmix.influence.sets import ratio_of_sums
from dynmix.influence.task_gradients import TaskGradients
from dynmix.observation import Array, Influence


class Tally:
    """Per domain, over what was seen of it in units (micro-batches or sequences) with products p and scored tokens n:

    their number, sums of n, of n^2, of p and n p by row, and of p p^T by task.

    Attributes:
        table: float64[n_domains, width], which adds up over processes.
    """

    def __init__(self, domains: int, folds: Sequence[int]) -> None:
        self.folds = tuple(folds)
        rows = sum(folds)
        widths = [1, 1, 1, rows, rows, *(k * k for k in folds)]
        self._ends = np.cumsum(widths)[:-1]
        self.table: Array = np.zeros((domains, sum(widths)))

    def add(self, domain: int, products: Array, tokens: Array) -> None:
        """Count units of a domain: products [k, n_rows] of their summed losses, scored tokens [k]."""
        by_task = np.split(products, np.cumsum(self.folds)[:-1], axis=1)
        self.table[domain] += np.concatenate(
            [
                [len(tokens), tokens.sum(), (tokens**2).sum()],
                products.sum(0),
                tokens @ products,
                *((p.T @ p).ravel() for p in by_task),
            ]
        )

    @property
    def units(self) -> Array:
        """How many were seen of each domain, [n_domains]."""
        return self.table[:, 0]

    @property
    def tokens(self) -> Array:
        """Scored tokens that were seen of each domain, [n_domains]."""
        return self.table[:, 1]

    def influence(self, gradients: TaskGradients, domains: Sequence[str]) -> Influence:
        """Score of a task and a domain: the sum of products over the sum of tokens. NaN for a domain not seen.

        The standard error covers the choice of the domain's units and, by the spread of the folds, that of the task's
        sequences; what both see, the product of the two noises, counts once. Each is a ratio of sums, by the delta
        method; the curvature is taken as given.
        """
        shape = len(gradients.tasks), len(domains)
        scores, error = np.full(shape, np.nan), np.full(shape, np.nan)
        for j, row in enumerate(self.table):
            (count,), (n,), (squares,), p, np_, *grams = np.split(row, self._ends)
            if not n:
                continue
            for i, (rows, gram) in enumerate(zip(gradients.rows, grams, strict=True)):
                k, share = self.folds[i], gradients.tokens[rows] / gradients.tokens[rows].sum()
                seen = count, n, squares, p[rows], np_[rows], gram.reshape(k, k)
                a_token = p[rows] / n
                scores[i, j] = a_token.sum()
                over_domain = _variance(np.ones(k), *seen)
                _, (over_task,) = ratio_of_sums(a_token[:, None], share)
                both = k / (k - 1) * sum(_variance(c, *seen) for c in np.eye(k) - share[:, None]) if k > 1 else 0.0
                both = min(both, over_domain, over_task)
                error[i, j] = np.sqrt(over_domain + over_task - (both if np.isfinite(both) else 0.0))
        return Influence(
            scores=scores,
            tasks=gradients.tasks,
            domains=domains,
            standard_error=error,
            task_loss=gradients.loss,
            task_loss_standard_error=gradients.loss_standard_error,
        )

    def state_dict(self) -> dict[str, Any]:
        """The rows of domains that were seen, JSON-able."""
        seen = np.flatnonzero(self.units).tolist()
        return {"seen": seen, "rows": self.table[seen].tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError if it is of other tasks or domains."""
        table = np.zeros_like(self.table)
        if state["seen"]:  # nothing was as a window opened
            rows = np.array(state["rows"], dtype=np.float64).reshape(len(state["seen"]), -1)
            if rows.shape[1] != table.shape[1] or max(state["seen"]) >= len(table):
                raise ValueError(f"{rows.shape[1]} sums a domain were saved, and here there are {table.shape[1]}")
            table[state["seen"]] = rows
        self.table = table


def _variance(c: Array, count: float, n: float, squares: float, p: Array, np_: Array, gram: Array) -> float:
    """Of c^T p a token, over `count` units with these sums of n, n^2, p, n p and p p^T."""
    if count < 2:
        return np.inf
    ratio = c @ p / n
    residuals = float(c @ gram @ c - 2 * ratio * (c @ np_) + ratio**2 * squares)
    return float(count / (count - 1) * max(0.0, residuals) / n**2)
