"""The best mixture by a fitted law: a criterion minimised over the simplex within bounds. Knows no corpus.

Criteria are weighted averages of the targets; `dynmix.laws.criteria` makes them from names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from dynmix.laws.base import Array, Law, check_mixtures
from dynmix.laws.bounds import Bounds
from dynmix.laws.criteria import normalised
from dynmix.shown import Bar

SMOOTHING = 0.01  # MDE's: 0.99 w + 0.01 uniform
SWEEPS = 3  # over the domains, in turn, at most
SHARES = np.linspace(0, 1, 25) ** 2  # between a domain's bounds: where they are small a little more matters most
SLOPE = 1e-4  # a weight's change for a difference quotient
DRAWN, LIKED = 2**14, 128  # mixtures, and those that a law of steps likes best


@dataclass(frozen=True)
class BestMixture:
    """The mixture with the least predicted criterion.

    Attributes:
        weights: float64[n_domains], sums to 1.
        predicted: the criterion there, in L's unit (nats per token).
        std: its standard deviation, of a run with those weights; NaN if the law has none.
        targets, targets_std: each target's, float64[n_targets].
        best_run: the criterion that the law predicts for the best of `compare`, NaN without them.
        message: what held the search back, and how it was made where it is no least one, else "".
    """

    weights: Array
    predicted: float
    std: float
    targets: Array
    targets_std: Array = field(repr=False)
    best_run: float = float("nan")
    message: str = ""


def best_mixture(
    law: Law,
    criterion: ArrayLike | None = None,
    lower: ArrayLike = 0.0,
    upper: ArrayLike = 1.0,
    *,
    tokens: ArrayLike | None = None,
    total_tokens: float | None = None,
    max_epochs: float | None = None,
    smoothing: float = 0.0,
    caution: float = 0.0,
    compare: ArrayLike | None = None,
    starts: int = 8,
    random_state: int = 0,
) -> BestMixture:
    """Return the mixture with the least predicted criterion within the bounds.

    The very least of a law of steps (`Law.steps`) is a corner that the noise of the runs has chosen: of such a law the
    answer is the mean of the mixtures that it likes best, as in RegMix (arXiv 2407.01492).

    Args:
        law: fitted.
        criterion: weight of each target, float[n_targets], at least 0; they are made to sum to 1. None: all equal.
        lower, upper: bounds of each weight, a number or float[n_domains]. A domain that no run had is held at 0, and
            `message` says so: the law knows nothing of it.
        tokens: that each domain has, float[n_domains]; with `total_tokens` of the run and `max_epochs` they bound each
            weight by max_epochs * tokens / total_tokens.
        total_tokens: of the run.
        max_epochs: times that a domain may be seen.
        smoothing: the answer is (1 - smoothing) w + smoothing / n_domains, as MDE's (arXiv 2502.15950) with 0.01, as
            far as the bounds allow.
        caution: minimise predicted + caution * std: at 1 it prefers what is known well.
        compare: the runs' mixtures float[n_runs, n_domains]: where the search also starts, and what it is compared to.
        starts: of the search.
        random_state: of the starts.

    Raises:
        ValueError: bounds that leave no mixture, weights of the wrong number, or `caution` with a law without std.
    """
    k, t = law.n_features_in_, law.n_targets_
    v = normalised(criterion, t)
    bounds = Bounds.of(k, lower, upper, tokens=tokens, total_tokens=total_tokens, max_epochs=max_epochs, seen=law.seen_)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing={smoothing}: a share between 0 and 1 is needed")
    rng = np.random.default_rng(random_state)

    messages = [bounds.message] if bounds.message else []
    if caution and not np.isfinite(_deviation(law, np.full((1, k), 1 / k), v)[0]).all():
        raise ValueError(
            f"caution={caution}: {type(law).__name__} has no standard deviation: AutoLaw has, or caution=0"
        )

    def value(W: Array) -> Array:
        mean = law.predict(W).reshape(-1, t) @ v
        return np.asarray(mean + caution * _deviation(law, W, v)[0] if caution else mean, dtype=np.float64)

    seen = check_mixtures(compare, k) if compare is not None else np.empty((0, k))
    if law.steps:
        around = np.maximum(seen.mean(axis=0), 1e-6) if len(seen) else np.full(k, 1 / k)
        drawn = bounds.nearest(rng.dirichlet(k / 2 * around, size=DRAWN))
        w = bounds.nearest(drawn[np.argsort(value(drawn), kind="stable")[:LIKED]].mean(axis=0))
        messages.append(f"it is the mean of the {LIKED} of {DRAWN:,} mixtures that the law of steps likes best")
    else:
        scattered = rng.dirichlet(np.full(k, 0.5), size=64 * starts)
        candidates = bounds.nearest(np.vstack([np.full(k, 1 / k), seen, scattered]))
        order = np.argsort(value(candidates), kind="stable")[:starts]
        bar = Bar(candidates[order], desc="searching the best mixture", unit="start")
        found = [_descend(value, w, bounds) for w in bar]
        w = found[int(np.argmin(value(np.array(found))))]
    if smoothing:
        w = bounds.nearest((1 - smoothing) * w + smoothing / k)
    mean = law.predict(w[None]).reshape(t)
    std, each = _deviation(law, w[None], v)
    return BestMixture(
        weights=w,
        predicted=float(mean @ v),
        std=float(std[0]),
        targets=mean,
        targets_std=each[0],
        best_run=float((law.predict(seen).reshape(-1, t) @ v).min()) if len(seen) else float("nan"),
        message="; ".join(messages),
    )


def _descend(value: Callable[[Array], Array], w: Array, bounds: Bounds) -> Array:
    """Return a local minimum: SLSQP by difference quotients, then domain by domain, as step functions have no slope."""
    k = len(w)
    unit = max(float(np.ptp(value(np.array([w, np.full(k, 1 / k)])))), 1e-3)

    def slope(x: Array) -> Array:
        # Along e_j - w, which stays on the simplex; the constraint takes out what that differs by.
        x = np.maximum(x, 0) / np.maximum(x, 0).sum()
        moved = x + SLOPE * (np.eye(k) - x)
        return np.asarray((value(moved) - value(x[None])) / SLOPE / unit, dtype=np.float64)

    def at(x: Array) -> float:
        x = np.maximum(x, 0)
        return float(value((x / x.sum())[None])[0]) / unit

    moved = bounds.nearest(np.maximum(bounds.slsqp(at, w, slope, maxiter=100, ftol=1e-9), 0))
    w = moved if value(moved[None])[0] < value(w[None])[0] else w
    for _ in range(SWEEPS):
        before = w
        for j in range(k):
            share = (bounds.low[j] + (min(bounds.high[j], 1) - bounds.low[j]) * SHARES)[:, None]
            others = np.where(np.arange(k) == j, 0, w if w[j] < 1 else 1 / k)
            line = share * np.eye(k)[j] + (1 - share) * others / max(others.sum(), 1e-300)
            tried = np.vstack([w, bounds.nearest(line)])
            w = tried[int(np.argmin(value(tried)))]
        if np.array_equal(w, before):
            break
    return w


def _deviation(law: Law, W: Array, v: Array) -> tuple[Array, Array]:
    """Return the criterion's standard deviation float64[n] and the targets' float64[n, n_targets]; NaN without.

    Targets of one run err together. How much is known of `AutoLaw`; of others they are taken to err as one, which is
    the most that the criterion can be off by.
    """
    try:
        each = law.predict(W, return_std=True)[1].reshape(len(W), -1)
    except ValueError:
        return np.full(len(W), np.nan), np.full((len(W), len(v)), np.nan)
    together = getattr(law, "correlation_", np.ones((len(v), len(v))))
    weighted = each * v
    return np.sqrt(np.maximum(((weighted @ together) * weighted).sum(axis=1), 0)), each
