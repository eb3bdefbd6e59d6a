"""Which domain and row stand at the positions that one process reads, looked up some thousands at a time.

A call of the schedule has a fixed cost, and whoever asks for some positions asks for those behind them next. Knows the
schedule; nothing of sequences, nor of who reads.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dynmix.mixture.accounting import NewEpoch, UsedUp, new_epochs, used_up
from dynmix.mixture.schedule import Ints, MixtureSchedule

_LEAST, _MOST = 4096, 65_536  # positions looked up at once: at first, and where requests go on and on


class _Window(NamedTuple):
    """What stands at the positions [start, stop), under one generation of the schedule."""

    generation: int
    start: int
    stop: int
    domain: Ints
    row: Ints
    events: Sequence[NewEpoch | UsedUp]

    def holds(self, start: int, stop: int, schedule: MixtureSchedule) -> bool:
        """Whether the schedule still assigns [start, stop) as is said here."""
        return self.start <= start <= stop <= self.stop and self.generation == schedule.generation


class ReadAhead:
    """What a schedule assigns to a window of positions, kept until the schedule changes."""

    def __init__(self, schedule: MixtureSchedule) -> None:
        self._schedule = schedule
        nothing = np.zeros(0, np.int64)
        self._window = _Window(-1, 0, 0, nothing, nothing, [])  # replaced as a whole: threads may read at once

    def __reduce__(self) -> tuple[type["ReadAhead"], tuple[MixtureSchedule]]:
        return type(self), (self._schedule,)  # a copy's schedule counts generations of its own

    def holds(self, start: int, stop: int) -> bool:
        """Whether the positions [start, stop) were looked up, and nothing was published since."""
        return self._window.holds(start, stop, self._schedule)

    def assigned(self, run: range, ends_at: Callable[[], int], *, events: bool = False) -> tuple[Ints, Ints]:
        """Domain number and row of each position of `run`, which are decided, int64[len(run)] each.

        Nothing is looked up beyond `ends_at()`. With `events`, the method of that name can tell of what is looked up.
        """
        start, stop, window = run[0], run[-1] + 1, self._window
        if not window.holds(start, stop, self._schedule):
            self._window = window = self._look_up(start, stop, ends_at, events)
        part = slice(start - window.start, stop - window.start, run.step)
        return window.domain[part], window.row[part]

    def events(self, start: int, stop: int) -> Sequence[NewEpoch | UsedUp]:
        """Where in [start, stop) domains begin to be read again or are used up, in order, as far as it was noted."""
        noted = self._window.events
        return noted[bisect_left(noted, (start,)) : bisect_left(noted, (stop,))]

    def _look_up(self, start: int, stop: int, ends_at: Callable[[], int], events: bool) -> _Window:
        schedule, before = self._schedule, self._window
        generation, end = schedule.generation, schedule.end  # first: what is found is never too new for it
        # Twice as far each time, because a request here or there is for looking and one behind the other is a run.
        far = max(_LEAST, min(2 * len(before.domain), _MOST) if start == before.stop else 0)
        limit = ends_at()
        last = max(stop, min(start + far, limit, limit if end is None else end))
        domain, row, epoch = schedule.assign(start, last)
        found: list[NewEpoch | UsedUp] = []
        if events:
            found += new_epochs(schedule, start, last, domain) if epoch.any() else []
            found += used_up(schedule, start, last)
        return _Window(generation, start, last, domain, row, sorted(found))
