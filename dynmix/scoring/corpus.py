"""A raw corpus as numbered samples: the rows, or the documents, of its domains, one domain after the other.

Knows token stores and sequences; no model, no task and no scores.
"""

from __future__ import annotations

import hashlib
import operator
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dynmix.mixture.index import split
from dynmix.mixture.sequences import (
    PADDING,
    Ints,
    Sequences,
    common_length,
    content_hash,
    documents,
    gather,
    is_padded,
)
from dynmix.mixture.sources import as_sequences
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import DocumentView

Unit = Literal["sequence", "document"]
Domains = Mapping[str, TokenStore | DocumentView | str | os.PathLike[str] | Sequences]
Tokens = NDArray[np.integer[Any]]

_ENDS = 1024  # tokens of a store's beginning and end that its fingerprint is made of, beside its index


class Corpus:
    """Samples 0 to `len - 1` of all domains together.

    Args:
        domains: name -> token store, path of one, or for rows also a `DocumentView`, `RowView` or any sequence of dicts
            with `input_ids` of one length.
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

    def __init__(self, domains: Domains, unit: Unit = "sequence", sequence_length: int | None = None) -> None:
        if not domains:
            raise ValueError("domains is empty: a corpus needs at least one")
        if unit not in get_args(Unit):
            raise ValueError(f'unit={unit!r}: "sequence" or "document"')
        if sequence_length is not None and operator.index(sequence_length) < 2:
            raise ValueError(f"sequence_length={sequence_length}: at least 2, a token to score and one before it")
        self.names, self.unit = tuple(domains), unit
        self._parts: list[Any] = []
        for name, data in domains.items():
            self._parts.append(
                _documents(name, data) if unit == "document" else as_sequences(name, data, sequence_length)
            )
        if unit == "sequence":
            named = {f"domain {name!r}": rows for name, rows in zip(self.names, self._parts, strict=True)}
            sequence_length = common_length(named, sequence_length)
        if sequence_length is None:
            raise ValueError("sequence_length is missing: tokens of a document that a model reads at once")
        self.sequence_length = sequence_length
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
        """Token ids of samples start to stop, 1-D, without padding; documents are views on the memory-mapped stores."""
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

    def spread(self, n: int) -> list[Tokens]:
        """At most n different sequences, evenly spread over the tokens of the corpus; always the same ones.

        One from each of n equal parts of all tokens, by a random token in it: the row, or the window of the document,
        that has this token. Those without a token to score are left out.
        """
        ends = np.cumsum(self.tokens)
        strata = (np.arange(n) + np.random.default_rng(0).random(n)) / n
        domains, tokens = split((strata * ends[-1]).astype(np.int64), ends)
        chosen = dict.fromkeys((d, *self._window(d, t)) for d, t in zip(domains.tolist(), tokens.tolist(), strict=True))
        first = self._ends - self.sizes
        found = []
        for domain, row, offset in chosen:
            sample = self.read(int(first[domain]) + row, int(first[domain]) + row + 1)[0]
            found.append(sample[offset : offset + self.sequence_length])
        return [window for window in found if len(window) > 1]

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
        """Of each domain: a hash of its index or length, and of its first and last tokens."""
        if self.unit == "sequence":
            named = zip(self.names, self._parts, strict=True)
            return [content_hash(rows, self.sequence_length, f"domain {name!r}") for name, rows in named]
        return [_store_hash(store) for store in self._parts]


def windows(samples: Sequence[Tokens], length: int) -> tuple[list[Tokens], Ints]:
    """The samples in consecutive windows of at most `length` tokens, without those that have no token to score.

    Returns the windows, and the number of the sample that each is of, int64[n].
    """
    found = [
        (number, sample[start : start + length])
        for number, sample in enumerate(samples)
        for start in range(0, len(sample) - 1, length)
    ]
    return [window for _, window in found], np.array([number for number, _ in found], np.int64)


def by_length(lengths: Ints, batch_tokens: int) -> Iterator[Ints]:
    """Numbers of the sequences of each batch, the longest first, so that what does not fit into memory shows at once.

    A batch has at most `batch_tokens` tokens, padding included, or a single sequence.
    """
    order, start = np.argsort(-lengths, kind="stable"), 0
    while start < len(order):
        stop = start + max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start:stop]
        start = stop


def _documents(name: str, data: Any) -> TokenStore:
    store = TokenStore.open(data) if isinstance(data, str | os.PathLike) else data
    if not isinstance(store, TokenStore):
        raise ValueError(f"domain {name!r} is a {type(data).__name__}: with unit='document' give token stores or paths")
    return store


def _store_hash(store: TokenStore) -> str:
    digest = hashlib.blake2b(store.fingerprint.encode(), digest_size=16)
    for part in (store.tokens[:_ENDS], store.tokens[-_ENDS:]):
        digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()
