"""How often a domain may be read, and how a stage goes on when one of them has been read that often.

Under "redistribute", from the very position at which a domain of a stage reaches its limit on, that domain's share of
the stage's integers belongs to the others, in proportion to theirs; the stage keeps its blocks and its keys. All of it
follows from the stage's row, the limits and the order, so every process finds the same, when it first needs it.
Knows rows of the stage table and their order; nothing of tokens, loaders or who decides weights.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple, SupportsFloat

import numpy as np

from dynmix.mixture.order import Order
from dynmix.mixture.quota import TOTAL, Ints
from dynmix.mixture.stages import StageRow

Policy = Literal["repeat", "stop", "redistribute"]
MaxEpochs = float | Mapping[str, float] | None

_WALKED = 1024  # positions that are gone through one by one, which then is quicker than to halve them
_NEAR = 64  # of these, those that are gone through first

NEVER = 1 << 62  # beyond every position, and more draws than any domain gives


class Exhausted(LookupError, StopIteration):  # noqa: N818 (a state of affairs: the data that may be read is read)
    """A position beyond the stream: the domains that are to stand there have been read as often as they may be.

    It is a StopIteration too, so that a loader which asks for it ends as it does behind its last batch.
    """


@dataclass(frozen=True)
class Limits:
    """What the user says of repetition: `max_epochs` and `when_exhausted` as in `MixtureDataset`.

    A limit is reached with the last whole group that fits, up to `group` - 1 sequences early. Raises ValueError for a
    limit below 0, a policy there is not, or one that has no limit to act on.
    """

    max_epochs: MaxEpochs = None
    when_exhausted: Policy | None = None
    group: int = 1  # sequences that are drawn at once
    hard: bool = field(init=False)  # whether the order of the samples depends on the limits

    def __post_init__(self) -> None:
        given = self.max_epochs if isinstance(self.max_epochs, Mapping) else {None: self.max_epochs}
        for name, limit in given.items():
            if limit is not None and not (isinstance(limit, SupportsFloat) and float(limit) >= 0):
                raise ValueError(f"max_epochs{'' if name is None else f'[{name!r}]'}={limit!r}: a number, at least 0")
        numbers = {n: x if isinstance(x, int) else float(x) for n, x in given.items() if x is not None}  # for JSON
        object.__setattr__(self, "max_epochs", numbers if isinstance(self.max_epochs, Mapping) else numbers.get(None))
        policy = self.when_exhausted or ("repeat" if self.max_epochs is None else "redistribute")
        if policy not in ("repeat", "stop", "redistribute"):
            raise ValueError(f"when_exhausted={policy!r}: 'repeat', 'stop' or 'redistribute'")
        if policy != "repeat" and self.max_epochs is None:
            raise ValueError(f"when_exhausted={policy!r} needs max_epochs: how often a domain may be read, 1 for once")
        if self.group < 1:
            raise ValueError(f"homogeneous={self.group}: at least 1 sequence of one domain in a row")
        object.__setattr__(self, "when_exhausted", policy)
        object.__setattr__(self, "hard", policy != "repeat")

    def epochs(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Name -> its limit in epochs, of the domains that have one."""
        if isinstance(self.max_epochs, Mapping):
            return dict(self.max_epochs)
        return {} if self.max_epochs is None else dict.fromkeys(sizes, float(self.max_epochs))

    def draws(self, sizes: Mapping[str, int]) -> Ints:
        """How often each domain may be drawn, int64[n_domains]; NEVER where there is no limit."""
        epochs = self.epochs(sizes)
        draws = np.array([_draws(epochs.get(name, math.inf), size) for name, size in sizes.items()], np.int64)
        return np.where(draws < NEVER, draws - draws % self.group, draws) if self.hard else draws

    def without_a_group(self, sizes: Mapping[str, int]) -> list[str]:
        """Why nothing can be read of some domains, in words: each may be read, but not as much as a group."""
        some = replace(self, group=1).draws(sizes) > 0
        return [
            f"domain {name!r} has {size} rows, within max_epochs fewer than the {self.group} that stand in a row: lower"
            " homogeneous, or raise its limit"
            for (name, size), n, any_ in zip(sizes.items(), self.draws(sizes), some, strict=True)
            if any_ and not n
        ]

    def state(self) -> dict[str, Any]:
        """What the order depends on, JSON-able."""
        return {"max_epochs": self.max_epochs, "when_exhausted": self.when_exhausted} if self.hard else {}

    def differences(self, state: Mapping[str, Any], common: Collection[str]) -> list[str]:
        """In words, how the limits of `state` differ from these; of limits by name, those of the `common` domains."""
        none = {"max_epochs": None, "when_exhausted": "repeat"}
        found = []
        for key, now in (none | self.state()).items():
            then = (none | dict(state))[key]
            if isinstance(now, Mapping) and isinstance(then, Mapping):
                now, then = ({name: each[name] for name in common if name in each} for each in (now, then))
            if then != now:
                found.append(f"{key} was {then} and is {now}")
        return found

    def after(self, state: Mapping[str, Any], names: Collection[str]) -> "Limits":
        """The limits of `state`, whose domains are `names`, and these for domains that it had not."""
        then = state.get("max_epochs")
        if not isinstance(then, Mapping) or not isinstance(self.max_epochs, Mapping):
            return self
        return replace(self, max_epochs={**{n: x for n, x in self.max_epochs.items() if n not in names}, **then})


