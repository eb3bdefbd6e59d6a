"""A raw corpus as numbered samples: the rows, or the documents, of its domains, one domain after the other.

Knows token stores, sequences and what items tell of them; no model, no task and no scores.
"""

from __future__ import annotations

import hashlib
import operator
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dynmix.mixture.boundaries import IGNORED
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.index import split
from dynmix.mixture.options import SequenceOptions
from dynmix.mixture.rows import as_items, parts_of
from dynmix.mixture.sequences import (
    PADDING,
    Ints,
    Item,
    Sequences,
    common_length,
    content_hash,
    documents,
    gather,
    is_padded,
    labels,
)
from dynmix.mixture.sources import as_sequences
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import DocumentView

Unit = Literal["sequence", "document"]
Domains = Mapping[str, TokenStore | DocumentView | str | os.PathLike[str] | Sequences]
Tokens = NDArray[np.integer[Any]]

_BLOCKS, _BLOCK = 64, 1 << 14  # a fingerprint is made of so many pieces of a domain, of so many tokens each


class Corpus:
    """Samples 0 to `len - 1` of all domains together.

    Args:
        domains: name -> token store, path of one, or for rows also a `DocumentView`, `RowView` or any sequence of dicts
            with `input_ids` of one length; or a `MixtureDataset`, whose first domains they are, without those that are
            gone, and whose `boundaries` and ignored ids its items have here too.
        unit: a sample is a "sequence": a row of `sequence_length` tokens, as `MixtureDataset` has them; or a
            "document" of a token store.
        sequence_length: tokens of a row, and of what a model reads at once of a document. It may be left out where no
            domain is a token store.

    Attributes:
        names: of the domains, in order.
        sizes: int64[n_domains], samples of each.
        tokens: int64[n_domains], tokens of each, in whole samples.

    Raises:
        ValueError: no domains, one without samples, rows of different lengths, documents of something else.
    """

    def __init__(
        self, domains: Domains | MixtureDataset, unit: Unit = "sequence", sequence_length: int | None = None
    ) -> None:
        self._options = SequenceOptions()
        if isinstance(domains, MixtureDataset):
            self._options, gone = domains.options, domains.gone
            domains = {name: rows for name, rows in domains.sequences.items() if name not in gone}
        if not domains:
            raise ValueError("domains is empty: a corpus needs at least one")
        if unit not in get_args(Unit):
            raise ValueError(f'unit={unit!r}: "sequence" or "document"')
        if sequence_length is not None and operator.index(sequence_length) < 2:
            raise ValueError(f"sequence_length={sequence_length}: at least 2, a token to score and one before it")
        self.names, self.unit = tuple(domains), unit
        self._parts: list[Any] = [
            _documents(name, data) if unit == "document" else as_sequences(name, data, sequence_length)
            for name, data in domains.items()
        ]
        if unit == "sequence":
            named = {f"domain {name!r}": rows for name, rows in zip(self.names, self._parts, strict=True)}
            sequence_length = common_length(named, sequence_length)
        if sequence_length is None:
            raise ValueError("sequence_length is missing: tokens of a document that a model reads at once")
        self.sequence_length = sequence_length
        apart = bool(self._options.boundaries or self._options.ignore_token_ids)
        self._masked = [apart or is_padded(part) for part in self._parts]  # of rows
        self.sizes = np.array([len(part) for part in self._parts], np.int64)
        self.tokens = self.sizes * sequence_length
        if unit == "document":
            self.tokens = np.array([store.num_tokens for store in self._parts], np.int64)
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Domain, as an index into `names`, and row or document in it, of samples start to stop; int64[n] each."""
        return split(np.arange(start, stop), self._ends)

    def read(self, start: int, stop: int) -> list[Tokens]:
        """Token ids alone of samples start to stop, 1-D, without padding; documents are views on the stores."""
        domains, rows = self.where(start, stop)
        samples: list[Tokens] = []
        for domain in np.unique(domains).tolist():
            part, here = self._parts[domain], rows[domains == domain]
            if self.unit == "document":
                samples += [part[row] for row in here.tolist()]
            else:
                where = f"domain {self.names[domain]!r}"
                ids = gather(part, here, self.sequence_length, where)
                kept = documents(part, here, self.sequence_length, where) != PADDING if is_padded(part) else ids >= 0
                samples += [tokens[real] for tokens, real in zip(ids, kept, strict=True)]
        return samples

    def lengths(self, start: int, stop: int) -> Ints:
        """Tokens of samples start to stop, int64[n]: of a document its own, of a row all, padding included."""
        domains, rows = self.where(start, stop)
        if self.unit == "sequence":
            return np.full(len(rows), self.sequence_length, np.int64)
        found = np.empty(len(rows), np.int64)
        for domain in np.unique(domains).tolist():
            here = domains == domain
            found[here] = self._parts[domain].starts(rows[here] + 1) - self._parts[domain].starts(rows[here])
        return found

    def items(self, samples: Ints, offsets: Ints) -> Sequence[Item]:
        """What a model is given of samples, each from a token of it on.

        Of a row that is the item that a `MixtureDataset` gives to train on, as a whole: `input_ids`, `labels`, and what
        keeps its documents apart. Of a document at most `sequence_length` of its `input_ids`.

        Args:
            samples: their numbers, int64[n].
            offsets: of rows 0, int64[n].
        """
        domains, rows = split(samples, self._ends)
        if self.unit == "sequence":
            parts = parts_of(self._parts.__getitem__, self.names, domains, rows)
            return as_items(domains, self.sequence_length, None, parts, self._options if any(self._masked) else None)
        pieces = zip(domains.tolist(), rows.tolist(), offsets.tolist(), strict=True)
        ids = [self._parts[domain][row][at : at + self.sequence_length] for domain, row, at in pieces]
        return [{"input_ids": torch.from_numpy(tokens.astype(np.int64))} for tokens in ids]

    def spread(self, n: int) -> list[Item]:
        """At most n different sequences, evenly spread over the tokens of the corpus; always the same ones.

        One from each of n equal parts of all tokens, by a random token in it: the row, or the window of the document,
        that has this token, as `items` gives it. Those without a token to score are left out.
        """
        ends = np.cumsum(self.tokens)
        strata = (np.arange(n) + np.random.default_rng(0).random(n)) / n
        domains, tokens = split((strata * ends[-1]).astype(np.int64), ends)
        chosen = dict.fromkeys((d, *self._window(d, t)) for d, t in zip(domains.tolist(), tokens.tolist(), strict=True))
        domain, row, offset = np.array(list(chosen), np.int64).T
        items = self.items((self._ends - self.sizes)[domain] + row, offset)
        return [item for item in items if (item["labels" if "labels" in item else "input_ids"][1:] != IGNORED).any()]

    def _window(self, domain: int, token: int) -> tuple[int, int]:
        """Sample of a domain that has this token of it, and where in it the window with the token begins."""
        if self.unit == "sequence":
            return token // self.sequence_length, 0
        store: TokenStore = self._parts[domain]

        def start(document: int) -> int:
            return int(store.starts(np.array([document]))[0])

        document = bisect_right(range(len(store)), token, key=start) - 1
        return document, (token - start(document)) // self.sequence_length * self.sequence_length

    @property
    def fingerprints(self) -> list[str]:
        """Of each domain: a hash of its index or length, and of about a million tokens spread over it, or all of them.

        Where labels or boundaries are not those of plain text, of these too.
        """
        if self.unit == "sequence":
            return [self._rows_hash(domain) for domain in range(len(self.names))]
        return [_store_hash(store) for store in self._parts]

    def _rows_hash(self, domain: int) -> str:
        rows, length, where = self._parts[domain], self.sequence_length, f"domain {self.names[domain]!r}"
        digest = hashlib.blake2b(content_hash(rows, length, where).encode(), digest_size=16)
        if self._masked[domain]:
            digest.update(f"{self._options.boundaries} {self._options.ignore_token_ids}".encode())
        size = max(1, _BLOCK // length)
        for start in _starts(len(rows), size):
            some = np.arange(start, min(start + size, len(rows)))
            ids = gather(rows, some, length, where)
            digest.update(ids.astype("<i8").tobytes())
            if self._masked[domain]:
                digest.update(labels(rows, some, ids, where).astype("<i8").tobytes())
                digest.update(documents(rows, some, length, where).astype("<i8").tobytes())
        return digest.hexdigest()


def windows(lengths: Ints, length: int) -> tuple[Ints, Ints]:
    """Samples of these lengths in consecutive windows of at most `length` tokens, but for a last one of a single token.

    Returns the number of the sample that each window is of, and where in it the window begins, int64[n] each.
    """
    counts = -(-np.maximum(lengths - 1, 0) // length)
    owners = np.repeat(np.arange(len(lengths)), counts)
    return owners, (np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)) * length


def _documents(name: str, data: Any) -> TokenStore:
    store = TokenStore.open(data) if isinstance(data, str | os.PathLike) else data
    if not isinstance(store, TokenStore):
        raise ValueError(f"domain {name!r} is a {type(data).__name__}: with unit='document' give token stores or paths")
    return store


def _store_hash(store: TokenStore) -> str:
    digest = hashlib.blake2b(store.fingerprint.encode(), digest_size=16)
    for start in _starts(len(store.tokens), _BLOCK):
        digest.update(store.tokens[start : start + _BLOCK].astype("<i8").tobytes())
    return digest.hexdigest()


def _starts(n: int, size: int) -> list[int]:
    """Where pieces of `size` begin that are spread over n things, and cover all where `_BLOCKS` of them can."""
    starts: list[int] = np.linspace(0, n - size, min(_BLOCKS, -(-n // size))).astype(np.int64).tolist()
    return starts
