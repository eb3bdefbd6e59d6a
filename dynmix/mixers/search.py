"""TiKMiX-M's search: the mixture in a box that a function of mixtures is largest at (arXiv 2508.17677, Algorithm 1).

Knows arrays, bounds and the constraint; nothing of what the function is, of surrogates or of measuring.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import linprog

from dynmix.mixers.candidates import around, into
from dynmix.mixers.problem import Problem
from dynmix.observation import Array

FEASIBLE = 1e-9  # row-scaled violation that is rounding
# The search ends after this many iterations that moved nothing: a narrower one may move what a broad one did not.
STILL = 3


class Pareto:
    """The constraint of the search: that of TiKMiX-D's problem, or none. Convex, so averages keep it."""

    def __init__(self, problem: Problem | None):
        self._problem = problem
        self._cuts = [] if problem is None else list(zip(-problem.C, -problem.floor, strict=True))

    def holds(self, W: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which mixtures of W float64[n, n_domains] keep it, bool[n]."""
        if self._problem is None:
            return np.ones(len(W), dtype=np.bool_)
        return np.asarray(self._problem.violation(W) <= FEASIBLE)

    def shrink(self, W: Array, centre: Array) -> Array:
        """Return `W`, those that break the constraint moved towards `centre`, which keeps it, by bisection."""
        out = ~self.holds(W)
        way = W[out] - centre
        good, bad = np.zeros((len(way), 1)), np.ones((len(way), 1))
        for _ in range(20):
            middle = (good + bad) / 2
            kept = self.holds(centre + middle * way)[:, None]
            good, bad = np.where(kept, middle, good), np.where(kept, bad, middle)
        W = W.copy()
        W[out] = centre + good * way
        return W

    def vertex(self, slope: Array, lower: Array, upper: Array, otherwise: Array) -> Array:
        """Return the mixture with the largest `slope` @ w in the box, float64[n_domains].

        A linear programme over the plain constraints. What noise adds to them (`Problem.R`) is a cone: its tangents
        where an answer broke it are added, for this call and the later ones.
        """
        for _ in range(4):
            answer = linprog(
                -slope / max(float(np.abs(slope).max()), 1e-300),
                A_ub=np.array([row for row, _ in self._cuts]) if self._cuts else None,
                b_ub=np.array([bound for _, bound in self._cuts]) if self._cuts else None,
                A_eq=np.ones((1, len(slope))),
                b_eq=[1.0],
                bounds=np.stack([lower, upper], axis=1),
            )
            if answer.status != 0:
                return otherwise
            w = into(answer.x, lower, upper)
            p = self._problem
            if p is None or not p.robust or self.holds(w[None])[0]:
                break
            risk = p.risk(w)
            i = int(np.argmax(p.floor - p.C @ w + risk))
            if risk[i] == 0:
                break
            tangent = p.R[i] ** 2 * (w - p.centre) / risk[i]
            self._cuts.append((tangent - p.C[i], tangent @ w - risk[i] - p.floor[i]))
        return w


@dataclass(frozen=True)
class Search:
    """The search; its arguments are `TiKMiXM`'s."""

    iterations: int
    samples: int
    top_k: int
    concentration: tuple[float, float]
    anneal: Literal["narrowing", "literal"]

    def find(
        self,
        predict: Callable[[Array], Array],
        start: Array,
        problem: Problem,
        constraint: Pareto,
        rng: np.random.Generator,
    ) -> Array:
        """Return the mixture with the largest prediction that is found from `start` on, float64[n_domains].

        Args:
            predict: mixtures float64[n, n_domains] -> what is to be large, float64[n].
            start: a mixture in the box that keeps the constraint.
            problem: whose bounds are the box.
            constraint: that what is found keeps.
            rng: candidates are drawn from it.

        To Algorithm 1's candidates come `top_k` on the way to the vertex that a linear fit to the others' predictions
        points to: the best mixtures lie on faces of the box, which Dirichlet draws in many domains do not reach.
        """
        lower, upper = problem.lower, problem.upper
        steps = np.geomspace(*self.concentration, self.iterations) * len(start)
        middle, found, still = start, start, 0
        for step in steps if self.anneal == "narrowing" else steps[::-1]:
            W = around(self.samples, middle, step, lower, upper, rng)
            values = predict(W)
            slope = np.linalg.lstsq(W - W.mean(axis=0), values - values.mean(), rcond=1e-6)[0]
            way = np.linspace(0, 1, self.top_k + 1)[:, None] * (constraint.vertex(slope, lower, upper, middle) - middle)
            W = constraint.shrink(np.concatenate([W, middle + way]), middle)
            top = W[np.argsort(-predict(W), kind="stable")[: self.top_k]]
            before, middle = middle, top.mean(axis=0)
            found = largest(predict, np.stack([found, middle, top[0]]))
            still = still + 1 if np.abs(middle - before).max() < 1e-9 else 0
            if still == STILL:
                break
        return found


def largest(predict: Callable[[Array], Array], W: Array) -> Array:
    """Return the mixture of W float64[n, n_domains] whose prediction is the largest, float64[n_domains]."""
    return np.asarray(W[int(np.argmax(predict(W)))], dtype=np.float64)
