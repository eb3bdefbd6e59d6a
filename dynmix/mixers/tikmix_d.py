"""TiKMiX-D: the mixture that maximises group influence under a Pareto constraint (arXiv 2508.17677, Section 3.2).

Turns a measured influence, its noise and the guards into a convex `Problem`, has it solved, and says what came of it: a
proposal is feasible and no worse than the prior, or it is the prior. Knows arrays and names; no model.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, norm

from dynmix.mixers.base import Mixer, Proposal, Run, bounds
from dynmix.mixers.memory import Memory
from dynmix.mixers.problem import Problem, slackest
from dynmix.mixers.simplex import cap, normalized
from dynmix.mixers.solvers import ROUNDING, solve
from dynmix.observation import Array, Influence, Weights

logger = logging.getLogger("dynmix.mixers")

EPS = 1e-8  # Eq. 6's


def row_scales(scores: Array, how: Literal["absmax", "paper"]) -> Array:
    """Return what each task's influence is divided by so that tasks are comparable (Eq. 6), float64[n_tasks].

    `"paper"` is max_j S_ij + eps, which flips the sign of a task that every domain hurts; `"absmax"` is
    max_j |S_ij| + eps, which never does.
    """
    top = np.abs(scores) if how == "absmax" else scores
    return np.asarray(top.max(axis=1) + EPS, dtype=np.float64)


class TiKMiXD(Mixer):
    """TiKMiX-D (arXiv 2508.17677, Section 3.2, Eq. 6 and 7): direct maximisation of group influence.

    With standard errors, a gain counts by its lower confidence bound, S_i (w - prior) - q |E_i * (w - prior)|, both in
    the objective and in the Pareto constraint. The mixture is chosen after the noise was drawn, so the bound must hold
    for all mixtures at once (Scheffé's, for contrasts of n_domains scores): q^2 is the quantile of the chi-squared
    distribution with n_domains - 1 degrees of freedom at the probability of `confidence` standard deviations. (Errors
    count as known; estimated from few sequences, they make the bound less certain than that.) If the scores of a task
    differ from each other by no more than the bound, it says nothing, and the mixture stays at the prior.

    Args:
        alpha: weight of the standard deviation over tasks of the normalised influence (evenness).
        beta: weight of its sum (gain).
        gamma: weight of the mixture's entropy (diversity).
        normalization: `"absmax"` divides a task's influence by its largest magnitude; `"paper"` by its maximum, as
            Eq. 6 prints it, and warns where that flips a sign.
        confidence: in standard deviations of a normal distribution, one-sided (1: 84 %, 2: 98 %). Below 1, as by
            default, it is a share of the bound at 1, since a bound for all mixtures at once is a strict one. 0 takes
            the scores as exact, as the paper does and as is done without standard errors.
        memory: in a run, the share of what earlier boundaries said that is kept at each, in [0, 1): the decision is
            made on an average of the influences, weighted by precision (see `dynmix.mixers.memory`). 0: each boundary
            decides alone, as in the paper, which has one.
        against: the mixture that gains are counted from, and that no task may fall below. `"stage"`: that of the stage
            that is ending, so every proposal is an improvement by what was measured. `"run"`, in a run: that of its
            first stage, so a boundary may take back what an earlier, noisier one decided.
        guard_weight: weight of a guard's row in the objective, where a task's is 1; 0 makes guards a constraint only.
        guard_slack: how far a guard may fall below the prior's influence, in units of that guard's largest influence:
            one number for all, or by name. Guards are held by their scores, without `confidence`.
        lower, upper: domain -> smallest and largest weight it may get, or one number for all.
        max_change: how much a weight may differ from that of the stage that is ending, whatever gains are counted
            from. If bounds move that mixture, the difference is counted from where they move it.

    Raises:
        ValueError: an argument that is not a number, negative or not finite; a bound above 1; an unknown normalization.
    """

    needs = frozenset({"influence", "guards"})

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        *,
        normalization: Literal["absmax", "paper"] = "absmax",
        confidence: float = 0.5,
        memory: float = 0.8,
        against: Literal["stage", "run"] = "stage",
        guard_weight: float = 0.0,
        guard_slack: float | Mapping[str, float] = 0.0,
        lower: float | Weights | None = None,
        upper: float | Weights | None = None,
        max_change: float | None = None,
    ):
        if normalization not in ("absmax", "paper"):
            raise ValueError(f"normalization={normalization!r}: 'absmax' or 'paper'")
        if against not in ("stage", "run"):
            raise ValueError(f"against={against!r}: 'stage' or 'run'")
        settings: dict[str, Any] = {"alpha": alpha, "beta": beta, "gamma": gamma, "confidence": confidence}
        settings |= {"memory": memory, "guard_weight": guard_weight, "guard_slack": guard_slack}
        for name, value in (settings | {"lower": lower, "upper": upper, "max_change": max_change}).items():
            by_name = isinstance(value, Mapping) and name in ("lower", "upper", "guard_slack")
            for number in value.values() if by_name else [value]:
                real = isinstance(number, Real) and not isinstance(number, bool)
                optional = number is None and name not in settings
                if not optional and not (real and 0 <= cast(float, number) < np.inf):
                    raise ValueError(f"{name}={value!r}: a finite number of at least 0 is needed")
                if name in ("lower", "upper", "max_change") and not optional and number > 1:  # a percentage
                    raise ValueError(f"{name}={value!r}: weights are from 0 to 1")
        if not memory < 1:
            raise ValueError(f"memory={memory!r}: below 1, where 0 remembers nothing")
        self.alpha, self.beta, self.gamma = float(alpha), float(beta), float(gamma)
        self.normalization: Literal["absmax", "paper"] = normalization
        self.confidence, self.memory, self.guard_weight = float(confidence), float(memory), float(guard_weight)
        self.guard_slack, self.max_change = guard_slack, max_change
        self.lower, self.upper = lower, upper
        self.against: Literal["stage", "run"] = against
        self._memory = Memory(0.0)  # until a run starts, every proposal stands alone
        self._first: Weights | None = None

    def start(self, run: Run) -> None:
        """Remember this run, and no other. See `Mixer.start`."""
        self._memory = Memory(self.memory)
        self._first = run.weights if self.against == "run" else None

    def state_dict(self) -> dict[str, Any]:
        """Return what the boundaries so far said."""
        return self._memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._memory.load_state_dict(state)

    def propose(
        self, influence: Influence | None, prior: Weights, upper: Weights | None = None, *, lower: Weights | None = None
    ) -> Proposal:
        """Return the weights that solve Eq. 7; by the influence given, never worse than `prior` on any task.

        In a run, that is once `start` was called, the influence is averaged with earlier ones as `memory` says, and
        `against` says which mixture is the prior.

        Bounds come first. If they exclude the prior, gains are counted from the prior moved inside them, and from there
        on towards the best mixture within them until no task is worse, if one is as good as the prior on every task;
        the message says so. A task counts as no worse within 1e-9 of its largest score (1e-7 if a solver other than
        the dual had to answer) and, for scores near Eq. 6's eps of 1e-8, within (eps / largest score)^2 of them.

        Args:
            influence: scores float64[n_tasks, n_domains], positive helps (nats per token per unit weight). A domain
                whose standard error is not finite keeps its weight.
            prior: the weights of the stage that is ending; sums to 1.
            upper: domain -> largest weight; of this bound and the constructor's the smaller one holds.
            lower: domain -> smallest weight; likewise the larger one.

        Returns:
            A `Proposal` whose `solver` is `"dual"`, `"clarabel"`, `"slsqp"` or, if nothing better than the prior was
            found or the influence is not finite, `"prior"`. Weights are in the order of `influence.domains`.

        Raises:
            ValueError: names or weights that do not match, bounds that leave no mixture.
        """
        if not isinstance(influence, Influence):
            raise ValueError(
                f"TiKMiXD decides from the influence, not from {type(influence).__name__}: pass the Influence measured "
                "at this boundary"
            )
        remembered = self._memory.add(influence)
        against = prior if self._first is None or influence.not_finite else self._first
        found = self.decide(remembered, against, upper, lower=lower, present=prior)
        if remembered is not influence:
            found = replace(found, decided_on=remembered)
        if against is prior:
            return found
        move = [found.weights[name] - prior[name] for name in influence.domains]
        gain, error = predicted_gain(of_sequences(remembered, against), np.array(move))
        return replace(found, predicted_gain=gain, predicted_gain_standard_error=error)

    def decide(
        self,
        influence: Influence,
        prior: Weights,
        upper: Weights | None = None,
        *,
        lower: Weights | None = None,
        present: Weights | None = None,
    ) -> Proposal:
        """Return what `propose` would for this influence alone; remembers nothing.

        Args and Raises as in `propose`; `present` is the mixture that `max_change` is counted from, None: the prior. An
        influence on guards only is refused.
        """
        if not influence.optimised.any():
            raise ValueError(f"there is no task to optimise for, only guards: {list(influence.tasks)}")
        influence = of_sequences(influence, prior)
        posed = self._pose(influence, prior, upper, lower, present)
        problem, inside, note, binding = posed.problem, posed.inside, posed.note, dict[str, float]()
        if problem is None:
            w, solver, message = inside, "prior", f"prior {posed.kept}: {note}"
        else:
            w, multipliers, solver = solve(problem)
            message = f"objective {problem.objective(inside):.4f} -> {problem.objective(w):.4f}{note}"
            if np.array_equal(w, inside):
                why = "no mixture does better and is no worse on any row, as sure as asked for"
                message = f"weights {posed.kept}: {why}{note}"
            if solver != "prior" and (binding := self._binding(influence, problem, posed.widest, w, multipliers)):
                message += "; binding: " + ", ".join(binding)
        gain, error = predicted_gain(influence, w - posed.wanted)
        return Proposal(dict(zip(influence.domains, w.tolist(), strict=True)), solver, message, gain, error, binding)

    def problem(
        self, influence: Influence, prior: Weights, upper: Weights | None = None, lower: Weights | None = None
    ) -> Problem | None:
        """Return the problem that `propose` solves; None where it keeps the prior without one."""
        return self._pose(of_sequences(influence, prior), prior, upper, lower).problem

    def _pose(
        self,
        influence: Influence,
        prior: Weights,
        upper: Weights | None,
        lower: Weights | None,
        present: Weights | None = None,
    ) -> "_Posed":
        """Return the problem, or why there is none: first what may move, then whether the scores say anything of it."""
        wanted = normalized(prior, influence.domains)
        widest = self._bounds(influence.domains, upper, lower)
        reach, inside = self._reach(influence.domains, widest, wanted, present)
        if bad := influence.not_finite:
            return _Posed(None, wanted, inside, widest, f"influence not finite on {bad}")
        self._warn_of_flips(influence)
        errors = self._uncertainty(influence)
        known = np.isfinite(errors).all(axis=0)  # the other domains keep their weights
        low, high = (np.where(known, bound, inside) for bound in reach)
        E = np.where(known, errors, 0.0)
        if uninformed := self._uninformed(influence, E, high > low):
            why = (
                f"the influence on {', '.join(uninformed)} cannot be told from its noise (more probe_sequences and "
                "task_sequences, or less confidence)"
            )
            return _Posed(None, wanted, inside, widest, why)
        held = [influence.domains[j] for j in np.flatnonzero(~known)]
        note = f"; weights kept, for want of a finite standard error: {', '.join(held)}" if held else ""
        slack = self._slack(influence)
        problem, repair = _repaired(self._eq_7(influence, E, slack, wanted, inside, low, high), slack)
        return _Posed(problem, wanted, inside, widest, note + repair)

    def _bounds(self, domains: tuple[str, ...], upper: Weights | None, lower: Weights | None) -> tuple[Array, Array]:
        """Return the lower and the upper bounds, the tightest of these and the constructor's; without `max_change`."""
        low = bounds(domains, _for_all(self.lower, domains), lower, lower=True)
        high = bounds(domains, _for_all(self.upper, domains), upper)
        if crossed := [f"{n!r} ({a:.4g} > {b:.4g})" for n, a, b in zip(domains, low, high, strict=True) if a > b]:
            raise ValueError(f"lower bounds above the upper ones: {', '.join(crossed)}")
        return low, high

    def _reach(
        self, domains: tuple[str, ...], widest: tuple[Array, Array], wanted: Array, present: Weights | None
    ) -> tuple[tuple[Array, Array], Array]:
        """Return the `widest` bounds narrowed by `max_change`, and the prior `wanted` moved inside them."""
        low, high = widest
        inside = cap(wanted, high, low)
        if self.max_change is None:
            return widest, inside
        # Counted from where the bounds leave the present mixture, so that the two always fit together.
        now = inside if present is None else cap(normalized(present, domains), high, low)
        narrow_low, narrow_high = np.maximum(low, now - self.max_change), np.minimum(high, now + self.max_change)
        if present is not None:
            inside = cap(wanted, narrow_high, narrow_low)
        return (narrow_low, narrow_high), inside

    def _eq_7(
        self, influence: Influence, E: Array, slack: Array, wanted: Array, inside: Array, low: Array, high: Array
    ) -> Problem:
        """Return Eq. 7 within the bounds. Where they moved the prior, its start `inside` may miss the floor."""
        S, weight = influence.scores, np.where(influence.optimised, 1.0, self.guard_weight)
        scale, divisor = np.abs(S).max(axis=1), row_scales(S, self.normalization)
        divided = np.maximum(scale, np.finfo(np.float64).tiny)[:, None]
        C = S / divided
        return Problem(
            A=(weight[:, None] * S / divisor[:, None])[weight > 0],
            C=C,
            floor=C @ wanted - slack,
            start=inside,
            lower=low,
            upper=high,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            R=self._radius(int((high > low).sum())) * E / divided,
            cost=self.beta * weight * scale / np.abs(divisor),
            centre=wanted,
        )

    def _uncertainty(self, influence: Influence) -> Array:
        """Return the standard errors that count, float64[n_rows, n_domains]: 0 for guards, and without confidence."""
        E = influence.standard_error
        if E is None or self.confidence == 0:
            return np.zeros_like(influence.scores)
        return np.where(influence.optimised[:, None], np.where(np.isnan(E), np.inf, E), 0.0)

    def _uninformed(self, influence: Influence, errors: Array, moving: NDArray[np.bool_]) -> list[str]:
        """Return the tasks on which no move between the `moving` domains has a gain beyond the bound."""
        rows = zip(influence.tasks, influence.scores, errors, strict=True)
        return [task for task, s, e in rows if e.any() and self._is_noise(s[moving], e[moving])]

    def _is_noise(self, s: Array, e: Array) -> bool:
        """Whether scores cannot be told from equal ones, by a chi-squared test.

        Its statistic is the largest square of (s d) / |e * d| over all d that sum to 0, in closed form.
        """
        if len(s) < 2:
            return False
        precision = 1 / np.maximum(e, 1e-9 * e.max()) ** 2
        common = precision @ s / precision.sum()
        return bool(precision @ (s - common) ** 2 <= self._radius(len(s)) ** 2)

    def _radius(self, domains: int) -> float:
        """Return q: by how many standard errors a move between so many domains may be wrong."""
        level = norm.cdf(max(1.0, self.confidence))
        return min(1.0, self.confidence) * float(np.sqrt(chi2.ppf(level, max(1, domains - 1))))

    def _slack(self, influence: Influence) -> Array:
        """Return how far each row may fall below the prior's influence, row-scaled.

        Below Eq. 6's eps an influence does not count. That slack is of second order in eps: a row of ordinary scale
        must hold up to rounding, and a row at eps must not decide the mixture for all others.
        """
        given = self.guard_slack
        if isinstance(given, Mapping) and (unknown := sorted(set(given) - set(influence.guards))):
            raise ValueError(f"guard_slack: no guard {unknown[0]!r}; the guards are {list(influence.guards)}")
        of_guards = [given.get(name, 0.0) if isinstance(given, Mapping) else given for name in influence.tasks]
        scale = np.abs(influence.scores).max(axis=1)
        return np.asarray((EPS / np.maximum(scale, EPS)) ** 2 + np.where(influence.optimised, 0.0, of_guards))

    def _binding(
        self, influence: Influence, p: Problem, widest: tuple[Array, Array], w: Array, multipliers: Array
    ) -> dict[str, float]:
        """Return constraint -> multiplier of those that bind, under the user's name for each."""
        found = {name: float(x) for name, x in zip(influence.tasks, multipliers, strict=True) if x > 1e-6}
        low, high = widest
        for j, x in enumerate(p.bound_multipliers(w, multipliers).tolist()):
            if abs(x) > 1e-6 and p.upper[j] > p.lower[j]:  # else the weight is held for want of an error
                own = p.upper[j] == high[j] if x > 0 else p.lower[j] == low[j]
                kind = ("upper" if x > 0 else "lower") if own else "max_change"
                found[f"{kind}:{influence.domains[j]}"] = abs(x)
        return found

    def _warn_of_flips(self, influence: Influence) -> None:
        flipped = [t for t, row in zip(influence.tasks, influence.scores, strict=True) if row.max() < 0]
        if flipped and self.normalization == "paper":
            logger.warning(
                "every domain hurts %s: Eq. 6 divides by a negative maximum and flips the sign of the task, so the "
                "mixture will be drawn to what hurts it most; normalization='absmax' does not",
                flipped,
            )


@dataclass(frozen=True)
class _Posed:
    """The problem to solve, or None and why there is none.

    Attributes:
        wanted, inside: the prior as given, and moved inside the bounds.
        widest: the bounds without `max_change`.
        note: what the message is to say, or why there is no problem.
    """

    problem: Problem | None
    wanted: Array
    inside: Array
    widest: tuple[Array, Array]
    note: str

    @property
    def kept(self) -> str:
        """What becomes of the prior where nothing better is found."""
        return "kept" if np.array_equal(self.inside, self.wanted) else "moved inside the bounds and no further"


def _repaired(problem: Problem, slack: Array) -> tuple[Problem, str]:
    """Return the problem with a feasible start, and what to say if that took other than where the bounds put it."""
    inside, C = problem.start, problem.C
    if not problem.violation(inside) > 0:  # NaN, where squares of errors overflow, is not to blame on the bounds
        return problem, ""
    best, room = slackest(problem)
    if room < 0:
        lowered = replace(problem, floor=C @ inside - slack, centre=inside)
        return lowered, "; the bounds leave no mixture as good as the prior on every task"
    # No further from the prior than it takes: what noise may do to a move is counted from here.
    missing, gained = problem.floor - C @ inside, C @ (best - inside)
    short = missing > ROUNDING
    way = (missing[short] / np.maximum(gained, missing)[short]).max(initial=0.0)
    start = inside + way * (best - inside)
    moved = replace(problem, start=start, centre=start)
    return moved, "; the bounds cut the prior: gains are counted from where that is made up for"


def of_sequences(influence: Influence, prior: Weights) -> Influence:
    """Return the influence of sequences, which weights are shares of, around the prior."""
    return influence.of_sequences(normalized(prior, influence.domains))


def predicted_gain(influence: Influence, move: Array) -> tuple[dict[str, float], dict[str, float]]:
    """Return task or guard -> predicted decrease of its loss by a move of the weights, and its standard error.

    In nats per token; the entries' errors are taken as independent. NaN where there are none.
    """
    moved = move != 0
    gain = influence.scores[:, moved] @ move[moved]
    error = influence.standard_error
    spread = np.full(len(gain), np.nan) if error is None else np.sqrt(error[:, moved] ** 2 @ move[moved] ** 2)
    return tuple(dict(zip(influence.tasks, x.tolist(), strict=True)) for x in (gain, spread))  # type: ignore[return-value]


def _for_all(bound: float | Weights | None, domains: tuple[str, ...]) -> Weights | None:
    return bound if bound is None or isinstance(bound, Mapping) else dict.fromkeys(domains, float(bound))
