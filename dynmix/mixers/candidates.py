"""Mixtures inside a box, in plain arrays: spread over it for the surrogate's design, around a centre for the search.

The box is {w : lower <= w <= upper, sum w = 1}, a slice of a hyperrectangle. What is returned lies in it to 1e-12.
Knows nothing of influence, of tasks or of what a domain is.
"""

import numpy as np

from dynmix.observation import Array

# Below this share of accepted draws rejection gives way to hit-and-run.
LEAST_ACCEPTED = 0.02


def spread(count: int, lower: Array, upper: Array, rng: np.random.Generator) -> tuple[Array, float]:
    """Return `count` mixtures spread over the box, float64[count, n_domains], and the share that rejection accepted.

    As in TiKMiX-M (arXiv 2508.17677, Section 3.3): a Latin hypercube in the hyperrectangle, each row divided by its
    sum, rows that left the box by that rejected. The share accepted falls with the number of domains (1 in 10,000 at
    100); under 2 % what is missing comes from `hit_and_run`. The two differ: hit-and-run tends to the uniform
    distribution on the slice, while rejection's density there is that of all the points of the hyperrectangle that
    normalise to a mixture, so it is somewhat lower where those rays are short, near the vertices.

    Raises:
        ValueError: the box holds no mixture.
    """
    from scipy.stats.qmc import LatinHypercube  # half a second to import

    start = centre(lower, upper)  # raises where there is nothing to draw
    accepted, drawn = np.empty((0, len(lower))), 0
    while len(accepted) < count and (drawn == 0 or len(accepted) > LEAST_ACCEPTED * drawn):
        w = lower + (upper - lower) * LatinHypercube(len(lower), rng=rng).random(count)
        w = w / np.maximum(w.sum(axis=1, keepdims=True), 1e-300)
        inside = ((w >= lower) & (w <= upper)).all(axis=1)
        accepted, drawn = np.concatenate([accepted, w[inside]]), drawn + count
    missing = max(0, count - len(accepted))
    return np.concatenate([accepted[:count], hit_and_run(missing, start, lower, upper, rng)]), len(accepted) / drawn


def hit_and_run(count: int, start: Array, lower: Array, upper: Array, rng: np.random.Generator) -> Array:
    """Return `count` mixtures, near uniform on the box, float64[count, n_domains], by chains that begin at `start`.

    Each sweep pairs the domains at random and, in every pair, draws how its total is split anew, uniformly between the
    bounds: hit-and-run along e_i - e_j. The pairs of a sweep are disjoint, so this is m / 2 exact Gibbs steps at once,
    and a disturbance reaches all domains in a number of sweeps logarithmic in m; scales of weights do not matter to it.
    """
    m = len(start)
    w = np.tile(start, (count, 1))
    for _ in range(30 + 10 * int(np.log2(m))):
        order = rng.permutation(m)
        i, j = order[: m // 2], order[m // 2 : m // 2 * 2]
        total = w[:, i] + w[:, j]
        low, high = np.maximum(lower[i], total - upper[j]), np.minimum(upper[i], total - lower[j])
        w[:, i] = low + rng.random(total.shape) * np.maximum(high - low, 0)
        w[:, j] = total - w[:, i]
    return into(w, lower, upper)


def around(count: int, middle: Array, concentration: float, lower: Array, upper: Array,
           rng: np.random.Generator) -> Array:  # fmt: skip
    """Return `count` draws of Dirichlet(concentration * middle) moved into the box, float64[count, n_domains]."""
    gamma = rng.standard_gamma(concentration * middle, size=(count, len(middle)))
    total = gamma.sum(axis=1, keepdims=True)
    return into(np.where(total > 0, gamma / np.where(total > 0, total, 1), middle), lower, upper)


def into(w: Array, lower: Array, upper: Array) -> Array:
    """Return `w` [..., n_domains] moved into the box: cut at the bounds, the sum made up from the room that is left."""
    w = np.clip(w, lower, upper)
    for _ in range(2):  # the second time for the rounding of the first
        excess = w.sum(axis=-1, keepdims=True) - 1
        room = np.where(excess > 0, w - lower, upper - w)
        total = room.sum(axis=-1, keepdims=True)
        w = w - room * (excess / np.where(total > 0, total, np.inf))
    return np.clip(w, lower, upper)


def centre(lower: Array, upper: Array) -> Array:
    """Return the mixture as far between the bounds in every domain, float64[n_domains].

    Raises:
        ValueError: the box holds no mixture.
    """
    if (lower > upper).any() or lower.sum() > 1 + 1e-9 or upper.sum() < 1 - 1e-9:
        raise ValueError(
            f"lower bounds sum to {lower.sum():.6g} and upper bounds to {upper.sum():.6g}, with "
            f"{int((lower > upper).sum())} domains' crossed: no mixture lies between them"
        )
    return into(lower + (upper - lower) * (1 - lower.sum()) / max(float((upper - lower).sum()), 1e-300), lower, upper)
