import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixture.probe import probe_rows, repeated
from dynmix.mixture.schedule import MixtureSchedule


def turns(schedule: MixtureSchedule, domain: int, start: int) -> dict[int, int]:
    """Row -> how many draws of the domain after `start` come before its next one, by walking."""
    drawn, size = int(schedule.counts(start)[domain]), schedule.sizes[schedule.names[domain]]
    found: dict[int, int] = {}
    for draw in range(2 * size):
        found.setdefault(int(schedule.rows(domain, np.array([drawn + draw]))[0][0]), draw)
    return found


@given(
    size=st.integers(1, 60),
    count=st.integers(1, 40),
    start=st.integers(0, 300),
    window=st.integers(0, 90),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_no_draw_of_the_window_is_a_probe_while_others_are_left(
    size: int, count: int, start: int, window: int, seed: int
) -> None:
    schedule = MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": size, "b": 100}, seed=seed)
    rows = probe_rows(schedule, 0, count, start, window).tolist()
    turn = turns(schedule, 0, start)
    assert len(set(rows)) == len(rows) == min(count, size)
    safe = [row for row in turn if turn[row] >= window]
    assert len(set(rows) & set(safe)) == min(len(safe), len(rows))
    if len(safe) < len(rows):  # the rest are those whose turn comes latest
        assert sorted(turn[row] for row in rows) == list(np.sort(list(turn.values())))[-len(rows) :]
    schedule.publish({"a": 1.0, "b": 0.0}, start=start + 1 if start == 0 else start)
    if start and window:
        in_window = schedule.assign(start, start + window)[1]
        assert repeated(schedule, 0, np.array(rows), start, start + window) == np.isin(rows, in_window).sum()
        if len(safe) >= len(rows):
            assert not np.isin(rows, in_window).any()


def test_while_its_epoch_has_room_rows_are_fresh() -> None:
    schedule = MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": 1000, "b": 100})
    rows = probe_rows(schedule, 0, 50, 600, 400)
    domain, seen, _ = schedule.assign(0, 1000)
    assert not np.isin(rows, seen[domain == 0]).any()


def test_repeats_are_counted_by_what_was_published() -> None:
    schedule = MixtureSchedule({"a": 0.5, "b": 0.5}, {"a": 30, "b": 100})
    rows = probe_rows(schedule, 0, 30, 100, 10)
    schedule.publish({"a": 0.0, "b": 1.0}, start=100)
    assert repeated(schedule, 0, rows, 100, 300) == 0
    schedule.publish({"a": 1.0, "b": 0.0}, start=300)
    assert repeated(schedule, 0, rows, 300, 310) == len(set(schedule.assign(300, 310)[1].tolist())) >= 5
    assert repeated(schedule, 0, rows, 300, 10**9) == 30


def test_an_enormous_domain_costs_its_window_only() -> None:
    schedule = MixtureSchedule({"a": 1.0}, {"a": 10**12})
    for start in (0, 10**12 - 500, 10**12):
        rows = probe_rows(schedule, 0, 8, start, 2000)
        schedule_after = MixtureSchedule({"a": 1.0}, {"a": 10**12})
        assert repeated(schedule_after, 0, rows, start, start + 2000) == 0


@pytest.mark.parametrize(("count", "window"), [(0, 5), (5, -1)])
def test_nothing_to_choose_from(count: int, window: int) -> None:
    with pytest.raises(ValueError, match=f"count={count}, window={window}"):
        probe_rows(MixtureSchedule({"a": 1.0}, {"a": 10}), 0, count, 0, window)
