import json
import logging
import multiprocessing
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader  # type: ignore[import-untyped]
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SequentialSampler, Subset
from torchdata.stateful_dataloader import StatefulDataLoader

from dynmix.mixture import packed
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.schedule import Undecided
from dynmix.mixture.store import TokenStore
from dynmix.mixture.stream import MixtureStream

LENGTH = 6
half = {"a": 0.5, "b": 0.5}


def plain(rows: int, first: int = 0, length: int = LENGTH) -> list[dict[str, Any]]:
    """Row r holds first + r, `length` times."""
    return [{"input_ids": [first + row] * length} for row in range(rows)]


def make(**options: Any) -> MixtureDataset:
    options = {"weights": {"a": 0.25, "b": 0.75}, "num_samples": 1000, "block": 16, **options}
    return MixtureDataset({"a": plain(40), "b": plain(90, 1000)}, **options)


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, TokenStore]:
    rng = np.random.default_rng(0)
    return {
        name: TokenStore.write(tmp_path / name, [rng.integers(0, 5000, n) for n in rng.integers(1, 90, documents)])
        for name, documents in (("a", 20), ("b", 45))
    }


def logged_to_stderr(worker: int) -> None:
    logging.getLogger("dynmix.mixture").addHandler(logging.StreamHandler())


def first_tokens(loader: Any) -> list[int]:
    return [int(row[0]) for batch in loader for row in batch["input_ids"]]


