"""TiKMiX-D: the mixture that maximises group influence under a Pareto constraint (arXiv 2508.17677, Section 3.2).

Turns a measured influence into the convex `Problem` of Eq. 7, asks the solvers in turn, and verifies what they answer:
a proposal is feasible and no worse than the prior, or it is the prior. Knows arrays and names; no model.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from dynmix.mixers.base import Proposal, prior_and_bounds
from dynmix.mixers.problem import Array, Problem, slackest
from dynmix.mixers.simplex import normalized
from dynmix.mixers.solvers import GAP, solve_clarabel, solve_dual, solve_slsqp
from dynmix.observation import Influence

logger = logging.getLogger("dynmix.mixers")

# Row-scaled violation below which a Pareto constraint holds: rounding of S w, far under any measured influence.
FEASIBLE = 1e-9
EPS = 1e-8  # Eq. 6's


def normalize(scores: Array, how: Literal["absmax", "paper"]) -> Array:
    """Return the influence divided task by task so that tasks are comparable (Eq. 6).

    `"paper"` divides by max_j S_ij + eps, which flips the sign of a task that every domain hurts; `"absmax"` divides
    by max_j |S_ij| + eps, which never does.
    """
    top = np.abs(scores) if how == "absmax" else scores
    return np.asarray(scores / (top.max(axis=1, keepdims=True) + EPS), dtype=np.float64)


class TiKMiXD:
    """TiKMiX-D (arXiv 2508.17677, Section 3.2, Eq. 6 and 7): direct maximisation of group influence.

    Args:
        alpha: weight of the standard deviation over tasks of the normalised influence (evenness).
        beta: weight of its sum (gain).
        gamma: weight of the mixture's entropy (diversity).
        normalization: `"absmax"` divides a task's influence by its largest magnitude; `"paper"` by its maximum, as
            Eq. 6 prints it, and warns where that flips a sign.
        upper: domain -> largest weight it may get.

    Raises:
        ValueError: a negative or non-finite coefficient, an unknown normalization.
    """

    needs = frozenset({"influence"})

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        *,
        normalization: Literal["absmax", "paper"] = "absmax",
        upper: Mapping[str, float] | None = None,
    ):
        for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma}.items():
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: Eq. 7 is convex for finite values of at least 0 only")
        if normalization not in ("absmax", "paper"):
            raise ValueError(f"normalization={normalization!r}: 'absmax' or 'paper'")
        self.alpha, self.beta, self.gamma = float(alpha), float(beta), float(gamma)
        self.normalization: Literal["absmax", "paper"] = normalization
        self.upper = dict(upper or {})

    def describe(self) -> dict[str, Any]:
        """Return the configuration, JSON-able."""
        return {"name": "TiKMiXD", **vars(self)}

    def propose(
        self,
        influence: Influence | None,
        prior: Mapping[str, float],
        upper: Mapping[str, float] | None = None,
    ) -> Proposal:
        """Return the weights that solve Eq. 7; never worse than `prior` on any task by the influence given.

        Upper bounds come first: where they leave no mixture that is as good as the prior on every task, the prior moved
        inside them takes its place, and the message says so. A task counts as no worse within rounding (1e-9 of its
        largest score) and, for scores near Eq. 6's eps of 1e-8, within (eps / largest score)^2 of them.

        Args:
            influence: scores float64[n_tasks, n_domains], positive helps (nats per token per unit weight).
            prior: the weights of the stage that ends; sums to 1.
            upper: domain -> largest weight; together with the constructor's the smaller one holds.

        Returns:
            A `Proposal` whose `solver` is `"dual"`, `"clarabel"`, `"slsqp"` or, where nothing better than the prior
            was found or the influence is not finite, `"prior"`. Weights are in the order of `influence.domains`.

        Raises:
            ValueError: names or weights that do not match, bounds that leave no mixture.
        """
        if influence is None:
            raise ValueError("TiKMiXD decides from the influence: pass the Influence measured at this boundary")
        wanted = normalized(prior, influence.domains)
        inside, bounds = prior_and_bounds(influence.domains, prior, self.upper, upper)
        S = influence.scores
        if bad := influence.not_finite:
            return self._answer(influence, wanted, inside, "prior", f"influence not finite on {bad}: prior kept")
        self._warn_of_flips(influence)
        scale = np.abs(S).max(axis=1, keepdims=True)
        C = np.divide(S, scale, out=np.zeros_like(S), where=scale > 0)
        # Eq. 6's eps is where an influence ends to count. To second order in it, because a row of ordinary scale must
        # hold to rounding and a row at eps must not decide the mixture of all others.
        nothing = (EPS / np.maximum(scale[:, 0], EPS)) ** 2
        problem = Problem(
            A=normalize(S, self.normalization),
            C=C,
            floor=C @ wanted - nothing,
            start=inside,
            upper=bounds,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
        )
        cut = ""
        if problem.violation(inside) > 0:
            best, slack = slackest(problem)
            if slack >= 0:
                problem = replace(problem, start=best)
            else:
                problem = replace(problem, floor=C @ inside - nothing)
                cut = "; the bounds leave no mixture as good as the prior on every task"
        w, multipliers, solver = self._solve(problem)
        message = f"objective {problem.objective(inside):.4f} -> {problem.objective(w):.4f}{cut}"
        binding = {t: float(x) for t, x in zip(influence.tasks, multipliers, strict=True) if x > 1e-6}
        if binding:
            message += "; the Pareto constraint binds on " + ", ".join(binding)
        return self._answer(influence, wanted, w, solver, message, binding)

    def _solve(self, problem: Problem) -> tuple[Array, Array, str]:
        solvers = {"dual": solve_dual} if self.gamma > 0 else {}
        solvers |= {"clarabel": solve_clarabel, "slsqp": solve_slsqp}
        for name, solve in solvers.items():
            try:
                w, multipliers = solve(problem)
            except ArithmeticError as failure:
                logger.debug("TiKMiX-D: %s: %s", name, failure)
                continue
            inside = (w >= 0).all() and (w <= problem.upper + 1e-9).all() and abs(w.sum() - 1) < 1e-9
            worse = problem.objective(w) - problem.objective(problem.start)
            if inside and worse <= GAP * max(1.0, abs(problem.objective(w))) and problem.violation(w) <= FEASIBLE:
                return (problem.start if worse >= 0 else w), multipliers, name
        return problem.start, np.zeros(len(problem.C)), "prior"

    def _warn_of_flips(self, influence: Influence) -> None:
        flipped = [t for t, row in zip(influence.tasks, influence.scores, strict=True) if row.max() < 0]
        if flipped and self.normalization == "paper":
            logger.warning(
                "every domain hurts %s: Eq. 6 divides by a negative maximum and flips the sign of the task, so the "
                "mixture will be drawn to what hurts it most; normalization='absmax' does not",
                flipped,
            )

    def _answer(
        self,
        influence: Influence,
        prior: Array,
        w: Array,
        solver: str,
        message: str,
        multipliers: dict[str, float] | None = None,
    ) -> Proposal:
        move = w - prior
        moved = move != 0
        gain = influence.scores[:, moved] @ move[moved]
        error = influence.standard_error
        spread = np.full(len(gain), np.nan) if error is None else np.sqrt(error[:, moved] ** 2 @ move[moved] ** 2)
        return Proposal(
            weights=dict(zip(influence.domains, w.tolist(), strict=True)),
            solver=solver,
            message=message,
            predicted_gain=dict(zip(influence.tasks, gain.tolist(), strict=True)),
            predicted_gain_standard_error=dict(zip(influence.tasks, spread.tolist(), strict=True)),
            multipliers=multipliers or {},
        )
