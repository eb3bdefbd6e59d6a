import copy

import numpy as np

from dynmix.mixture import read_ahead
from dynmix.mixture.read_ahead import ReadAhead
from dynmix.mixture.schedule import MixtureSchedule

SIZES = {"a": 3_000, "b": 40_000}


def test_any_run_is_what_the_schedule_assigns_however_it_was_looked_up(monkeypatch) -> None:
    schedule, asked = MixtureSchedule({"a": 0.5, "b": 0.5}, SIZES, block=8), []
    assign = schedule.assign
    monkeypatch.setattr(schedule, "assign", lambda *bounds: asked.append(bounds) or assign(*bounds))
    ahead = ReadAhead(schedule)
    for run in (range(0, 8), range(8, 16, 2), range(4_090, 4_100), range(4_100, 4_101), range(0, 1)):
        found = ahead.assigned(run, lambda: 6_000)
        expected = assign(run.start, run.stop)
        assert [x.tolist() for x in found] == [x[:: run.step].tolist() for x in expected[:2]]
    assert asked == [(0, 4_096), (4_090, 6_000), (0, 4_096)]


def test_what_another_thread_looks_up_meanwhile_does_not_belong_to_this_request() -> None:
    class Meddled(ReadAhead):
        """One whose window another thread replaces by a further one as soon as it was looked at."""

        @property
        def _window(self):
            found, self.kept = self.kept, further._window
            return found

        @_window.setter
        def _window(self, window):
            self.kept = window

    schedule = MixtureSchedule({"a": 0.5, "b": 0.5}, SIZES, block=8)
    further, ahead = ReadAhead(schedule), Meddled(schedule)
    further.assigned(range(4_096, 4_104), lambda: 6_000)
    ahead.kept = ReadAhead(schedule)._look_up(0, 8, lambda: 6_000, events=False)
    found = ahead.assigned(range(4_104, 4_112), lambda: 6_000)
    assert [x.tolist() for x in found] == [x.tolist() for x in schedule.assign(4_104, 4_112)[:2]]


def test_a_copy_does_not_take_what_was_read_ahead_under_other_stages() -> None:
    schedule = MixtureSchedule({"a": 1.0, "b": 0.0}, SIZES)
    schedule.publish({"a": 1.0, "b": 0.0}, start=10)
    ahead = ReadAhead(schedule)
    ahead.assigned(range(8, 16), lambda: 6_000)
    other, copied = copy.deepcopy((schedule, ahead))  # a generation of its own, that gets as far as this one's was
    other.publish({"a": 0.0, "b": 1.0}, start=20)
    assert copied.assigned(range(20, 21), lambda: 6_000)[0].tolist() == [1]


def test_requests_that_go_on_are_looked_up_ever_further() -> None:
    ahead, seen = ReadAhead(MixtureSchedule({"a": 0.5, "b": 0.5}, SIZES)), []
    for position in range(0, 400_000, 4_096):
        if not ahead.holds(position, position + 1):
            ahead.assigned(range(position, position + 1), lambda: 400_000)
            seen.append(position)
    steps = np.diff(seen).tolist()
    assert steps[:5] == [4_096, 8_192, 16_384, 32_768, 65_536]
    assert set(steps[5:]) == {read_ahead._MOST}


def test_nothing_is_looked_up_beyond_a_stage_and_a_new_one_is_seen() -> None:
    schedule = MixtureSchedule({"a": 1.0, "b": 0.0}, SIZES)
    schedule.hold(100)
    ahead = ReadAhead(schedule)
    ahead.assigned(range(10), lambda: 6_000)
    assert ahead.holds(0, 100)
    assert not ahead.holds(0, 101)
    schedule.publish({"a": 0.0, "b": 1.0}, start=100)
    assert not ahead.holds(0, 100)
    assert set(ahead.assigned(range(100, 110), lambda: 6_000)[0].tolist()) == {1}


def test_events_are_told_of_their_positions_alone_and_only_where_asked_for() -> None:
    ahead = ReadAhead(MixtureSchedule({"a": 1.0, "b": 0.0}, SIZES))
    ahead.assigned(range(10), lambda: 6_000)
    assert not ahead.events(0, 4_096)
    ahead = ReadAhead(MixtureSchedule({"a": 1.0, "b": 0.0}, SIZES))
    ahead.assigned(range(10), lambda: 6_000, events=True)
    assert [str(event) for event in ahead.events(0, 4_096)] == [
        "domain 'a' begins its epoch 2 at position 3000, reshuffled"
    ]
    assert not ahead.events(0, 3_000)
    assert len(ahead.events(3_000, 3_001)) == 1
