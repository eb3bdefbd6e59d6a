"""Which domain, and which row of it, stands at a position of the training stream: a pure function of seed and stages.

Inside each block of M positions a keyed permutation scatters a golden-ratio sequence, whose value picks the domain by
the stage's integer weights; how often a domain was drawn before a position is closed-form, so the draw's number, its
epoch and its row need no table and no replay. This module must not know of tokens, files, loaders or models.
"""

import math
import operator
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dynmix.mixture.golden import TOTAL, golden, interval_counts
from dynmix.mixture.permutation import mix, permute
from dynmix.mixture.roster import Domain, Roster
from dynmix.mixture.shared import is_starting_process
from dynmix.mixture.stages import MAX_STAGES, StageRow, StageTable

Ints = npt.NDArray[np.int64]
Weights = Mapping[str, float] | npt.NDArray[np.integer] | Sequence[int]

MAX_BLOCK = 1 << 20
_CHUNK = 1 << 14  # positions computed at once: a working set that stays in the cache
_VERSION = 1  # of the order itself; raise it when the same state would give other samples
_BLOCK_KEY, _OFFSET_KEY, _ROW_KEY = 1, 2, 3  # keep the hashes of one seed apart


class Undecided(LookupError):  # noqa: N818 (a state of affairs, and often no error: a worker waits for it to pass)
    """A position beyond the last published stage: which sample stands there depends on weights yet to be published."""


class Stage(NamedTuple):
    """One stage of a schedule: positions [start, end), `end` None while open, and weights that sum to 1."""

    start: int
    end: int | None
    weights: dict[str, float]


def integer_cdf(weights: npt.ArrayLike) -> Ints:
    """Cumulative weights in units of 2**-32; compute it once and share it, as float sums may differ between machines.

    Domain k is drawn by the integers [cdf[k - 1], cdf[k]). A zero weight has none; a positive one has at least one.

    Args:
        weights: float[n_domains], finite, >= 0, with a sum within 1e-6 of 1 (it is normalised).

    Returns:
        int64[n_domains], non-decreasing, the last exactly 2**32.

    Raises:
        ValueError: anything else.
    """
    share = np.asarray(weights, np.float64)
    if share.ndim != 1 or not share.size:
        raise ValueError(f"weights must be a vector with one weight a domain, not an array of shape {share.shape}")
    if bad := np.flatnonzero(~(np.isfinite(share) & (share >= 0))).tolist():
        raise ValueError(f"weights must be finite and >= 0: weight {share[bad[0]]} of domain number {bad[0]} is not")
    total = math.fsum(share)  # the same on every machine, which a vectorised sum need not be
    if not math.isclose(total, 1.0, rel_tol=0.0, abs_tol=1e-6):
        raise ValueError(f"weights sum to {total:.9g}, not to 1: divide each of them by their sum")
    # Whole units first, at least one where the weight is positive so that none vanishes by rounding, then largest
    # remainders. Weights that are multiples of a unit stay as they are: what was published can be published again.
    exact = share / total * TOTAL
    units = np.maximum(np.floor(exact).astype(np.int64), share > 0)
    left = TOTAL - int(units.sum())
    if left > 0:
        units[np.argsort(units - exact, kind="stable")[:left]] += 1
    else:
        units[np.argmax(units)] += left  # at most a unit a domain, from the one that will not miss it
    return np.cumsum(units)


