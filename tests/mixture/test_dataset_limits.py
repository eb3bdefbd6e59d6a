"""What limits on repetition do to a dataset and the loaders that read it."""

import json
import logging
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader  # type: ignore[import-untyped]
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SequentialSampler

from dynmix.mixture.accounting import Remaining
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.limits import Exhausted

SIZES = {"a": 40, "b": 90, "c": 70}


def make(max_epochs: Any = 1, when_exhausted: Any = None, **options: Any) -> MixtureDataset:
    domains = {
        name: [{"input_ids": [k, row, 0]} for row in range(size)] for k, (name, size) in enumerate(SIZES.items())
    }
    options = {"weights": {"a": 0.5, "b": 0.3, "c": 0.2}, "num_samples": 1000, "block": 16, **options}
    return MixtureDataset(domains, max_epochs=max_epochs, when_exhausted=when_exhausted, **options)


def read(loader: Any) -> list[list[int]]:
    return [ids for batch in loader for ids in batch["input_ids"][:, :2].tolist()]


def reference(dataset: MixtureDataset, stop: int) -> list[list[int]]:
    domain, row, _ = dataset.schedule.assign(0, stop)
    return np.stack([domain, row], axis=1).tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["stop", "redistribute"])
def test_a_loader_ends_where_the_data_does(policy: str, workers: int) -> None:
    dataset = make(when_exhausted=policy)
    end = dataset.schedule.exhausted_at
    assert end == len(dataset)
    if policy == "redistribute":
        assert end == sum(SIZES.values())
    found = read(DataLoader(dataset, batch_size=7, num_workers=workers))
    assert found == reference(dataset, len(dataset))
    assert len({tuple(each) for each in found}) == len(found)  # nothing twice
    for look in (lambda: dataset[len(dataset)], lambda: dataset.__getitems__([len(dataset), len(dataset) + 1])):
        with pytest.raises(Exhausted, match=rf"ends at position {end}, .*'a' \(max_epochs=1\)"):
            look()
    with pytest.raises(IndexError, match="position 1000"):
        dataset[1000]


def test_without_a_limit_nothing_ends() -> None:
    dataset = make(max_epochs=None)
    assert len(dataset) == 1000 == len(read(DataLoader(dataset, batch_size=50)))
    assert make(max_epochs=2, when_exhausted="repeat").schedule.exhausted_at is None


