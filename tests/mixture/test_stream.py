import copy
import json
import pickle
import threading
import time
from collections.abc import Iterator
from itertools import chain, count, cycle, islice
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker as torch_worker
from torch.utils.data._utils.fetch import _IterableDatasetFetcher
from torchdata.stateful_dataloader import StatefulDataLoader

from dynmix import MixtureDataset, MixtureStream
from dynmix.mixture import packed
from dynmix.mixture.schedule import Undecided
from dynmix.mixture.weights import integer_cdf

LENGTH, BATCH = 4, 4
WEIGHTS, SWAPPED = {"a": 0.3, "b": 0.7}, {"a": 0.8, "b": 0.2}


def a() -> Iterator[dict[str, Any]]:
    for row in range(10):
        yield {"input_ids": [row] * 5}


def b() -> Iterator[dict[str, Any]]:
    for row in range(7):
        yield {"input_ids": list(range(100 + 3 * row, 103 + 3 * row))}


def make(**options: Any) -> MixtureStream:
    options = {"num_samples": 80, "batch_size": BATCH, "block": 8, "weights": WEIGHTS, **options}
    return MixtureStream({"a": a, "b": b}, **({"sequence_length": LENGTH} | options))


def samples(loader: Any) -> list[tuple[int, list[int]]]:
    return [
        (domain, ids)
        for batch in loader
        for domain, ids in zip(batch["domain"].tolist(), batch["input_ids"].tolist(), strict=True)
    ]


