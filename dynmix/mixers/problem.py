"""The optimisation problem of TiKMiX-D (arXiv 2508.17677, Eq. 7), in plain arrays, made robust against noise.

For tasks i and domains j, with A w the normalised influence of a mixture w and C w the row-scaled one:

    minimise  alpha std(A w) - beta sum(A w) + sum_i cost_i r_i(w) - gamma H(w)
    over the simplex with lower <= w <= upper,  such that  C_i w - r_i(w) >= floor_i,

where r_i(w) = |R_i * (w - centre)| is what the noise of row i's scores may take from the gain of moving from `centre`.
Without noise (R = 0) it is Eq. 7 as printed. It is convex for alpha, beta, gamma >= 0 (the standard deviation of a
linear map is a norm, and so is r), and `start` is feasible, so there is one optimal value, and no starting point to be
chosen. Knows nothing of names or of where A comes from.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.special import xlogy

from dynmix.observation import Array


@dataclass(frozen=True)
class Problem:
    """Eq. 7 in arrays.

    Attributes:
        A: float64[n_tasks, n_domains], normalised influence of the tasks that are optimised for.
        C: float64[n_rows, n_domains], row-scaled influence of all tasks and guards.
        floor: float64[n_rows], the least C w - r(w) may be.
        start: float64[n_domains], a feasible mixture: the prior itself, unless bounds cut it.
        lower, upper: float64[n_domains], bounds of the weights.
        alpha, beta, gamma: as in Eq. 7.
        R: float64[n_rows, n_domains], row-scaled radius of each score's uncertainty; 0 where it is not counted.
        cost: float64[n_rows], what r_i costs in the objective.
        centre: float64[n_domains], the mixture that moves are uncertain from.
    """

    A: Array
    C: Array
    floor: Array
    start: Array
    lower: Array
    upper: Array
    alpha: float
    beta: float
    gamma: float
    R: Array
    cost: Array
    centre: Array

    @property
    def robust(self) -> bool:
        """Whether any score is taken as uncertain."""
        return bool(self.R.any())

    @property
    def linear(self) -> Array:
        """Coefficients of the objective's linear part, float64[n_domains]."""
        return np.asarray(-self.beta * self.A.sum(axis=0), dtype=np.float64)

    @property
    def spread(self) -> Array:
        """Matrix K with alpha std(A w) = |K w|, float64[n_tasks, n_domains] (population standard deviation)."""
        return np.asarray(self.alpha * (self.A - self.A.mean(axis=0)) / np.sqrt(len(self.A)), dtype=np.float64)

    def risk(self, w: Array) -> Array:
        """Return r(w) of w [..., n_domains], [..., n_rows]: what noise may take from a row's gain over `centre`."""
        return np.sqrt((w - self.centre) ** 2 @ self.R.T**2)

    def objective(self, w: Array) -> float:
        """Return the objective's value at `w` (natural logarithm, 0 log 0 = 0)."""
        value = np.linalg.norm(self.spread @ w) + self.linear @ w + self.gamma * xlogy(w, w).sum()
        return float(value + self.cost @ self.risk(w))

    def violation(self, w: Array) -> Array:
        """Return the largest row-scaled amount by which w [..., n_domains] misses the floor of a row, float64[...]."""
        return np.asarray((self.floor - w @ self.C.T + self.risk(w)).max(axis=-1, initial=0.0), dtype=np.float64)

    def bound_multipliers(self, w: Array, multipliers: Array) -> Array:
        """Return the Lagrange multipliers of the bounds at the optimum `w`, float64[n_domains].

        Above 0 the upper bound holds a weight down, below 0 the lower one holds it up; from the stationarity of the
        Lagrangian, given those of the rows. Where no weight is free they are not unique; these are then in the middle.
        """
        Kw, risk = self.spread @ w, self.risk(w)
        safe = np.where(risk > 0, risk, 1.0)
        of_risk = ((self.cost + multipliers) / safe * (risk > 0)) @ self.R**2 * (w - self.centre)
        std = float(np.linalg.norm(Kw))
        slope = self.linear + of_risk - multipliers @ self.C + (self.spread.T @ Kw / std if std > 0 else 0.0)
        if self.gamma:
            slope = slope + self.gamma * (np.log(np.maximum(w, 1e-300)) + 1)
        room = np.minimum(w - self.lower, self.upper - w)
        free, at_upper = room > 1e-7, self.upper - w <= w - self.lower
        if free.any():
            level = np.median(slope[free])
        elif at_upper.all() or not at_upper.any():
            level = slope.mean()
        else:
            level = (slope[at_upper].max() + slope[~at_upper].min()) / 2
        found = np.where(free, 0.0, level - slope)
        return np.where(at_upper, np.maximum(found, 0), np.minimum(found, 0))


def slackest(p: Problem) -> tuple[Array, float]:
    """Return the mixture in the bounds whose least C w - floor is largest, and that slack (-inf if none was found).

    A linear programme, which takes no account of r; a negative slack says that the bounds leave no feasible mixture.
    """
    n, m = p.C.shape
    lp = linprog(
        np.concatenate([np.zeros(m), [-1.0]]),
        A_ub=np.hstack([-p.C, np.ones((n, 1))]),
        b_ub=-p.floor,
        A_eq=np.concatenate([np.ones(m), [0.0]])[None],
        b_eq=[1.0],
        bounds=[*zip(p.lower, p.upper, strict=True), (None, None)],
    )
    if lp.status != 0:
        return p.start, -np.inf
    w = np.clip(lp.x[:-1], p.lower, p.upper)
    return w / w.sum(), float(lp.x[-1])


def lift(p: Problem, w: Array) -> Array:
    """Return `w` moved by a hair onto the constraints it misses by rounding.

    The move goes towards the mixture with the largest slack, so it is as short as can be. Robust constraints leave the
    plain ones a slack of their own, and have no such mixture that a linear programme could find: nothing is moved.
    """
    worst = float(p.violation(w))
    if worst == 0 or p.robust:
        return w
    inner, slack = slackest(p)
    if slack <= 0:
        return w
    theta = worst / (worst + slack) * (1 + 1e-9)
    return (1 - theta) * w + theta * inner
