"""Weights on the simplex with upper bounds: validation and water-filling.

Knows nothing of influence or of what a domain is.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dynmix.mixers.problem import Array


def normalized(weights: Mapping[str, float], domains: Sequence[str]) -> Array:
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


def water_fill(log_weights: Array, upper: Array) -> Array:
    """Return w_j = min(upper_j, exp(log_weights_j - nu)) with nu such that w sums to 1.

    It is the minimiser of sum_j w_j (log w_j - log_weights_j) over the simplex with upper bounds (a KL projection).
    `log_weights` may be -inf (never filled); computed in logs because softmax arguments may be thousands apart.

    Raises:
        ValueError: the bounds of the domains that may be filled sum to less than 1.
    """
    open_ = np.isfinite(log_weights) & (upper > 0)
    w = np.zeros_like(upper)
    z, u = log_weights[open_], upper[open_]
    if u.sum() < 1 - 1e-12:
        raise ValueError(f"the upper bounds sum to {u.sum():.6g}: no mixture fits under them; raise some")
    # Domains hit their bounds in the order of z - log(upper): try each prefix of that order as the capped set.
    order = np.argsort(-(z - np.log(u)), kind="stable")
    z, u = z[order], u[order]
    capped = np.concatenate([[0.0], np.cumsum(u)[:-1]])
    rest = np.logaddexp.accumulate(z[::-1])[::-1]
    room = np.maximum(1 - capped, 0)
    with np.errstate(divide="ignore"):
        nu = rest - np.log(room)
        fits = z - nu <= np.log(u) + 1e-15
    k = int(np.argmax(fits)) if fits.any() else len(z) - 1
    filled = np.exp(np.minimum(z - nu[k], np.log(u))) if room[k] > 0 else np.zeros_like(u)
    filled[:k] = u[:k]
    w[np.flatnonzero(open_)[order]] = filled
    return np.asarray(w / w.sum(), dtype=np.float64)


def cap(weights: Array, upper: Array) -> Array:
    """Return `weights` under `upper`: the excess goes to the domains with room, in proportion to their weights.

    Domains of weight 0 take a share, in proportion to their bounds, only if the others cannot hold everything.

    Raises:
        ValueError: the bounds sum to less than 1.
    """
    if (weights <= upper).all():
        return weights
    if upper.sum() < 1 - 1e-12:
        raise ValueError(f"the upper bounds sum to {upper.sum():.6g}: no mixture fits under them; raise some")
    held = upper[weights > 0].sum()
    if held < 1:
        spare = np.where(weights > 0, 0, upper)
        return np.where(weights > 0, upper, spare * (1 - held) / spare.sum())
    with np.errstate(divide="ignore"):
        return water_fill(np.log(weights), upper)
