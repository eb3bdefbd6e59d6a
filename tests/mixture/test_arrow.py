import pickle
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

datasets = pytest.importorskip("datasets")

from dynmix.mixture.arrow import ArrowTokens, dataset_documents  # noqa: E402
from dynmix.mixture.view import DocumentView  # noqa: E402

KINDS = {
    "list": datasets.List(datasets.Value("int32")),
    "large": datasets.LargeList(datasets.Value("int64")),
    "fixed": datasets.List(datasets.Value("uint16"), length=3),
}


def dataset(rows: list[list[int]], kind: str) -> Any:
    return datasets.Dataset.from_dict({"input_ids": rows}, features=datasets.Features({"input_ids": KINDS[kind]}))


@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
@settings(max_examples=30)
def test_rows_are_documents_in_the_order_of_the_dataset(data: st.DataObject, kind: str) -> None:
    row = st.lists(st.integers(0, 65_535), min_size=3 * (kind == "fixed"), max_size=3 if kind == "fixed" else 7)
    parts = data.draw(st.lists(st.lists(row, min_size=1, max_size=6), min_size=1, max_size=3))
    rows = [each for part in parts for each in part]
    found = datasets.concatenate_datasets([dataset(part, kind) for part in parts])
    for _ in range(data.draw(st.integers(0, 2))):
        order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=12))
        if data.draw(st.booleans()):
            order = list(range(min(order), max(order) + 1))  # a slice of the table, with no indices
        found, rows = found.select(order), [rows[i] for i in order]
    documents = dataset_documents(found)
    assert [document.tolist() for document in documents] == rows
    assert documents.num_tokens == sum(map(len, rows))
    starts = list(accumulate(map(len, rows), initial=0))
    assert documents.starts(np.arange(len(rows) + 1)).tolist() == starts
    every = [token for each in rows for token in each]
    length = min(4, len(every))
    windows = np.arange(len(every) - length + 1)
    assert documents.read(windows, length).tolist() == [every[at : at + length] for at in windows.tolist()]


def test_the_fingerprint_is_of_the_documents_however_they_are_stored() -> None:
    rows = [[1, 2, 3], [4], [], [5, 6]]
    table = dataset_documents(dataset(rows, "list"))
    chunked = datasets.concatenate_datasets([dataset(rows[:1], "list"), dataset(rows[1:], "list")])
    assert dataset_documents(chunked).fingerprint == table.fingerprint
    assert dataset_documents(dataset(rows, "large")).fingerprint == table.fingerprint
    for other in ([[1, 2, 3], [4], [], [5, 7]], [[1, 2], [3, 4], [], [5, 6]]):
        assert dataset_documents(dataset(other, "list")).fingerprint != table.fingerprint


def test_a_dataset_on_disk_is_pickled_by_path(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 50_000, (400, 100)).tolist()
    dataset(rows, "list").save_to_disk(str(tmp_path))
    table = dataset_documents(datasets.load_from_disk(str(tmp_path)))
    assert isinstance(table, ArrowTokens)
    content = pickle.dumps(table)
    assert len(content) < 4000
    assert [each.tolist() for each in pickle.loads(content)] == rows
    view = dataset_documents(table.dataset.shuffle(seed=0))
    assert isinstance(view, DocumentView)
    assert sorted(each.tolist() for each in pickle.loads(pickle.dumps(view))) == sorted(rows)
    assert dataset_documents(table.dataset.select([])).num_tokens == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"input_ids": ["a"]}, "column 'input_ids' of the dataset is string: lists of integers are needed"),
        ({"input_ids": [[0.5]]}, "is list<item: double>: lists of integers are needed"),
        ({"input_ids": [[[1]]]}, "lists of integers are needed"),
        ({"input_ids": [[1], None]}, "has 1 rows that are null"),
        ({"input_ids": [[1, None]]}, "has 1 ids that are null"),
    ],
)
def test_columns_that_hold_no_documents_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset_documents(datasets.Dataset.from_dict(content))


def test_a_negative_id_is_refused_when_it_is_read() -> None:
    documents = dataset_documents(datasets.Dataset.from_dict({"input_ids": [[1, -100]]}))
    with pytest.raises(ValueError, match="column 'input_ids' of the dataset has token -100"):
        documents[0]
