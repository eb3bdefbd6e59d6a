"""Weights as the integers that decide which domain is drawn. Knows no position, no stage and no file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dynmix.mixture.quota import TOTAL, Ints

Weights = Mapping[str, float] | npt.NDArray[np.integer] | Sequence[int]
"""Domain -> weight, or an `integer_cdf` in the domains' order."""


def integer_cdf(weights: npt.ArrayLike) -> Ints:
    """Cumulative weights in units of 2**-32, int64[n_domains], the last one 2**32.

    Compute it once and share it, as float sums may differ between machines. Domain k is drawn by the integers
    [cdf[k - 1], cdf[k]): none for a weight of zero, at least one for a positive one. Raises ValueError unless all are
    finite, >= 0, with a sum within 1e-6 of 1.
    """
    share = np.asarray(weights, np.float64)
    if share.ndim != 1 or not share.size:
        raise ValueError(f"weights must be a vector with one weight a domain, not an array of shape {share.shape}")
    if bad := np.flatnonzero(~(np.isfinite(share) & (share >= 0))).tolist():
        raise ValueError(f"weights must be finite and >= 0: weight {share[bad[0]]} of domain number {bad[0]} is not")
    total = math.fsum(share)  # the same on every machine, which a vectorised sum need not be
    if not math.isclose(total, 1.0, rel_tol=0.0, abs_tol=1e-6):
        raise ValueError(f"weights sum to {total:.9g}, not to 1: divide each of them by their sum")
    # Whole units first, at least one where the weight is positive so that none vanishes by rounding, then largest
    # remainders. Weights that are multiples of a unit stay as they are: what was published can be published again.
    exact = share / total * TOTAL
    units = np.maximum(np.floor(exact).astype(np.int64), share > 0)
    left = TOTAL - int(units.sum())
    if left > 0:
        units[np.argsort(units - exact, kind="stable")[:left]] += 1
    else:
        units[np.argmax(units)] += left  # at most a unit a domain, from the one that will not miss it
    return np.cumsum(units)


def checked_cdf(weights: Weights, sizes: Mapping[str, int]) -> Ints:
    """Return `weights` as an integer cdf over the domains of `sizes`, int64[n_domains].

    Raises ValueError for other domains, no distribution, or weight on a domain without rows.
    """
    if isinstance(weights, Mapping):
        cdf = integer_cdf(list(matched(weights, tuple(sizes), "weights").values()))
    else:
        given = np.asarray(weights)
        if given.dtype.kind not in "iu" or given.shape != (len(sizes),):
            raise ValueError(
                f"weights must be a mapping from name to weight or the {len(sizes)} integers of an integer_cdf, not"
                f" {given.dtype} of shape {given.shape}"
            )
        cdf = given.astype(np.int64)
        if cdf[-1] != TOTAL or (np.diff(cdf, prepend=0) < 0).any():
            raise ValueError(f"an integer cdf must ascend from 0 to 2**32, not {cdf.tolist()[:8]}...{cdf[-1]}")
    if empty := [n for n, units in zip(sizes, np.diff(cdf, prepend=0), strict=True) if units and not sizes[n]]:
        raise ValueError(f"domain {empty[0]!r} has weight but no rows: give it rows, or weight 0")
    return cdf


def matched(values: Mapping[str, Any], names: Sequence[str], what: str) -> dict[str, Any]:
    """`values` in the order of `names`; a ValueError names those that are missing or unknown."""
    missing, extra = [n for n in names if n not in values], [n for n in values if n not in names]
    if missing or extra:
        raise ValueError(f"{what} must have the domains {list(names)}: missing {missing}, unknown {extra}")
    return {name: values[name] for name in names}