class MixtureSchedule:
    """Domain, row and epoch of every position, for weights that change at declared positions.

    Only the process that made it may publish and extend it; processes started by it see each new stage, and each new
    domain, at once and whole.

    Args:
        weights: name -> weight of the stage that begins at position 0; its order is the order of the domains.
        sizes: name -> rows (sequences) of the domain; >= 1 wherever a weight is positive.
        seed: 0 to 2**63 - 1.
        block: positions a keyed permutation scatters, best the global batch size; part of the state.

    Raises:
        ValueError: names that do not match, weights that are not a distribution, sizes, seed or block out of range.
    """

    def __init__(self, weights: Mapping[str, float], sizes: Mapping[str, int], seed: int = 0, block: int = 256) -> None:
        self._setup(dict(zip(weights, matched(sizes, tuple(weights), "sizes"), strict=True)), seed, block)
        self._table.write(0, [StageRow(0, 0, None, self._cdf(weights), np.zeros(len(weights), np.int64))])

    def _setup(self, sizes: Mapping[str, int], seed: int, block: int) -> None:
        self._roster = Roster(sizes)
        self.seed, self.block = operator.index(seed), operator.index(block)
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, not {seed}")
        if not 1 <= self.block <= MAX_BLOCK:
            raise ValueError(f"block must be from 1 to {MAX_BLOCK} (best the global batch size), not {block}")
        self._row_keys = mix(self.seed, _ROW_KEY, np.arange(self._roster.capacity))
        self._table = StageTable(self._roster.capacity)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains, in order."""
        return self._roster.now.names

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> rows of the domain."""
        return self._roster.now.sizes

    @property
    def joined(self) -> tuple[Domain, ...]:
        """The last of the domains: those that `extend` added."""
        return self._roster.now.joined

    def check_new(self, domains: Sequence[Domain]) -> None:
        """Nothing, if `extend` would take these domains. Raises ValueError as it does."""
        self._roster.check(domains, keep=len(self.joined))

    def extend(self, domains: Sequence[Domain]) -> None:
        """Add domains behind those there are, with weight 0 until a stage is published that gives them some.

        No position changes its sample. (The schedule of a dataset is extended by `MixtureDataset.extend`.)

        Raises:
            ValueError: a name that is taken, a domain without rows, more than `roster.MAX_JOINED` of them.
        """
        self._roster.put(domains, keep=len(self.joined))
        self._table.outdate()

    def begin(self, weights: Weights) -> None:
        """Give the first stage other weights, as long as it is the only one.

        Raises:
            ValueError: a later stage is published already; bad weights.
        """
        if len(self._table) > 1:
            raise ValueError(f"{len(self._table)} stages are published already: the weights of the first one stay")
        self._table.write(0, [self._stage(0)._replace(cdf=self._cdf(weights))])

    def publish(self, weights: Weights, start: int, end: int | None = None) -> None:
        """Begin a stage at position `start`; positions before it stay what they were.

        Args:
            weights: name -> weight, or an `integer_cdf` computed elsewhere (by rank 0, say), in the domains' order.
            start: first position of the stage; the end of the last stage if that was declared.
            end: where the stage ends; None leaves it open. Positions from there on are undecided.

        Raises:
            ValueError: a start in the past or with a gap before it, an end not beyond start, bad weights.
            RuntimeError: `MAX_STAGES` are published already.
        """
        start, last = operator.index(start), self._stage(len(self._table) - 1)
        if start <= last.start:
            raise ValueError(
                f"start={start} is in the past: stage {last.number} began at position {last.start}, and what is"
                f" published stays; publish from position {last.start + 1} on"
            )
        if last.end is not None and start != last.end:
            raise ValueError(f"start={start}: the last stage ends at {last.end}, so the next one starts at {last.end}")
        if len(self._table) == MAX_STAGES:
            raise RuntimeError(f"all {MAX_STAGES} stages of this schedule are published: use longer stages")
        number, end = len(self._table), _checked_end(start, end)
        self._table.write(number, [StageRow(number, start, end, self._cdf(weights), self._counts_in(last, start))])

    def hold(self, end: int) -> None:
        """Declare that the last stage ends at `end`: positions from there on are undecided until a stage is published.

        Raises:
            ValueError: `end` is not beyond the stage's start, or another end was declared.
        """
        last = self._table[len(self._table) - 1]
        if last.end not in (None, end):
            raise ValueError(f"end={end}: the last stage was declared to end at {last.end}, and that stays")
        _checked_end(last.start, end)
        self._table.hold(end)

    @property
    def end(self) -> int | None:
        """First undecided position; None while the last stage is open."""
        return self._table.end

    @property
    def generation(self) -> int:
        """Grows when domains join, a stage is published or a state loaded: what was read before may be outdated."""
        return self._table.generation

    @property
    def stages(self) -> list[Stage]:
        """Every published stage, oldest first."""
        rows = [self._stage(number) for number in range(len(self._table))]
        ends = [*(row.start for row in rows[1:]), self.end]  # an open stage ends where the next one was published
        return [Stage(row.start, end, self._floats(row.cdf)) for row, end in zip(rows, ends, strict=True)]

    def check_decided(self, start: int, stop: int) -> None:
        """Nothing, if every position of [start, stop) has its stage.

        Raises:
            Undecided: `stop` is beyond the last stage's declared end.
            ValueError: not 0 <= start <= stop < 2**62.
        """
        if not 0 <= start <= stop < 1 << 62:
            raise ValueError(f"positions must be 0 <= start <= stop < 2**62, not start={start}, stop={stop}")
        end = self.end
        if end is not None and stop > end:
            raise Undecided(
                f"position {max(start, end)} is not decided yet: the last stage ends at {end};"
                f" publish the next one first, publish(weights, start={end})"
            )

    def weights_at(self, position: int) -> dict[str, float]:
        """Weights, name -> float, of the stage in which `position` lies.

        Raises:
            Undecided: `position` is beyond the last stage's declared end.
        """
        self.check_decided(position, position + 1)
        return self._floats(self._stage_at(position).cdf)

    def assign(self, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """Domain number, row within the domain and epoch of the domain, for every position of [start, stop).

        Returns:
            three int64 arrays of shape [stop - start].

        Raises:
            Undecided: `stop` is beyond the last stage's declared end.
            ValueError: not 0 <= start <= stop < 2**62.
        """
        self.check_decided(start, stop)
        starts = self._table.starts.tolist()
        pieces = [(np.zeros(0, np.int64),) * 3]
        while start < stop:
            number = bisect_right(starts, start) - 1
            last = min(stop, start + _CHUNK, *starts[number + 1 : number + 2])
            pieces.append(self._assign_in(self._stage(number), start, last))
            start = last
        domain, row, epoch = map(np.concatenate, zip(*pieces, strict=True))
        return domain, row, epoch

    def counts(self, position: int) -> Ints:
        """Draws of each domain before `position`, int64[n_domains], in time that does not grow with the position.

        Raises:
            Undecided: `position` is beyond the last stage's declared end.
            ValueError: not 0 <= position < 2**62.
        """
        self.check_decided(0, position)
        return self._counts_in(self._stage_at(position), position)

    def rows(self, domain: int | Ints, draws: Ints) -> tuple[Ints, Ints]:
        """Row and epoch of a domain's draws, counted from 0; each epoch is a permutation of the domain's rows.

        Args:
            domain: number of the domain, or one for each draw.
            draws: int64[n] >= 0.

        Returns:
            row and epoch, int64[n] each.
        """
        numbers = draws.astype(np.uint64)
        size = self._roster.now.rows[domain]
        epoch = numbers // size
        row = permute(numbers - epoch * size, size, mix(self._row_keys[domain], epoch))
        return row.astype(np.int64), epoch.astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Everything the order depends on, as JSON-able values."""
        rows = [self._stage(number) for number in range(len(self._table))]
        domains = self._roster.now
        return {
            "version": _VERSION,
            "seed": self.seed,
            "block": self.block,
            "names": list(domains.names),
            "sizes": list(domains.sizes.values()),
            **({"joined": [dict(domain.source) for domain in domains.joined]} if domains.joined else {}),
            "stages": [
                {"start": row.start, "end": row.end, "cdf": row.cdf.tolist(), "base": row.base.tolist()} for row in rows
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace stages, and domains that joined, by those of a state of `state_dict`; all of them or, on error, none.

        Raises:
            ValueError: the state is of other domains, sizes, seed or block, or its stages do not fit together.
        """
        if differences := self.differences(state):
            raise ValueError("this state belongs to another schedule: " + "; ".join(differences))
        first, joined = _domains_of(state)
        self._roster.check(joined, keep=0)
        sizes = {**first, **{domain.name: domain.size for domain in joined}}
        stages: list[StageRow] = []
        for number, saved in enumerate(state["stages"]):
            start, cdf, base = saved["start"], _checked_cdf(saved["cdf"], sizes), np.array(saved["base"], np.int64)
            last = stages[-1] if stages else StageRow(0, -1, 0, cdf, np.zeros_like(base))
            expected = self._counts_in(last, start) if stages else np.zeros_like(cdf)
            if start <= last.start or last.end not in (None, start) or not np.array_equal(base, expected):
                raise ValueError(
                    f"damaged state: stage {number} (start {start}) does not continue the stages before it"
                )
            stages.append(StageRow(number, start, _checked_end(start, saved["end"]), cdf, base))
        if not 1 <= len(stages) <= MAX_STAGES:
            raise ValueError(f"damaged state: {len(stages)} stages, where there are 1 to {MAX_STAGES}")
        self._roster.put(joined, keep=0)
        self._table.write(0, stages)

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """How a state's domains, seed and block differ from these, a phrase each; a state without any can be loaded.

        Domains that joined, then or now, make no difference: loading replaces them.
        """
        (then, _), sizes = _domains_of(state), self._roster.first
        found = [f"domain {name!r} is new" for name in sizes if name not in then]
        found += [f"domain {name!r} is gone" for name in then if name not in sizes]
        if not found and list(then) != list(sizes):
            found.append(f"the domains' order was {list(then)} and is {list(sizes)}")
        found += [
            f"domain {name!r} had {then[name]} rows and has {size}"
            for name, size in sizes.items()
            if then.get(name, size) != size
        ]
        now = {"version": _VERSION, "seed": self.seed, "block": self.block}
        return found + [f"{key} was {state[key]} and is {now[key]}" for key in now if state[key] != now[key]]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if is_starting_process() else self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_table" in state:  # a starting process shares the table, any other copy is independent
            self.__dict__.update(state)
        else:
            self._setup(_domains_of(state)[0], state["seed"], state["block"])
            self.load_state_dict(state)

    def _stage(self, number: int) -> StageRow:
        row = self._table[number]  # before the names are looked at: whoever wrote it had seen all it has
        return row.widened(len(self.names))

    def _stage_at(self, position: int) -> StageRow:
        return self._stage(int(np.searchsorted(self._table.starts, position, side="right")) - 1)

    def _cdf(self, weights: Weights) -> Ints:
        return _checked_cdf(weights, self.sizes)

    def _floats(self, cdf: Ints) -> dict[str, float]:
        # Not strict: more domains may have joined since the cdf was read.
        return dict(zip(self.names, (np.diff(cdf, prepend=0) / TOTAL).tolist(), strict=False))

    def _domains(self, stage: StageRow, first: int, count: int) -> Ints:
        """Domain of `count` positions from the stage's position `first` on, which begins a block."""
        position = np.arange(first, first + count, dtype=np.uint64)
        inside = position % self.block
        key = mix(self.seed, _BLOCK_KEY, stage.number, position // self.block)
        scattered = position - inside + permute(inside, self.block, key)
        return np.searchsorted(stage.cdf, golden(scattered, self._offset(stage)), side="right")

    def _offset(self, stage: StageRow) -> int:
        return int(mix(self.seed, _OFFSET_KEY, stage.number)) % TOTAL

    def _counts_in(self, stage: StageRow, position: int) -> Ints:
        """Draws of each domain before `position`, which lies in `stage` or at its end."""
        inside = (position - stage.start) % self.block
        whole = position - stage.start - inside
        partial = np.bincount(self._domains(stage, whole, inside), minlength=len(stage.cdf))
        # A block's permutation stays within the block, so whole blocks hold the plain golden-ratio sequence.
        return stage.base + interval_counts(whole, self._offset(stage), stage.cdf) + partial

    def _assign_in(self, stage: StageRow, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        inside = (start - stage.start) % self.block
        domain = self._domains(stage, start - stage.start - inside, stop - start + inside)[inside:]
        drawn = np.bincount(domain, minlength=len(stage.cdf))
        # The n-th occurrence of a domain here is its draw before + n: number the occurrences in domain order.
        order = np.argsort(domain.astype(np.min_scalar_type(len(stage.cdf))), kind="stable")  # small types: radix sort
        before = self._counts_in(stage, start) - (np.cumsum(drawn) - drawn)
        draw = np.empty_like(domain)
        draw[order] = np.arange(len(domain)) + np.repeat(before, drawn)
        return domain, *self.rows(domain, draw)


def _checked_cdf(weights: Weights, sizes: Mapping[str, int]) -> Ints:
    """`weights` as an integer cdf over the domains of `sizes`."""
    if isinstance(weights, Mapping):
        cdf = integer_cdf(matched(weights, tuple(sizes), "weights"))
    else:
        given = np.asarray(weights)
        if given.dtype.kind not in "iu" or given.shape != (len(sizes),):
            raise ValueError(
                f"weights must be a mapping from name to weight or the {len(sizes)} integers of an integer_cdf, not"
                f" {given.dtype} of shape {given.shape}"
            )
        cdf = given.astype(np.int64)
        if cdf[-1] != TOTAL or (np.diff(cdf, prepend=0) < 0).any():
            raise ValueError(f"an integer cdf must ascend from 0 to 2**32, not {cdf.tolist()[:8]}...{cdf[-1]}")
    if empty := [n for n, units in zip(sizes, np.diff(cdf, prepend=0), strict=True) if units and not sizes[n]]:
        raise ValueError(f"domain {empty[0]!r} has weight but no rows: give it rows, or weight 0")
    return cdf


def _domains_of(state: Mapping[str, Any]) -> tuple[dict[str, int], list[Domain]]:
    """A state's first domains, name -> size, and those that joined."""
    sizes, sources = list(zip(state["names"], state["sizes"], strict=True)), state.get("joined", [])
    if (first := len(sizes) - len(sources)) < 0:
        raise ValueError(f"damaged state: {len(sources)} of its {len(sizes)} domains joined")
    joined = [Domain(name, size, source) for (name, size), source in zip(sizes[first:], sources, strict=True)]
    return dict(sizes[:first]), joined


def _checked_end(start: int, end: int | None) -> int | None:
    if end is not None and operator.index(end) <= start:
        raise ValueError(f"end={end} is not beyond start={start}")
    return end


def matched(values: Mapping[str, Any], names: Sequence[str], what: str) -> list[Any]:
    """`values` in the order of `names`; a ValueError names those that are missing or unknown."""
    missing, extra = [n for n in names if n not in values], [n for n in values if n not in names]
    if missing or extra:
        raise ValueError(f"{what} must have the domains {list(names)}: missing {missing}, unknown {extra}")
    return [values[name] for name in names]
