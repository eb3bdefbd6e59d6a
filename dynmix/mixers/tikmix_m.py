"""TiKMiX-M: a surrogate of the influence that mixtures really have, and a search on it (arXiv 2508.17677, Section 3.3).

Asks for the measured influence of some mixtures in a box around the prior, fits a surrogate to it and looks for its
maximum where no task gets worse; measures what it finds, fits again, and so on. Knows arrays, names and a callable that
measures; no model.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from dynmix.mixers.base import Mixer, Proposal
from dynmix.mixers.candidates import around, into, spread
from dynmix.mixers.problem import Problem
from dynmix.mixers.registry import make_mixer
from dynmix.mixers.search import Pareto, Search, largest
from dynmix.mixers.simplex import normalized
from dynmix.mixers.surrogate import NAMES, Name, Smooth, fit
from dynmix.mixers.tikmix_d import EPS, TiKMiXD, of_sequences, predicted_gain, row_scales
from dynmix.observation import Array, Influence, Weights

logger = logging.getLogger("dynmix.mixers")

Measure = Callable[[dict[str, float]], ArrayLike]

# Of the mixtures to measure, the share that is spread over the box; the others follow the search.
DESIGN = 0.6
# A surrogate this much of R2 behind the best is not fitted again in later rounds, to save its time.
BEHIND = 0.05
# How near to the found mixture the first and the last round look: Dirichlet parameters as `concentration` counts them.
NEAR = (30.0, 1000.0)


class TiKMiXM(Mixer):
    """TiKMiX-M (arXiv 2508.17677, Section 3.3 and Algorithm 1): mixture effects that are not linear.

    Influence computed from scores is linear in the weights; what mixtures do to each other has to be measured. So
    `propose` takes `measure`, which draws a sample of a mixture and measures its influence (Appendix D's experiment),
    and calls it `mixtures` times. Of these, 60 % are spread over the box; the others are measured in rounds where the
    search looks, because most of the gain lies outside of what a design in many domains reaches. (The paper fits once,
    which is `rounds=0`; `benchmarks/mixers_m.py` has both.)

    The answer is TiKMiX-D's in the box, or among the rounds' maxima and the prior what is better than that with the
    confidence that `direct` asks for: by a smooth surrogate of all measurements, which knows its own error and is the
    measurement itself where there is no noise.

    Args:
        direct: the TiKMiX-D whose bounds, normalisation and Pareto constraint hold, and whose answer is the search's
            start; or its arguments, as a mapping; default `TiKMiXD()`. Each boundary decides alone here, by its own
            measurements: `memory` and `against` are not used.
        low, high: the box: a domain's weight is at least `low` and at most `high` times the prior's; at most `high`
            times the mean of all where it is 0 there, as of a domain that joined.
        mixtures: how many mixtures are measured, at least 16.
        rounds: how often the surrogate is fitted again to what was measured where the search looked.
        iterations: of the search (Algorithm 1's T) at most; it ends after three that move nothing.
        samples: candidates in each iteration (N).
        top_k: of how many of the best the average is the next centre (k).
        concentration: the least and largest concentration of the Dirichlet distribution that candidates are drawn
            from, as the sum of its parameters over the number of domains.
        anneal: `"narrowing"`, from broad to narrow, is what the paper's words say: global exploration first. Its
            concentration parameter, however, is said to start large and decrease, and a Dirichlet of large
            concentration is narrow: `"literal"` does that, from narrow to broad. With Algorithm 1's own candidates
            alone narrowing wins (`benchmarks/mixers_m.py`); with those this search adds they differ little.
        pareto: keep every candidate no worse than the prior on any task (and guard) by the influence given; False is
            the paper's search, which has no such constraint.
        surrogate: `"auto"` chooses by cross-validation; or the name of one: `"ridge"`, `"lightgbm"`, `"smooth"`.
        seed: of everything that is drawn; two proposals of a run draw differently.

    Raises:
        ValueError: an argument outside of what is said here.
    """

    needs = frozenset({"influence", "guards", "measure"})

    def __init__(
        self,
        direct: TiKMiXD | Mapping[str, Any] | None = None,
        *,
        low: float = 0.5,
        high: float = 2.0,
        mixtures: int = 256,
        rounds: int = 4,
        iterations: int = 20,
        samples: int = 256,
        top_k: int = 16,
        concentration: tuple[float, float] = (1.0, 1000.0),
        anneal: Literal["narrowing", "literal"] = "narrowing",
        pareto: bool = True,
        surrogate: Literal["auto"] | Name = "auto",
        seed: int = 0,
    ):
        if not 0 <= low <= 1 <= high < np.inf:
            raise ValueError(f"low={low}, high={high}: the box is around the prior, 0 <= low <= 1 <= high")
        least_of = {"mixtures": 16, "rounds": 0, "iterations": 1, "top_k": 1, "seed": 0}
        for (name, least), value in zip(least_of.items(), (mixtures, rounds, iterations, top_k, seed), strict=True):
            if value < least:
                raise ValueError(f"{name}={value}: at least {least}")
        if rounds > (most := mixtures - int(DESIGN * mixtures) - 1):
            raise ValueError(f"rounds={rounds}: at most {most} with mixtures={mixtures}, so that each measures one")
        if samples < top_k:
            raise ValueError(f"samples={samples}: at least top_k={top_k}, which are chosen from them")
        if len(concentration) != 2 or not 0 < concentration[0] <= concentration[1] < np.inf:
            raise ValueError(f"concentration={concentration}: (least, largest), both above 0 and finite")
        if anneal not in ("narrowing", "literal"):
            raise ValueError(f"anneal={anneal!r}: 'narrowing' or 'literal'")
        if surrogate != "auto" and surrogate not in NAMES:
            raise ValueError(f"surrogate={surrogate!r}: 'auto' or one of {list(NAMES)}")
        self.direct = _made(direct)
        self.low, self.high, self.mixtures, self.rounds = float(low), float(high), int(mixtures), int(rounds)
        self.iterations, self.samples, self.top_k = int(iterations), int(samples), int(top_k)
        self.concentration = (float(concentration[0]), float(concentration[1]))
        self.anneal: Literal["narrowing", "literal"] = anneal
        self.pareto, self.seed = bool(pareto), int(seed)
        self.surrogate: Literal["auto"] | Name = surrogate
        self.search = Search(self.iterations, self.samples, self.top_k, self.concentration, self.anneal)
        self._proposals = 0
        self._warned = False

    def describe(self) -> dict[str, Any]:
        """Return the configuration, JSON-able."""
        own = {name: value for name, value in super().describe().items() if name != "search"}  # made of the others
        return own | {"direct": self.direct.describe()}

    def state_dict(self) -> dict[str, Any]:
        """Return how many proposals were made: the next one's random numbers follow from it."""
        return {"proposals": self._proposals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned. Raises ValueError for a state that is not of this mixer."""
        count = state.get("proposals")
        if set(state) != {"proposals"} or not isinstance(count, int) or count < 0:
            raise ValueError(f"TiKMiXM's state is {{'proposals': count}}, but was given {dict(state)}")
        self._proposals = count

    def propose(
        self,
        influence: Influence | None,
        prior: Weights,
        upper: Weights | None = None,
        *,
        measure: Measure | None = None,
    ) -> Proposal:
        """Return the weights of the largest sum of normalised influence, by measurement, in the box.

        The target is the sum over tasks (guards are no part of it) of the measured influence, each divided by what
        TiKMiX-D divides by (Eq. 6); a task whose scores are below Eq. 6's eps does not count. Where the bounds cut the
        prior, the box is around the prior moved inside them.

        Args:
            influence: scores float64[n_tasks, n_domains], positive helps (nats per token per unit weight).
            prior: the weights of the stage that ends; sums to 1.
            upper: domain -> largest weight; together with `direct`'s the smaller one holds.
            measure: weights (domain -> weight) -> influence of a sample drawn from that mixture, float64[n_tasks] in
                the order of `influence.tasks`. None: TiKMiX-D's answer, not held in the box, with a warning.

        Returns:
            A `Proposal` whose `solver` is `"tikmix-m:<surrogate>"`, or `"tikmix-d"` or `"prior"` where that was best.
            Its predicted gain is the linear one, from the scores; the measured one is in the message.

        Raises:
            ValueError: names, weights or bounds that do not match, a measurement of the wrong shape or not finite.
        """
        if influence is None:
            raise ValueError("TiKMiXM decides from the influence: pass the Influence measured at this boundary")
        if measure is None:
            return self._linear(influence, prior, upper)
        influence = of_sequences(influence, prior)  # as what is measured of a drawn sample is
        rng = np.random.default_rng((self.seed, self._proposals))
        self._proposals += 1
        posed = self.direct.problem(influence, prior, upper)
        if posed is None or not influence.optimised.any():  # nothing can be told from this influence
            return self.direct.decide(influence, prior, upper)
        given = normalized(prior, influence.domains)
        inside = into(given, posed.lower, posed.upper)
        reach = np.where(inside > 0, inside, inside.mean())  # a multiple of 0 would never draw a domain that joined
        least, most = (
            dict(zip(influence.domains, bound.tolist(), strict=True))
            for bound in (np.maximum(posed.lower, self.low * inside), np.minimum(posed.upper, self.high * reach))
        )
        problem = self.direct.problem(influence, prior, most, least)
        if problem is None:
            return self.direct.decide(influence, prior, most, lower=least)
        found = np.array([*self.direct.decide(influence, prior, most, lower=least).weights.values()])

        target = _Target(influence, measure, self.direct.normalization)
        constraint = Pareto(problem if self.pareto else None)
        stay = inside if constraint.holds(inside[None])[0] else problem.start
        w0 = found if constraint.holds(found[None])[0] else stay
        target.add(stay, "prior")
        target.add(w0, "tikmix-d")
        count = max(0, int((DESIGN if self.rounds else 1) * self.mixtures) - 2 - (not self.rounds))
        for w in spread(count, problem.lower, problem.upper, rng)[0]:
            target.add(w)
        with np.errstate(invalid="ignore"):  # NaN where one of them is constant
            correlation = float(np.corrcoef(target.W @ problem.A.sum(axis=0), target.y)[0, 1])
        r2 = self._follow(target, w0, problem, constraint, rng)
        return self._answer(influence, given, target, r2, correlation)

    def _follow(
        self, target: "_Target", w0: Array, problem: Problem, constraint: Pareto, rng: np.random.Generator
    ) -> dict[Name, float]:
        """Measure where the search looks, round by round; return the surrogates' R2 on the design."""
        names = NAMES if self.surrogate == "auto" else (self.surrogate,)
        design_r2: dict[Name, float] = {}
        kernel = None
        rounds = np.array_split(np.arange(self.mixtures - len(target.y) - 1), self.rounds) if self.rounds else []
        for near, size in zip([*np.geomspace(*NEAR, self.rounds), 0.0], [*map(len, rounds), 1], strict=True):
            fitted = fit(target.W, target.standardized, names, kernel)
            model, kernel = fitted.model, fitted.kernel
            design_r2 = design_r2 or fitted.r2
            names = tuple(other for other in names if fitted.r2[other] > max(fitted.r2.values()) - BEHIND)
            known = target.W[constraint.holds(target.W)]
            starts = (w0, largest(model.predict, known))  # Algorithm 1's, and where measurements say that it is better
            ends = [self.search.find(model.predict, start, problem, constraint, rng) for start in starts]
            middle = largest(model.predict, np.stack(ends))
            for w in around(size - 1, middle, near * len(middle), problem.lower, problem.upper, rng):
                target.add(w)
            target.add(middle, f"tikmix-m:{fitted.name}")
        return design_r2

    def _answer(
        self, influence: Influence, prior: Array, target: "_Target", r2: dict[Name, float], correlation: float
    ) -> Proposal:
        smooth = Smooth().fit(target.W, target.standardized)
        places = list(target.labels)
        values, covariance = smooth.posterior(target.W[places])
        # By how much each is better than TiKMiX-D's answer (the second place), as surely as that is asked to be.
        variance = covariance.diagonal() + covariance[1, 1] - 2 * covariance[1]
        surely = values - values[1] - self.direct.confidence * np.sqrt(np.maximum(variance, 0))
        best = int(np.argmax(np.where(np.arange(len(places)) == 1, 0.0, surely)))
        chosen = places[best]
        w, solver = target.W[chosen], target.labels[chosen]
        spread_ = float(target.y.std())
        errors = ", ".join(f"{name} {value:.2f}" for name, value in r2.items())
        message = (
            f"cross-validated R2: {errors}; the linear prediction correlates {correlation:.2f} with what was measured; "
            f"sum of normalised influence over the prior's: predicted {(values[best] - values[0]) * spread_:.4g}, "
            f"measured {target.y[chosen] - target.y[0]:.4g}"
        )
        gain, error = predicted_gain(influence, w - prior)
        weights = dict(zip(influence.domains, w.tolist(), strict=True))
        return Proposal(weights, solver, message, gain, error)

    def _linear(self, influence: Influence, prior: Weights, upper: Weights | None) -> Proposal:
        why = "without measure the target is exactly linear in the weights: this is TiKMiX-D's answer"
        if not self._warned:
            logger.warning("TiKMiX-M: %s; pass measure= to find mixture effects", why)
            self._warned = True
        answer = self.direct.decide(influence, prior, upper)
        return replace(answer, message=f"{why}; {answer.message}")


def _made(direct: TiKMiXD | Mapping[str, Any] | None) -> TiKMiXD:
    mixer = make_mixer({"name": "tikmix-d"} | dict(direct)) if isinstance(direct, Mapping) else direct or TiKMiXD()
    if not isinstance(mixer, TiKMiXD):
        raise ValueError(f"direct={direct!r}: a TiKMiXD, or its arguments as a mapping")
    return mixer


class _Target:
    """The mixtures that were measured: `W` float64[n, n_domains], `y` float64[n], place -> label of the proposable."""

    def __init__(self, influence: Influence, measure: Measure, how: Literal["absmax", "paper"]):
        self._influence, self._measure = influence, measure
        counts = influence.optimised & (np.abs(influence.scores).max(axis=1) > EPS)
        self._share = np.where(counts, 1 / row_scales(influence.scores, how), 0.0)
        self._mixtures: list[Array] = []
        self._values: list[float] = []
        self.labels: dict[int, str] = {}

    @property
    def W(self) -> Array:  # noqa: N802
        return np.stack(self._mixtures)

    @property
    def y(self) -> Array:
        return np.array(self._values)

    @property
    def standardized(self) -> Array:
        return np.asarray((self.y - self.y.mean()) / (self.y.std() or 1.0), dtype=np.float64)

    def add(self, w: Array, label: str | None = None) -> None:
        weights = dict(zip(self._influence.domains, w.tolist(), strict=True))
        rows = np.asarray(self._measure(weights), dtype=np.float64)
        if rows.shape != self._share.shape:
            raise ValueError(
                f"measure returned shape {list(rows.shape)}, but the influence has {len(self._share)} rows, "
                f"{list(self._influence.tasks)}"
            )
        if not np.isfinite(rows).all():
            bad = [task for task, x in zip(self._influence.tasks, rows, strict=True) if not np.isfinite(x)]
            raise ValueError(f"measure is not finite on {bad} at the weights {weights}")
        if label is not None:
            self.labels[len(self._values)] = label
        self._mixtures.append(w)
        self._values.append(float(rows @ self._share))
