import pickle
from itertools import accumulate, chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixture.documents import ArrayDocuments, Documents, Ints, JoinedDocuments, check_vocabulary, spread
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.view import DocumentView

contents = st.lists(st.lists(st.lists(st.integers(0, 2**40), max_size=9), max_size=5), max_size=5)


class Listed(Documents):
    """Documents in a list, read one token at a time."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.documents))

    @property
    def fingerprint(self) -> str:
        return str(self.documents)

    def starts(self, documents: Ints) -> Ints:
        return np.array(list(accumulate(map(len, self.documents), initial=0)))[documents]

    def read(self, starts: Ints, length: int) -> Ints:
        every = list(chain(*self.documents))
        assert all(0 <= start <= len(every) - length for start in starts.tolist())
        rows = [every[start : start + length] for start in starts.tolist()]
        return np.array(rows, np.int64).reshape(len(starts), length)


class Array(ArrayDocuments):
    """One document, an array."""

    def __init__(self, tokens: np.ndarray, vocab_size: int | None = None) -> None:
        self.tokens, self.where, self.vocab_size = tokens, "x", vocab_size

    def __len__(self) -> int:
        return 1

    @property
    def fingerprint(self) -> str:
        return ""

    def starts(self, documents: Ints) -> Ints:
        return documents * self.num_tokens


@given(contents=contents, length=st.integers(1, 30), data=st.data())
@settings(max_examples=25)
def test_joined_documents_are_those_of_one_list(
    contents: list[list[list[int]]], length: int, data: st.DataObject
) -> None:
    flat = [document for part in contents for document in part]
    every = list(chain(*flat))
    joined = pickle.loads(pickle.dumps(JoinedDocuments([Listed(part) for part in contents])))
    assert (len(joined), joined.num_tokens) == (len(flat), len(every))
    assert [document.tolist() for document in joined] == flat
    assert [joined[i - len(flat)].tolist() for i in range(len(flat))] == flat
    ends = list(accumulate(map(len, flat), initial=0))
    assert joined.starts(np.arange(len(flat) + 1)[::-1]).tolist() == ends[::-1]
    if len(every) >= length:
        starts = data.draw(st.lists(st.integers(0, len(every) - length), max_size=8))
        read = joined.read(np.array(starts, np.int64), length)
        assert read.dtype == np.int64
        assert read.tolist() == [every[start : start + length] for start in starts]
    with pytest.raises(IndexError, match=f"of {len(every)}"):
        joined.read(np.array([0, len(every) - length + 1]), length)
    with pytest.raises(IndexError, match=f"of {len(flat)}"):
        joined[len(flat)]
    if flat:
        order = data.draw(st.permutations(range(len(flat))))
        view = DocumentView([joined], np.zeros(len(order), np.int64), order)
        again = list(chain(*(flat[i] for i in order)))
        assert [document.tolist() for document in view] == [flat[i] for i in order]
        packed = PackedSequences(view, length)
        assert packed.gather(np.arange(len(packed))).reshape(-1).tolist() == again[: len(again) // length * length]
        assert view.starts(np.arange(len(flat) + 1)).tolist() == list(
            accumulate((len(flat[i]) for i in order), initial=0)
        )


@given(
    tokens=st.lists(st.integers(0, 60_000), max_size=40),
    dtype=st.sampled_from(["<u2", "<i4", "<i8", ">u4"]),
    data=st.data(),
)
def test_windows_of_an_array_are_its_slices(tokens: list[int], dtype: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(tokens)))
    starts = data.draw(st.lists(st.integers(0, len(tokens) - length), max_size=6))
    read = Array(np.array(tokens, dtype)).read(np.array(starts, np.int64), length)
    assert (read.dtype, read.shape) == (np.int64, (len(starts), length))
    assert read.tolist() == [tokens[start : start + length] for start in starts]
    for bad in (-1, len(tokens) - length + 1):
        with pytest.raises(IndexError, match=f"of {len(tokens)}"):
            Array(np.array(tokens, dtype)).read(np.array([bad]), length)


@given(st.integers(0, 500), st.integers(1, 60), st.integers(2, 20))
def test_windows_are_spread_over_everything(size: int, length: int, most: int) -> None:
    starts = spread(size, length, most).tolist()
    seen = {token for start in starts for token in range(start, min(start + length, size))}
    assert len(starts) <= most
    assert starts == sorted(starts)
    assert not size or (starts[0] == 0 and max(seen) == size - 1)
    if most * length >= size:
        assert seen == set(range(size))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([5, -1], np.int32), "x has token -1: ids are not negative"),
        (np.array([5, 2**64 - 1], np.uint64), "x has token -1"),
        (np.array([5, 7], np.uint16), "x has token 7, and the vocabulary 7 ids"),
    ],
)
def test_what_is_no_id_is_refused_when_it_is_read(tokens: np.ndarray, message: str) -> None:
    assert Array(tokens, 7).read(np.array([0]), 1).tolist() == [[5]]
    with pytest.raises(ValueError, match=message):
        Array(tokens, 7).read(np.array([0, 1]), 1)


def test_the_vocabulary_is_checked_in_every_token_of_what_is_small() -> None:
    tokens = np.zeros(200_000, np.int64)
    for bad in (0, 70_000, 199_999):
        tokens[bad] = 9
        found = Listed([tokens.tolist()])
        check_vocabulary(found, "x", 10)
        with pytest.raises(ValueError, match="x has token 9"):
            check_vocabulary(found, "x", 9)
        tokens[bad] = 0
