"""What packing and views read: documents of token ids, end to end, wherever they are kept.

`TokenStore`, `FlatTokens`, `ArrowTokens`, `DocumentView` and `JoinedDocuments` are of this kind. Knows nothing of
files, domains or sequences.
"""

import hashlib
import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import accumulate
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[Any]  # of an integer type

_CHUNK, _CHUNKS = 1 << 16, 1 << 10
_SAMPLE, _SAMPLES = 256, 64


class Documents(ABC):
    """Documents of token ids: item i is document i, 1-D. Token t is the t-th of all documents end to end."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens of all documents together."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that tells these documents from others, without reading all of them."""

    @abstractmethod
    def starts(self, documents: Ints) -> Ints:
        """First token of each of `documents`, int64[n]; for document `len(self)`, one past the last token."""

    @abstractmethod
    def read(self, starts: Ints, length: int) -> Ints:
        """Tokens [start, start + length) for each start, over the ends of documents; int64[len(starts), length].

        Raises:
            IndexError: tokens that are not there.
            ValueError: a token that is no id: negative, or beyond a vocabulary that these documents were given.
        """

    def copy(self, start: int, out: Ints) -> None:
        """Fill `out` with the tokens from `start` on; the caller has seen to it that there are so many."""
        if len(out):
            out[:] = self.read(np.array([start]), len(out))[0]

    def __getitem__(self, index: SupportsIndex) -> Tokens:
        i = checked(index, self, "document")
        start, stop = self.starts(np.array([i, i + 1])).tolist()
        tokens: Tokens = self.read(np.array([start]), stop - start)[0]
        return tokens

    def __iter__(self) -> Iterator[Tokens]:
        return (self[i] for i in range(len(self)))


class ArrayDocuments(Documents):
    """Documents whose tokens lie end to end in one array."""

    tokens: Tokens  # [num_tokens], contiguous, mostly a memory map
    where: str  # what an error calls it
    vocab_size: int | None = None  # ids are below it; None: below 2^63

    def __repr__(self) -> str:
        facts = f"documents={len(self)}, tokens={self.num_tokens}, dtype={self.dtype}"
        return f"{type(self).__name__}({self.where!r}, {facts})"

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return len(self.tokens)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a token in the array."""
        return self.tokens.dtype

    def read(self, starts: Ints, length: int) -> Ints:
        """Tokens [start, start + length) for each start, int64[len(starts), length]. Raises as `Documents.read`."""
        check_windows(starts, length, self.num_tokens)
        if not len(starts) or not length:
            return np.empty((len(starts), length), np.int64)
        # Every window as a row of one overlapping table: as fast as a table of rows, and from any token on.
        shape, step = (self.num_tokens - length + 1, length), self.tokens.itemsize
        table: Tokens = np.ndarray(shape, self.dtype, self.tokens, 0, (step, step))
        found = table[starts] if length > 1 else self.tokens[starts][:, None]
        ids: Ints = found.astype(np.int64)
        self._check(ids)
        return ids

    def copy(self, start: int, out: Ints) -> None:
        """Fill `out` with the tokens from `start` on."""
        out[:] = self.tokens[start : start + len(out)]
        self._check(out)

    def _check(self, ids: Ints) -> None:
        """Check what was read, if its type or a vocabulary leaves room for what is no id."""
        if self.vocab_size is not None or self.dtype.kind == "i" or self.dtype.itemsize == 8:
            check_ids(ids, self.where, self.vocab_size)


class JoinedDocuments(Documents):
    """The documents of several `parts`, end to end; no token is copied. Of no parts there are none."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self.parts = tuple(parts)
        self._documents = np.cumsum([0, *(len(part) for part in self.parts)])
        self._tokens = list(accumulate((part.num_tokens for part in self.parts), initial=0))

    def __len__(self) -> int:
        return int(self._documents[-1])

    def __repr__(self) -> str:
        return f"JoinedDocuments({len(self)} documents of {len(self.parts)} parts, tokens={self.num_tokens})"

    def __getitem__(self, index: SupportsIndex) -> Tokens:
        i = checked(index, self, "document")
        part = int(np.searchsorted(self._documents, i, side="right")) - 1
        return self.parts[part][i - int(self._documents[part])]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return self._tokens[-1]

    @property
    def fingerprint(self) -> str:
        """Hex digest of the parts' own, in their order."""
        return joint_hash(part.fingerprint for part in self.parts)

    def starts(self, documents: Ints) -> Ints:
        """First token of each of `documents`, int64[n]; for document `len(self)`, one past the last token."""
        part = np.searchsorted(self._documents, documents, side="right") - 1
        found = np.full(len(documents), self.num_tokens)  # as one past the end is, which no part has
        for number in np.unique(part[part < len(self.parts)]).tolist():
            here = part == number
            found[here] = self.parts[number].starts(documents[here] - self._documents[number]) + self._tokens[number]
        return found

    def read(self, starts: Ints, length: int) -> Ints:
        """Tokens [start, start + length) for each start, int64[len(starts), length]. Raises as `Documents.read`."""
        check_windows(starts, length, self.num_tokens)
        ids = np.empty((len(starts), length), np.int64)
        for start, window in zip(starts.tolist(), ids, strict=True):
            self.copy(start, window)
        return ids

    def copy(self, start: int, out: Ints) -> None:
        """Fill `out` with the tokens from `start` on."""
        part, done = bisect_right(self._tokens, start) - 1, 0
        while done < len(out):
            count = min(self._tokens[part + 1] - start, len(out) - done)
            self.parts[part].copy(start - self._tokens[part], out[done : done + count])
            part, start, done = part + 1, start + count, done + count


