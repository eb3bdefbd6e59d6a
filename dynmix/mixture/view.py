"""Domains that are views on others: rows or documents in another grouping and order, with no token copied.

A view knows what it is a view on and which parts of it it holds; why those is its caller's business.
"""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from dynmix.mixture.documents import Documents, Tokens, check_windows, checked, enumerated, joint_hash
from dynmix.mixture.index import Ints, digest, numbered, read_numbers, split
from dynmix.mixture.sequences import Rows, Sequences, common_length, content_hash, documents, gather, is_padded, labels
from dynmix.mixture.shared import SharedArray, shared
from dynmix.mixture.store import TokenStore


class RowView(Rows):
    """Rows of several sequences as one: item i is item `row[i]` of `parts[part[i]]`, in any order, repeated or not.

    Takes the memory of one unsigned integer a row, as wide as the rows of all parts need; worker processes share it.

    Args:
        parts: packed stores, other views, or any sequences of dicts with `input_ids`; all of one length.
        part: int[n], which of `parts`.
        row: int[n], which row of it.

    Raises:
        ValueError: no rows, a part or a row that is not there, sequences of different lengths.
    """

    def __init__(self, parts: Sequence[Sequences], part: npt.ArrayLike, row: npt.ArrayLike) -> None:
        self._setup(parts, shared(numbered([len(rows) for rows in parts], part, row, "part", "row")))

    @classmethod
    def open(cls, file: str | os.PathLike[str], parts: Sequence[Sequences], content: str | None = None) -> "RowView":
        """The view whose numbers (`dynmix.mixture.index`) are in `file`, memory-mapped; pickles by path.

        Raises:
            ValueError: the file is missing or no index on these parts, or its hash is not `content`.
        """
        view = cls.__new__(cls)
        view._setup(parts, Path(file).absolute())
        if content is not None and digest(view._numbers) != content:
            raise ValueError(f"{file} has changed: its hash is {digest(view._numbers)}, and was {content}")
        if (last := int(view._numbers.max())) >= view._ends[-1]:
            raise ValueError(f"{file} is an index on other data: it has row {last} of {view._ends[-1]}")
        return view

    def _setup(self, parts: Sequence[Sequences], home: SharedArray | Path) -> None:
        self.parts, self._home = tuple(parts), home
        self._numbers = read_numbers(home) if isinstance(home, Path) else home.array
        self._ends = np.cumsum([len(rows) for rows in parts])
        self.sequence_length = common_length({f"part {k}": rows for k, rows in enumerate(parts) if len(rows)})

    def __getstate__(self) -> tuple[Any, ...]:
        return self.parts, self._home

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._setup(*state)

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return f"RowView({len(self)} rows of {len(self.parts)} parts)"

    def __getitem__(self, index: Any) -> Any:
        part, row = self.where(np.array([checked(index, self, "sequence")]))
        return self.parts[int(part[0])][int(row[0])]

    def where(self, rows: Ints) -> tuple[Ints, Ints]:
        """Part, and row of it, of rows of this view; int64[len(rows)] each."""
        return split(self._numbers[rows], self._ends)

    def gather(self, rows: Ints) -> Ints:
        """Token ids of many rows at once, int64[len(rows), sequence_length]."""
        return self._of_parts(rows, lambda part, row, _, where: gather(part, row, self.sequence_length, where))

    @property
    def padded(self) -> bool:
        """Whether a part has padding."""
        return any(is_padded(rows) for rows in self.parts if len(rows))

    def documents(self, rows: Ints) -> Ints:
        """Number of each token's document within its sequence, int64[len(rows), sequence_length]."""
        return self._of_parts(rows, lambda part, row, _, where: documents(part, row, self.sequence_length, where))

    def labels(self, rows: Ints, ids: Ints) -> Ints:
        """Labels of rows whose token ids are `ids`, int64[len(rows), sequence_length]."""
        return self._of_parts(rows, lambda part, row, here, where: labels(part, row, ids[here], where))

    def _of_parts(self, rows: Ints, read: Callable[[Sequences, Ints, Ints, str], Ints]) -> Ints:
        """What `read(part, rows of it, which of these rows they are, its name)` gives, for the rows of all parts."""
        part, row = self.where(rows)
        found = np.empty((len(rows), self.sequence_length), np.int64)
        for number in np.unique(part).tolist():
            here = np.flatnonzero(part == number)
            found[here] = read(self.parts[number], row[here], here, f"part {number}")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the index and of what the parts hold."""
        parts = [
            content_hash(rows, self.sequence_length, f"part {k}") for k, rows in enumerate(self.parts) if len(rows)
        ]
        return joint_hash([str(self._ends.tolist()), digest(self._numbers), *parts])


class DocumentView(Documents):
    """Documents of several stores as one, end to end in the order given: item i is document `document[i]` of a store.

    As a domain it is packed to sequences as a store with these documents would be. Takes the memory of 8 bytes a
    document for where it ends, and of an unsigned integer as wide as the documents of all stores need; worker
    processes share both.

    Args:
        stores: token stores, paths of them, or any `Documents`.
        store: int[n], which of `stores`.
        document: int[n], which document of it.

    Attributes:
        stores: the stores, opened.

    Raises:
        ValueError: no documents, a store or a document that is not there.
    """

    def __init__(
        self, stores: Sequence[Documents | str | os.PathLike[str]], store: npt.ArrayLike, document: npt.ArrayLike
    ) -> None:
        opened = [TokenStore.open(each) if isinstance(each, str | os.PathLike) else each for each in stores]
        numbers = numbered([len(each) for each in opened], store, document, "store", "document")
        bounds = SharedArray((1 + len(numbers),))
        which, inside = split(numbers, np.cumsum([len(each) for each in opened]))
        for number, each in enumerate(opened):
            here = np.flatnonzero(which == number)
            bounds.array[1 + here] = each.starts(inside[here] + 1) - each.starts(inside[here])
        np.cumsum(bounds.array, out=bounds.array)
        self._setup(opened, shared(numbers), bounds)

    def _setup(self, stores: Sequence[Documents], numbers: SharedArray, bounds: SharedArray) -> None:
        self.stores, self._homes = tuple(stores), (numbers, bounds)
        self._numbers, self._bounds = numbers.array, bounds.array  # document i is tokens bounds[i]:bounds[i + 1]
        self._ends = np.cumsum([len(store) for store in stores])

    def __getstate__(self) -> tuple[Any, ...]:
        return self.stores, *self._homes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._setup(*state)

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return f"DocumentView({len(self)} documents of {len(self.stores)} stores, tokens={self.num_tokens})"

    def __getitem__(self, index: SupportsIndex) -> Tokens:
        i = checked(index, self, "document")
        store, document = split(self._numbers[i : i + 1], self._ends)
        return self.stores[int(store[0])][int(document[0])]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self._bounds[-1])

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the index and of the stores' own."""
        return joint_hash([digest(self._numbers), *(store.fingerprint for store in self.stores)])

    def starts(self, documents: Ints) -> Ints:
        """First token of each of `documents`, int64[n]; for document `len(self)`, one past the last token."""
        found: Ints = self._bounds[documents]
        return found

    def read(self, starts: Ints, length: int) -> Ints:
        """Tokens [start, start + length) for each start, int64[len(starts), length]. Raises as `Documents.read`."""
        check_windows(starts, length, self.num_tokens)
        if not length:
            return np.empty((len(starts), length), np.int64)
        # The pieces of documents that make up the windows, in order. Empty documents make empty pieces.
        first = np.searchsorted(self._bounds[1:], starts, side="right")
        pieces = np.searchsorted(self._bounds[1:], starts + length - 1, side="right") - first + 1
        window, number = enumerated(pieces)
        document = first[window] + number
        low = np.maximum(self._bounds[document], starts[window])
        count = np.minimum(self._bounds[document + 1], starts[window] + length) - low
        store, inside = split(self._numbers[document], self._ends)
        source = low - self._bounds[document]  # within the document, and below within its store
        for number in np.unique(store).tolist():
            here = store == number
            source[here] += self.stores[number].starts(inside[here])
        ids = np.empty(len(starts) * length, np.int64)
        at = np.cumsum(count) - count
        for of, start, begin, size in zip(*(each.tolist() for each in (store, source, at, count)), strict=True):
            self.stores[of].copy(start, ids[begin : begin + size])
        return ids.reshape(len(starts), length)
