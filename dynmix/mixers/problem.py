"""The optimisation problem of TiKMiX-D (arXiv 2508.17677, Eq. 7), in plain arrays.

For tasks i and domains j, with A w the normalised influence of a mixture w and C w the row-scaled one:

    minimise  alpha std(A w) - beta sum(A w) - gamma H(w)   over the simplex, w <= upper,   such that  C w >= C prior.

It is convex for alpha, beta, gamma >= 0 (the standard deviation of a linear map is a norm) and the prior is feasible,
so there is one optimal value, and no starting point to be chosen. Knows nothing of names or of where A comes from.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import xlogy

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Eq. 7 in arrays: `A`, `C` float64[n_tasks, n_domains]; `floor` [n_tasks]; `start`, `upper` [n_domains].

    `floor` is the least C w may be: the prior's, less what counts as nothing. `start` is feasible: the prior itself,
    unless bounds cut it.
    """

    A: Array
    C: Array
    floor: Array
    start: Array
    upper: Array
    alpha: float
    beta: float
    gamma: float

    @property
    def linear(self) -> Array:
        """Coefficients of the objective's linear part, float64[n_domains]."""
        return np.asarray(-self.beta * self.A.sum(axis=0), dtype=np.float64)

    @property
    def spread(self) -> Array:
        """Matrix K with alpha std(A w) = |K w|, float64[n_tasks, n_domains] (population standard deviation)."""
        return np.asarray(self.alpha * (self.A - self.A.mean(axis=0)) / np.sqrt(len(self.A)), dtype=np.float64)

    def objective(self, w: Array) -> float:
        """Return Eq. 7's value at `w` (natural logarithm, 0 log 0 = 0)."""
        return float(np.linalg.norm(self.spread @ w) + self.linear @ w + self.gamma * xlogy(w, w).sum())

    def violation(self, w: Array) -> float:
        """Return the largest row-scaled amount by which `w` is under the floor of a task (0: of none)."""
        return float((self.floor - self.C @ w).max(initial=0.0))


def slackest(p: Problem) -> tuple[Array, float]:
    """Return the mixture under the bounds whose least C w - floor is largest, and that slack (-inf if none was found).

    A linear programme; a negative slack says that the bounds leave no feasible mixture.
    """
    n, m = p.C.shape
    lp = linprog(
        np.concatenate([np.zeros(m), [-1.0]]),
        A_ub=np.hstack([-p.C, np.ones((n, 1))]),
        b_ub=-p.floor,
        A_eq=np.concatenate([np.ones(m), [0.0]])[None],
        b_eq=[1.0],
        bounds=[(0, b) for b in p.upper] + [(None, None)],
    )
    if lp.status != 0:
        return p.start, -np.inf
    w = np.clip(lp.x[:-1], 0, p.upper)
    return np.asarray(w / w.sum(), dtype=np.float64), float(lp.x[-1])


def lift(p: Problem, w: Array) -> Array:
    """Return `w` moved by a hair onto the Pareto constraints it misses by rounding.

    The move goes towards the mixture with the largest slack, so it is as short as can be.
    """
    worst = p.violation(w)
    if worst == 0:
        return w
    inner, slack = slackest(p)
    if slack <= 0:
        return w
    theta = worst / (worst + slack) * (1 + 1e-9)
    return np.asarray((1 - theta) * w + theta * inner, dtype=np.float64)
