"""The golden-ratio sequence in integers, and how many of its terms lie in an interval without walking it.

Term i is (A * i + offset) mod 2**32 with A = 2**32 over the golden ratio: of all such sequences the one whose every
prefix is spread most evenly. Knows nothing of domains or mixtures.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
UInts = npt.NDArray[np.uint64]

TOTAL = 1 << 32
_GOLDEN = 2654435769  # odd, so that TOTAL consecutive terms hold every integer below TOTAL once


def golden(index: UInts, offset: int) -> Ints:
    """Terms of the sequence, int64 in [0, 2**32); `index` any uint64, `offset` 0 to 2**32 - 1."""
    return ((index * _GOLDEN + offset) & (TOTAL - 1)).astype(np.int64)


def interval_counts(count: int, offset: int, cdf: Ints) -> Ints:
    """How many of the first `count` terms lie in [cdf[k - 1], cdf[k]), for every k; exact for any count below 2**62.

    Args:
        count: number of terms.
        offset: 0 to 2**32 - 1, as in `golden`.
        cdf: int64[n], non-decreasing, from 0 to 2**32; the first interval begins at 0.

    Returns:
        int64[n].
    """
    periods, rest = divmod(count, TOTAL)
    bounds = np.concatenate([[0], cdf])
    # For x >= 0: [x mod T < c] = floor((x + T) / T) - floor((x + T - c) / T).
    sums = _floor_sum(rest, (offset + TOTAL - bounds).astype(np.uint64)).view(np.int64)  # mod 2**64; differences exact
    counts: Ints = periods * (bounds[1:] - bounds[:-1]) + (sums[:-1] - sums[1:])
    return counts


def _floor_sum(count: int, b: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Sum over i in [0, count) of floor((_GOLDEN * i + b) / 2**32) for each b; count <= 2**32, result mod 2**64.

    The Euclid-like algorithm of the AtCoder Library. Only `n` and `b` differ between elements; as n, a and b stay
    below 2**32 after the reductions, a * n + b never overflows.
    """
    total = np.zeros_like(b)
    n = np.full_like(b, count)
    a, m = _GOLDEN, TOTAL
    while n.any():
        quotient, a = divmod(a, m)
        total += n * (n - 1) // 2 * quotient + n * (b // m)
        reach = n * a + b % m
        n, b = reach // m, reach % m
        a, m = m, a
    return total
