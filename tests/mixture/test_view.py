import copy
import multiprocessing
import os
import pickle
from collections.abc import Sequence
from multiprocessing import context, reduction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.index import digest, numbered, write_numbers
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import DocumentView, RowView

LENGTH = 8
documents = st.lists(st.lists(st.integers(0, 65499), max_size=9), min_size=1, max_size=6).filter(any)
Plain = list[dict[str, Any]]


def plain(rows: int, first: int) -> Plain:
    return [{"input_ids": [first + row] * LENGTH} for row in range(rows)]


@pytest.fixture
def stores(tmp_path: Path) -> list[TokenStore]:
    rng = np.random.default_rng(0)
    return [
        TokenStore.write(tmp_path / str(k), [rng.integers(0, top, n) for n in rng.integers(0, 40, 30)])
        for k, top in enumerate((60_000, 200_000, 900))
    ]


def some_rows(parts: Sequence[Any], count: int = 200) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    part = rng.integers(0, len(parts), count)
    return part, rng.integers(0, np.array([len(rows) for rows in parts])[part])


def test_windows_of_no_tokens_are_read(tmp_path: Path) -> None:
    view = DocumentView([TokenStore.write(tmp_path / "store", [[], [1], []])], [0, 0], [2, 0])
    assert view.read(np.array([0]), 0).shape == (1, 0)
    assert view.read(np.empty(0, np.int64), 0).shape == (0, 0)


@given(contents=st.lists(documents, min_size=1, max_size=3), length=st.integers(1, 30), data=st.data())
@settings(max_examples=25)
def test_a_view_on_documents_is_packed_as_a_store_with_them(
    contents: list[list[list[int]]], length: int, data: st.DataObject
) -> None:
    every = [(k, i) for k, content in enumerate(contents) for i in range(len(content))]
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=25))
    dtypes = data.draw(st.lists(st.sampled_from(["uint16", "int32"]), min_size=3, max_size=3))
    with TemporaryDirectory() as folder:
        stores = [TokenStore.write(Path(folder, f"{k}"), c, dtypes[k]) for k, c in enumerate(contents)]
        view = DocumentView(stores, *zip(*chosen, strict=True))
        assert [document.tolist() for document in view] == [contents[k][i] for k, i in chosen]
        assert view[-1].tolist() == contents[chosen[-1][0]][chosen[-1][1]]
        assert view.num_tokens == sum(len(contents[k][i]) for k, i in chosen)
        if not view.num_tokens:
            assert len(PackedSequences(view, length)) == 0
            return
        written = TokenStore.write(Path(folder, "all"), [contents[k][i] for k, i in chosen])
        ours, theirs = PackedSequences(view, length), PackedSequences(written, length)
        assert len(ours) == len(theirs)
        rows = np.array(data.draw(st.lists(st.integers(0, max(0, len(ours) - 1)), max_size=8 if len(ours) else 0)), int)
        for asked in (np.arange(len(ours)), rows):
            got = ours.gather(asked)
            assert got.dtype == np.int64
            assert np.array_equal(got, theirs.gather(asked))
        if len(ours):
            assert ours[-1]["input_ids"].tolist() == theirs[-1]["input_ids"].tolist()
        end = view.num_tokens
        for start in (0, end - 1):  # windows anywhere, not only where sequences begin
            assert view.read(np.array([start]), 1)[0, 0] == written.tokens[start]
        with pytest.raises(IndexError, match=f"of {end}"):
            view.read(np.array([0, end]), 1)


