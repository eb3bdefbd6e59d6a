"""Rows to measure a domain on at a stage boundary: rows the coming stage will not train on, whatever its weights.

Knows the schedule and nothing of what is measured.
"""

import numpy as np

from dynmix.mixture.schedule import Ints, MixtureSchedule


def probe_rows(schedule: MixtureSchedule, domain: int, count: int, start: int, window: int) -> Ints:
    """Rows of a domain that none of the next `window` positions can hold, though all of them drew this domain.

    Where its epoch has room these are rows the epoch has not yet shown. Near its end they are the first rows beyond the
    window's draws that are not among those, and if a small domain has too few of them, those whose turn comes latest.

    Args:
        schedule: the schedule, with every stage before `start` published.
        domain: number of the domain.
        count: rows wanted; all of the domain's rows if it has fewer. They are all different.
        start: position of the stage boundary.
        window: positions from `start` on that must not hold a probe row, as far as the domain's size allows.

    Raises:
        Undecided: `start` is beyond the last stage's declared end.
        ValueError: count, window or the domain's size is not positive.
    """
    size = schedule.sizes[schedule.names[domain]]
    if count < 1 or window < 0 or size < 1:
        raise ValueError(f"count={count}, window={window}, size={size} of domain {domain}: nothing to choose from")
    count = min(count, size)
    drawn = int(schedule.counts(start)[domain])
    if drawn % size + window + count <= size:
        return schedule.rows(domain, np.arange(count) + drawn + window)[0]
    window = min(window, 2 * size)  # that many draws hold a whole epoch, hence every row
    # Among twice as many more draws (two epochs at most) are `count` different rows that the window does not hold.
    beyond = min(2 * (window + count), 2 * size)
    rows = schedule.rows(domain, np.arange(window + beyond) + drawn)[0]
    distinct, turn = np.unique(rows, return_index=True)
    order = np.argsort(turn)
    first = min(int(np.searchsorted(turn[order], window)), len(order) - count)
    return distinct[order[first : first + count]]


def repeated(schedule: MixtureSchedule, domain: int, rows: Ints, start: int, stop: int) -> int:
    """How many of `rows` the positions [start, stop) do hold, now that their stages are published."""
    first, last = (int(schedule.counts(position)[domain]) for position in (start, stop))
    last = min(last, first + 2 * schedule.sizes[schedule.names[domain]])  # a whole epoch and more: every row
    return int(np.isin(rows, schedule.rows(domain, np.arange(first, last))[0]).sum())
