"""Weights on the simplex with bounds: validation and water-filling.

Knows nothing of influence or of what a domain is.
"""

from collections.abc import Collection, Sequence

import numpy as np

from dynmix.observation import Array, Weights


def normalized(weights: Weights, domains: Sequence[str]) -> Array:
    """Return weights as float64[n_domains] in the order of `domains`, summing to 1 exactly up to rounding.

    Raises:
        ValueError: missing or unknown domains, negative or non-finite weights, a sum more than 1e-6 away from 1.
    """
    if set(weights) != set(domains):
        missing, unknown = sorted(set(domains) - set(weights)), sorted(set(weights) - set(domains))
        raise ValueError(f"weights do not match the domains: missing {missing}, unknown {unknown}")
    w = np.array([weights[name] for name in domains], dtype=np.float64)
    if not (np.isfinite(w).all() and (w >= 0).all()):
        bad = {name: float(x) for name, x in zip(domains, w, strict=True) if not (np.isfinite(x) and x >= 0)}
        raise ValueError(f"weights must be finite and at least 0, got {bad}")
    if abs(w.sum() - 1) > 1e-6:
        raise ValueError(f"weights sum to {w.sum():.9g}, not 1: divide each by that sum")
    return np.asarray(w / w.sum(), dtype=np.float64)


def mixture(weights: Weights, domains: Collection[str], what: str) -> dict[str, float]:
    """Return `normalized` weights by name, in the order of `domains`. Raises ValueError, beginning with `what`."""
    try:
        return dict(zip(domains, normalized(weights, tuple(domains)).tolist(), strict=True))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def water_fill(log_weights: Array, upper: Array, lower: Array | float = 0.0) -> Array:
    """Return w_j = exp(log_weights_j - nu), clipped to [lower_j, upper_j], with nu such that w sums to 1.

    It is the minimiser of sum_j w_j (log w_j - log_weights_j) over the simplex within the bounds (a KL projection).
    `log_weights` may be -inf (never filled above `lower`); they may be thousands apart, as softmax arguments are.

    Raises:
        ValueError: the lower bounds sum to more than 1, or the upper ones of what may be filled to less.
    """
    lower = np.broadcast_to(lower, upper.shape)
    top = np.where(np.isfinite(log_weights), upper, lower)
    if top.sum() < 1 - 1e-12:
        raise ValueError(f"the upper bounds sum to {top.sum():.6g}: no mixture fits under them; raise some")
    if lower.sum() > 1 + 1e-12:
        raise ValueError(f"the lower bounds sum to {lower.sum():.6g}: no mixture fits above them; lower some")
    with np.errstate(divide="ignore"):
        log_lower, log_upper = np.log(lower), np.log(upper)
    # Guess which domains are at a bound, pour what is left over the others, look where that puts them, until it fits.
    # The sum falls as nu rises, so every guess also brackets nu; a guess outside the bracket halves it instead.
    low, high, nu = -np.inf, np.inf, _log_sum(log_weights)
    for _ in range(200):
        w = np.exp(np.clip(log_weights - nu, log_lower, log_upper))
        total = w.sum()
        if abs(total - 1) < 1e-13 or nu in (low, high) or high - low < 1e-15 * abs(nu):
            break
        low, high = (nu, high) if total > 1 else (low, nu)
        free = (log_weights - nu > log_lower) & (log_weights - nu < log_upper)
        room = 1 - w[~free].sum()
        if free.any() and room > 0:
            guess = _log_sum(log_weights[free]) - float(np.log(room))
            if guess == nu:
                break
            if low < guess < high:
                nu = guess
                continue
        with np.errstate(invalid="ignore"):
            edges = np.concatenate([log_weights - log_upper, log_weights - log_lower])
        edges = edges[np.isfinite(edges) & (edges > low) & (edges < high)]
        # Only bounds hold at this nu: go to the next place where a domain leaves or reaches one.
        nu = float(np.median(edges)) if len(edges) else _midpoint(low, high)
    return np.asarray(w / w.sum(), dtype=np.float64)


def _log_sum(z: Array) -> float:
    """Return log(sum(exp(z))): scipy's costs several times what it computes, and this is the solver's inner loop."""
    top = float(z.max())
    return top + float(np.log(np.exp(z - top).sum())) if np.isfinite(top) else top


def _midpoint(low: float, high: float) -> float:
    if np.isfinite(low) and np.isfinite(high):
        return 0.5 * (low + high)
    return low + 1.0 if np.isfinite(low) else high - 1.0


def cap(weights: Array, upper: Array, lower: Array | float = 0.0) -> Array:
    """Return `weights` within the bounds: the excess goes to the domains with room, in proportion to their weights.

    Domains of weight 0 take a share, in proportion to their bounds, only if the others cannot hold everything.

    Raises:
        ValueError: the upper bounds sum to less than 1, or the lower ones to more.
    """
    lower = np.broadcast_to(lower, upper.shape)
    if (weights <= upper).all() and (weights >= lower).all():
        return weights
    if upper.sum() < 1 - 1e-12:
        raise ValueError(f"the upper bounds sum to {upper.sum():.6g}: no mixture fits under them; raise some")
    held = np.where(weights > 0, upper, lower).sum()
    if held < 1 - 1e-12:
        spare = np.where(weights > 0, 0, upper - lower)
        return np.where(weights > 0, upper, lower + spare * (1 - held) / spare.sum())
    if held < 1:  # but for rounding, the others hold everything
        return np.asarray(np.where(weights > 0, upper, lower) / held, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return water_fill(np.log(weights), upper, lower)
