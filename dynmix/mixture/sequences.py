"""What a domain is read as: a sequence of dicts with `input_ids` of one length, or `Rows`, which gives many at once.

Knows nothing of stores, views or mixtures.
"""

import hashlib
import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Item = dict[str, Any]
Sequences = Sequence[Mapping[str, Any]]


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

    def __getitem__(self, index: Any) -> Any:  # an int: slices of sequences are not needed
        return {"input_ids": torch.from_numpy(self.gather(np.array([self.checked(index)]))[0])}

    def checked(self, index: Any) -> int:
        """`index`, counted from the end if it is negative. Raises IndexError."""
        row = operator.index(index)
        row += len(self) if row < 0 else 0
        if not 0 <= row < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self!r}")
        return row


def gather(sequences: Sequences, rows: Ints, length: int, where: str) -> Ints:
    """Token ids of many sequences, int64[len(rows), length].

    Raises:
        ValueError: an item that is no sequence of `length` integers; the message says `where`.
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


def token_ids(sequences: Sequences, row: int, where: str) -> Ints:
    """Token ids of one item. Raises ValueError, saying `where`, if it has none."""
    try:
        tokens = np.asarray(sequences[row]["input_ids"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"item {row} of {where} is no dict with input_ids ({error!r})") from error
    if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
        raise ValueError(
            f"input_ids of item {row} of {where} are {tokens.dtype} of shape {tokens.shape}, not a vector of integers"
        )
    return tokens.astype(np.int64)


def common_length(parts: Mapping[str, Sequences], given: int | None = None) -> int:
    """Tokens of the first item of every part, name -> sequences.

    Raises:
        ValueError: they are not all of this length, or not of the `given` one.
    """
    lengths = {where: len(token_ids(sequences, 0, where)) for where, sequences in parts.items()}
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