def enumerated(counts: Ints) -> tuple[Ints, Ints]:
    """For counts[i] things of each i: the i of each thing, and its number among those of i."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def checked(index: SupportsIndex, owner: Sized, what: str) -> int:
    """`index` of an `owner`, counted from the end if it is negative. Raises IndexError."""
    i = operator.index(index)
    i += len(owner) if i < 0 else 0
    if not 0 <= i < len(owner):
        raise IndexError(f"{what} {index} of {len(owner)} in {owner!r}")
    return i


def check_windows(starts: Ints, length: int, num_tokens: int) -> None:
    """Raises IndexError for windows of `length` tokens that are not all within `num_tokens`."""
    if len(starts) and not 0 <= starts.min() <= starts.max() <= num_tokens - length:
        raise IndexError(f"{length} tokens from {starts.min()} to {starts.max()} on, of {num_tokens}")


def check_vocabulary(documents: Documents, where: str, vocab_size: int | None = None) -> None:
    """Look for what `check_ids` refuses, in every token of up to 2^26, and in as many spread evenly over more."""
    for start in spread(documents.num_tokens, _CHUNK, _CHUNKS):
        check_ids(documents.read(start[None], min(_CHUNK, documents.num_tokens)), where, vocab_size)


def sampled_hash(documents: Documents, index: Iterable[bytes | memoryview]) -> str:
    """Hex digest of what tells where documents are, and of their first tokens, the last, and some between."""
    digest, length = hashlib.blake2b(digest_size=16), min(_SAMPLE, documents.num_tokens)
    for part in index:
        digest.update(part)
    digest.update(documents.read(spread(documents.num_tokens, length, _SAMPLES), length).astype("<i8").tobytes())
    return digest.hexdigest()


def joint_hash(parts: Iterable[str]) -> str:
    """Hex digest of several, in their order."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def spread(size: int, length: int, most: int) -> Ints:
    """Starts of windows of `length` in [0, size), all of them if `most` suffice, else `most`, evenly; int64[n].

    The last one ends with `size`, and overlaps the one before it where they do not come out even.
    """
    windows = -(-size // max(length, 1))
    return np.linspace(0, size - length, min(most, windows)).astype(np.int64)


def check_ids(ids: Tokens, where: str, vocab_size: int | None = None) -> None:
    """Raises ValueError for an id that is negative or not below `vocab_size`; it says `where`."""
    if ids.size and (low := int(ids.min())) < 0:
        raise ValueError(f"{where} has token {low}: ids are not negative; it is damaged, or of another dtype")
    if vocab_size is not None and ids.size and (top := int(ids.max())) >= vocab_size:
        raise ValueError(
            f"{where} has token {top}, and the vocabulary {vocab_size} ids: it was made with another tokenizer, is"
            " damaged, or of another dtype"
        )
