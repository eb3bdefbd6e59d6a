"""Which domain, and which row of it, stands at a position of the training stream: a pure function of seed and stages.

The stage's integer weights give each domain its draws, evenly over time; keyed permutations scatter them over the
positions, a few at a time and never beyond a block. How often a domain was drawn before a position has a closed form,
so a draw's number, its epoch and its row need no table and no replay. This module must not know of tokens, files,
loaders or models.
"""

import logging
import operator
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dynmix.mixture.limits import NEVER, Course, Exhausted, Limits, MaxEpochs, Policy
from dynmix.mixture.order import Order
from dynmix.mixture.packed import pack, unpack
from dynmix.mixture.permutation import mix, permute, permute_runs
from dynmix.mixture.quota import TOTAL
from dynmix.mixture.roster import JoinedDomain, Roster
from dynmix.mixture.shared import is_starting_process
from dynmix.mixture.stages import MAX_STAGES, StageRow, StageTable
from dynmix.mixture.weights import Weights, checked_cdf, matched

logger = logging.getLogger("dynmix.mixture")

Ints = npt.NDArray[np.int64]

MAX_BLOCK = 1 << 20
_VERSION = 3  # of the order itself; raise it when the same state would give other samples
_ROW_KEY = 3  # keeps these hashes of a seed apart from those of `order`


class Undecided(LookupError):  # noqa: N818 (often not an error: a worker waits for it to pass)
    """A position beyond the last published stage: its sample depends on weights that are not published yet."""


class Stage(NamedTuple):
    """One stage of a schedule: positions [start, end), `end` None while open, and weights that sum to 1."""

    start: int
    end: int | None
    weights: dict[str, float]


