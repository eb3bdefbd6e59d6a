from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dynmix.mixture import best_fit as module
from dynmix.mixture.best_fit import best_fit, lay_out
from dynmix.mixture.store import TokenStore


def rooms_one_by_one(lengths: list[int], size: int) -> list[int]:
    """What is left in the bins, ascending, when each item, longest first, is put where it leaves the least."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(size - length)
    return sorted(rooms)


@given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=80))))
@example((10, [6, 6, 6, 4, 3, 2]))
def test_items_placed_by_the_thousand_fill_bins_as_those_placed_one_by_one(case: tuple[int, list[int]]) -> None:
    size, lengths = case
    bin_of, count = best_fit(np.array(lengths, np.int64), size)
    rooms = size - np.bincount(bin_of, weights=lengths, minlength=count).astype(int) if lengths else np.array([], int)
    assert sorted(rooms.tolist()) == rooms_one_by_one(lengths, size)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    lengths = np.random.default_rng(0).geometric(0.02, 400)
    return TokenStore.write(tmp_path / "a", [np.arange(n) for n in lengths])


def arrays(made: module.Layout) -> list[list[int]]:
    return [each.array.tolist() for each in made]


def test_real_lengths_leave_next_to_nothing(store: TokenStore) -> None:
    made = lay_out(store, 256)
    filled = made.lengths.array.sum() / (256 * (len(made.rows.array) - 1))
    assert made.lengths.array.sum() == store.num_tokens
    assert filled > 0.98
    starts, rows = made.starts.array.astype(int), made.rows.array.astype(int)
    assert all((np.diff(starts[first:stop]) > 0).all() for first, stop in pairwise(rows))  # as the documents stand