def test_a_limit_beyond_the_stream_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    dataset = make(num_samples=90)
    dataset.publish({"a": 0.2, "b": 0.5, "c": 0.3}, start=50)
    assert dataset.schedule.exhausted_at == 200
    assert len(dataset) == dataset.ends_at == 90
    assert read(DataLoader(dataset, batch_size=7)) == reference(dataset, 90)
    assert not caplog.messages


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stage_published_late_may_end_the_stream_under_a_loader(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sampler was told of 1,000 samples, and asks on."""
    dataset = make(when_exhausted="stop")
    dataset.schedule.hold(48)
    found: list[list[int]] = []
    for batch in DataLoader(dataset, batch_size=8, num_workers=workers, timeout=60 if workers else 0):
        found += batch["input_ids"][:, :2].tolist()
        if len(found) == 48:
            assert not caplog.messages
            dataset.publish({"a": 0.0, "b": 0.0, "c": 1.0}, start=48)
            assert f"the stream ends at position {dataset.schedule.exhausted_at}, " in caplog.text
    end = dataset.schedule.exhausted_at
    assert end is not None
    assert dataset.read_until == end
    assert found == reference(dataset, end)
    assert len(found) == end < 130


class Wrapping(Dataset[Any]):
    """What users put around a dataset, to change its items."""

    def __init__(self, dataset: MixtureDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, position: int) -> Any:
        return self.dataset[position]


@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_that_read_through_what_wraps_the_dataset_end_with_one_whole_step(workers: int) -> None:
    dataset = make(num_samples=400)
    dataset.controlled = True
    dataset.plan_steps(3)  # of 200 samples: in the step that is not whole two of the ranks have one, and the third none
    for rank in range(3):
        loader: Any = DataLoader(Wrapping(dataset), sampler=range(rank, 400, 3), num_workers=workers)
        assert read(loader) == reference(dataset, 198)[rank::3]


def test_a_run_that_says_its_step_ends_with_a_whole_one() -> None:
    dataset = make(when_exhausted="stop")
    dataset.controlled = True  # its length is not known
    dataset.__getitems__(list(range(8)))  # as where the first batch says what a step takes
    dataset.plan_steps(32)
    whole = (dataset.schedule.exhausted_at or 0) // 32 * 32
    assert dataset.ends_at == whole
    assert len(dataset) == 1000
    batches = [len(batch["domain"]) for batch in DataLoader(dataset, batch_size=8)]
    assert batches == [8] * (whole // 8)
    # A loader that looks a batch ahead in every process, as accelerate's do: all end alike.
    for rank in range(2):
        loader = prepare_data_loader(
            DataLoader(dataset, batch_size=8), num_processes=2, process_index=rank, put_on_device=False
        )
        assert len(list(loader)) == whole // 16


@pytest.mark.parametrize("world", [2, 3])
def test_shards_of_a_stream_that_ends_are_even(world: int) -> None:
    dataset = make()
    expected, length = reference(dataset, len(dataset)), len(dataset)
    whole = BatchSampler(SequentialSampler(range(length)), 4, drop_last=False)
    for shard in (
        lambda rank: DataLoader(dataset, batch_sampler=BatchSamplerShard(whole, world, rank)),
        lambda rank: DataLoader(dataset, 4, sampler=DistributedSampler(dataset, world, rank, shuffle=False)),
    ):
        parts = [read(shard(rank)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert {tuple(each) for part in parts for each in part} == {tuple(each) for each in expected}


def test_limits_go_on_in_a_resumed_run() -> None:
    dataset = make(max_epochs={"a": 0.5, "c": 1.5}, num_samples=400)
    dataset.schedule.hold(100)
    dataset.publish({"a": 0.2, "b": 0.2, "c": 0.6}, start=100)
    state = json.loads(json.dumps(dataset.state_dict()))
    twin = make(max_epochs={"a": 0.5, "c": 1.5}, num_samples=400, weights="uniform")
    twin.load_state_dict(state)
    found = read(DataLoader(twin, batch_size=10, sampler=range(90, 400)))
    assert found == reference(dataset, 400)[90:]
    assert dataset.schedule.counts(400)[[0, 2]].tolist() == [20, 105]
    with pytest.raises(ValueError, match="max_epochs was"):
        make(num_samples=400).load_state_dict(state)


def test_a_domain_that_is_gone_keeps_its_limit_and_the_others_theirs() -> None:
    limits = {"a": 1, "b": 2, "c": 1.5}
    dataset = make(max_epochs=limits, num_samples=200)
    dataset.publish({"a": 0.0, "b": 0.6, "c": 0.4}, start=48)
    state = json.loads(json.dumps(dataset.state_dict()))
    rows = {name: [{"input_ids": [k, row, 0]} for row in range(size)] for k, (name, size) in enumerate(SIZES.items())}

    def without(*names: str, **limits: Any) -> MixtureDataset:
        left = {name: rows[name] for name in SIZES if name not in names}
        return MixtureDataset(left, num_samples=200, block=16, max_epochs=limits)

    found = without("a", b=2, c=1.5)
    found.load_state_dict(state)
    assert found.schedule.limits.epochs(found.sizes) == limits
    assert [item["input_ids"].tolist() for item in found.look(48, 200)] == [
        item["input_ids"].tolist() for item in dataset.look(48, 200)
    ]
    same = make(max_epochs={"b": 2, "c": 1.5}, num_samples=200)  # lists it, and must say its limit
    with pytest.raises(ValueError, match="max_epochs was"):
        same.load_state_dict(state)
    with pytest.raises(ValueError, match="max_epochs was"):
        without("a", b=1, c=1.5).load_state_dict(state)


def test_what_is_left_and_what_was_read() -> None:
    dataset = make(max_epochs={"a": 2}, num_samples=400)
    assert dataset.remaining()["a"] == Remaining(0, 40, 120, 80, 240)
    dataset.__getitems__(list(range(100)))
    drawn = np.bincount(dataset.schedule.assign(0, 100)[0], minlength=3).tolist()
    left = dataset.remaining()
    assert left == dataset.remaining(100)
    assert dataset.remaining(0) == make(max_epochs={"a": 2}, num_samples=400).remaining()
    assert left["a"] == Remaining(
        drawn[0] // 40, 40 - drawn[0] % 40, 3 * (40 - drawn[0] % 40), 80 - drawn[0], 240 - 3 * drawn[0]
    )
    assert left["b"] == Remaining(0, 90 - drawn[1], 3 * (90 - drawn[1]), None, None)
    assert dataset.realised() == dataset.realised(100) == {n: 3 * d for n, d in zip(SIZES, drawn, strict=True)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_log_says_where_a_domain_is_read_again(ranks: int, caplog: pytest.LogCaptureFixture) -> None:
    """Once, on the rank that reads there."""
    dataset, *others = (make(max_epochs=None, num_samples=500) for _ in range(ranks))
    _, _, epoch = dataset.schedule.assign(0, 500)
    domain = dataset.schedule.assign(0, 500)[0]
    expected = []
    for k, name in enumerate(SIZES):
        for e in range(1, int(epoch[domain == k].max()) + 1):
            position = int(np.flatnonzero((domain == k) & (epoch == e))[0])
            expected.append((position, f"domain {name!r} begins its epoch {e + 1} at position {position}, reshuffled"))
    for at in range(0, 500, 20):
        before = len(caplog.messages)
        for rank, each in enumerate((dataset, *others)):
            each.__getitems__(list(range(at + rank, at + 20, ranks)))
        said = [text for position, text in sorted(expected) if at <= position < at + 20]
        assert sorted(caplog.messages[before:]) == sorted(said)
    assert len(caplog.messages) == len(expected) > 5
    assert {record.name for record in caplog.records} == {"dynmix.mixture"}


def test_a_stage_that_will_read_again_says_so_when_it_is_published(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dynmix.mixture")
    dataset = make(max_epochs=None)
    dataset.schedule.hold(64)
    dataset.publish({"a": 1.0, "b": 0.0, "c": 0.0}, start=64, end=100)
    assert "stage 1 begins at position 64, with the weights {'a': 1.0" in caplog.text
    begins = 64 + 40 - int(dataset.schedule.counts(64)[0])
    assert f"stage 1 will read again: domain 'a' begins its epoch 2 at position {begins}, reshuffled" in caplog.text
