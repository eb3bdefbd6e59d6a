import pytest

from dynmix.mixture.reading import InOrder


def test_ranks_one_after_the_other_are_passes() -> None:
    order = InOrder(64)
    for rank in range(8):
        for start in range(rank, 64, 32):
            assert order.runs(list(range(start, start + 32, 8)), lambda: 64) == [range(start, start + 25, 8)]


def test_requests_that_go_back_and_forth_are_a_shuffle() -> None:
    order = InOrder(64)
    for start in (8, 40, 24, 32, 16, 48):
        order.runs(list(range(start, start + 8)), lambda: 64)
    with pytest.raises(ValueError, match="requests go back and forth, now to 24"):
        order.runs(list(range(24, 32)), lambda: 64)
