"""Mixtures to train proxies with: diverse, and near the domains' sizes only as far as wanted. Knows arrays only."""

import numpy as np
from numpy.typing import ArrayLike

from dynmix.laws.base import Array


def sample_mixtures(
    tokens: ArrayLike, count: int, *, frequency: float = 0.5, scale: tuple[float, float] = (0.5, 2.0), seed: int = 0
) -> Array:
    """Return mixtures to train proxies with, float64[count, n_domains], as MDE samples them (arXiv 2502.15950, B.4).

    Each is Dirichlet: its concentration is the weighted average of the domains' shares of the tokens and a uniform
    distribution, times a factor drawn uniformly from `scale`. The first n mixtures of a seed do not depend on `count`.

    Args:
        tokens: of each domain, float[n_domains], above 0.
        count: of mixtures.
        frequency: of the domains' shares in that average; the paper does not say how much.
        scale: least and greatest factor: small ones give mixtures of few domains.
        seed: of the draws.

    Raises:
        ValueError: tokens that are not above 0, or a frequency or scale out of range.
    """
    sizes = np.asarray(tokens, dtype=np.float64)
    if sizes.ndim != 1 or not len(sizes) or not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError(f"tokens={sizes.tolist()}: a number above 0 is needed for each domain")
    low, high = scale
    if not (0 <= frequency <= 1 and 0 < low <= high):
        raise ValueError(f"frequency={frequency} must be a share and scale={scale} positive, the smaller first")
    centre = frequency * sizes / sizes.sum() + (1 - frequency) / len(sizes)
    rng = np.random.default_rng(seed)
    return np.array([rng.dirichlet(rng.uniform(low, high) * centre) for _ in range(count)]).reshape(count, len(sizes))
