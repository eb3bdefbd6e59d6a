import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixture.golden import TOTAL, golden, interval_counts

cdfs = st.lists(st.integers(0, TOTAL), max_size=6).map(lambda cuts: np.array([*sorted(cuts), TOTAL]))


@given(count=st.integers(0, 3000), offset=st.integers(0, TOTAL - 1), cdf=cdfs)
@settings(max_examples=200, deadline=None)
def test_counts_are_those_of_the_terms_one_by_one(count: int, offset: int, cdf: np.ndarray) -> None:
    terms = [(2654435769 * i + offset) % TOTAL for i in range(count)]
    assert golden(np.arange(count, dtype=np.uint64), offset).tolist() == terms
    lower = [0, *cdf.tolist()]
    expected = [sum(low <= term < high for term in terms) for low, high in zip(lower, cdf.tolist(), strict=False)]
    assert interval_counts(count, offset, cdf).tolist() == expected


def exact_floor_sum(n: int, a: int, b: int) -> int:
    """Sum of (a * i + b) // 2**32 over i < n in Python's own integers, by the textbook recursion."""

    def recurse(n: int, m: int, a: int, b: int) -> int:
        if n == 0:
            return 0
        total = n * (n - 1) // 2 * (a // m) + n * (b // m)
        reach = a % m * n + b % m
        return total + recurse(reach // m, a % m, m, reach % m) if a % m else total

    return recurse(n, TOTAL, a, b)


@given(count=st.integers(0, 2**61), offset=st.integers(0, TOTAL - 1), cdf=cdfs)
@settings(max_examples=200, deadline=None)
def test_counts_are_exact_however_far(count: int, offset: int, cdf: np.ndarray) -> None:
    sums = [exact_floor_sum(count, 2654435769, offset + TOTAL - c) for c in [0, *cdf.tolist()]]
    expected = [low - high for low, high in itertools.pairwise(sums)]
    assert interval_counts(count, offset, cdf).tolist() == expected
    assert sum(expected) == count
