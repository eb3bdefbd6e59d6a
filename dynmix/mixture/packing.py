"""Documents as sequences of one length: which tokens stand in which sequence, and whose document each of them is.

Knows documents and their tokens; nothing of labels, batches, domains or datasets.
"""

import hashlib
import operator
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from dynmix.mixture.best_fit import Layout, lay_out
from dynmix.mixture.documents import Documents, Ints, enumerated
from dynmix.mixture.sequences import PADDING, Rows
from dynmix.mixture.store import TokenStore

Packing = Literal["concat", "best_fit"]

_COARSE = 1 << 20  # document starts kept in memory, evenly spaced


class PackedSequences(Rows):
    """Documents as equal sequences. Item i is {"input_ids": LongTensor[sequence_length]}.

    "concat": end to end, cut every `sequence_length` tokens, the rest dropped. "best_fit": whole documents together
    where they fit best (`dynmix.mixture.best_fit`); only those longer than a sequence are cut, and what a sequence has
    left at its end is padded. Its layout is made when it is first needed.

    Args:
        store: the documents; they are not separated by what they do not contain themselves.
        sequence_length: tokens of a sequence, >= 1, or 2 with a BOS.
        packing: "concat" or "best_fit".
        bos_token_id: stands in front of what a model reads from its start: with `each_document` of every document,
            else of every sequence. A part of `sequence_length`, so that a sequence holds fewer tokens of the store.
        each_document: the documents of a sequence are read apart from each other; always so for best fit, where each
            piece of a document that was cut gets a BOS. End to end, a sequence that begins within a document does not.
        pad_token_id: what padding consists of; any id does, as nothing is to attend to it or to learn it.
        bos_where_missing: leave the BOS out where the documents begin with it already.

    Without `each_document` a BOS that documents begin with stays where it is, so that a sequence which begins with a
    document has two.

    Raises:
        ValueError: an argument that is none of these, or with `each_document` a BOS that the documents have already.
    """

    def __init__(
        self,
        store: Documents,
        sequence_length: int,
        *,
        packing: Packing = "concat",
        bos_token_id: int | None = None,
        each_document: bool = False,
        pad_token_id: int = 0,
        bos_where_missing: bool = False,
    ) -> None:
        if bos_where_missing and bos_token_id is not None and _all_begin_with(bos_token_id, store):
            bos_token_id = None
        if operator.index(sequence_length) < 1 + (bos_token_id is not None):
            least = "1" if bos_token_id is None else "2, a BOS and a token"
            raise ValueError(f"sequence_length must be at least {least}, not {sequence_length}")
        if packing not in get_args(Packing):
            raise ValueError(f'packing={packing!r}: "concat" or "best_fit"')
        self.store, self.sequence_length, self.packing = store, operator.index(sequence_length), packing
        self.bos_token_id, self.pad_token_id = bos_token_id, pad_token_id
        self.each_document = each_document or packing == "best_fit"
        self._lead = int(bos_token_id is not None)
        if bos_token_id is not None and self.each_document and _all_begin_with(bos_token_id, store):
            raise ValueError(
                f"bos_token_id={bos_token_id}: the documents of {store!r} begin with it already; leave it out"
            )

    def __len__(self) -> int:
        if self.packing == "best_fit":
            return len(self._layout.rows.array) - 1 if self.store.num_tokens else 0
        if self.each_document:
            return (self.store.num_tokens + self._lead * len(self.store)) // self.sequence_length
        return self.store.num_tokens // (self.sequence_length - self._lead)

    def __repr__(self) -> str:
        return f"PackedSequences({self.store!r}, {self.sequence_length}, packing={self.packing!r})"

    @property
    def fingerprint(self) -> str:
        """The store's; with another packing or a BOS, a hash of it and of them."""
        if self.packing == "concat" and self.bos_token_id is None:
            return self.store.fingerprint
        parts = (self.store.fingerprint, self.packing, self.sequence_length, self.bos_token_id, self.each_document)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    @property
    def padded(self) -> bool:
        """Whether sequences may end with padding."""
        return self.packing == "best_fit"

    @property
    def table(self) -> npt.NDArray[np.integer] | None:
        """All sequences as they lie in memory, [len(self), sequence_length], where they do; ids are not checked."""
        if not isinstance(self.store, TokenStore) or self.packing != "concat" or self.bos_token_id is not None:
            return None
        return self.store.tokens[: len(self) * self.sequence_length].reshape(len(self), self.sequence_length)

    def gather(self, rows: Ints) -> Ints:
        """Token ids of many sequences at once, int64[len(rows), sequence_length]."""
        length, lead = self.sequence_length, self._lead
        if self.packing == "concat" and not (lead and self.each_document):
            ids = self.store.read(rows * (length - lead), length - lead)
            return ids if not lead else np.insert(ids, 0, self.bos_token_id or 0, axis=1)
        found = self._pieces(rows)
        ids = np.full((len(rows), length), self.pad_token_id, np.int64)
        flat = ids.reshape(-1)
        flat[found.at[found.led > 0]] = self.bos_token_id or 0
        _read_into(flat, found.at + found.led, self.store, found.starts, found.lengths)
        return ids

    def documents(self, rows: Ints) -> Ints:
        """Number of each token's document within its sequence, from 0, int64[len(rows), sequence_length]."""
        if not self.each_document:
            return super().documents(rows)
        found = self._pieces(rows)
        numbers = np.full(len(rows) * self.sequence_length, PADDING, np.int64)
        size = found.lengths + found.led
        token = np.arange(size.sum()) + np.repeat(found.at - (np.cumsum(size) - size), size)
        numbers[token] = np.repeat(found.number, size)
        return numbers.reshape(len(rows), self.sequence_length)

    @cached_property
    def _layout(self) -> Layout:
        return lay_out(self.store, self.sequence_length, self._lead)

    def _pieces(self, rows: Ints) -> "_Pieces":
        row, starts, lengths, led = self._laid_out(rows) if self.packing == "best_fit" else self._cut(rows)
        size = lengths + led
        before, head = np.cumsum(size) - size, np.searchsorted(row, row)  # the first piece of each one's sequence
        at = row * self.sequence_length + before - before[head]
        return _Pieces(starts, lengths, at, np.arange(len(row)) - head, led)

    def _laid_out(self, rows: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        starts, lengths, bounds = (each.array for each in self._layout)
        first = bounds[rows].astype(np.int64)
        row, number = enumerated(bounds[rows + 1].astype(np.int64) - first)
        piece = first[row] + number
        return row, starts[piece].astype(np.int64), lengths[piece].astype(np.int64), np.full(len(piece), self._lead)

    def _cut(self, rows: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        begin = rows * self.sequence_length
        first, last = np.split(self._documents_at(np.concatenate([begin, begin + self.sequence_length - 1])), 2)
        row, number = enumerated(last - first + 1)
        document = first[row] + number
        start = self._bounds(document)
        low = np.maximum(start, begin[row])
        size = np.minimum(self._bounds(document + 1), begin[row] + self.sequence_length) - low
        row, document, start, low, size = (each[size > 0] for each in (row, document, start, low, size))
        led = self._lead * (low == start)
        # Every document up to this one has a BOS in front of it, but for this one where it begins here.
        return row, low - self._lead * (document + 1) + led, size - led, led

    def _bounds(self, documents: Ints) -> Ints:
        """`store.starts`, counting the BOS of each document."""
        return self.store.starts(documents) + self._lead * documents

    @cached_property
    def _coarse(self) -> tuple[int, Ints]:
        step = 1 + len(self.store) // _COARSE
        return step, self._bounds(np.arange(0, len(self.store), step))

    def _documents_at(self, tokens: Ints) -> Ints:
        """The document that each token of the packed stream is of."""
        step, coarse = self._coarse
        low = (np.searchsorted(coarse, tokens, side="right") - 1) * step
        high = np.minimum(low + step, len(self.store))  # starts beyond the token
        while (high - low > 1).any():
            middle = (low + high) // 2
            begun = self._bounds(middle) <= tokens
            low, high = np.where(begun, middle, low), np.where(begun, high, middle)
        return low


class _Pieces(NamedTuple):
    """Parts of documents as they stand in a request's sequences, in order; int64[n] each."""

    starts: Ints  # first token in the store
    lengths: Ints  # tokens of the store
    at: Ints  # where the piece begins in the sequences end to end
    number: Ints  # of the document within its sequence, ascending
    led: Ints  # whether a BOS comes first


def _all_begin_with(token: int, store: Documents) -> bool:
    """Whether the first documents do, 64 at most."""
    bounds = store.starts(np.arange(min(len(store), 64) + 1))
    first = bounds[:-1][np.diff(bounds) > 0]
    return len(first) > 0 and bool((store.read(first, 1) == token).all())


def _read_into(out: Ints, at: Ints, store: Documents, starts: Ints, lengths: Ints) -> None:
    """Read runs of tokens of any lengths into `out`, each from its `at` on.

    From memory they are copied one by one. Other documents are read in many windows of one length at once: a run is two
    that overlap, of the largest power of two within it.
    """
    if isinstance(store, TokenStore):
        for begin, start, length in zip(at.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            out[begin : begin + length] = store.tokens[start : start + length]
        if store.dtype.kind == "u" or out.min() >= 0:
            return  # else the store says which of its tokens is no id
    exponents = np.frexp(lengths)[1]
    for exponent in np.unique(exponents[lengths > 0]).tolist():
        width = 1 << (exponent - 1)
        here = np.flatnonzero(exponents == exponent)
        over = lengths[here] - width
        here, shift = np.concatenate([here, here[over > 0]]), np.concatenate([0 * over, over[over > 0]])
        found = store.read(starts[here] + shift, width)
        out[(at[here] + shift)[:, None] + np.arange(width)] = found
