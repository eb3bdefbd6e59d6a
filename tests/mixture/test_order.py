"""The order of the samples against an enumeration in Python's own integers, and through every way of reading it."""

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.schedule import MixtureSchedule
from dynmix.mixture.weights import integer_cdf

WORD, TOTAL, STEP = 2**64, 2**32, 0x9E3779B97F4A7C15
names = ["web", "code", "books", "law"]


def mixed(*words: int) -> int:
    state = 0
    for word in words:
        state = ((state ^ word) + STEP) % WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB % WORD
        state ^= state >> 31
    return state


def shuffled(index: int, length: int, key: int) -> int:
    """The Feistel network with cycle walking."""
    a = math.isqrt(length - 1) + 1
    b = -(-length // a)
    left, right = divmod(index, b)
    for turn in range(6):
        noise = (right * 0xBF58476D1CE4E5B9 + key + (turn + 1) * STEP) % WORD
        noise = (noise ^ noise >> 32) * 0x94D049BB133111EB % WORD
        left, right, a, b = right, (left + ((noise >> 32) * a >> 32)) % a, b, a
    image = left * b + right
    return image if image < length else shuffled(image, length, key)


class StageOf(NamedTuple):
    number: int
    start: int
    units: list[int]


def domains_of(stage: StageOf, seed: int, block: int, count: int, owed: list[int]) -> list[int]:
    """Domain of each position of a stage, counted from its start, where each was `owed` parts of 2**-32 of a draw."""
    parts = -(-block // 32)
    edges = [0]
    while edges[-1] < count:
        edges.append(len(edges) * block // parts)
    moments = []
    for k, unit in enumerate(stage.units):
        key, draw = mixed(seed, 2, stage.number, k), 0
        while unit:
            place = 3 * TOTAL // 8 + 1 + (mixed((key + draw) % WORD) >> 34)
            moment = max(0, -(-(draw * TOTAL + place - owed[k]) // unit))
            if moment > edges[-1] + 50:  # later than any draw that counts: few are owed
                break
            moments.append((moment, k, draw))
            draw += 1
    domains = [k for _, k, _ in sorted(moments)]
    order: list[int] = []
    key = mixed(seed, 1, stage.number)
    for begin, end in itertools.pairwise(edges):
        order += sorted(range(begin, end), key=lambda g: (mixed((key + g) % WORD) >> 36, g))
    return [domains[g] for g in order[:count]]


def enumerated(
    stages: list[StageOf], sizes: list[int], seed: int, block: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    """Domain, row and epoch of every position before `stop`."""
    drawn, owed = [0] * len(sizes), [0] * len(sizes)
    for k, stage in enumerate(stages):
        end = min(stop, stages[k + 1].start) if k + 1 < len(stages) else stop
        found = domains_of(stage, seed, block, max(0, end - stage.start), owed)
        owed = [
            o + len(found) * unit - found.count(d) * TOTAL
            for d, (o, unit) in enumerate(zip(owed, stage.units, strict=True))
        ]
        for domain in found:
            epoch, index = divmod(drawn[domain], sizes[domain])
            yield domain, shuffled(index, sizes[domain], mixed(mixed(seed, 3, domain), epoch)), epoch
            drawn[domain] += 1


def weights_of(values: list[float]) -> dict[str, float]:
    return {name: value / sum(values) for name, value in zip(names, values, strict=True)}


def units_of(weights: dict[str, float]) -> list[int]:
    return np.diff(integer_cdf(list(weights.values())), prepend=0).tolist()


shares = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1)), min_size=4, max_size=4).filter(any).map(weights_of)
all_sizes = st.lists(st.integers(1, 60), min_size=4, max_size=4)
seeds = st.integers(0, 2**63 - 1)


@given(
    mixtures=st.lists(shares, min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 200), min_size=2, max_size=2),
    sizes=all_sizes,
    seed=seeds,
    block=st.integers(1, 100),
    cuts=st.lists(st.integers(0, 400), min_size=2, max_size=4),
)
@settings(max_examples=25)
def test_positions_are_those_of_the_enumeration(
    mixtures: list[dict[str, float]], lengths: list[int], sizes: list[int], seed: int, block: int, cuts: list[int]
) -> None:
    made = MixtureSchedule(mixtures[0], dict(zip(names, sizes, strict=True)), seed, block)
    stages = [StageOf(0, 0, units_of(mixtures[0]))]
    for weights, length in zip(mixtures[1:], lengths, strict=False):
        stages.append(StageOf(len(stages), stages[-1].start + length, units_of(weights)))
        made.publish(weights, stages[-1].start)
    expected = list(enumerated(stages, sizes, seed, block, 400))
    start, stop = min(cuts), max(cuts)
    assert list(zip(*(part.tolist() for part in made.assign(start, stop)), strict=True)) == expected[start:stop]
    for cut in cuts:
        assert made.counts(cut).tolist() == [sum(d == k for d, *_ in expected[:cut]) for k in range(4)]


GLOBAL, SAMPLES = 24, 480  # a batch, and all of them


class Way(NamedTuple):
    """How some steps are read: batches of `GLOBAL // (world * accumulate)`, sharded in one of the known ways."""

    world: int
    accumulate: int
    sharding: str
    steps: int

    def loaders(self, datasets: list[MixtureDataset], done: int) -> list[Iterator[Any]]:
        """One a rank, beginning at position `done`."""
        size = GLOBAL // self.world // self.accumulate
        found = []
        for rank, dataset in enumerate(datasets):
            if self.sharding == "distributed":
                sampler: Any = DistributedSampler(dataset, self.world, rank, shuffle=False)
                batches: Any = BatchSampler(sampler, size, drop_last=False)
            else:
                split = self.sharding == "split"
                wide = BatchSampler(SequentialSampler(dataset), size * (self.world if split else 1), drop_last=False)
                batches = BatchSamplerShard(wide, self.world, rank, split_batches=split)
            rest = SkipBatchSampler(batches, skip_batches=done // GLOBAL * self.accumulate)
            found.append(iter(DataLoader(dataset, batch_sampler=rest)))
        return found


ways = st.builds(
    Way,
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([1, 2]),
    st.sampled_from(["batches", "split", "distributed"]),
    st.integers(1, 8),
)


@given(
    plan=st.lists(ways, min_size=1, max_size=5),
    mixtures=st.lists(shares, min_size=4, max_size=4),
    stage_steps=st.integers(2, 8),
    sizes=all_sizes,
    seed=seeds,
)
@settings(max_examples=12)
def test_ranks_accumulation_and_interruptions_leave_the_sequence_as_it_is(
    plan: list[Way], mixtures: list[dict[str, float]], stage_steps: int, sizes: list[int], seed: int
) -> None:
    length = stage_steps * GLOBAL
    data = {
        name: [{"input_ids": [k, row]} for row in range(size)]
        for k, (name, size) in enumerate(zip(names, sizes, strict=True))
    }
    stages = [StageOf(k, k * length, units_of(weights)) for k, weights in enumerate(mixtures)]
    expected = list(enumerated(stages, sizes, seed, GLOBAL, SAMPLES))

    def make() -> MixtureDataset:
        made = MixtureDataset(data, mixtures[0], num_samples=SAMPLES, seed=seed, block=GLOBAL)
        made.schedule.hold(length)
        return made

    done, state = 0, json.dumps(make().state_dict())
    for way in plan:
        ranks = [make() for _ in range(way.world)]
        for dataset in ranks:
            dataset.load_state_dict(json.loads(state))
        loaders = way.loaders(ranks, done)
        for _ in range(min(way.steps, (SAMPLES - done) // GLOBAL)):
            for dataset in ranks:
                if dataset.schedule.end == done and (number := done // length) < len(mixtures):
                    dataset.publish(mixtures[number], done, done + length if number + 1 < len(mixtures) else None)
            read = [next(loader)["input_ids"].tolist() for _ in range(way.accumulate) for loader in loaders]
            want = [[domain, row] for domain, row, _ in expected[done : done + GLOBAL]]
            assert sorted(itertools.chain(*read)) == sorted(want)
            done += GLOBAL
            state = json.dumps(ranks[-1].state_dict())
