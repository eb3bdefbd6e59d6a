"""The best mixture by a fitted law: a criterion minimised over the simplex within bounds. Knows no corpus.

Criteria are weighted averages of the targets: MDE (arXiv 2502.15950) has the validation domains', the end tasks' and
that of both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from dynmix.laws.base import Array, Law, check_mixtures

SMOOTHING = 0.01  # MDE's: 0.99 w + 0.01 uniform
SHRINKING = 0.7  # of the search's steps, a round
SLOPE = 1e-4  # a weight's change for a difference quotient


@dataclass(frozen=True)
class BestMixture:
    """The mixture with the least predicted criterion.

    Attributes:
        weights: float64[n_domains], sums to 1.
        predicted: the criterion there, in L's unit (nats per token).
        std: its standard deviation, of a run with those weights; NaN if the law has none.
        targets, targets_std: each target's, float64[n_targets].
        best_run: the criterion that the law predicts for the best of `compare`, NaN without them.
        message: what held the search back, else "".
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

    Args:
        law: fitted.
        criterion: weight of each target, float[n_targets], at least 0; they are made to sum to 1. None: all equal.
        lower, upper: bounds of each weight, a number or float[n_domains]. A domain that no run had (its weights are
            all 0) should get the upper bound 0: the law knows nothing of it.
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
    v = _share(np.ones(t) if criterion is None else criterion, t)
    low, high, message = _bounds(k, lower, upper, tokens, total_tokens, max_epochs)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing={smoothing}: a share between 0 and 1 is needed")
    rng = np.random.default_rng(random_state)

    def value(W: Array) -> Array:
        mean = _columns(law.predict(W)) @ v
        return np.asarray(mean + caution * _deviation(law, W, v)[0] if caution else mean, dtype=np.float64)

    seen = check_mixtures(compare, k) if compare is not None else np.empty((0, k))
    scattered = rng.dirichlet(np.full(k, 0.5), size=64 * starts)
    candidates = np.array([_inside(w, low, high) for w in (np.full(k, 1 / k), *seen, *scattered)])
    order = np.argsort(value(candidates), kind="stable")[:starts]
    found = [_descend(value, w, low, high, rng) for w in candidates[order]]
    w = found[int(np.argmin(value(np.array(found))))]
    if smoothing:
        w = _inside((1 - smoothing) * w + smoothing / k, low, high)
    mean = _columns(law.predict(w[None]))[0]
    std, each = _deviation(law, w[None], v)
    return BestMixture(
        weights=w,
        predicted=float(mean @ v),
        std=float(std[0]),
        targets=mean,
        targets_std=each[0],
        best_run=float((_columns(law.predict(seen)) @ v).min()) if len(seen) else float("nan"),
        message=message,
    )


def _descend(value: Callable[[Array], Array], w: Array, low: Array, high: Array, rng: np.random.Generator) -> Array:
    """Return a local minimum: SLSQP by difference quotients, then a random search, which step functions need too."""
    from scipy.optimize import minimize

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

    found = minimize(
        at,
        w,
        jac=slope,
        method="SLSQP",
        bounds=list(zip(low, high, strict=True)),
        constraints=[{"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: np.ones(k)}],
        options={"maxiter": 100, "ftol": 1e-9},
    )
    if np.isfinite(found.x).all():
        moved = _inside(np.maximum(found.x, 0), low, high)
        w = moved if value(moved[None])[0] < value(w[None])[0] else w
    size = 0.1
    for _ in range(12):
        near = np.array(
            [_inside((1 - size) * w + size * d, low, high) for d in rng.dirichlet(np.full(k, 0.2), size=24)]
        )
        values = value(np.vstack([w, near]))
        w = np.vstack([w, near])[int(np.argmin(values))]
        size *= SHRINKING
    return w


def _inside(w: Array, low: Array, high: Array) -> Array:
    """Return the nearest mixture within the bounds (Euclidean): clip(w + shift), the shift found by bisection."""
    if (w >= low).all() and (w <= high).all() and abs(w.sum() - 1) < 1e-12:
        return w
    left, right = float((low - w).min()), float((high - w).max())
    for _ in range(60):
        shift = 0.5 * (left + right)
        left, right = (shift, right) if np.clip(w + shift, low, high).sum() < 1 else (left, shift)
    x = np.clip(w + right, low, high)
    return np.asarray(x / x.sum(), dtype=np.float64)


def _deviation(law: Law, W: Array, v: Array) -> tuple[Array, Array]:
    """Return the criterion's standard deviation float64[n] and the targets' float64[n, n_targets]; NaN without.

    Targets of one run err together. How much is known of `AutoLaw`; of others they are taken to err as one, which is
    the most that the criterion can be off by.
    """
    try:
        each = _columns(law.predict(W, return_std=True)[1])
    except ValueError:
        return np.full(len(W), np.nan), np.full((len(W), len(v)), np.nan)
    together = getattr(law, "correlation_", np.ones((len(v), len(v))))
    weighted = each * v
    return np.sqrt(np.maximum(((weighted @ together) * weighted).sum(axis=1), 0)), each


def _columns(values: Array) -> Array:
    return values[:, None] if values.ndim == 1 else values


def _share(criterion: ArrayLike, t: int) -> Array:
    v = np.asarray(criterion, dtype=np.float64)
    if v.shape != (t,) or not (np.isfinite(v).all() and (v >= 0).all() and v.sum() > 0):
        raise ValueError(f"criterion={v.tolist()}: {t} weights of at least 0 are needed, one a target, not all 0")
    return np.asarray(v / v.sum(), dtype=np.float64)


def _bounds(
    k: int,
    lower: ArrayLike,
    upper: ArrayLike,
    tokens: ArrayLike | None,
    total_tokens: float | None,
    max_epochs: float | None,
) -> tuple[Array, Array, str]:
    try:
        low = np.broadcast_to(np.asarray(lower, dtype=np.float64), (k,))
        high = np.broadcast_to(np.asarray(upper, dtype=np.float64), (k,))
    except ValueError:
        raise ValueError(f"lower and upper are a number or {k} of them, one a domain") from None
    message = ""
    if max_epochs is not None:
        if tokens is None or total_tokens is None:
            raise ValueError("max_epochs needs tokens (of each domain) and total_tokens (of the run)")
        have: Sequence[float] | Array = np.asarray(tokens, dtype=np.float64)
        if np.shape(have) != (k,):
            raise ValueError(f"tokens has shape {np.shape(have)}: {k} numbers are needed, one a domain")
        held = np.minimum(high, max_epochs * np.asarray(have) / total_tokens)
        message = f"max_epochs={max_epochs:g} bounds {int((held < high).sum())} of {k} domains"
        high = held
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low >= 0).all() and (low <= high).all()):
        raise ValueError(f"bounds must be finite with 0 <= lower <= upper: lower {low.tolist()}, upper {high.tolist()}")
    if low.sum() > 1 + 1e-9 or high.sum() < 1 - 1e-9:
        raise ValueError(
            f"no mixture fits: the lower bounds sum to {low.sum():.4g}, the upper ones to {high.sum():.4g}"
            + (f" ({message}: fewer total_tokens or more epochs)" if message else "")
        )
    return low, high, message
