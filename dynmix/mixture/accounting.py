"""What was read of each domain, what is left of it, and where it begins again: closed forms over a schedule.

Draws grow with the position, so where a domain's next epoch begins is found by halving, and no stretch of the stream is
walked but the last few thousand positions. Knows schedules; nothing of files, loaders or models.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from dynmix.mixture.limits import NEVER
from dynmix.mixture.schedule import Ints, MixtureSchedule

_WALKED = 4096  # positions that are gone through one by one, which then is quicker than to halve them
_SHOWN = 8  # epochs that are named where all of a stage are told at once
_EACH = 16  # epochs that are told one by one; of a domain that is read more often, every doubling


class Remaining(NamedTuple):
    """What is left of a domain at some position, in sequences and in tokens (padding included).

    `epoch` is the one that its next sequence belongs to, 0 the first; `sequences` and `tokens` are left of it. The
    last two are left within `max_epochs`, and None where there is no limit.
    """

    epoch: int
    sequences: int
    tokens: int
    limit_sequences: int | None
    limit_tokens: int | None


class NewEpoch(NamedTuple):
    """A domain begins to be read again: `epoch` counts from 0, so that 1 is the second time through it."""

    position: int
    domain: str
    epoch: int

    def __str__(self) -> str:
        return f"domain {self.domain!r} begins its epoch {self.epoch + 1} at position {self.position}, reshuffled"


class UsedUp(NamedTuple):
    """A domain reaches its limit before `position`, from which on the others have its share."""

    position: int
    domain: str

    def __str__(self) -> str:
        return f"domain {self.domain!r} is used up at position {self.position}: the others take its share from there on"


def remaining(schedule: MixtureSchedule, position: int, sequence_length: int) -> dict[str, Remaining]:
    """Domain -> what is left of it at `position`, within its epoch and within its limit."""
    drawn, limits, found = schedule.counts(position).tolist(), schedule.limits.draws(schedule.sizes).tolist(), {}
    for (name, size), n, limit in zip(schedule.sizes.items(), drawn, limits, strict=False):
        epoch, used = divmod(n, size)
        within = None if limit == NEVER else max(0, limit - n)
        left = size - used if within is None or not schedule.limits.hard else min(size - used, within)
        tokens = None if within is None else within * sequence_length
        found[name] = Remaining(epoch, left, left * sequence_length, within, tokens)
    return found


def used_up(schedule: MixtureSchedule, start: int, stop: int) -> list[UsedUp]:
    """Where in [start, stop) domains are used up, in order of position; none where limits do not bind the order.

    A domain of which nothing may be drawn at all has no such position.
    """
    if schedule.limits.when_exhausted != "redistribute" or start >= stop:
        return []
    limits, first = schedule.limits.draws(schedule.sizes), max(start - 1, schedule.starts[0])
    # Domains may join from another process meanwhile, of which nothing is drawn here.
    before, after = (schedule.counts(position)[: len(limits)] for position in (first, stop - 1))
    last_draws = [(n, int(limits[n]) - 1) for n in np.flatnonzero((before < limits) & (after >= limits)).tolist()]
    found = _located(schedule, first, stop - 1, before, last_draws)
    return [UsedUp(position + 1, schedule.names[number]) for position, number, _ in found]


def new_epochs(schedule: MixtureSchedule, start: int, stop: int, assigned: Ints | None = None) -> list[NewEpoch]:
    """Where domains begin to be read again in [start, stop), in order of position.

    Told are a domain's 2nd to 16th epoch and, of one that is read more often, the 32nd, the 64th and so on. With
    `assigned`, the domain of each of these positions, nothing is searched for.
    """
    return list(_epochs(schedule, start, stop, assigned)[0])


def first_epochs(schedule: MixtureSchedule, start: int, stop: int) -> tuple[list[NewEpoch], int]:
    """The first few of `new_epochs`, without a search for the others, and how many there are of all."""
    found, count = _epochs(schedule, start, stop)
    return list(islice(found, _SHOWN)), count


def _epochs(
    schedule: MixtureSchedule, start: int, stop: int, assigned: Ints | None = None
) -> tuple[Iterator[NewEpoch], int]:
    """`new_epochs`, each searched for when it is asked for, and how many there are."""
    sizes = np.maximum(1, np.array(list(schedule.sizes.values()), np.int64))
    before, after = (schedule.counts(position)[: len(sizes)] for position in (start, stop))  # as in `used_up`
    first, last = np.maximum(1, -(-before // sizes)), (after - 1) // sizes
    first_draws = [
        (number, epoch * int(sizes[number]))
        for number in np.flatnonzero(last >= first).tolist()
        for epoch in _epochs_told(int(first[number]), int(last[number]))
    ]
    found = _located(schedule, start, stop, before, first_draws, assigned)
    epochs = (NewEpoch(at, schedule.names[number], draw // int(sizes[number])) for at, number, draw in found)
    return epochs, len(first_draws)


def _located(
    schedule: MixtureSchedule,
    start: int,
    stop: int,
    before: Ints,
    wanted: Sequence[tuple[int, int]],
    assigned: Ints | None = None,
) -> Iterator[tuple[int, int, int]]:
    """Position, domain and number of each draw that is `wanted` by domain and number, all in [start, stop), in order.

    `before` are the draws of each domain before `start`; `assigned` as in `new_epochs`.
    """
    if not wanted:
        return
    if assigned is not None or stop - start <= _WALKED:
        domain = schedule.assign(start, stop)[0] if assigned is None else assigned
        yield from sorted(
            (start + int(np.flatnonzero(domain == number)[draw - before[number]]), number, draw)
            for number, draw in wanted
        )
        return
    middle = (start + stop) // 2
    drawn = schedule.counts(middle)
    yield from _located(schedule, start, middle, before, [(n, draw) for n, draw in wanted if draw < drawn[n]])
    yield from _located(schedule, middle, stop, drawn, [(n, draw) for n, draw in wanted if draw >= drawn[n]])


def _epochs_told(first: int, last: int) -> list[int]:
    each = range(first, min(last, _EACH - 1) + 1)
    doublings = (1 << k for k in range(_EACH.bit_length(), (last + 1).bit_length()))
    return [*each, *(human - 1 for human in doublings if first <= human - 1 <= last)]


def as_rows(found: Sequence[NewEpoch]) -> dict[str, list[tuple[int, int]]]:
    """Domain -> (epoch counted from 1, position) of each, for a journal."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for position, domain, epoch in found:
        rows.setdefault(domain, []).append((epoch + 1, position))
    return rows


def in_words(found: Sequence[NewEpoch], count: int) -> str:
    """The first of `count` epochs, and how many more there are."""
    return "; ".join(map(str, found[:_SHOWN])) + (f"; and {count - _SHOWN} more" if count > _SHOWN else "")