def test_views_are_domains_like_others(stores: list[TokenStore], tmp_path: Path) -> None:
    which, number = some_rows(stores)
    documents = DocumentView([stores[0].path, stores[1], stores[2]], which, number)
    packed = [PackedSequences(store, LENGTH) for store in stores]
    part, row = some_rows(packed)
    rows = RowView(packed, part, row)
    copied = TokenStore.write(tmp_path / "copy", list(documents))
    listed = [{"input_ids": packed[p].gather(np.array([r]))[0]} for p, r in zip(part, row, strict=True)]
    options: dict[str, Any] = {"weights": "uniform", "num_samples": 600, "sequence_length": LENGTH}
    ours = MixtureDataset({"documents": documents, "rows": rows}, **options)
    theirs = MixtureDataset({"documents": copied, "rows": listed}, **options)
    assert ours.sizes == theirs.sizes == {"documents": documents.num_tokens // LENGTH, "rows": 200}
    expected = theirs.__getitems__(list(range(600)))
    for item, other in zip(ours.__getitems__(list(range(600))), expected, strict=True):
        assert item["domain"] == other["domain"]
        assert torch.equal(item["input_ids"], other["input_ids"])
    for method in ("fork", "forkserver"):
        loader = DataLoader(ours, batch_size=100, num_workers=1, multiprocessing_context=method, timeout=60)
        assert [ids.tolist() for batch in loader for ids in batch["input_ids"]] == [
            item["input_ids"].tolist() for item in expected
        ]
    with pytest.raises(ValueError, match=r"domain 'd' has not one whole sequence \(\d+ tokens, of 9999\)"):
        MixtureDataset({"d": documents}, num_samples=1, sequence_length=9999)


def test_a_view_on_rows_holds_the_rows_and_may_be_viewed(stores: list[TokenStore]) -> None:
    parts = [PackedSequences(stores[0], LENGTH), plain(30, 1000), PackedSequences(stores[1], LENGTH), []]
    part, row = some_rows(parts[:3])
    view = RowView(parts, part, row)
    expected = [np.asarray(parts[p][r]["input_ids"]).tolist() for p, r in zip(part, row, strict=True)]
    assert view.gather(np.arange(200)).tolist() == expected
    assert view.gather(np.array([5, 5, 199])).tolist() == [expected[5], expected[5], expected[199]]
    assert [np.asarray(item["input_ids"]).tolist() for item in view] == expected
    assert RowView(parts, part, row).fingerprint == view.fingerprint
    assert RowView(parts, [1], [3])[-1] is parts[1][3]
    again = RowView([view, parts[1]], [0, 1, 0], [7, 3, 0])
    assert again.gather(np.arange(3)).tolist() == [expected[7], [1003] * LENGTH, expected[0]]
    for index in (200, -201):
        with pytest.raises(IndexError, match=f"sequence {index} of 200"):
            view[index]


def test_what_cannot_be_viewed_is_named(stores: list[TokenStore]) -> None:
    with pytest.raises(ValueError, match=r"row\[1\] is 30, of part 1, which has 30 of them"):
        RowView([plain(3, 0), plain(30, 0)], [0, 1], [2, 30])
    with pytest.raises(ValueError, match=r"document\[0\] is 30, of store 2, which has 30"):
        DocumentView(stores, [2], [30])
    with pytest.raises(ValueError, match=r"store\[2\] is 3: there are 0 to 2"):
        DocumentView(stores, [0, 0, 3], [0, 0, 0])
    with pytest.raises(ValueError, match="here 8: in part 1 it is 5"):
        RowView([plain(3, 0), PackedSequences(stores[0], 5)], [0], [0])
    ragged = [*plain(2, 0), {"input_ids": [1, 2]}]
    with pytest.raises(ValueError, match="sequence 2 of part 0 has 2 tokens, not 8"):
        RowView([ragged], [0, 0], [1, 2]).gather(np.array([0, 1]))


def test_a_fingerprint_tells_other_rows_and_other_bases(stores: list[TokenStore]) -> None:
    packed = [PackedSequences(store, LENGTH) for store in stores]
    views = [
        RowView(packed, [0, 1], [2, 3]),
        RowView(packed, [0, 1], [3, 2]),
        RowView(packed[::-1], [0, 1], [2, 3]),
        RowView([plain(9, 0)], [0, 0], [2, 3]),
        RowView([plain(9, 7)], [0, 0], [2, 3]),
    ]
    assert len({view.fingerprint for view in views}) == 5
    assert RowView(packed, [0, 1], [2, 3]).fingerprint == views[0].fingerprint
    groups = [
        DocumentView(stores, [0, 1], [2, 3]),
        DocumentView(stores, [0, 1], [3, 2]),
        DocumentView(stores[:2], [0, 1], [2, 3]),
    ]
    assert len({view.fingerprint for view in groups}) == 3
    states = [MixtureDataset({"a": view}, num_samples=1, sequence_length=1).fingerprint for view in groups]
    assert len({state["a"] for state in states}) == 3


class Starting:
    """Stands in for a process that is being started: descriptors are counted, not passed."""

    descriptors, method = 0, "spawn"

    def duplicate_for_child(self, descriptor: int) -> int:
        self.descriptors += 1
        return os.dup(descriptor)

    def DupFd(self, descriptor: int) -> "Descriptor":
        return Descriptor(descriptor)


class Descriptor:
    def __init__(self, number: int) -> None:
        self.number = number

    def detach(self) -> int:
        return self.number


def test_a_started_process_is_given_the_memory_and_no_copy(stores: list[TokenStore]) -> None:
    packed = [PackedSequences(store, LENGTH) for store in stores]
    views: list[Any] = [RowView(packed, *some_rows(packed, 50_000)), DocumentView(stores, *some_rows(stores, 50_000))]
    for view in views:
        starting = Starting()
        context.set_spawning_popen(starting)  # type: ignore[attr-defined]
        try:
            content = reduction.ForkingPickler.dumps(view)
        finally:
            context.set_spawning_popen(None)  # type: ignore[attr-defined]
        assert len(content) < 3000
        twin = pickle.loads(content)
        assert starting.descriptors >= 1
        assert twin._numbers.tolist() == view._numbers.tolist()
        view._numbers[0] += 1
        assert twin._numbers[0] == view._numbers[0]


def first_rows(views: list[Any], out: Any) -> None:
    out.put([view.gather(np.arange(5)).tolist() for view in views])


def test_a_view_is_the_same_in_a_spawned_process(stores: list[TokenStore], tmp_path: Path) -> None:
    packed = [PackedSequences(store, LENGTH) for store in stores]
    part, row = some_rows(packed)
    numbers = numbered([len(rows) for rows in packed], part, row, "part", "row")
    write_numbers(tmp_path / "view.npy", numbers)
    opened = RowView.open(tmp_path / "view.npy", packed, digest(numbers))
    assert len(pickle.dumps(opened)) < 2000
    spawn = multiprocessing.get_context("spawn")
    views = [RowView(packed, part, row), opened, PackedSequences(DocumentView(stores, *some_rows(stores)), LENGTH)]
    out = spawn.Queue()
    process = spawn.Process(target=first_rows, args=(views, out))
    process.start()
    assert out.get(timeout=60) == [view.gather(np.arange(5)).tolist() for view in views]
    process.join(60)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_copy_is_equal_and_independent(make_copy: Any, stores: list[TokenStore]) -> None:
    packed = [PackedSequences(store, LENGTH) for store in stores]
    rows, documents = RowView(packed, *some_rows(packed)), DocumentView(stores, *some_rows(stores))
    twins = make_copy(rows), make_copy(documents)
    assert np.array_equal(twins[0].gather(np.arange(200)), rows.gather(np.arange(200)))
    assert [document.tolist() for document in twins[1]] == [document.tolist() for document in documents]
    rows._numbers[:] = 0
    assert twins[0]._numbers.any()


def test_an_index_of_other_data_is_refused(tmp_path: Path) -> None:
    file, parts = tmp_path / "a.npy", [plain(5, 0), plain(7, 100)]
    numbers = numbered([5, 7], [1, 0], [6, 4], "part", "row")
    write_numbers(file, numbers)
    view = RowView.open(file, parts, digest(numbers))
    assert view.gather(np.arange(2)).tolist() == [[106] * LENGTH, [4] * LENGTH]
    with pytest.raises(ValueError, match=r"a.npy is an index on other data: it has row 11 of 10"):
        RowView.open(file, [plain(5, 0), plain(5, 100)])
    write_numbers(file, numbers[::-1])
    with pytest.raises(ValueError, match="a.npy has changed"):
        RowView.open(file, parts, digest(numbers))
    assert view.gather(np.arange(2)).tolist() == [[106] * LENGTH, [4] * LENGTH]  # what is mapped stays
