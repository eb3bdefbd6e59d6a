"""From a piece of raw input to a shard of tokens: the work of one worker.

Reads the piece a batch of documents at a time, checks them, finds each one's domain and side, and tokenises them.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dynmix.mixture.prepare.parts import Encode, in_parts
from dynmix.mixture.prepare.pieces import Fields, Piece, PrepareError, damage
from dynmix.mixture.prepare.shards import Document, Summary, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 2048
BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class Job:
    """What every worker has to know; picklable."""

    tokenizer: str | PreTrainedTokenizerBase  # the tokenizer.json of a fast one, or a slow one itself
    end: tuple[int, ...]  # ids that are put after each document
    dtype: str  # of the tokens
    fields: Fields  # that are read
    default: str | None = None  # domain of the documents that lack the domain field; None: they are an error
    held_out: float = 0.0  # share of the documents that is held out, by hash
    split_special: bool = False  # take special tokens in a text for text, which a tokenizer.json does not say

    @cached_property
    def encode(self) -> Encode:
        """Token ids of texts, without special tokens."""
        dtype = np.dtype(self.dtype)
        if not isinstance(self.tokenizer, str):
            slow = self.tokenizer
            return lambda texts: [
                np.array(ids, dtype) for ids in slow(texts, add_special_tokens=False, verbose=False)["input_ids"]
            ]
        fast = Tokenizer.from_str(self.tokenizer)
        fast.no_truncation()  # a tokenizer.json often carries a length
        fast.no_padding()
        fast.encode_special_tokens = self.split_special
        return in_parts(
            lambda texts: [
                np.array(each.ids, dtype) for each in fast.encode_batch_fast(texts, add_special_tokens=False)
            ]
        )


def is_held_out(text: bytes, share: float) -> bool:
    """Whether a document is on the held-out side: a fixed function of its text, in UTF-8.

    A document that is held out at one share is so at any larger one.
    """
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < share * 2**64


def tokenise(job: Job, piece: Piece, domain: str, path: Path) -> Summary:
    """Write the shard of a piece; `domain` is that of its documents, where no field says it.

    Raises PrepareError, naming the file and the line or row, for damaged or bad input.
    """
    return write_shard(path, _encoded(job, piece, domain), np.dtype(job.dtype))


def _encoded(job: Job, piece: Piece, domain: str) -> Iterator[tuple[list[Document], list[NDArray[Any]]]]:
    end = np.array(job.end, job.dtype)
    for batch in _batches(_documents(job, piece, domain)):
        # Side by side by store: a store then takes one slice of a batch. The order within a store is the input's.
        batch.sort(key=lambda each: each[0][:2])
        documents = [document for document, _ in batch]
        ids = job.encode([text for _, text in batch])
        if len(end):
            ended = zip(documents, ids, strict=True)
            ids = [np.concatenate((each, end)) if document.bytes else each for document, each in ended]
        yield documents, ids


def _batches(documents: Iterator[tuple[Document, str]]) -> Iterator[list[tuple[Document, str]]]:
    batch, characters = [], 0
    for document, text in documents:
        batch.append((document, text))
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _documents(job: Job, piece: Piece, domain: str) -> Iterator[tuple[Document, str]]:
    """Each checked to be a string that UTF-8 can hold."""
    number = 0
    try:
        for number, text, value in piece.records(job.fields):
            if not isinstance(text, str):
                kind = "null" if text is None else type(text).__name__
                raise piece.bad(number, f"field {job.fields.text!r} is {kind}, not a string: filter such out")
            data = text.encode()  # a lone surrogate, which JSON can escape, is no text
            held_out = bool(job.held_out) and is_held_out(data, job.held_out)
            if job.fields.domain is not None:
                domain = _domain(job, piece, number, value)
            yield Document(domain, held_out, len(data)), text
    except UnicodeError as error:
        raise piece.bad(number, f"not UTF-8: {error}") from error
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise PrepareError(f"{piece.path}, after {piece.where(number)}: {damage(error)}") from error


def _domain(job: Job, piece: Piece, number: int, value: Any) -> str:
    field = job.fields.domain
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None or value == "":
        if job.default is None:
            raise piece.bad(
                number,
                f"no field {field!r} to take the domain from: add it, or give a name for the domain of such documents "
                "with domain_default (--domain-default)",
            )
        return job.default
    if not isinstance(value, str):
        raise piece.bad(number, f"field {field!r} is {type(value).__name__}; a domain is a string or an integer")
    value.encode()
    return value
