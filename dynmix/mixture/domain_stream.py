"""The items of one domain as token sequences of one length: tokenised as they come, end to end, cut, nothing dropped.

Knows items and tokens; nothing of mixtures, schedules or loaders.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from dynmix.mixture.documents import check_ids
from dynmix.mixture.items import Items, ItemSource, PassEnded
from dynmix.mixture.sequences import Ints
from dynmix.mixture.text import load, vocabulary_size

logger = logging.getLogger("dynmix.mixture")

TokenizerOrFunction = Any  # of transformers, the path or hub name of one, or a function from text to token ids


class Encoder:
    """Token ids of an item: its `input_ids` as they are, or its text, in a mapping under `text_field`, by `tokenizer`.

    One of transformers, or its path or hub name, adds no special token but its EOS after each text, and refuses
    `input_ids` that it does not have. Else it is a function from text to token ids, or None: there is no text.
    """

    def __init__(self, tokenizer: TokenizerOrFunction, text_field: str) -> None:
        tokenizer = load(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
        if tokenizer is not None and not callable(tokenizer):
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__}: give a tokenizer of transformers or a function"
            )
        self._tokenizer, self._text_field = tokenizer, text_field
        self._end: list[int] | None = None
        self._vocab_size = vocabulary_size(tokenizer) if hasattr(tokenizer, "get_vocab") else None
        if hasattr(tokenizer, "eos_token_id"):
            self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            if not self._end:
                logger.warning("the tokenizer has no EOS token: nothing separates one text from the next")

    def __call__(self, item: Any, name: str) -> Ints:
        """Token ids, int64[n]. Raises ValueError, in words for domain `name`, where the item has none."""
        if isinstance(item, Mapping) and "input_ids" in item:
            ids = _checked(item["input_ids"], name, self._vocab_size)
            _check_all_learnt(item, ids, name)
            return ids
        text = item.get(self._text_field) if isinstance(item, Mapping) else item
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"a text of domain {name!r} is not UTF-8: {error}") from error
        if not isinstance(text, str):
            raise ValueError(f"an item of domain {name!r} {self._no_text(item)}")
        if self._tokenizer is None:
            raise ValueError(f"domain {name!r} gives text: pass tokenizer=")
        if not text:
            return np.empty(0, np.int64)
        if self._end is None:
            return _checked(self._tokenizer(text), name)
        try:
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except TypeError as error:
            raise ValueError(
                f"a text of domain {name!r} is not for the tokenizer, as one with half a surrogate pair, which UTF-8"
                f" cannot hold: {error}"
            ) from error
        return _checked(ids + self._end, name)

    def _no_text(self, item: Any) -> str:
        if not isinstance(item, Mapping):
            return f"is a {type(item).__name__}: give mappings with input_ids or a text, or strings"
        if self._text_field in item:
            kind = type(item[self._text_field]).__name__
            return f"has under {self._text_field!r} a {kind}, and no string: filter such out"
        return f"has neither input_ids nor {self._text_field!r}, but the keys {list(item)}: pass text_field="


def _checked(found: Any, name: str, vocab_size: int | None = None) -> Ints:
    ids = np.asarray(found)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise ValueError(f"token ids of domain {name!r} are {ids.dtype} of shape {ids.shape}, not a vector of integers")
    ids = ids.astype(np.int64)
    check_ids(ids, f"domain {name!r}", vocab_size)
    return ids


def _check_all_learnt(item: Mapping[Any, Any], ids: Ints, name: str) -> None:
    """Raise ValueError for padding and labels of an item's own, which are lost where ids are put end to end."""
    if (mask := item.get("attention_mask")) is not None and not np.asarray(mask).all():
        raise ValueError(
            f"an item of domain {name!r} is padded (its attention_mask has zeros), and a stream puts ids end to end:"
            " give them without padding"
        )
    labels = np.asarray(item.get("labels"))
    if labels.shape == ids.shape and (labels != ids).any():
        raise ValueError(
            f"an item of domain {name!r} has labels that are not its input_ids, and a stream learns all ids: leave the"
            " labels out if that is meant, or give such examples to a MixtureDataset, which keeps them"
        )


class KeptAside(NamedTuple):
    """Sequences that were kept aside, int64[n, sequence_length], and the hashes of the items they are made of."""

    rows: Ints
    held: frozenset[bytes]


def kept_aside(name: str, source: ItemSource, encode: Encoder, length: int, count: int) -> KeptAside:
    """The first `count` sequences of a domain, or as many as one pass has; then nothing is held, and a warning says so.

    Raises ValueError if that is not one whole sequence.
    """
    items, held, parts, tokens = Items(name, source, once=True), set[bytes](), [np.empty(0, np.int64)], 0
    try:
        while tokens < count * length:
            ids = encode(next(items), name)
            held.add(_digest(ids))
            parts.append(ids)
            tokens += len(ids)
        # Something must be left to train on, and near at hand.
        if all(_digest(encode(item, name)) in held for item in islice(items, len(parts))):
            raise PassEnded(name)
    except PassEnded:
        held = set()
        logger.warning("domain %r has little more than its probe sequences: they are trained on as well", name)
    whole = min(tokens // length, count)
    if not whole:
        raise ValueError(
            f"domain {name!r} has not one whole sequence ({tokens} tokens, of {length}): give it more text, or leave it"
            " out"
        )
    return KeptAside(np.concatenate(parts)[: whole * length].reshape(whole, length), frozenset(held))


class DomainReader:
    """Sequences of one domain for one of its `readers`, without end; items whose hash is `held` are left out.

    An item that was cut goes on in the next sequence, and the end of a pass runs into the next one. The state holds
    fewer than `length` tokens: an item of which sequences are still to come is read again. To go on from one, `items`
    go on from its "items".
    """

    def __init__(
        self,
        items: Items,
        encode: Encoder,
        length: int,
        held: frozenset[bytes] = frozenset(),
        readers: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._items, self._encode, self._length, self._held, self._readers = items, encode, length, held, readers
        state = state or {"carried": [], "given": 0}
        self._before, self._carried = items.state_dict(), np.asarray(state["carried"], np.int64)
        self._tokens, self._at = self._carried, 0
        if state["given"]:
            self._read_on()
            self._at = state["given"] * length
            if self._at > len(self._tokens):
                raise ValueError(f"domain {items.name!r} gives other items than it did when it was left")

    def sequence(self) -> Ints:
        """The next sequence, int64[length].

        Raises PassEnded if there is none, of items that are read once, and ValueError for items without token ids.
        """
        while len(self._tokens) - self._at < self._length:
            self._read_on()
        self._at += self._length
        return self._tokens[self._at - self._length : self._at].copy()

    def state_dict(self) -> dict[str, Any]:
        """Where this reader is, JSON-able if the source's own state is."""
        return {"items": self._before, "carried": self._carried.tolist(), "given": self._at // self._length}

    def _read_on(self) -> None:
        self._before, self._carried = self._items.state_dict(), self._tokens[self._at :]
        self._tokens = np.concatenate([self._carried, self._next_tokens()])
        self._at = 0

    def _next_tokens(self) -> Ints:
        first = self._items.epoch
        while self._items.epoch <= first + self._readers:  # a share of few items may hold none of a pass
            ids = self._encode(next(self._items), self._items.name)
            if ids.size and not (self._held and _digest(ids) in self._held):
                return ids
        raise ValueError(
            f"domain {self._items.name!r} gave no token in {self._readers + 1} passes: its items are empty, or all of"
            " them are probes; give it more text, or lower probe_sequences"
        )


def _digest(ids: Ints) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