def _draws(epochs: float, size: int) -> int:
    # As the number is written: 0.29 of 100 rows are 29, though the float below it times 100 is less.
    return NEVER if math.isinf(epochs) else min(NEVER, math.floor(Fraction(repr(float(epochs))) * size))


class _Stretch(NamedTuple):
    """Positions [start, stop) of a stage, over which one row of integers holds."""

    start: int
    stop: int
    row: StageRow
    drawn_at_stop: Ints  # of each domain, before `stop`; of no meaning where that is `NEVER`


class Course:
    """How one stage goes on under limits: which row of integers holds from which position on.

    There is more than one row under "redistribute" alone: one for each stretch between two positions at which domains
    reach their limits. Every one follows from the one before; they are found when they are first asked for, and kept.

    Made of the stage as it was published, the draws that each domain may have over the whole run, int64[n_domains], and
    the schedule's policy and order. `dry` is the first position that the stage has nothing for, `NEVER` if none.
    """

    def __init__(self, stage: StageRow, limit: Ints, policy: Policy, order: Order) -> None:
        self._stage, self._limit, self._order = stage, limit, order
        self._weighted = stage.units > 0
        begins_used_up = bool((self._weighted & (stage.base >= limit)).any())
        if policy == "repeat":
            self.dry, first = NEVER, _Stretch(stage.start, NEVER, stage, stage.base)
        elif policy == "redistribute":
            self.dry = self._all_used_up()
            some_left = stage.start < self.dry
            row = self._row_from(stage.start, stage.base) if begins_used_up and some_left else stage
            first = self._stretch(row, stage.start, stage.base)
        elif begins_used_up:
            self.dry, first = stage.start, _Stretch(stage.start, stage.start, stage, stage.base)
        else:
            first = self._stretch(stage, stage.start, stage.base)
            self.dry = first.stop
        self._found = [first]

    def at(self, position: int) -> tuple[StageRow, int]:
        """The row that holds at `position`, and the first position at which it does not any more."""
        stretch = self._found[self._index(position)]
        return stretch.row, stretch.stop

    def counts(self, position: int) -> Ints:
        """Draws of each domain before `position`, which lies in the stage, or at its end."""
        return self._order.counts(self.at(position)[0], position)

    def ended(self, position: int) -> tuple[Ints, Ints]:
        """`base` and `owed` of a stage that follows at `position`, which is at most where this one runs dry.

        A domain is owed what it was owed at the start and what the weights gave it since, less what was drawn.
        """
        drawn, group = self.counts(position), self._order.group
        owed = self._stage.owed - ((drawn - self._stage.base) // group << 32)
        stretches = self._found[: self._index(position) + 1]
        stops = [*(stretch.start for stretch in stretches[1:]), position]
        for (start, _, row, _), stop in zip(stretches, stops, strict=True):
            # It wraps modulo 2**64, as the draws above do; the difference of both is small.
            owed = owed + row.units * ((stop - start) // group)
        return drawn, owed

    def used_up(self, position: int) -> list[int]:
        """Numbers of the stage's domains that have reached their limit before `position`."""
        found: list[int] = np.flatnonzero(self._weighted & (self.counts(position) >= self._limit)).tolist()
        return found

    def _index(self, position: int) -> int:
        """Index of the stretch that `position` is in, or ends, if the stage does; finds the stretches up to it."""
        last = self._found[-1]
        while last.stop <= position and last.stop < self.dry:
            row = self._row_from(last.stop, last.drawn_at_stop)
            last = self._stretch(row, last.stop, last.drawn_at_stop)
            self._found.append(last)
        return bisect_right(self._found, position, key=attrgetter("start")) - 1

    def _all_used_up(self) -> int:
        """Where every domain of the stage has reached its limit: in whatever order, all that they may give is drawn."""
        limit = self._limit[self._weighted]
        if not (limit < NEVER).all():
            return NEVER
        return self._stage.start + int((limit - self._stage.base[self._weighted]).sum())

    def _row_from(self, start: int, drawn: Ints) -> StageRow:
        """The row that holds from `start` on, before which `drawn` was drawn: of the domains below their limits."""
        left = np.where(drawn < self._limit, self._stage.units, 0)
        row = self._stage._replace(cdf=redistributed(left), base=np.zeros_like(drawn))
        return row._replace(base=drawn - self._order.counts(row, start))

    def _stretch(self, row: StageRow, start: int, drawn: Ints) -> _Stretch:
        """The positions from `start` on, before which `drawn` was drawn, until a domain of the row reaches its limit.

        What is near is walked to; what is further away is bracketed by closed-form counts first. It may be near though
        each domain is expected to last: of many near their limits, one reaches it early.
        """
        units = row.units
        live = np.flatnonzero((units > 0) & (drawn < self._limit) & (self._limit < NEVER))
        limit = self._limit[live]
        # Positions until the first of them is expected to reach its limit.
        wait = float(((limit - drawn[live]) / units[live]).min(initial=math.inf)) * TOTAL
        if wait >= NEVER >> 1:
            return _Stretch(start, NEVER, row, drawn)
        guess = start + math.ceil(wait)
        near = min(_WALKED, _NEAR + 2 * (guess - start)) if wait < _WALKED else _NEAR
        if (found := self._walk(row, live, start, start + near, drawn)) is None:
            counts = partial(self._order.counts, row)
            low, high = bracket(lambda g: bool((counts(g)[live] >= limit).any()), start, guess, _WALKED)
            found = self._walk(row, live, low, high, counts(low))
            assert found is not None
        stop, then = found
        return _Stretch(start, stop, row, then)

    def _walk(self, row: StageRow, live: Ints, low: int, high: int, drawn: Ints) -> tuple[int, Ints] | None:
        """First position up to `high` before which one of the `live` domains has reached its limit, if there is one.

        `drawn` are draws before `low`; those before the position come with it.
        """
        domain = self._order.domains(row, low, high)
        order = np.argsort(domain, kind="stable")
        # Where in that order the draw is that takes a domain to its limit, if there are so many draws of it here.
        last = np.searchsorted(domain[order], live) + (self._limit - drawn)[live] - 1
        reached = (last < len(domain)) & (domain[order[np.minimum(last, len(domain) - 1)]] == live)
        if not reached.any():
            return None
        count = 1 + int(order[last[reached]].min())
        return low + count, drawn + np.bincount(domain[:count], minlength=len(drawn))


def redistributed(units: Ints) -> Ints:
    """`integer_cdf` of shares in proportion to integers with a sum from 1 to 2**32 - 1; exact, everywhere the same.

    None of them is 0 that is not among `units`.
    """
    total = int(units.sum())
    scaled = units.astype(np.uint64) * np.uint64(TOTAL)  # below 2**64
    share, rest = (part.astype(np.int64) for part in np.divmod(scaled, np.uint64(total)))
    share[np.argsort(-rest, kind="stable")[: TOTAL - int(share.sum())]] += 1  # largest remainders
    return np.cumsum(share)


def bracket(reached: Callable[[int], bool], low: int, guess: int, width: int) -> tuple[int, int]:
    """Two positions at most `width` apart, between which `reached` begins to hold, and from then on holds.

    It does not hold at `low`. The better the `guess` of where it begins to, the fewer positions are asked about.
    """
    high, step = max(guess, low + 1), width
    while not reached(high):
        low, high, step = high, high + step, 4 * step
    while high - step > low:
        if not reached(high - step):
            low = high - step
            break
        high, step = high - step, 4 * step
    while high - low > width:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return low, high
