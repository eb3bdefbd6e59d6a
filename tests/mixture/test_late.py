import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.roster import MAX_JOINED
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import RowView
from dynmix.mixture.weights import integer_cdf

LENGTH = 16
NEW = "forkserver"  # a process that is given what it needs, as a spawned one is, and that has torch imported
first = {"a": 0.25, "b": 0.75}
second = {"a": 0.1, "b": 0.2, "x": 0.7}
third = {"a": 0.0, "b": 0.0, "x": 0.5, "y/z": 0.5}
Rows = dict[str, tuple[Any, Any]]
x: Rows = {"x": (np.array([0, 1, 1, 0, 1]), np.array([3, 2, 0, 1, 7]))}
y: Rows = {"y/z": ([1, 1, 0], [1, 4, 0])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, documents in (("a", 20), ("b", 45)):
        TokenStore.write(tmp_path / name, [rng.integers(0, 5000, n) for n in rng.integers(1, 90, documents)])
    return tmp_path


def make(folder: Path, **options: Any) -> MixtureDataset:
    options = {"weights": first, "num_samples": 400, "sequence_length": LENGTH, "block": 16, **options}
    return MixtureDataset({"a": folder / "a", "b": folder / "b"}, **options)


def grown(folder: Path, **options: Any) -> MixtureDataset:
    dataset = make(folder, **options)
    dataset.extend(x, folder / "index")
    dataset.publish(second, start=100)
    dataset.extend(y, folder / "index")
    dataset.publish(third, start=260)
    return dataset


def whole(folder: Path) -> MixtureDataset:
    """The same, as if the domains that join had been there from the start: the slow reference."""
    early = make(folder).sequences
    views = {name: RowView(tuple(early.values()), *rows) for name, rows in (x | y).items()}
    zero = {"x": 0.0, "y/z": 0.0}
    dataset = MixtureDataset(
        {"a": folder / "a", "b": folder / "b", **views}, first | zero, num_samples=400, sequence_length=16, block=16
    )
    dataset.publish(second | {"y/z": 0.0}, start=100)
    dataset.publish(third, start=260)
    return dataset


def order(batches: Any) -> list[tuple[int, list[int]]]:
    return [
        (domain, ids)
        for batch in batches
        for domain, ids in zip(batch["domain"].tolist(), batch["input_ids"].tolist(), strict=True)
    ]


def read(dataset: MixtureDataset, start: int = 0, stop: int = 400) -> list[tuple[int, list[int]]]:
    items = [
        item for at in range(start, stop, 20) for item in dataset.__getitems__(list(range(at, min(at + 20, stop))))
    ]
    return [(item["domain"], item["input_ids"].tolist()) for item in items]


def test_domains_that_join_are_read_as_if_they_had_always_been_there(folder: Path) -> None:
    dataset, expected = grown(folder), read(whole(folder))
    assert read(dataset) == expected
    assert {domain for domain, _ in expected[260:]} == {2, 3}
    assert dataset.domains == dataset.schedule.names == ("a", "b", "x", "y/z")
    assert dataset.sizes == whole(folder).sizes
    assert list(dataset.sequences) == ["a", "b"]
    for name, (part, row) in (x | y).items():
        for k, (p, r) in enumerate(zip(part, row, strict=True)):
            ours, theirs = dataset.sequence(name, k), dataset.sequence("ab"[p], r)
            assert torch.equal(ours["input_ids"], theirs["input_ids"])
            assert ours["domain"] == dataset.domains.index(name)
    assert sorted(path.name for path in (folder / "index").iterdir()) == ["x.npy", "y%2Fz.npy"]
    assert (folder / "index" / "x.npy").stat().st_size == 128 + 5  # one byte a row: a and b have fewer than 256


def test_what_comes_before_the_boundary_is_that_of_a_run_nothing_joins(folder: Path) -> None:
    plain = read(make(folder))
    dataset = make(folder)
    assert read(dataset, 0, 40) == plain[:40]
    dataset.extend(x, folder)
    assert read(dataset, 40, 100) == plain[40:100]  # with positions beyond assigned already
    dataset.publish(second, start=100)
    assert read(dataset, 100)[0:] != plain[100:]
    assert dataset.schedule.weights_at(99) == pytest.approx(first | {"x": 0.0})
    assert dataset.schedule.counts(100)[2] == 0 < dataset.schedule.counts(400)[2]


def swapped(dataset: MixtureDataset, folder: Path, **options: Any) -> list[tuple[int, list[int]]]:
    """Order of a stream that a domain joins when everything before the boundary was handed out."""
    dataset.schedule.hold(96)
    found: list[tuple[int, list[int]]] = []
    for batch in DataLoader(dataset, batch_size=8, **options):
        found += order([batch])
        if len(found) == 96:
            dataset.extend(x, folder / "index")
            assert dataset.schedule.end == 96
            dataset.publish({"a": 0.0, "b": 0.0, "x": 1.0}, start=96)
    return found


@pytest.mark.parametrize("method", ["fork", NEW])
def test_workers_that_wait_at_the_boundary_see_the_domain_that_joins(method: str, folder: Path) -> None:
    expected = swapped(make(folder), folder)
    shutil.rmtree(folder / "index")
    # The timeout makes a stage that never arrives a failure instead of a hang.
    options = {"num_workers": 2, "multiprocessing_context": method, "timeout": 60}
    assert swapped(make(folder), folder, **options) == expected
    assert all(domain < 2 for domain, _ in expected[:96])
    assert all(domain == 2 for domain, _ in expected[96:])
    rows = [make(folder).sequence("ab"[p], r)["input_ids"].tolist() for p, r in zip(*x["x"], strict=True)]
    assert sorted(ids for _, ids in expected[96:101]) == sorted(rows)  # an epoch of it


class Part:
    """A sampler whose range may be moved between the passes of a loader with persistent workers."""

    def __init__(self) -> None:
        self.positions = range(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_persistent_workers_see_what_joins_replaces_and_leaves(method: str, folder: Path) -> None:
    dataset, sampler = make(folder), Part()
    loader: Any = DataLoader(
        dataset,
        batch_size=10,
        sampler=sampler,  # type: ignore[arg-type]
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=method,
        timeout=60,
    )

    def read_in_workers(start: int, stop: int) -> list[tuple[int, list[int]]]:
        sampler.positions = range(start, stop)
        return order(loader)

    expected, early = read(whole(folder)), make(folder).state_dict()
    assert read_in_workers(0, 100) == expected[:100]
    dataset.extend(x, folder / "index")
    dataset.publish(second, start=100)
    assert read_in_workers(100, 260) == expected[100:260]
    dataset.extend(y, folder / "index")
    dataset.publish(third, start=260)
    assert read_in_workers(260, 400) == expected[260:]
    dataset.load_state_dict(early)  # the run is rewound, and goes on with other rows under the same name
    dataset.extend({"x": ([0, 0], [0, 1])}, folder / "index")
    dataset.publish({"a": 0.0, "b": 0.0, "x": 1.0}, start=100)
    rows = [dataset.sequence("a", row)["input_ids"].tolist() for row in (0, 1)]
    assert sorted(ids for _, ids in read_in_workers(100, 102)) == sorted(rows)


def in_a_new_process(folder: Path, text: str, out: Any) -> None:
    dataset = make(folder, weights="uniform")
    dataset.load_state_dict(json.loads(text))
    out.put((read(dataset, 40), json.dumps(dataset.state_dict())))


def test_a_state_continues_the_stream_in_a_new_process(folder: Path) -> None:
    dataset = grown(folder)
    text = json.dumps(dataset.state_dict())
    context: Any = multiprocessing.get_context(NEW)
    out = context.Queue()
    process = context.Process(target=in_a_new_process, args=(folder, text, out))
    process.start()
    assert out.get(timeout=60) == (read(dataset, 40), text)
    process.join(60)


# Before a boundary with its stage published but not saved, and long after both that domains join at.
@pytest.mark.parametrize(("workers", "killed_at"), [(2, [56, 216])])
def test_a_run_that_is_killed_goes_on_bit_for_bit(
    workers: int, killed_at: list[int], folder: Path, processes: Any
) -> None:
    other = folder / "whole"
    other.mkdir()
    for file in [*folder.glob("*.bin"), *folder.glob("*.idx")]:
        shutil.copy(file, other)
    script = Path(__file__).with_name("joining_run.py")
    for where, die_at in ((other, -1), *((folder, at) for at in killed_at), (folder, -1)):
        status, printed = processes.run(script, where, die_at, workers)
        assert status == (0 if die_at == -1 else -signal.SIGKILL), printed
    assert (folder / "order.jsonl").read_text() == (other / "order.jsonl").read_text()
    lines = [json.loads(line)[0] for line in (other / "order.jsonl").read_text().splitlines()]
    assert {domain for line in lines[:8] for domain in line} == {0, 1}
    assert {domain for line in lines[8:24] for domain in line} == {0, 1, 2}
    assert {domain for line in lines[24:] for domain in line} == {0, 1, 2, 3}


@pytest.mark.parametrize("world", [2, 3])
def test_shards_together_are_the_stream(world: int, folder: Path) -> None:
    expected, found = read(whole(folder)), {}
    for rank in range(world):  # every rank extends, here with the files of the first there already
        dataset = grown(folder)
        sampler: Any = DistributedSampler(dataset, world, rank, shuffle=False, drop_last=True)
        found |= dict(zip(sampler, order(DataLoader(dataset, batch_size=10, sampler=sampler)), strict=True))
    assert [found[position] for position in range(len(found))] == expected[: len(found)]
    assert len(found) >= 399


def extend_at_once(folder: Path, start: Any, out: Any) -> None:
    dataset = make(folder)
    start.wait(60)
    dataset.extend(x | y, folder / "index")
    dataset.publish(third, start=1)
    out.put(read(dataset, 0, 40))


def test_ranks_that_extend_at_once_do_no_harm(folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start, out = fork.Barrier(4), fork.Queue()
    ranks = [fork.Process(target=extend_at_once, args=(folder, start, out)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [out.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert all(each == found[0] for each in found)
    assert sorted(path.name for path in (folder / "index").iterdir()) == ["x.npy", "y%2Fz.npy"]


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({"n": ([0], [0]), "x": ([0], [0])}, "there is a domain 'x' already"),
        ({"n": ([0], [0]), "a": ([0], [0])}, "there is a domain 'a' already"),
        ({"n": ([0], [0]), "m": ([], [])}, "domain 'm': domain number and row must be vectors of one length, at least"),
        ({"n": ([0], [0]), "m": ([0, 2], [0, 0])}, r"domain 'm': domain number\[1\] is 2: there are 0 to 1"),
        ({"n": ([0, 1], [0, 10**6])}, r"domain 'n': row\[1\] is 1000000, of domain number 1, which has \d+ of them"),
        ({f"n{i}": ([0], [0]) for i in range(MAX_JOINED)}, "cannot join the 1 that did: there is room for 1024"),
        ({"n" * 300: ([0], [0])}, "shorten it"),
        ({"n": ([0], [0]), 7: ([0], [0])}, "domain names must be strings, not 7"),
    ],
)
def test_domains_that_cannot_join_change_nothing(domains: Any, message: str, folder: Path) -> None:
    dataset = make(folder)
    dataset.extend(x, folder / "index")
    before, generation = dataset.state_dict(), dataset.schedule.generation
    files = {path: path.read_bytes() for path in (folder / "index").iterdir()}
    with pytest.raises(ValueError, match=message):
        dataset.extend(domains, folder / "index")
    assert dataset.state_dict() == before
    assert dataset.schedule.generation == generation
    assert {path: path.read_bytes() for path in (folder / "index").iterdir()} == files


def test_an_index_that_cannot_be_written_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise OSError("no space")

    dataset = make(folder)
    before = dataset.state_dict()
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        dataset.extend(x | y, folder / "index")
    assert dataset.state_dict() == before
    assert not list((folder / "index").iterdir())


def test_a_state_finds_its_index_files_or_says_which_are_missing(folder: Path) -> None:
    dataset = grown(folder)
    state, expected = json.loads(json.dumps(dataset.state_dict())), read(dataset)
    moved = folder / "moved"
    shutil.move(folder / "index", moved)
    twin = make(folder)
    before = twin.state_dict()
    with pytest.raises(ValueError, match=r"domain 'x'.*index/x.npy: no such file; put the file back, or .* `views`"):
        twin.load_state_dict(state)
    assert twin.state_dict() == before
    twin.load_state_dict(state, views=moved)
    assert read(twin) == expected
    make(folder).load_state_dict(twin.state_dict())  # which knows the new place
    (moved / "x.npy").rename(moved / "kept")
    shutil.copy(moved / "y%2Fz.npy", moved / "x.npy")
    with pytest.raises(ValueError, match=r"domain 'x'.*moved/x.npy has changed"):
        make(folder).load_state_dict(state, views=moved)
    content = bytearray((moved / "kept").read_bytes())
    content[-1] ^= 1
    (moved / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"domain 'x'.*moved/x.npy has changed"):
        make(folder).load_state_dict(state, views=moved)


def test_a_file_that_changes_before_a_worker_opens_it_is_refused(folder: Path) -> None:
    dataset = grown(folder)
    (folder / "index" / "x.npy").unlink()
    assert read(dataset, 100, 140) == read(whole(folder), 100, 140)  # mapped already
    loader = DataLoader(dataset, batch_size=10, sampler=range(100, 140), num_workers=1, multiprocessing_context=NEW)
    with pytest.raises(ValueError, match=r"domain 'x'.*x.npy: no such file"):
        list(loader)


def test_a_rewound_run_forgets_what_joined_since(folder: Path) -> None:
    dataset = make(folder)
    states = [dataset.state_dict()]
    dataset.extend(x, folder)
    dataset.publish(second, start=100)
    states.append(dataset.state_dict())
    dataset = grown(folder)
    expected = [read(make(folder)), None, read(dataset)]
    dataset.load_state_dict(states[1])
    assert dataset.domains == ("a", "b", "x")
    dataset.extend(y, folder / "index")
    dataset.publish(third, start=260)
    assert read(dataset) == expected[2]
    dataset.load_state_dict(states[0])
    assert dataset.domains == ("a", "b")
    assert dataset.state_dict() == states[0]
    assert read(dataset) == expected[0]


def test_a_state_of_other_data_is_refused_though_domains_joined(folder: Path) -> None:
    state = grown(folder).state_dict()
    other = make(folder, seed=3)
    with pytest.raises(ValueError, match="seed was 0 and is 3"):
        other.load_state_dict(state)
    TokenStore.write(folder / "a", [np.arange(2000)])
    with pytest.raises(ValueError, match="domain 'a' had"):
        make(folder).load_state_dict(state)


def test_a_state_without_domains_that_joined_has_nothing_new(folder: Path) -> None:
    state = make(folder).state_dict()
    assert list(state) == ["schedule", "sequence_length", "options", "fingerprint"]
    assert list(state["schedule"]) == ["version", "seed", "block", "names", "sizes", "stages"]
    assert list(grown(folder).state_dict()["fingerprint"]) == ["a", "b"]


def test_a_cdf_computed_elsewhere_has_the_new_length(folder: Path) -> None:
    dataset = make(folder)
    dataset.extend(x, folder)
    with pytest.raises(ValueError, match="the 3 integers"):
        dataset.publish(integer_cdf([0.25, 0.75]), start=100)
    with pytest.raises(ValueError, match=r"missing \['x'\]"):
        dataset.publish(first, start=100)
    dataset.publish(integer_cdf([0.1, 0.2, 0.7]), start=100)
    assert dataset.schedule.weights_at(100) == pytest.approx(second)


def test_a_copy_reads_on_by_itself_and_is_small(folder: Path) -> None:
    dataset = grown(folder)
    content = pickle.dumps(dataset)
    assert len(content) < 100_000
    twin = pickle.loads(content)
    dataset.load_state_dict(make(folder).state_dict())
    assert read(twin) == read(whole(folder))


# -- new data, and data that is gone ---------------------------------------------------------------------------------

with_new = {"a": 0.2, "b": 0.2, "new": 0.6}


def new_store(folder: Path) -> TokenStore:
    rng = np.random.default_rng(1)
    return TokenStore.write(folder / "new", [rng.integers(0, 5000, n) for n in rng.integers(1, 90, 15)])


def in_memory(folder: Path) -> list[dict[str, Any]]:
    return [{"input_ids": ids} for ids in np.arange(30 * LENGTH).reshape(30, LENGTH).tolist()]


def listed_from_the_start(folder: Path, new: Any) -> MixtureDataset:
    dataset = MixtureDataset(
        {"a": folder / "a", "b": folder / "b", "new": new}, first | {"new": 0.0}, num_samples=400, sequence_length=16,
        block=16,
    )  # fmt: skip
    dataset.publish(with_new, start=96)
    return dataset


@pytest.mark.parametrize(
    ("make_new", "workers"),
    [(new_store, 0), (in_memory, 0), (new_store, 2), (lambda folder: str(new_store(folder).path) + ".bin", 2)],
)
def test_new_data_joins_at_a_boundary_also_under_workers(make_new: Any, workers: int, folder: Path) -> None:
    new = make_new(folder)
    expected = read(listed_from_the_start(folder, new))
    dataset = make(folder)
    dataset.schedule.hold(96)
    found: list[tuple[int, list[int]]] = []
    for batch in DataLoader(dataset, batch_size=8, num_workers=workers, timeout=60 if workers else 0):
        found += order([batch])
        if len(found) == 96:
            dataset.extend({"new": new})
            dataset.publish(with_new, start=96)
    assert found == expected
    state = json.loads(json.dumps(dataset.state_dict()))
    twins = [
        MixtureDataset(
            {"a": folder / "a", "b": folder / "b", "new": new}, num_samples=400, sequence_length=16, block=16
        )
    ]
    if not isinstance(new, list):
        twins.append(make(folder))  # the state knows where the store is
    for twin in twins:
        twin.load_state_dict(state)
        assert twin.domains == ("a", "b", "new")
        assert read(twin, 80) == expected[80:]
        assert twin.state_dict() == state
    if isinstance(new, list):
        with pytest.raises(ValueError, match="domain 'new' joined the run, from data in memory: list it among"):
            make(folder).load_state_dict(state)
        new[0] = {"input_ids": [7] * LENGTH}
        with pytest.raises(ValueError, match="domain 'new', which joined the run, has other content"):
            MixtureDataset(
                {"a": folder / "a", "b": folder / "b", "new": new}, num_samples=400, sequence_length=16, block=16
            ).load_state_dict(state)


def test_a_pair_of_paths_joins_end_to_end(folder: Path) -> None:
    new_store(folder)
    pair, twin = make(folder), make(folder)
    pair.extend({"new": (folder / "new", str(folder / "a"))})
    twin.extend({"new": [folder / "new", folder / "a"]})
    for dataset in (pair, twin):
        dataset.publish(with_new, start=96)
    assert read(pair) == read(twin)


def test_a_path_of_the_home_folder_is_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_store(folder)
    monkeypatch.setenv("HOME", str(folder))
    dataset = make(folder)
    dataset.extend({"new": "~/new"})
    dataset.publish(with_new, start=96)
    twin = make(folder)
    twin.load_state_dict(json.loads(json.dumps(dataset.state_dict())))
    assert read(twin) == read(dataset)


def test_a_resumed_run_may_list_new_data(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make(folder)
    dataset.schedule.hold(96)
    expected = read(listed_from_the_start(folder, new_store(folder)))
    sources = {"a": folder / "a", "b": folder / "b", "new": folder / "new"}
    twin = MixtureDataset(sources, num_samples=400, sequence_length=16, block=16)
    twin.load_state_dict(dataset.state_dict())
    assert "['new'] joined: nothing is drawn of it until a stage is published" in caplog.text
    assert twin.schedule.weights_at(50) == pytest.approx(first | {"new": 0.0})
    twin.publish(with_new, start=96)
    assert read(twin) == expected
    third_run = MixtureDataset(sources, num_samples=400, sequence_length=16, block=16)
    third_run.load_state_dict(json.loads(json.dumps(twin.state_dict())))
    assert read(third_run) == expected


@pytest.mark.parametrize(("limit", "rows", "told"), [(1, 3, True), (1, 4, False), (2, 3, False), (None, 3, False)])
def test_a_domain_that_joins_with_less_than_a_group_within_its_limit_is_told(
    limit: float | None, rows: int, told: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make(folder, homogeneous=4, max_epochs=limit)
    dataset.extend({"new": in_memory(folder)[:rows]})
    dataset.publish(with_new, start=16)
    assert (dataset.realised(dataset.ends_at)["new"] == 0) == told
    assert ("nothing will be read of what joined: domain 'new' has 3 rows" in caplog.text) == told


def test_data_may_go_once_nothing_is_drawn_of_it(folder: Path) -> None:
    new_store(folder)
    sources = {name: folder / name for name in ("a", "new", "b")}
    dataset = MixtureDataset(sources, "uniform", num_samples=400, sequence_length=16, block=16)
    dataset.publish({"a": 0.5, "new": 0.0, "b": 0.5}, start=96)
    state, expected = json.loads(json.dumps(dataset.state_dict())), read(dataset)
    twin = make(folder)
    twin[96]  # whose domains have other numbers than the state's
    twin.load_state_dict(state)
    assert twin.gone == ("new",)
    assert twin.domains == dataset.domains
    assert twin.realised(400) == dataset.realised(400)
    assert read(twin, 96) == expected[96:]
    assert twin.state_dict() == state
    with pytest.raises(ValueError, match="domain 'new' is in the state that was loaded, and not among the domains"):
        read(twin, 0)
    again = MixtureDataset(sources, num_samples=400, sequence_length=16, block=16)  # it may come back
    again.load_state_dict(twin.state_dict())
    assert read(again) == expected


@pytest.mark.parametrize("make_new", [new_store, in_memory])
def test_data_that_joined_may_go_too(make_new: Any, folder: Path) -> None:
    dataset = make(folder)
    dataset.extend({"new": make_new(folder)})
    dataset.publish(with_new, start=96)
    dataset.publish({"a": 0.5, "new": 0.0, "b": 0.5}, start=192)
    state, expected = dataset.state_dict(), read(dataset)
    for file in folder.glob("new.*"):
        file.unlink()
    twin = make(folder)
    twin.load_state_dict(json.loads(json.dumps(state)))
    assert twin.gone == ("new",)
    assert read(twin, 192) == expected[192:]
    assert twin.state_dict() == state


def test_data_may_go_though_views_joined_and_those_on_it_go_with_it(folder: Path) -> None:
    dataset = make(folder)
    dataset.extend({"of_a": ([0, 0], [1, 2]), "of_b": ([1, 0], [3, 1])}, folder / "index")
    dataset.publish({"a": 0.0, "b": 0.0, "of_a": 1.0, "of_b": 0.0}, start=100)
    twin = MixtureDataset({"a": folder / "a"}, num_samples=400, sequence_length=LENGTH, block=16)
    twin.load_state_dict(json.loads(json.dumps(dataset.state_dict())))
    assert twin.gone == ("b", "of_b")
    assert [twin[g]["input_ids"].tolist() for g in range(100, 400)] == [
        dataset[g]["input_ids"].tolist() for g in range(100, 400)
    ]
    with pytest.raises(ValueError, match=r"domain 'new' has rows of \['b'\], which are in the state"):
        twin.extend({"new": ([0, 1], [1, 2])}, folder / "index")
    twin.extend({"new": ([0, 0], [1, 3])}, folder / "index")
    dataset.publish({"a": 0.0, "b": 0.0, "of_a": 0.0, "of_b": 1.0}, start=200)
    with pytest.raises(ValueError, match=r"domain 'of_b' has rows of \['b'\], which are in the state"):
        twin.load_state_dict(json.loads(json.dumps(dataset.state_dict())))


def test_data_that_is_still_drawn_may_not_go(folder: Path) -> None:
    state = listed_from_the_start(folder, new_store(folder)).state_dict()
    twin = make(folder)
    before = twin.state_dict()
    with pytest.raises(ValueError, match="domain 'new' is gone, and the last stage of the state draws it: list it, or"):
        twin.load_state_dict(state)
    assert twin.state_dict() == before


def test_a_view_that_joined_as_data_is_in_every_copy(folder: Path) -> None:
    dataset = make(folder)
    dataset.extend({"x": RowView(tuple(make(folder).sequences.values()), *x["x"])})
    dataset.publish(second, start=100)
    copied = pickle.loads(pickle.dumps(dataset))
    for there, here in zip(copied.look(100, 200), dataset.look(100, 200), strict=True):
        assert torch.equal(there["input_ids"], here["input_ids"])


def test_data_in_memory_is_refused_where_workers_run_that_would_not_see_it(folder: Path) -> None:
    dataset = make(folder)
    dataset.schedule.hold(96)
    batches = iter(DataLoader(dataset, batch_size=8, num_workers=1))
    next(batches)
    with pytest.raises(
        ValueError, match="domain 'new' is in memory, where .* worker processes, .* do not see it: give"
    ):
        dataset.extend({"new": in_memory(folder)})
    sources = {"a": folder / "a", "b": folder / "b", "new": new_store(folder)}
    other = MixtureDataset(sources, first | {"new": 0.0}, num_samples=400, sequence_length=LENGTH, block=16)
    with pytest.raises(ValueError, match="workers read already, and this state has other domains"):
        dataset.load_state_dict(other.state_dict())
    assert dataset.domains == ("a", "b")
    # Workers that start later have it.
    dataset = make(folder)
    dataset.extend({"new": in_memory(folder)})
    dataset.publish(with_new, start=96)
    expected = read(dataset)
    loader = DataLoader(dataset, batch_size=10, sampler=range(100, 160), num_workers=1, multiprocessing_context=NEW)
    assert order(loader) == expected[100:160]


def test_new_data_that_does_not_fit_is_refused(folder: Path) -> None:
    dataset = make(folder)
    with pytest.raises(ValueError, match="domain 'new'"):
        dataset.extend({"new": [{"input_ids": [1, 2]}]})
    with pytest.raises(ValueError, match="there is a domain 'a' already"):
        dataset.extend({"a": in_memory(folder)})
    with pytest.raises(ValueError, match="folder is missing, where the index of 'x' is kept"):
        dataset.extend(x)
    assert dataset.domains == ("a", "b")