def test_a_run_that_goes_back_to_its_state_again_and_again_is_no_shuffle() -> None:
    """As one in a notebook, which is interrupted and resumed."""
    dataset = make()
    for start in range(0, 96, 32):
        dataset.__getitems__(list(range(start, start + 32)))
    state = dataset.state_dict()
    for _ in range(4):
        dataset.load_state_dict(state)
        for start in (96, 128):
            dataset.__getitems__(list(range(start, start + 32)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_of_one_domain(ranks: int) -> None:
    """However accelerate deals them to ranks, and in the proportions of the weights."""
    dataset = make(homogeneous=4)
    batches = BatchSampler(SequentialSampler(dataset), 4, drop_last=False)
    shards = [BatchSamplerShard(batches, ranks, rank) for rank in range(ranks)]
    found = [batch for shard in shards for batch in DataLoader(make(homogeneous=4), batch_sampler=shard)]
    assert all(len(set(batch["domain"].tolist())) == 1 for batch in found)
    assert sorted(first_tokens(found)) == sorted(dataset.look(0, 1000).batch()["input_ids"][:, 0].tolist())  # type: ignore[index]
    steps = dataset.look(0, 992).batch()["domain"].view(-1, 16)  # type: ignore[index]
    assert set(steps.sum(1).tolist()) <= {8, 12, 16}  # of 12: whole micro-batches, one more or less
    with pytest.raises(ValueError, match="homogeneous was 4 and is 1"):
        make().load_state_dict(dataset.state_dict())
    with pytest.raises(ValueError, match="homogeneous=3 must divide block=16"):
        make(homogeneous=3)
    with pytest.raises(ValueError, match=r"homogeneous=2\.5: give a whole number"):
        make(homogeneous=2.5)


def test_item_g_is_the_row_the_schedule_says() -> None:
    dataset = make()
    domain, row, _ = dataset.schedule.assign(0, 1000)
    batch = dataset.__getitems__(list(range(1000)))
    for position in (0, 1, 17, 500, 999):
        expected = int(row[position]) + 1000 * int(domain[position])
        for item in (dataset[position], batch[position]):
            assert item["input_ids"].tolist() == item["labels"].tolist() == [expected] * LENGTH
            assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
            assert item["domain"] == domain[position]
    assert len(dataset) == 1000
    assert dataset.domains == ("a", "b")
    assert dataset.sizes == {"a": 40, "b": 90}
    assert dataset.sequence_length == LENGTH


def test_labels_may_be_masked_without_touching_the_inputs() -> None:
    item = make().__getitems__([0, 1])[0]
    item["labels"][:] = -100
    assert (item["input_ids"] >= 0).all()


def test_token_stores_are_cut_end_to_end(stores: dict[str, TokenStore]) -> None:
    flat = np.concatenate(list(stores["a"]))
    packed = PackedSequences(stores["a"], 32)
    assert len(packed) == len(flat) // 32
    for row in (0, 1, len(packed) - 1, -1):
        expected = flat[: len(packed) * 32].reshape(-1, 32)[row]
        assert packed[row]["input_ids"].tolist() == expected.tolist()
    for row in (len(packed), -len(packed) - 1):
        with pytest.raises(IndexError, match="sequence"):
            packed[row]
    dataset = MixtureDataset({"a": stores["a"], "b": stores["b"].path}, num_samples=300, sequence_length=32)
    domain, rows, _ = dataset.schedule.assign(0, 300)
    for item, d, r in zip(dataset.__getitems__(list(range(300))), domain.tolist(), rows.tolist(), strict=True):
        expected = stores["ab"[d]].tokens[r * 32 : r * 32 + 32]
        assert item["input_ids"].tolist() == dataset.sequence("ab"[d], r)["labels"].tolist() == expected.tolist()


def test_a_store_and_its_sequences_as_a_list_give_one_stream(stores: dict[str, TokenStore]) -> None:
    lists = {name: list(PackedSequences(store, 32)) for name, store in stores.items()}
    ours = MixtureDataset(stores, num_samples=200, sequence_length=32).__getitems__(list(range(200)))
    theirs = MixtureDataset(lists, num_samples=200).__getitems__(list(range(200)))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(ours, theirs, strict=True))


def test_names_may_be_any_text(stores: dict[str, TokenStore]) -> None:
    odd = ["", " ", "a/b", "naïve 日本", "new\nline", "{}", "'\"$;", "a" * 500]
    dataset = MixtureDataset(dict.fromkeys(odd, stores["a"]), "uniform", num_samples=100, sequence_length=32)
    twin = MixtureDataset(dict.fromkeys(odd, stores["a"]), "natural", num_samples=100, sequence_length=32)
    twin.load_state_dict(json.loads(json.dumps(dataset.state_dict())))
    assert twin.domains == tuple(odd)
    assert {item["domain"] for item in twin.__getitems__(list(range(100)))} == set(range(8))


def test_5000_domains_one_of_them_with_one_sequence(stores: dict[str, TokenStore]) -> None:
    domains: dict[str, Any] = {f"d{k}": plain(2 + k % 3, 10 * k) for k in range(5000)} | {"one": plain(1, 99_999)}
    dataset = MixtureDataset(domains, "uniform", num_samples=20_000)
    domain, row, epoch = dataset.schedule.assign(0, 20_000)
    assert np.bincount(domain).min() >= 3
    assert np.bincount(domain).max() <= 5  # 3.999 each, rounded up or down, and one late
    assert (row[domain == 5000] == 0).all()
    assert epoch[domain == 5000].tolist() == list(range((domain == 5000).sum()))
    for item, d, r in zip(dataset.__getitems__(list(range(64))), domain.tolist(), row.tolist(), strict=False):
        assert item["input_ids"].tolist() == domains[dataset.domains[d]][r]["input_ids"]
    twin = MixtureDataset(domains, num_samples=20_000)
    twin.load_state_dict(json.loads(json.dumps(dataset.state_dict())))
    assert twin.schedule.counts(12_345).tolist() == np.bincount(domain[:12_345], minlength=5001).tolist()


def test_named_weights() -> None:
    assert make(weights="natural").schedule.weights_at(0) == pytest.approx({"a": 40 / 130, "b": 90 / 130})
    assert make(weights="uniform").schedule.weights_at(0) == half
    assert make(weights={"b": 0.75, "a": 0.25}).schedule.names == ("a", "b")


@pytest.mark.parametrize(
    ("domains", "options", "message"),
    [
        ({}, {}, "domains is empty"),
        ({"a": plain(3), "b": []}, {}, "domain 'b' has not one whole sequence"),
        ({"a": plain(3), "b": plain(3, length=4)}, {}, "here 6: in domain 'b' it is 4"),
        ({"a": plain(3)}, {"sequence_length": 5}, "here 5: in domain 'a' it is 6"),
        ({"a": [{"text": "x"}]}, {}, "item 0 of domain 'a' is no dict with input_ids"),
        ({"a": [{"input_ids": [0.5]}]}, {}, "input_ids of item 0 of domain 'a' are float64"),
        ({"a": [{"input_ids": []}]}, {}, "at least one token"),
        ({"a": iter([])}, {}, "domain 'a' is a list_iterator"),
        ({"a": plain(3)}, {"num_samples": 0}, "num_samples must be at least 1"),
        ({"a": plain(3)}, {"weights": "equal"}, 'give "natural", "uniform" or'),
        (["a", "b"], {}, "domains is a list: give a mapping"),
        ({"a": plain(3)}, {"num_samples": 1e3}, "num_samples=1000.0: give a whole number"),
        ({"a": plain(3)}, {"sequence_length": 4.0}, "sequence_length=4.0: give a whole number"),
        ({"a": plain(3)}, {"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"a": plain(3)}, {"seed": "x"}, "seed='x': give a whole number"),
        ({"a": plain(3)}, {"block": 2.5}, "block=2.5: give a whole number"),
        ({"a": plain(3)}, {"bos_token_id": "<s>"}, "bos_token_id='<s>': a token id, \"auto\" or None"),
        ({"a": plain(3)}, {"ignore_token_ids": 3}, "ignore_token_ids=3: give a list of token ids"),
        ({"a": plain(3)}, {"ignore_token_ids": ["x"]}, "ignore_token_ids='x': give a whole number"),
        ({"a": plain(3)}, {"max_epochs": 0}, "max_epochs=0: no sequence may be read"),
        ({"a": plain(3)}, {"max_epochs": 0, "when_exhausted": "repeat"}, "max_epochs=0: no sequence may be read"),
        ({"a": plain(3)}, {"max_epochs": {"a": 0.1}}, "max_epochs={'a': 0.1}: no sequence may be read"),
        ({"a": plain(3)}, {"weights": [1.0]}, r'weights=\[1.0\]: give "natural"'),
        ({"a": plain(3), "b": plain(3)}, {"weights": {"a": 2, "b": -1}}, r"weights\['b'\]=-1: a weight is"),
        ({"a": plain(3), "b": plain(3)}, {"weights": {"a": 1, "b": None}}, r"weights\['b'\]=None: a weight is"),
        ({"a": plain(3)}, {"weights": {"c": 1.0}}, r"weights must have .* missing \['a'\], unknown \['c'\]"),
    ],
)
def test_bad_arguments_are_named(domains: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureDataset(domains, **{"num_samples": 10, **options})


def test_stores_that_cannot_be_cut_are_named(stores: dict[str, TokenStore]) -> None:
    with pytest.raises(ValueError, match="sequence_length is missing: domain 'a'"):
        MixtureDataset(stores, num_samples=10)
    tokens = len(stores["a"].tokens)
    with pytest.raises(ValueError, match=rf"domain 'a' has not one whole sequence \({tokens} tokens, of 100000\)"):
        MixtureDataset(stores, num_samples=10, sequence_length=100_000)


def test_a_sequence_of_another_length_is_named_when_it_is_read() -> None:
    dataset = MixtureDataset({"a": [*plain(3), {"input_ids": [1]}]}, num_samples=10)
    with pytest.raises(ValueError, match="sequence 3 of domain 'a' has 1 tokens, not 6"):
        dataset.__getitems__(list(range(10)))


@pytest.mark.parametrize("position", [-1, 1000])
def test_positions_outside_are_index_errors(position: int) -> None:
    with pytest.raises(IndexError, match=f"position {position}"):
        make()[position]
    with pytest.raises(IndexError, match=f"position {position}"):
        make().__getitems__([position])
    with pytest.raises(IndexError, match="row 40 of domain 'a'"):
        make().sequence("a", 40)
    with pytest.raises(KeyError, match="no domain 'c'"):
        make().sequence("c", 0)


def test_the_order_is_the_same_for_all_batches_and_workers() -> None:
    orders = [
        first_tokens(DataLoader(make(), batch_size=size, num_workers=workers))
        for size, workers in ((1, 0), (7, 0), (64, 0), (5, 2))
    ]
    assert orders[0] == orders[1] == orders[2] == orders[3]
    assert len(set(orders[0])) == 130


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_gives_the_same_samples_again_is_said(workers: int, caplog: Any, capfd: Any) -> None:
    for read in (make(num_samples=42), MixtureStream({"a": plain(9)}, num_samples=40, sequence_length=6, batch_size=4)):
        loader = DataLoader(read, batch_size=4, num_workers=workers, drop_last=True, worker_init_fn=logged_to_stderr)
        next(iter(loader))  # a look at the first batch
        first = first_tokens(loader)
        if not workers:  # which cannot tell
            with torch.no_grad():  # an evaluation
                assert first_tokens(loader) == first
        assert "is read again" not in caplog.text + capfd.readouterr().err
        assert first_tokens(loader) == first
        said = caplog.text + capfd.readouterr().err
        assert "position 0 is read again, after all of the 4" in said
        assert "right for an evaluation" in said
        caplog.clear()
        first_tokens(loader)  # as an evaluation does, which is to read the same: said once
        assert "is read again" not in caplog.text + capfd.readouterr().err


def swap_at(dataset: MixtureDataset, boundary: int, read: Any = None, **options: Any) -> list[int]:
    """Order of a stream whose second stage is published when everything before it was handed out.

    `read`: what wraps the dataset, if something does.
    """
    dataset.schedule.hold(boundary)
    order: list[int] = []
    for batch in DataLoader(read or dataset, batch_size=8, **options):
        order += batch["input_ids"][:, 0].tolist()
        if len(order) == boundary:
            assert dataset.schedule.end == boundary
            dataset.publish({"a": 1.0, "b": 0.0}, start=boundary)
    return order


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_stage_published_while_workers_wait_begins_at_its_position(
    method: str, stores: dict[str, TokenStore]
) -> None:
    options: dict[str, Any] = {"weights": {"a": 0.1, "b": 0.9}, "num_samples": 200, "sequence_length": 32}
    expected = swap_at(MixtureDataset(stores, **options), 64)
    dataset = MixtureDataset(stores, **options)
    # The timeout makes a stage that never arrives a failure instead of a hang.
    order = swap_at(dataset, 64, num_workers=2, multiprocessing_context=method, timeout=60)
    assert order == expected
    domain = dataset.schedule.assign(0, 200)[0]
    assert domain[:64].sum() >= 56
    assert (domain[64:] == 0).all()
    assert dataset.read_until == 200
    assert dataset.read_size == 8


def train_as_a_rank(dataset: MixtureDataset | MixtureStream, queue: Any) -> None:
    dataset.detach()
    dataset.publish({"a": 0.75, "b": 0.25}, start=40, end=80)
    items = dataset if isinstance(dataset, MixtureDataset) else None  # what a stream reads is its loader's
    queue.put((dataset.schedule.state_dict(), items and first_tokens(DataLoader(Subset(items, range(80)), 8))))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_ranks_that_one_process_starts_decide_each_for_itself(method: str, kind: str) -> None:
    """As those of torch.multiprocessing.spawn, accelerate's notebook_launcher and Lightning's ddp_notebook."""
    sources, options = {"a": plain(40), "b": plain(90)}, {"num_samples": 1000, "sequence_length": LENGTH}
    made = make() if kind == "dataset" else MixtureStream(sources, {"a": 0.25, "b": 0.75}, **options)
    made.schedule.hold(40)
    context: Any = multiprocessing.get_context(method)
    queue, told = context.Queue(), []
    for _ in range(2):
        process = context.Process(target=train_as_a_rank, args=(made, queue))
        process.start()
        told.append(queue.get(timeout=60))
        process.join(60)
    assert made.schedule.starts == [0]
    train_as_a_rank(made, queue)  # what is its own already stays
    assert told == 2 * [queue.get(timeout=60)]
    assert made.schedule.starts == [0, 40]


def test_a_stage_published_ahead_is_seen_though_positions_beyond_it_were_assigned_before() -> None:
    dataset = make()
    first = dataset.__getitems__(list(range(8)))
    dataset.publish({"a": 1.0, "b": 0.0}, start=8)
    assert [item["domain"] for item in dataset.__getitems__(list(range(8, 100)))] == [0] * 92
    assert {item["domain"] for item in first} == {0, 1}


def test_the_main_process_never_waits() -> None:
    dataset = make()
    dataset.schedule.hold(20)
    dataset.__getitems__(list(range(16)))
    for look in (lambda: dataset[20], lambda: dataset.__getitems__(list(range(16, 32)))):
        with pytest.raises(Undecided, match=r"position 20 .*publish\(weights, start=20\)"):
            look()
    assert dataset.read_until == 16
    dataset.publish(half, start=20)
    assert len(dataset.__getitems__(list(range(16, 32)))) == 16


def test_what_was_read_cannot_be_published_again() -> None:
    dataset = make()
    assert (dataset.read_until, dataset.read_size) == (0, 0)
    dataset.__getitems__(list(range(24)))
    dataset.__getitems__(list(range(24, 30)))
    dataset[900]
    assert dataset.read_until == 30
    with pytest.raises(ValueError, match="start=29: position already read by the loader, which is at 30"):
        dataset.publish(half, start=29)
    dataset.publish(half, start=30)


class Wrapping(Dataset[Any]):
    """What users put around a dataset, to change its items."""

    def __init__(self, dataset: MixtureDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Any:
        return self.dataset[position]


def test_what_workers_read_ahead_through_a_wrapping_dataset_cannot_be_published_again() -> None:
    dataset = make()
    batches = iter(DataLoader(Wrapping(dataset), batch_size=4, num_workers=2, multiprocessing_context="fork"))
    assert [len(next(batches)["domain"]) for _ in range(3)] == [4] * 3
    with pytest.raises(ValueError, match="start=8: position already read by the loader"):
        dataset.publish(half, start=8)
    assert dataset.read_until >= 12
    assert dataset.read_size == 0


def test_workers_wait_for_a_stage_also_behind_what_wraps_the_dataset() -> None:
    dataset, options = make(num_samples=200), {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    assert swap_at(dataset, 64, Wrapping(dataset), **options) == swap_at(make(num_samples=200), 64)


@pytest.mark.parametrize(
    "positions", [[3, 1, 2], [5, 3], [4, 4], [0, 1, 3], [998, 999, 0, 1, 3], [0, 999, 998], [2, 0, 1]]
)
def test_shuffled_requests_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"not read in order.*shuffle=False.*sequential"):
        make().__getitems__(positions)


def test_a_shuffling_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="not read in order"):
        first_tokens(DataLoader(make(), batch_size=8, shuffle=True))
    sampler: Any = DistributedSampler(make(), num_replicas=2, rank=0, shuffle=True)
    with pytest.raises(ValueError, match="not read in order"):
        first_tokens(DataLoader(make(), batch_size=8, sampler=sampler))


@pytest.mark.parametrize("num_samples", [96, 100, 101, 127])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_shards_of_known_samplers_are_in_order(num_samples: int, world: int) -> None:
    def requests(rank: int) -> Sequence[list[list[int]]]:
        distributed: Any = DistributedSampler(make(num_samples=num_samples), world, rank, shuffle=False)
        whole = BatchSampler(SequentialSampler(range(num_samples)), 4, drop_last=False)
        wide = BatchSampler(SequentialSampler(range(num_samples)), 4 * world, drop_last=False)
        return [
            list(BatchSampler(distributed, 4, drop_last=False)),
            list(BatchSamplerShard(whole, world, rank)),
            list(BatchSamplerShard(wide, world, rank, split_batches=True)),
        ]

    for way, shards in enumerate(zip(*(requests(rank) for rank in range(world)), strict=True)):
        dataset = make(num_samples=num_samples)
        expected = [dataset[position] for position in range(num_samples)]
        read: set[int] = set()
        ranks = [make(num_samples=num_samples) for _ in shards]
        for rank, positions in (
            (rank, request) for rank, shard in zip(ranks, shards, strict=True) for request in shard
        ):
            items = rank.__getitems__(positions)
            assert all(
                torch.equal(item["input_ids"], expected[p]["input_ids"])
                for item, p in zip(items, positions, strict=True)
            )
            read.update(positions)
        assert read == set(range(num_samples)), way


def test_a_loader_prepared_by_accelerate_is_accepted() -> None:
    shards = []
    for rank in range(2):
        loader = DataLoader(make(num_samples=100), batch_size=8)
        prepared = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        shards.append([batch["input_ids"][:, 0].tolist() for batch in prepared])
    together = [token for pair in zip(*shards, strict=True) for batch in pair for token in batch]
    order = first_tokens(DataLoader(make(num_samples=100), batch_size=8))
    assert together[:100] == order
    assert together[100:] == order[: len(together) - 100]


def test_a_state_continues_the_stream_through_json() -> None:
    dataset = make()
    dataset.schedule.hold(500)
    dataset.__getitems__(list(range(480)))
    dataset.publish({"a": 0.9, "b": 0.1}, start=500)
    text = json.dumps(dataset.state_dict())
    rest = [item["input_ids"][0] for item in dataset.__getitems__(list(range(480, 1000)))]
    twin = make(weights="uniform")
    twin.__getitems__(list(range(900)))
    twin.load_state_dict(json.loads(text))
    assert (twin.read_until, twin.read_size) == (0, 0)
    assert [item["input_ids"][0] for item in twin.__getitems__(list(range(480, 1000)))] == rest
    assert json.dumps(twin.state_dict()) == text


@pytest.mark.parametrize("limits", [np.float32(2), {"a": np.float32(2), "b": np.int64(3)}])
def test_a_state_goes_through_json_where_arguments_are_numbers_of_numpy(limits: Any) -> None:
    dataset = make(
        weights={"a": np.float32(0.25), "b": np.float32(0.75)}, num_samples=np.int64(90),
        sequence_length=np.int64(LENGTH), seed=np.int64(3), block=np.int64(16), homogeneous=np.int64(2),
        max_epochs=limits,
    )  # fmt: skip
    assert json.loads(json.dumps(dataset.state_dict())) == dataset.state_dict()


def test_a_state_keeps_the_stage_of_the_step_though_a_loader_read_into_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "_ROOM", 0)  # as if there were very many stages, all published at the start
    dataset, twin = make(), make()
    for number in range(1, 60):
        dataset.publish({"a": 1 / number, "b": 1 - 1 / number}, 16 * number)
    dataset.__getitems__(list(range(320, 336)))
    dataset.__getitems__(list(range(336, 352)))  # read ahead, and not trained on
    state = dataset.state_dict()
    assert len(state["schedule"]["stages"]["starts"]) < 60
    twin.load_state_dict(state)
    ahead = list(range(320, 352))
    assert [row["input_ids"].tolist() for row in twin.__getitems__(ahead)] == [
        row["input_ids"].tolist() for row in dataset.look(320, 352)
    ]


def test_a_loaded_state_reaches_workers() -> None:
    dataset = make()
    dataset.publish({"a": 0.9, "b": 0.1}, start=500)
    twin = make(weights="uniform")
    twin.load_state_dict(dataset.state_dict())
    ours = first_tokens(DataLoader(dataset, batch_size=8))
    assert first_tokens(DataLoader(twin, batch_size=8, num_workers=1, multiprocessing_context="forkserver")) == ours


@pytest.mark.parametrize(("workers", "held"), [(0, True), (1, False), (1, True), (2, True)])
@pytest.mark.parametrize("cut", [1, 5])
def test_a_loader_with_states_of_its_workers_goes_on_exactly(
    workers: int, held: bool, cut: int, tmp_path: Path
) -> None:
    """They read ahead, so theirs are older than what is published and joins in the main process."""

    def loader(data: MixtureDataset) -> Any:
        return StatefulDataLoader(data, batch_size=8, num_workers=workers)

    dataset = make(num_samples=320)
    if held:
        dataset.schedule.hold(160)
    batches = iter(loaded := loader(dataset))
    read = [int(row[0]) for _ in range(cut) for row in next(batches)["input_ids"]]
    dataset.extend({"late": (np.array([0, 1]), np.array([3, 4]))}, tmp_path)
    dataset.publish({"a": 0.5, "b": 0.0, "late": 0.5}, start=160)
    state = pickle.dumps((dataset.state_dict(), loaded.state_dict()))
    del batches
    expected = [int(dataset[position]["input_ids"][0]) for position in range(320)]
    own, of_loader = pickle.loads(state)
    twin = make(num_samples=320)
    twin.load_state_dict(own)
    resumed = loader(twin)
    resumed.load_state_dict(of_loader)
    assert read + first_tokens(resumed) == expected
    assert twin.schedule.starts == [0, 160]


@pytest.mark.parametrize("room", [packed._ROOM, 0])
def test_what_is_published_before_a_loader_without_workers_loads_its_state_stays(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads the dataset's as it begins to read, when a run that goes on has decided its next stage."""
    monkeypatch.setattr(packed, "_ROOM", room)
    dataset = make(num_samples=320)
    for start in range(8, 160, 8):
        dataset.publish({"a": 1 / start, "b": 1 - 1 / start}, start)
    dataset.schedule.hold(160)
    batches = iter(loader := StatefulDataLoader(dataset, batch_size=8))
    for _ in range(20):
        next(batches)
    own, of_loader = dataset.state_dict(), loader.state_dict()
    assert bool(own["schedule"]["stages"]["first"]) == (not room)  # of very many stages the oldest are left out
    twin = make(num_samples=320)
    twin.load_state_dict(own)
    twin.extend({"late": (np.array([0, 1]), np.array([3, 4]))}, tmp_path)
    twin.publish({"a": 0.5, "b": 0.0, "late": 0.5}, start=160)
    resumed = StatefulDataLoader(twin, batch_size=8)
    resumed.load_state_dict(of_loader)
    assert first_tokens(resumed) == [int(twin[position]["input_ids"][0]) for position in range(160, 320)]
    assert twin.schedule.starts[-2:] == [152, 160]
    later = twin.state_dict()
    twin.load_state_dict(own)  # after reading it is what it says
    assert (twin.schedule.num_stages, twin.domains) == (20, ("a", "b"))
    for state, stages in ((later, 21), (own, 20)):  # and so is one that was not the last
        twin.load_state_dict(state)
        assert twin.schedule.num_stages == stages


def test_a_worker_refuses_a_state_with_stages_that_the_main_process_has_not() -> None:
    dataset = make(num_samples=320)
    dataset.publish(half, start=16)
    loader = StatefulDataLoader(dataset, batch_size=8, num_workers=1)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    resumed = StatefulDataLoader(make(num_samples=320), batch_size=8, num_workers=1)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="load them there before the loader starts"):
        next(iter(resumed))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"a mapping of \[\]"),
        ({"_snapshot": 1}, r"\['_snapshot'\]"),
        ({"schedule": {"names": ["a"]}}, r"\['schedule'\]"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_state_is_refused(state: Any, message: str) -> None:
    items = [{"input_ids": [1, 2]}]
    for made in (
        MixtureDataset({"a": items}, num_samples=4),
        MixtureStream({"a": items}, num_samples=4, sequence_length=2),
    ):
        with pytest.raises(ValueError, match=f"this is .*{message}.* and not what state_dict\\(\\)"):
            made.load_state_dict(state)


def test_a_state_of_a_stream_is_refused() -> None:
    stream = MixtureStream({"a": plain(40)}, num_samples=9, sequence_length=LENGTH, sizes={"a": 40})
    with pytest.raises(ValueError, match="belongs to other data: it is of a MixtureStream"):
        MixtureDataset({"a": plain(40)}, num_samples=9).load_state_dict(stream.state_dict())


def test_a_state_of_other_data_is_refused() -> None:
    state = make().state_dict()
    others: list[tuple[MixtureDataset, str]] = [
        (MixtureDataset({"a": plain(40), "b": plain(91, 1000)}, num_samples=9, block=16), "'b' had 90 rows and has 91"),
        (MixtureDataset({"a": plain(40), "c": plain(90)}, num_samples=9, block=16), "'c' is new; domain 'b' is gone"),
        (MixtureDataset({"b": plain(90), "a": plain(40)}, num_samples=9, block=16), "order was"),
        (MixtureDataset({"a": plain(40), "b": plain(90, 7)}, num_samples=9, block=16), "'b' has as many rows, but"),
        (
            MixtureDataset({"a": plain(40, length=8), "b": plain(90, length=8)}, num_samples=9, block=16),
            "sequence_length was 6 and is 8",
        ),
        (make(seed=5), "seed was 0 and is 5"),
    ]
    for other, message in others:
        before = other.state_dict()
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert other.state_dict() == before


def test_other_documents_in_a_store_are_other_data(tmp_path: Path) -> None:
    def dataset(documents: list[list[int]]) -> MixtureDataset:
        store = TokenStore.write(tmp_path / "a", [np.array(document) for document in documents])
        return MixtureDataset({"a": store}, num_samples=4, sequence_length=2)

    state = dataset([[1, 2, 3], [4, 5, 6]]).state_dict()
    dataset([[1, 2, 3], [4, 5, 6]]).load_state_dict(state)
    for changed in ([[1, 2], [3, 4, 5, 6]], [[1, 2, 3], [4, 5, 7]]):
        with pytest.raises(ValueError, match="domain 'a' has as many rows, but their content changed"):
            dataset(changed).load_state_dict(state)


def test_stores_with_one_index_in_another_order_are_other_data(tmp_path: Path) -> None:
    for name in range(4):
        TokenStore.write(tmp_path / str(name), np.arange(80).reshape(10, 8) + 100 * name)

    def dataset(order: str) -> MixtureDataset:
        return MixtureDataset({"a": [tmp_path / name for name in order]}, num_samples=40, sequence_length=8)

    state = dataset("0123").state_dict()
    dataset("0123").load_state_dict(state)
    with pytest.raises(ValueError, match="domain 'a' has as many rows, but their content changed"):
        dataset("0213").load_state_dict(state)


def test_stores_are_pickled_by_path(tmp_path: Path) -> None:
    store = TokenStore.write(tmp_path / "big", [np.zeros(3_000_000, np.uint16)])
    dataset = MixtureDataset({"big": store}, num_samples=10, sequence_length=100)
    content = pickle.dumps(dataset)
    assert len(content) < store.tokens.nbytes / 10
    assert torch.equal(pickle.loads(content)[3]["input_ids"], dataset[3]["input_ids"])


def test_reading_on_takes_no_more_memory(stores: dict[str, TokenStore]) -> None:
    dataset = MixtureDataset(stores, "uniform", num_samples=10**9, sequence_length=4, block=16)
    process, used = psutil.Process(), []
    for at in range(0, 1_000_000, 4096):
        dataset.__getitems__(list(range(at, at + 4096)))
        used.append(process.memory_info().rss)
    assert used[-1] - used[60] < 8 << 20  # a byte a draw would be near that, and what is read is 64 of them