class MixtureSchedule:
    """Domain, row and epoch of every position, for weights that change at declared positions.

    Only the process that made it may publish and extend it. Processes started from it see each new stage and each new
    domain immediately, never in part.

    Args:
        weights: name -> weight of the stage that begins at position 0; its order is the order of the domains.
        sizes: name -> rows (sequences) of the domain; >= 1 wherever a weight is positive.
        seed: 0 to 2**63 - 1.
        block: positions over which a keyed permutation scatters draws, best the global batch size; part of the state.
        max_epochs, when_exhausted: as in `MixtureDataset`.
        homogeneous: as in `MixtureDataset`, of positions; part of the state.

    Raises:
        ValueError: names that do not match, weights that are not a distribution, sizes, seed, block or limits out of
            range.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        sizes: Mapping[str, int],
        seed: int = 0,
        block: int = 256,
        max_epochs: MaxEpochs = None,
        when_exhausted: Policy | None = None,
        homogeneous: int = 1,
    ) -> None:
        sizes = matched(sizes, tuple(weights), "sizes")
        limits = Limits(max_epochs, when_exhausted, operator.index(homogeneous))
        if unknown := [name for name in limits.epochs(sizes) if name not in sizes]:
            raise ValueError(f"max_epochs: no domain {unknown[0]!r}; the domains are {list(sizes)}")
        if small := limits.without_a_group(sizes):
            raise ValueError(small[0])
        self._setup(sizes, seed, block, limits)
        none = np.zeros(len(weights), np.int64)
        self._table.write(StageRow(0, 0, None, checked_cdf(weights, self.sizes), none, none))

    def _setup(self, sizes: Mapping[str, int], seed: int, block: int, limits: Limits) -> None:
        self._roster = Roster(sizes)
        self.limits = limits
        self.seed, self.block = operator.index(seed), operator.index(block)
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, not {seed}")
        if not 1 <= self.block <= MAX_BLOCK:
            raise ValueError(f"block must be from 1 to {MAX_BLOCK} (best the global batch size), not {block}")
        self.homogeneous = limits.group
        if self.block % self.homogeneous:
            raise ValueError(
                f"homogeneous={self.homogeneous} must divide block={self.block}, the global batch size: so many samples"
                " of one domain stand in a row, a micro-batch"
            )
        self._order = Order(self.seed, self.block, self.homogeneous)
        self._row_keys = mix(self.seed, _ROW_KEY, np.arange(self._roster.capacity))
        self._table = StageTable(self._roster.capacity)
        self._courses: tuple[int, dict[int, Course]] = (-1, {})  # of the stages, under a generation

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains, in order."""
        return self._roster.now.names

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> rows of the domain."""
        return self._roster.now.sizes

    @property
    def joined(self) -> tuple[JoinedDomain, ...]:
        """The last of the domains: those that `extend` added."""
        return self._roster.now.joined

    def check_new(self, domains: Sequence[JoinedDomain]) -> None:
        """Raise ValueError if `extend` would refuse these domains."""
        self._roster.check(domains, keep=len(self.joined))

    def extend(self, domains: Sequence[JoinedDomain]) -> None:
        """Append domains, with weight 0 until a stage is published that gives them weight.

        No position changes its sample. A warning says of which nothing will be read, as its limit is less than a group.
        (Extend the schedule of a dataset by `MixtureDataset.extend`.) Raises ValueError for a name that is taken, a
        domain without rows, or more than 1,024 of them.
        """
        self._roster.put(domains, keep=len(self.joined))
        self.outdate()
        for why in self.limits.without_a_group({domain.name: domain.size for domain in domains}):
            logger.warning("nothing will be read of what joined: %s", why)

    def begin(self, weights: Weights) -> None:
        """Give the first stage other weights. Raises ValueError for bad ones, or once a later stage is published."""
        if self.num_stages > 1:
            raise ValueError(f"{self.num_stages} stages are published already: the weights of the first one stay")
        self._table.write(self._stage(0)._replace(cdf=checked_cdf(weights, self.sizes)))

    def publish(self, weights: Weights, start: int, end: int | None = None) -> None:
        """Begin a stage at position `start`; the samples before it stay the same.

        Args:
            weights: name -> weight, or an `integer_cdf` computed elsewhere (by rank 0, say), in the domains' order.
            start: first position of the stage; the end of the last stage if that was declared.
            end: where the stage ends, and positions become undecided; None leaves it open.

        Raises:
            ValueError: a start in the past or with a gap before it, an end not beyond start, bad weights.
            Exhausted: a start beyond where the stream ends, because what may be read has been read.
            RuntimeError: 4,096 stages are published already.
        """
        start, last = self._whole_groups("start", start), self._stage(self.num_stages - 1)
        if start <= last.start:
            raise ValueError(
                f"start={start} is in the past: stage {last.number} began at position {last.start}, and what is"
                f" published stays; publish from position {last.start + 1} on"
            )
        if last.end is not None and start != last.end:
            raise ValueError(f"start={start}: the last stage ends at {last.end}, so the next one starts at {last.end}")
        if self.num_stages == MAX_STAGES:
            raise RuntimeError(f"all {MAX_STAGES} stages of this schedule are published: use longer stages")
        self.check_not_exhausted(start)
        end, cdf = self._checked_end(start, end), checked_cdf(weights, self.sizes)
        row = StageRow(self.num_stages, start, end, cdf, *self._course(last.number).ended(start))
        self._table.write(row)
        logger.info("stage %d begins at position %d, with the weights %s", row.number, start, self._weights(row))

    def hold(self, end: int) -> None:
        """Declare that the last stage ends at `end`: from there on positions are undecided until a stage is published.

        Raises ValueError if `end` is not beyond the stage's start, or another one was declared.
        """
        last = self._table[self.num_stages - 1]
        if last.end not in (None, end):
            raise ValueError(f"end={end}: the last stage was declared to end at {last.end}, and that stays")
        self._checked_end(last.start, end)
        self._table.hold(end)

    @property
    def end(self) -> int | None:
        """First undecided position; None while the last stage is open."""
        return self._table.end

    def outdate(self) -> None:
        """Say that what was read from the schedule before may be outdated."""
        self._table.outdate()

    @property
    def generation(self) -> int:
        """Grows when domains join, a stage is published or a state is loaded: earlier reads may be outdated."""
        return self._table.generation

    @property
    def exhausted_at(self) -> int | None:
        """Where the stream ends because its domains may not be read again; None if the stages so far do not say."""
        end, course = self.end, self._course(self.num_stages - 1)
        # A domain used up at the end of its stage need not be in the next one; only "stop" ends the stream even so.
        ahead = NEVER if end is None else end + (self.limits.when_exhausted == "stop")
        return course.dry if course.dry < ahead else None

    @property
    def num_stages(self) -> int:
        """How many stages have been published, including those that a state left out."""
        return len(self._table)

    @property
    def starts(self) -> list[int]:
        """First position of each of `stages`."""
        found: list[int] = self._table.starts.tolist()
        return found

    @property
    def stages(self) -> list[Stage]:
        """Every published stage, oldest first, without those that a state left out."""
        rows = self._rows_kept()
        ends = [*(row.start for row in rows[1:]), self.end]  # an open stage ends where the next one was published
        return [Stage(row.start, end, self._weights(row)) for row, end in zip(rows, ends, strict=True)]

    def check_decided(self, start: int, stop: int) -> None:
        """Raise an error unless every position of [start, stop) has its stage.

        Raises:
            Exhausted: `stop` is beyond where the stream ends.
            Undecided: `stop` is beyond the last stage's declared end.
            LookupError: `start` is in a stage that the state did not keep.
            ValueError: not 0 <= start <= stop < 2**62.
        """
        if not 0 <= start <= stop < 1 << 62:
            raise ValueError(f"positions must be 0 <= start <= stop < 2**62, not start={start}, stop={stop}")
        if start < (first := int(self._table.starts[0])):
            raise LookupError(
                f"position {start} was left out of the state that was loaded, which begins with the stage of position"
                f" {first}: publish the stages again to look there, or save with state_dict(since={start})"
            )
        self.check_not_exhausted(stop)
        end = self.end
        if end is not None and stop > end:
            raise Undecided(
                f"position {max(start, end)} is not decided yet: the last stage ends at {end};"
                f" publish the next one first, publish(weights, start={end})"
            )

    def check_not_exhausted(self, stop: int) -> None:
        """Raise Exhausted, naming the domains that are used up, if the stream ends before `stop`."""
        if (dry := self.exhausted_at) is not None and stop > dry:
            raise Exhausted(self.why_exhausted(dry))

    def why_exhausted(self, dry: int) -> str:
        """Why the stream ends at position `dry`, in words."""
        epochs = self.limits.epochs(self.sizes)
        used = [self.names[number] for number in self._course(self.num_stages - 1).used_up(dry)]
        reason = ", ".join(f"{name!r} (max_epochs={epochs[name]:g})" for name in used[:8]) + ", ..." * (len(used) > 8)
        return f"the stream ends at position {dry}, where its domains have been read as often as they may: {reason}"

    def weights_at(self, position: int) -> dict[str, float]:
        """Weights, name -> float, that decide `position`: its stage's, without domains that are used up by then.

        Raises as `check_decided`.
        """
        self.check_decided(position, position + 1)
        return self._weights(self._course_at(position).at(position)[0])

    def assign(self, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """Domain number, row within the domain and epoch of the domain, int64[n] each, of the positions [start, stop).

        Raises as `check_decided`.
        """
        self.check_decided(start, stop)
        first, starts = self._table.first, self._table.starts.tolist()
        found, at = np.empty((3, stop - start), np.int64), start
        while at < stop:
            known = bisect_right(starts, at)
            holds, last = self._course(first + known - 1).at(at)
            last = min([stop, last, *starts[known : known + 1]])
            self._assign_in(holds, at, found[:, at - start : last - start])
            at = last
        domain, row, epoch = found
        return domain, row, epoch

    def counts(self, position: int) -> Ints:
        """Draws of each domain before `position`, int64[n_domains], in time independent of the position.

        Raises as `check_decided`.
        """
        self.check_decided(min(position, int(self._table.starts[0])), position)
        return self._course_at(position).counts(position)

    def rows(self, domain: int | Ints, draws: Ints) -> tuple[Ints, Ints]:
        """Row and epoch, int64[n] each, of a domain's draws, which are counted from 0.

        Each epoch is a permutation of the domain's rows. `domain` is its number, or one for each draw.
        """
        numbers = draws.astype(np.uint64)
        size = self._roster.now.rows[domain]
        epoch = numbers // size
        row = permute(numbers - epoch * size, size, mix(self._row_keys[domain], epoch))
        return row.view(np.int64), epoch.view(np.int64)

    def state_dict(self, since: int | None = None) -> dict[str, Any]:
        """Everything the order depends on, as JSON-able values.

        If there are very many stages (some 300 of 50 domains) the oldest are left out; what was drawn in them is kept.

        Args:
            since: keep every stage that positions from here on need, however many, and the three before; 0 keeps all.
        """
        domains = self._roster.now
        return {
            "version": _VERSION,
            "seed": self.seed,
            "block": self.block,
            "names": list(domains.names),
            "sizes": list(domains.sizes.values()),
            **({"joined": [dict(domain.source) for domain in domains.joined]} if domains.joined else {}),
            **({"limits": self.limits.state()} if self.limits.hard else {}),
            **({"homogeneous": self.homogeneous} if self.homogeneous > 1 else {}),
            "stages": pack(self._rows_kept(), since),
        }

    def load_state_dict(self, state: Mapping[str, Any], limited: Collection[str] | None = None) -> None:
        """Replace the stages, and the domains that joined, by those of a saved state; on error nothing is replaced.

        `limited` as in `differences`; other domains keep the limits of the state. Raises ValueError if the state is of
        other domains, sizes, seed or block, or its stages do not fit together.
        """
        if differences := self.differences(state, limited):
            raise ValueError("this state belongs to another schedule: " + "; ".join(differences))
        first, joined = domains_of(state)
        self._roster.check(joined, keep=0)
        sizes = {**first, **{domain.name: domain.size for domain in joined}}
        saved = unpack(state["stages"], len(sizes))
        count = saved.first + len(saved.starts)
        if not 0 <= saved.first < count <= MAX_STAGES or (saved.first == 0) != (saved.starts[0] == 0):
            raise ValueError(f"damaged state: {len(saved.starts)} stages, the first of them number {saved.first}")
        limits = self.limits.after(state.get("limits", {}), list(sizes))
        limit, stages = limits.draws(sizes), list[StageRow]()
        for number, (start, weights) in enumerate(zip(saved.starts, saved.cdfs, strict=True), saved.first):
            base, owed = saved.drawn, saved.owed
            if stages:
                course = self._course_of(stages[-1], limit)
                if not stages[-1].start < start <= course.dry or start % self.homogeneous:
                    raise ValueError(f"damaged state: stage {number} cannot begin at {start}")
                base, owed = course.ended(start)
            stages.append(StageRow(number, start, None, checked_cdf(weights, sizes), base, owed))
        stages[-1] = stages[-1]._replace(end=self._checked_end(stages[-1].start, saved.end))
        self.limits = limits
        self._roster.put(joined, keep=0)
        self._table.replace(stages)

    def like(self, sizes: Mapping[str, int]) -> "MixtureSchedule":
        """A schedule of the same seed, block and limits with other first domains, to load a state of theirs into."""
        made = type(self).__new__(type(self))
        made._setup(sizes, self.seed, self.block, self.limits)
        return made

    def continues(self, state: Mapping[str, Any]) -> bool:
        """Whether domains and stages here are those of `state`, possibly with more that joined or were published."""
        names, stages = self.names, self.stages
        if list(names[: len(state["names"])]) != state["names"]:
            return False
        then = unpack(state["stages"], len(names))
        ends = [*then.starts[1:], then.end]
        for number, (start, end, cdf) in enumerate(zip(then.starts, ends, then.cdfs, strict=True), then.first):
            if number < self._table.first:  # left out of the state that was loaded here
                continue
            if number >= self.num_stages:
                return False
            here = self._stage(number)
            same = here.start == start and np.array_equal(here.cdf, cdf)
            if not same or end not in (None, stages[number - self._table.first].end):
                return False
        return then.first + len(then.starts) > self._table.first

    def differences(self, state: Mapping[str, Any], limited: Collection[str] | None = None) -> list[str]:
        """How a state's domains, seed and block differ from these, one phrase each; if there are none it can be loaded.

        Domains that joined, then or now, do not count: loading replaces them. Limits by name are compared for the
        `limited` domains, None: all.
        """
        (then, _), sizes = domains_of(state), self._roster.first
        found = [f"domain {name!r} is new" for name in sizes if name not in then]
        found += [f"domain {name!r} is gone" for name in then if name not in sizes]
        if not found and list(then) != list(sizes):
            found.append(f"the domains' order was {list(then)} and is {list(sizes)}")
        found += [
            f"domain {name!r} had {then[name]} rows and has {size}"
            for name, size in sizes.items()
            if then.get(name, size) != size
        ]
        now = {"version": _VERSION, "seed": self.seed, "block": self.block, "homogeneous": self.homogeneous}
        old = {"homogeneous": 1, **state}
        found += [f"{key} was {old[key]} and is {now[key]}" for key in now if old[key] != now[key]]
        common = sizes.keys() & then.keys() & set(sizes if limited is None else limited)
        return found + self.limits.differences(state.get("limits", {}), common)

    def __getstate__(self) -> dict[str, Any]:
        if is_starting_process():
            # A copy of 4,096 stages of many domains would take 100 MB per worker, and would miss stages to come.
            return {**self.__dict__, "_courses": (-1, {})}  # each process works out those it needs
        limits = [self.limits.max_epochs, self.limits.when_exhausted, self.homogeneous]
        return {**self.state_dict(since=0), "own_limits": limits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_table" in state:  # a starting process shares the table, any other copy is independent
            self.__dict__.update(state)
        else:
            self._setup(domains_of(state)[0], state["seed"], state["block"], Limits(*state["own_limits"]))
            self.load_state_dict(state)

    def _stage(self, number: int) -> StageRow:
        row = self._table[number]  # before the names are read: the writer of the row knew all the domains in it
        return row.widened(len(self.names))

    def _rows_kept(self) -> list[StageRow]:
        return [self._stage(number) for number in range(self._table.first, self.num_stages)]

    def _course_at(self, position: int) -> Course:
        return self._course(self._table.first + int(np.searchsorted(self._table.starts, position, side="right")) - 1)

    def _course(self, number: int) -> Course:
        generation = self.generation  # read before the stage, so a course is never kept under a newer generation
        if self._courses[0] != generation:
            self._courses = generation, {}
        courses = self._courses[1]
        if number not in courses:
            courses[number] = self._course_of(self._stage(number), self.limits.draws(self.sizes))
        return courses[number]

    def _course_of(self, stage: StageRow, limit: Ints) -> Course:
        return Course(stage, limit[: len(stage.cdf)], self.limits.when_exhausted or "repeat", self._order)

    def _whole_groups(self, what: str, position: int) -> int:
        position = operator.index(position)
        if position % self.homogeneous:
            raise ValueError(
                f"{what}={position} is within a group of the homogeneous={self.homogeneous} samples of one domain that"
                " stand in a row: stages start and end with whole groups"
            )
        return position

    def _checked_end(self, start: int, end: int | None) -> int | None:
        if end is not None and self._whole_groups("end", end) <= start:
            raise ValueError(f"end={end} is not beyond start={start}")
        return end

    def _weights(self, row: StageRow) -> dict[str, float]:
        # Not strict: more domains may have joined since the row was read.
        return dict(zip(self.names, (row.units / TOTAL).tolist(), strict=False))

    def _assign_in(self, stage: StageRow, start: int, out: Ints) -> None:
        """Fill `out`, int64[3, n], with domain, row and epoch of the positions from `start` on, all in `stage`."""
        done = 0
        for before, found in self._order.chunks(stage, start, start + out.shape[1]):
            domain, row, epoch = out[:, done : done + len(found)]
            domain[:] = found
            # The n-th occurrence of a domain here is its draw before + n: rows come in domain order, and are put back.
            order = np.argsort(domain.astype(np.min_scalar_type(len(before))), kind="stable")  # small types: radix sort
            row[order], epoch[order] = self._next_rows(before, np.bincount(domain, minlength=len(before)))
            done += len(found)

    def _next_rows(self, before: Ints, drawn: Ints) -> tuple[Ints, Ints]:
        """Row and epoch of each domain's draws from `before` to `before + drawn - 1`, domain after domain."""
        some = np.flatnonzero(drawn)
        size, start, stop = self._roster.now.rows[some].astype(np.int64), before[some], (before + drawn)[some]
        first_epoch = start // size
        epochs = (stop - 1) // size - first_epoch + 1
        # One run for every epoch of a domain.
        some, size, start, stop = (np.repeat(each, epochs) for each in (some, size, start, stop))
        epoch = np.arange(len(some)) + np.repeat(first_epoch + epochs - np.cumsum(epochs), epochs)
        begin = epoch * size
        low, high = np.maximum(begin, start), np.minimum(begin + size, stop)
        key = mix(self._row_keys[some], epoch)
        row = permute_runs(low - begin, high - low, size.view(np.uint64), key)
        return row.view(np.int64), np.repeat(epoch, high - low)


def schedule_of(state: Any) -> Mapping[str, Any]:
    """The schedule's part of the state of a dataset or stream. Raises ValueError for anything else."""
    found = state.get("schedule") if isinstance(state, Mapping) else None
    if not isinstance(found, Mapping) or "names" not in found or "sequence_length" not in state:
        what = f"a mapping of {list(state)[:8]}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ValueError(f"this is {what}, and not what state_dict() of a MixtureDataset or MixtureStream gives")
    return found


def domains_of(state: Mapping[str, Any]) -> tuple[dict[str, int], list[JoinedDomain]]:
    """A state's first domains, name -> size, and those that joined."""
    sizes, sources = list(zip(state["names"], state["sizes"], strict=True)), state.get("joined", [])
    if (first := len(sizes) - len(sources)) < 0:
        raise ValueError(f"damaged state: {len(sources)} of its {len(sizes)} domains joined")
    joined = [JoinedDomain(name, size, source) for (name, size), source in zip(sizes[first:], sources, strict=True)]
    return dict(sizes[:first]), joined
