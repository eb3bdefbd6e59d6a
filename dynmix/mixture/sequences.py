"""What a domain is read as: a sequence of dicts with `input_ids` of one length, or `Rows`, which gives many at once.

Knows nothing of stores, views or mixtures.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynmix.mixture.documents import checked

Ints = npt.NDArray[np.int64]
Item = dict[str, Any]
Sequences = Sequence[Mapping[str, Any]]

PADDING = -1
"""Number of a padding token's document."""


class Rows(Sequence[Item]):
    """Sequences of one length that are gathered many at once; item i is {"input_ids": LongTensor[sequence_length]}."""

    sequence_length: int

    @abstractmethod
    def gather(self, rows: Ints) -> Ints:
        """Token ids of many sequences, int64[len(rows), sequence_length]; `rows` are from 0 to len - 1."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What tells these sequences from others with as many rows, without reading them all."""

    @property
    def padded(self) -> bool:
        """Whether sequences may have padding."""
        return False

    def documents(self, rows: Ints) -> Ints:
        """Number of each token's document within its sequence, int64[len(rows), sequence_length]; `PADDING`: of none.

        Tokens of one document stand together.
        """
        return np.zeros((len(rows), self.sequence_length), np.int64)

    def labels(self, rows: Ints, ids: Ints) -> Ints:
        """Labels of sequences whose token ids are `ids`, int64[len(rows), sequence_length]: their own, or the ids."""
        return ids

    def __getitem__(self, index: Any) -> Any:  # an int: slices of sequences are not needed
        return {"input_ids": torch.from_numpy(self.gather(np.array([checked(index, self, "sequence")]))[0])}


def gather(sequences: Sequences, rows: Ints, length: int, where: str) -> Ints:
    """Token ids of many sequences, int64[len(rows), length].

    Raises ValueError, saying `where`, for an item that is no sequence of `length` integers.
    """
    if isinstance(sequences, Rows):
        return sequences.gather(rows)
    found = [token_ids(sequences, row, where) for row in rows.tolist()]
    for row, tokens in zip(rows.tolist(), found, strict=True):
        if len(tokens) != length:
            raise ValueError(
                f"sequence {row} of {where} has {len(tokens)} tokens, not {length}: all must have one length; cut or"
                " pad them, or write them to a TokenStore"
            )
    return np.stack(found)


def documents(sequences: Sequences, rows: Ints, length: int, where: str) -> Ints:
    """`Rows.documents` of any sequences: a dict is one document, and padding where its `attention_mask` is 0.

    Raises ValueError, saying `where`, for an `attention_mask` of another form.
    """
    if isinstance(sequences, Rows):
        return sequences.documents(rows)
    numbers = np.zeros((len(rows), length), np.int64)
    for number, row in zip(numbers, rows.tolist(), strict=True):
        if (mask := sequences[row].get("attention_mask")) is not None:
            mask = np.asarray(mask)
            if mask.shape != (length,):
                raise ValueError(f"attention_mask of item {row} of {where} has shape {mask.shape}, not ({length},)")
            number[mask == 0] = PADDING
    return numbers


def labels(sequences: Sequences, rows: Ints, ids: Ints, where: str) -> Ints:
    """`Rows.labels` of any sequences: those of a dict that has `labels`.

    Raises ValueError, saying `where`, for `labels` that are not as many integers as the ids.
    """
    if isinstance(sequences, Rows):
        return sequences.labels(rows, ids)
    found = ids.copy()
    for number, row in enumerate(rows.tolist()):
        if (given := sequences[row].get("labels")) is not None:
            given = np.asarray(given)
            if given.shape != found[number].shape or given.dtype.kind not in "iu":
                raise ValueError(
                    f"labels of item {row} of {where} are {given.dtype} of shape {given.shape}, not"
                    f" {len(found[number])} integers, one for each of its input_ids: correct them, or leave them out"
                )
            found[number] = given
    return found


def is_padded(sequences: Sequences) -> bool:
    """Whether sequences may have padding or labels of their own; only lists are looked through for it."""
    if isinstance(sequences, Rows):
        return sequences.padded
    if not isinstance(sequences, list | tuple):
        return True
    return any(key in item for item in sequences for key in ("attention_mask", "labels"))


def token_ids(sequences: Sequences, row: int, where: str) -> Ints:
    """Token ids of one item. Raises ValueError, saying `where`, if it has none."""
    try:
        item: Any = sequences[row]
    except LookupError as error:
        if not hasattr(sequences, "columns"):
            raise
        raise ValueError(
            f"{where} is a {type(sequences).__name__}, which has columns and no items ({error!r}): give a sequence of"
            " dicts with input_ids, of a DataFrame datasets.Dataset.from_pandas(...)"
        ) from error
    if not hasattr(item, "keys"):
        raise ValueError(
            f"item {row} of {where} is no dict with input_ids, but a {type(item).__name__}: give dicts"
            " {'input_ids': [...]}, or write the token ids to a store by TokenStore.write"
        )
    try:
        tokens = np.asarray(item["input_ids"])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"item {row} of {where} is no dict with input_ids ({error!r})") from error
    if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
        raise ValueError(
            f"input_ids of item {row} of {where} are {tokens.dtype} of shape {tokens.shape}, not a vector of integers"
        )
    if tokens.size and tokens.min() < 0:
        raise ValueError(f"input_ids of item {row} of {where} have {tokens.min()}: token ids are not negative")
    return tokens.astype(np.int64)


def common_length(parts: Mapping[str, Sequences], given: int | None = None) -> int:
    """Tokens of a sequence of every part, name -> sequences; of those that are no `Rows` the first item is read.

    Raises ValueError if they are not all of one length, or not of the `given` one.
    """
    lengths = {
        where: rows.sequence_length if isinstance(rows, Rows) else len(token_ids(rows, 0, where))
        for where, rows in parts.items()
    }
    length = next(iter(lengths.values())) if given is None else given
    if wrong := [where for where in lengths if lengths[where] != length]:
        raise ValueError(f"sequences must have one length, here {length}: in {wrong[0]} it is {lengths[wrong[0]]}")
    if length < 1:
        raise ValueError("sequences must have at least one token")
    return length


def content_hash(sequences: Sequences, length: int, where: str) -> str:
    """Hash of the number of sequences, the fingerprint if they have one, the first and the last of them."""
    digest = hashlib.blake2b(str(len(sequences)).encode(), digest_size=16)
    if isinstance(sequences, Rows):
        digest.update(sequences.fingerprint.encode())
    digest.update(gather(sequences, np.array([0, len(sequences) - 1]), length, where).astype("<i8").tobytes())
    return digest.hexdigest()
