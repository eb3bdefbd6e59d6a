"""The `input_ids` of an HF `datasets.Dataset` as documents, read in its Arrow memory without a copy.

Knows the Arrow layout of lists; nothing of tokenizers or mixtures.
"""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dynmix.mixture.documents import ArrayDocuments, Documents, Ints, JoinedDocuments, Tokens, sampled_hash
from dynmix.mixture.view import DocumentView

if TYPE_CHECKING:
    from datasets import Dataset


def dataset_documents(dataset: "Dataset") -> Documents:
    """The `input_ids` of a dataset's rows as documents, in the dataset's order (`select`, `shuffle` and `filter`).

    Rows in another order than that of the Arrow table take the memory of a `DocumentView`. Raises ValueError if the
    column holds something else, or a row without a list or with an id that is null.
    """
    table = ArrowTokens(dataset)
    indices = dataset._indices  # what select, shuffle and filter made; nothing public tells of it
    if indices is None or not len(dataset):
        return table
    rows = indices.column(0).to_numpy().astype(np.int64)
    return DocumentView([table], np.zeros(len(rows), np.int64), rows)


class ArrowTokens(JoinedDocuments):
    """All rows of a dataset's Arrow table, in its order; pickles as the dataset does, by path if it is on disk."""

    def __init__(self, dataset: "Dataset") -> None:
        self.dataset = dataset
        super().__init__([_Chunk(chunk) for chunk in dataset.data.column("input_ids").chunks if len(chunk)])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dataset,)

    def __repr__(self) -> str:
        return f"ArrowTokens({len(self)} documents, tokens={self.num_tokens})"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the documents' lengths, and of 16,384 tokens from all over; not of how they are stored."""
        starts = (chunk.starts(np.arange(len(chunk) + 1)) for chunk in self.parts)
        return sampled_hash(self, (np.diff(each).astype("<i8").tobytes() for each in starts))


class _Chunk(ArrayDocuments):
    """One Arrow array of lists: its values are the documents end to end."""

    where = "column 'input_ids' of the dataset"

    def __init__(self, lists: Any) -> None:
        kind = lists.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        # Of lists that are all empty, nothing tells the type.
        if not is_list or not (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)):
            raise ValueError(f"{self.where} is {kind}: lists of integers are needed")
        if lists.null_count:
            raise ValueError(f"{self.where} has {lists.null_count} rows that are null: filter them out")
        if pa.types.is_fixed_size_list(kind):
            self._starts: Tokens = np.arange(len(lists) + 1) * kind.list_size
        else:
            offsets = lists.offsets.to_numpy()
            self._starts = offsets - offsets[0] if offsets[0] else offsets
        values = lists.flatten()
        if values.null_count:
            raise ValueError(f"{self.where} has {values.null_count} ids that are null")
        self.tokens = values.to_numpy() if len(values) else np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def fingerprint(self) -> str:
        raise NotImplementedError  # the table has one, whatever chunks it is in

    def starts(self, documents: Ints) -> Ints:
        return self._starts[documents].astype(np.int64)