def reference(stream: MixtureStream, batch: int, readers: int) -> list[tuple[int, list[int]]]:
    """Every sample in order, of readers that take batches in turn, each every `readers`-th item of every domain."""

    def shares(reader: int) -> list[Iterator[int]]:
        mine = [islice(cycle(source()), reader, None, readers) for source in (a, b)]
        return [chain.from_iterable(item["input_ids"] for item in items) for items in mine]

    flat = [shares(reader) for reader in range(readers)]
    domain = stream.schedule.assign(0, stream.num_samples)[0].tolist()
    return [(d, list(islice(flat[g // batch % readers][d], LENGTH))) for g, d in enumerate(domain)]


class Worker:
    """What a worker is told, and nothing else of one: a reader of its own in this process."""

    def __init__(self, stream: MixtureStream, number: int, workers: int) -> None:
        self.info = torch_worker.WorkerInfo(id=number, num_workers=workers, seed=0, dataset=None)
        with self:
            self.stream = pickle.loads(pickle.dumps(stream))
            self.items = iter(self.stream)

    def __enter__(self) -> None:
        torch_worker._worker_info = self.info

    def __exit__(self, *failure: Any) -> None:
        torch_worker._worker_info = None

    def take(self, size: int) -> list[tuple[int, list[int]]]:
        with self:
            return [(item["domain"], item["input_ids"].tolist()) for item in islice(self.items, size)]

    def state(self) -> Any:
        with self:
            return json.loads(json.dumps(self.stream.state_dict()))

    def load(self, state: Any) -> None:
        with self:
            self.stream.load_state_dict(state)
            self.items = iter(self.stream)


@settings(max_examples=15)
@given(st.data())
def test_batches_hold_the_domains_of_the_map_style_dataset(data: st.DataObject) -> None:
    world, workers, batch, steps = (data.draw(st.integers(1, most)) for most in (3, 3, 5, 12))
    total = world * batch * steps
    swap = data.draw(st.none() | st.integers(1, total))
    kept_from = data.draw(st.integers(0, steps))

    def ranks() -> list[list[Worker]]:
        found = []
        for rank in range(world):
            stream = make(num_samples=total, batch_size=batch, rank=rank, world_size=world)
            if swap is not None:
                stream.publish(SWAPPED, swap)
            found.append([Worker(stream, number, workers) for number in range(workers)])
        return found

    def step(readers: list[list[Worker]], number: int) -> list[tuple[int, list[int]]]:
        return [sample for of_rank in readers for sample in of_rank[number % workers].take(batch)]

    first, resumed = ranks(), ranks()
    got = [step(first, number) for number in range(kept_from)]
    for old, new in zip(chain(*first), chain(*resumed), strict=True):
        new.load(old.state())
    for number in range(kept_from, steps):
        got.append(step(first, number))
        assert step(resumed, number) == got[-1]
    expected = make(num_samples=total)
    if swap is not None:
        expected.publish(SWAPPED, swap)
    assert list(chain(*got)) == reference(expected, batch, world * workers)
    rows = [{"input_ids": [0] * LENGTH}] * 9
    dataset = MixtureDataset({"a": rows, "b": rows}, WEIGHTS, num_samples=total, block=8)
    if swap is not None:
        dataset.publish(SWAPPED, swap)
    assert [domain for domain, _ in chain(*got)] == [dataset[g]["domain"] for g in range(total)]


def test_items_are_what_the_map_style_dataset_gives() -> None:
    stream = make(num_samples=7)
    items = list(stream)
    assert len(items) == len(stream) == 7
    assert items[0].keys() == {"input_ids", "labels", "domain"}
    assert items[0]["input_ids"].dtype == items[0]["labels"].dtype == torch.int64
    items[0]["labels"][:] = -100
    assert (items[0]["input_ids"] >= 0).all()
    assert [item["input_ids"].tolist() for item in stream] == [item["input_ids"].tolist() for item in items]


@pytest.mark.parametrize(("workers", "left"), [(0, 0), (0, 7), (2, 7)])
def test_a_stateful_loader_resumes_exactly(workers: int, left: int) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(make(), batch_size=BATCH, num_workers=workers)

    whole = samples(loader())
    assert whole == reference(make(), BATCH, max(1, workers))
    first, second = loader(), loader()
    got = samples(islice(first, left))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert got + samples(second) == whole


def test_a_state_goes_through_json_where_arguments_are_numbers_of_numpy() -> None:
    numbers = {"num_samples": 8, "sequence_length": LENGTH, "batch_size": BATCH, "rank": 0, "world_size": 1, "seed": 3}
    stream = make(**{name: np.int64(number) for name, number in numbers.items()})
    samples(StatefulDataLoader(stream, batch_size=BATCH))
    assert json.loads(json.dumps(stream.state_dict())) == stream.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_of_where_a_process_is_leaves_out_the_stages_behind_it(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_ROOM", 0)  # which leaves the newest four, and those ahead
    stream, resumed = make(), make()
    for number in range(1, 80):
        stream.publish(SWAPPED if number % 2 else WEIGHTS, number)
    whole = reference(stream, BATCH, max(1, workers))
    first, second = (StatefulDataLoader(each, batch_size=BATCH, num_workers=workers) for each in (stream, resumed))
    batches = iter(first)
    got = samples(islice(batches, 9))
    state = json.loads(json.dumps(first.state_dict()))
    if workers:
        assert len(stream.state_dict()["schedule"]["stages"]["starts"]) == 80
        resumed.load_state_dict(stream.state_dict())
        kept = [each["dataset_state"] for each in state["_snapshot"]["_worker_snapshots"].values()]
    else:
        kept = [state["dataset_state"]]
    assert {each["schedule"]["stages"]["starts"][0] for each in kept} == {29}  # the next position is 36 or 40
    second.load_state_dict(state)
    assert got + samples(second) == got + samples(batches) == whole


def test_a_state_stays_small_after_1000_stages_of_50_domains() -> None:
    rng, names = np.random.default_rng(0), [f"domain{number}" for number in range(50)]

    def make() -> MixtureStream:
        sources = {name: lambda: ({"input_ids": [row] * 9} for row in count()) for name in names}
        return MixtureStream(sources, num_samples=8000, sequence_length=8)

    stream, resumed = make(), make()
    for number in range(1, 1000):
        stream.publish(integer_cdf(rng.dirichlet(np.ones(50))), 8 * number)
    items = iter(stream)
    list(islice(items, 7900))
    state = json.dumps(stream.state_dict())
    assert len(state) < 100_000
    resumed.load_state_dict(json.loads(state))
    assert len(json.dumps(resumed.state_dict())) == len(state)
    rest = [item["input_ids"].tolist() for item in items]
    assert [item["input_ids"].tolist() for item in resumed] == rest
    with pytest.raises(LookupError, match="position 0 was left out of the state"):
        next(iter(resumed))


def test_stages_may_be_loaded_once_the_loader_has_made_its_iterator() -> None:
    """As a hook does whose state is loaded after that of the loader."""
    stream = make()
    loader = StatefulDataLoader(stream, batch_size=BATCH, num_workers=0)
    got = samples(islice(loader, 5))
    again, last = make(), make()
    second, third = (StatefulDataLoader(each, batch_size=BATCH, num_workers=0) for each in (again, last))
    second.load_state_dict(loader.state_dict())
    batches = iter(second)
    again.load_state_dict(stream.state_dict() | {"reading": None})
    got += samples(islice(batches, 5))
    third.load_state_dict(second.state_dict())
    assert got + samples(third) == reference(stream, BATCH, 1)


def test_one_worker_goes_on_where_the_main_process_was() -> None:
    first, second = make(), make()
    got = [item["input_ids"].tolist() for item in islice(first, 10)]
    second.load_state_dict(first.state_dict())
    assert got + [ids for _, ids in samples(DataLoader(second, BATCH, num_workers=1))] == [
        ids for _, ids in reference(first, 1, 1)
    ]


def test_a_swap_is_exact_though_workers_read_ahead() -> None:
    stream = make(num_samples=160)
    stream.schedule.hold(40)
    batches = iter(DataLoader(stream, BATCH, num_workers=2, prefetch_factor=4))
    got = samples(islice(batches, 9))
    time.sleep(0.2)  # workers have asked for what is not decided
    stream.pulse()
    stream.publish(SWAPPED, 40, 100)
    got += samples(islice(batches, 14))
    threading.Timer(0.2, stream.publish, (WEIGHTS, 100)).start()
    got += samples(batches)
    assert [stage.start for stage in stream.schedule.stages] == [0, 40, 100]
    assert got == reference(stream, BATCH, 2)


def test_without_a_declared_end_a_swap_is_seen_at_once_and_never_too_late() -> None:
    stream = make(batch_size=None)
    items = iter(stream)
    got = [item["domain"] for item in islice(items, 10)]
    assert stream.read_until == 10
    with pytest.raises(ValueError, match="already read"):
        stream.publish(SWAPPED, 9)
    with pytest.raises(ValueError, match="already read|has read"):
        stream.begin(SWAPPED)
    stream.publish(SWAPPED, 12)
    got += [item["domain"] for item in items]
    assert got == stream.schedule.assign(0, 80)[0].tolist()


def test_the_main_process_does_not_wait_for_itself_and_loses_nothing() -> None:
    stream = make(num_samples=78)
    stream.schedule.hold(10)
    items = iter(stream)
    got = [(item["domain"], item["input_ids"].tolist()) for item in islice(items, 8)]
    with pytest.raises(Undecided):
        next(items)
    stream.publish(SWAPPED, 10, 78)  # where the last batch has not all of its samples
    assert got + [(item["domain"], item["input_ids"].tolist()) for item in items] == reference(stream, BATCH, 1)


@pytest.mark.parametrize("split", [False, True])
def test_accelerates_shards_are_those_of_the_map_style_dataset(split: bool) -> None:
    processes = 2
    size = BATCH if split else BATCH * processes

    def of_process(number: int) -> list[int]:
        workers = [Worker(make(batch_size=size), worker, 2) for worker in range(2)]
        shards = []
        for worker in workers:
            with worker:
                shard = IterableDatasetShard(worker.items, BATCH, False, processes, number, split)
                shards.append([item["domain"] for item in shard])
        mine = size // processes
        turns = [shard[k : k + mine] for k in range(0, 80, mine) for shard in shards]
        return list(chain(*turns))

    parts = np.array([of_process(number) for number in range(processes)]).reshape(processes, -1, size // processes)
    assert parts.swapaxes(0, 1).ravel().tolist() == make().schedule.assign(0, 80)[0].tolist()


def test_a_state_of_other_readers_is_refused() -> None:
    state = Worker(make(), 0, 2).state()
    with pytest.raises(ValueError, match="reader 0 of 2.*reader 1 of 3.*as many ranks and workers"):
        Worker(make(), 1, 3).load(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"sequence_length": 5}, "sequence_length was 4 and is 5"),
        ({"sizes": {"a": 1, "b": 2}}, "rows and has"),
    ],
)
def test_a_state_of_another_mixture_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"num_samples": 80, "sequence_length": LENGTH, "block": 8, **options}
    with pytest.raises(ValueError, match=message):
        MixtureStream({"a": a, "b": b}, WEIGHTS, **given).load_state_dict(make().state_dict())


def test_stages_come_back_with_a_state() -> None:
    stream = make()
    stream.schedule.hold(20)
    stream.publish(SWAPPED, 20, 60)
    items = iter(stream)
    list(islice(items, 26))
    state = stream.state_dict()
    stream.publish(WEIGHTS, 60)
    rest = [item["input_ids"].tolist() for item in items]

    fresh = make()
    fresh.load_state_dict(state)
    assert [stage.end for stage in fresh.schedule.stages] == [20, 60]
    fresh.publish(WEIGHTS, 60)
    fresh.load_state_dict(state)  # as a loader does that was saved beside the controller that has published since
    assert [stage.start for stage in fresh.schedule.stages] == [0, 20, 60]
    assert [item["input_ids"].tolist() for item in fresh] == rest
    for reading in (None, state["reading"]):  # now it was read: back to what it was
        fresh.load_state_dict({**state, "reading": reading})
        assert fresh.state_dict() == {**state, "reading": reading}
        next(iter(fresh))
        assert fresh.read_until == (4 if reading is None else 28)  # with the rest of the batch


def test_the_state_of_a_copy_has_the_stages_of_the_copy() -> None:
    stream = make()
    stream.publish({"a": 0.5, "b": 0.5}, start=8)
    stream.state_dict()
    twin = copy.deepcopy(stream)  # with a generation of its own, that gets as far as the stream's
    twin.publish({"a": 0.25, "b": 0.75}, start=16)
    resumed = make()
    resumed.load_state_dict(twin.state_dict())
    assert resumed.schedule.stages == twin.schedule.stages


def test_a_worker_does_not_publish_what_its_state_has() -> None:
    stream = make()
    stream.publish(SWAPPED, 20)
    state = Worker(stream, 0, 2).state()
    with pytest.raises(ValueError, match="load them there before the loader starts"):
        Worker(make(), 0, 2).load(state)


def test_stop_ends_where_a_domain_does() -> None:
    stream = make(when_exhausted="stop", batch_size=None)
    got = [(item["domain"], item["input_ids"].tolist()) for item in stream]
    expected = reference(stream, 1, 1)
    of_b = [g for g, (domain, _) in enumerate(expected) if domain == 1]
    assert got == expected[: of_b[21 // LENGTH]]  # b has 21 tokens
    with pytest.raises(ValueError, match="one rank and at most one worker"):
        make(when_exhausted="stop", rank=0, world_size=2)


def test_probes_are_sequences_of_the_domain_that_are_never_trained_on() -> None:
    stream = MixtureStream(
        {"a": [{"input_ids": [row] * LENGTH} for row in range(30)]}, num_samples=80, sequence_length=LENGTH,
        probe_sequences=6,
    )  # fmt: skip
    assert stream.probes("a") == 6
    assert [stream.sequence("a", row)["input_ids"].tolist() for row in range(6)] == [[row] * LENGTH for row in range(6)]
    assert {int(item["input_ids"][0]) for item in stream} == set(range(6, 30))
    with pytest.raises(IndexError, match="6 probe sequences, number 6"):
        stream.sequence("a", 6)
    with pytest.raises(IndexError, match="pass probe_sequences="):
        make().sequence("a", 0)
    with pytest.raises(KeyError, match="no domain"):
        stream.sequence("c", 0)


def test_a_state_stays_small() -> None:
    stream = MixtureStream(
        {f"domain{number}": lambda: ({"input_ids": [row] * 9} for row in count()) for number in range(50)},
        num_samples=10**9, sequence_length=64, block=8,
    )  # fmt: skip
    list(islice(stream, 400))
    reading = stream.state_dict()["reading"]
    assert len(reading["domains"]) == 50
    assert len(json.dumps(reading)) < 20_000


def test_loaders_of_another_batch_are_refused() -> None:
    worker = Worker(make(), 0, 2)
    with worker:  # what a DataLoader's worker does, and without the seconds that its end takes
        right, wrong = (_IterableDatasetFetcher(worker.stream, True, list, False) for _ in range(2))
        assert len(right.fetch([None] * BATCH)) == BATCH
        with pytest.raises(ValueError, match="takes 3 samples at a time and the MixtureStream was given batch_size=4"):
            wrong.fetch([None] * 3)
    with pytest.raises(ValueError, match="2 readers take batches in turn: pass batch_size="):
        Worker(make(batch_size=None), 0, 2)


def test_ranks_must_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="there are 2 processes: pass rank= and world_size="):
        make()
    assert len(samples(DataLoader(make(world_size=1), BATCH))) == 80
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="there are 3 processes"):
        make()
    for rank in (None, 2, -1):
        with pytest.raises(ValueError, match="ranks of world_size=2"):
            make(rank=rank, world_size=2)
    with pytest.raises(ValueError, match=r"num_samples=81 is no multiple of batch_size x world_size = 8"):
        make(rank=0, world_size=2, num_samples=81)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1e3}, "num_samples=1000.0: give a whole number"),
        ({"batch_size": 2.5}, "batch_size=2.5: give a whole number"),
        ({"block": "8"}, "block='8': give a whole number"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"probe_sequences": -1}, "probe_sequences must be at least 0"),
        ({"weights": "natural"}, "weights='natural'"),
        ({"weights": {"a": 1.0}}, r"missing \['b'\]"),
        ({"sizes": {"a": 1}}, r"missing \['b'\]"),
        ({"when_exhausted": "redistribute"}, "give one of"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
    with pytest.raises(ValueError, match="domains is empty"):
        MixtureStream({}, num_samples=1, sequence_length=1)
    with pytest.raises(ValueError, match="domains is a list: give a mapping"):
        MixtureStream([[]], num_samples=1, sequence_length=1)  # type: ignore[arg-type]
