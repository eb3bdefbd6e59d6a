import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dynmix.batches import as_batches, by_length, collate
from dynmix.mixture.store import TokenStore


def batches(source, micro_batch=2):
    return as_batches(source, name="tasks['x']", sequence_length=4, micro_batch=micro_batch)


def test_what_a_user_may_pass_gives_the_same_batches(tmp_path):
    rows = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    examples = [{"input_ids": row} for row in rows]
    store = TokenStore.write(tmp_path / "x", [[*range(1, 14)]])  # the rest that fills no row is dropped
    TokenStore.write(tmp_path / "y.jsonl", [[*range(1, 14)]])  # as Megatron's tools name one
    (tmp_path / "y.jsonl").touch()
    sources = {
        "examples": examples,
        "tensors": [{"input_ids": torch.tensor(row)} for row in rows],
        "datasets": datasets.Dataset.from_list(examples),
        "store": store,
        "path": tmp_path / "x",
        "path beside its text": tmp_path / "y.jsonl",
        "batches": [{"input_ids": torch.tensor(rows[:2])}, {"input_ids": torch.tensor(rows[2:])}],
        "loader": DataLoader([{"input_ids": torch.tensor(row)} for row in rows], batch_size=2),
    }
    for name, source in sources.items():
        got = batches(source)
        assert [b["input_ids"].tolist() for b in got] == [rows[:2], rows[2:]], name


def test_a_torch_dataset_without_iteration_is_a_list_of_examples():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"input_ids": torch.tensor([index, 1])}

    assert [batch["input_ids"].tolist() for batch in batches(Rows())] == [[[0, 1], [1, 1]], [[2, 1]]]


def test_documents_that_are_longer_than_a_sequence_are_warned_of(caplog):
    documents = [{"input_ids": [1] * length} for length in (3, 4, 5, 90)]
    batches(documents[:2])
    batches([{**document, "labels": document["input_ids"]} for document in documents])  # as of questions
    assert not caplog.text
    batches(datasets.Dataset.from_list(documents))
    assert "tasks['x']: 2 of its 4 sequences are longer than the 4 tokens of a sequence, up to 90" in caplog.text


def test_padding_is_masked_and_has_no_label():
    batch = collate([{"input_ids": [1, 2, 3]}, {"input_ids": [4], "labels": [5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [5, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in collate([{"input_ids": [1, 2]}])


@pytest.mark.parametrize("ids", [[1, 2], [[1, 2]]])
def test_what_a_table_has_no_value_for_is_as_if_it_were_not_there(ids):
    (batch,) = batches([{"input_ids": ids, "labels": None, "attention_mask": None}])
    (plain,) = batches([{"input_ids": ids}])
    assert batch.keys() == plain.keys()
    assert all(batch[key].equal(plain[key]) for key in plain)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64, np.int32])
def test_ids_of_any_integer_type_are_tokens(kind):
    examples = [{"input_ids": np.arange(1, n, dtype=kind), "labels": np.arange(1, n, dtype=kind)} for n in (5, 4)]
    (found,) = batches(examples)
    assert found["input_ids"].dtype == found["labels"].dtype == torch.int64
    assert found["labels"].tolist() == [[1, 2, 3, 4], [1, 2, 3, -100]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "it is empty"),
        ([[1, 2, 3]], "item 0 is no dict"),
        ([{"text": "a"}], r"item 0 is no dict with 'input_ids' but a dict of \['text'\]"),
        ([{"input_ids": [0.5, 1.5]}], "item 0 has input_ids of torch.float32 from 0.5 on: give numbers of tokens"),
        ([{"input_ids": [1, 2]}, {"input_ids": [1, -5]}], "item 1 has input_ids of torch.int64 from -5 on"),
        (
            [{"input_ids": [1, 2, 3], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [1, 2, 3]}],
            r"item 0 has labels of shape \[2\] for input_ids of \[3\]: one a token",
        ),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], r"item 0 has an attention_mask of shape \[1\]"),
        ([{"input_ids": []}], "not empty"),
        ([{"input_ids": torch.zeros(1, 1, 1, dtype=torch.long)}], "1-D or 2-D"),
        (3, "got int"),
        ({"input_ids": [1]}, "got dict"),
    ],
)
def test_what_is_no_task_is_refused_by_name(source, message):
    with pytest.raises(ValueError, match=r"tasks\['x'\].*" + message):
        batches(source)


@pytest.mark.parametrize(
    ("file", "message"), [("sums.jsonl", r"is no token store.*Task\.from_jsonl"), ("lost.bin", "no such file")]
)
def test_a_path_that_is_no_store_is_refused_with_what_reads_it(tmp_path, file, message):
    (tmp_path / "sums.jsonl").write_text('{"text": "one and one is two"}\n')
    with pytest.raises(ValueError, match=r"tasks\['x'\]: .*" + message):
        batches(str(tmp_path / file))


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 100))
def test_batches_hold_each_sequence_once_within_the_limit(lengths, limit):
    lengths = np.array(lengths, np.int64)
    batches = [*by_length(lengths, limit)]
    assert sorted(i for rows in batches for i in rows) == [*range(len(lengths))]
    for rows in batches:
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= limit
    longest = [lengths[rows].max() for rows in batches]
    assert longest == sorted(longest, reverse=True)
