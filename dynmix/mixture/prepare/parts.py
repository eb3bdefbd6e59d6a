"""Very long texts, tokenised in parts: the library takes over a hundred bytes of memory a byte of a text.

Where a text may be cut is not known of a tokenizer, so it is tried: the surroundings of a cut have to give the same ids
with and without it. What splits and merges look at is far nearer than these surroundings reach.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Encode: TypeAlias = Callable[[list[str]], list[NDArray[Any]]]

LONG = 1 << 22  # characters of a text that is cut
PART = 1 << 20
_AROUND = 2048  # characters on either side of a cut that have to agree
_TRIES = 32
_CUT = re.compile(r"(?<=\w)(?=\s\w)|(?<=\S)(?=\n)")


def in_parts(encode: Encode) -> Encode:
    """The same ids, with less memory for texts of over `LONG` characters, if they can be cut."""

    def encoded(texts: list[str]) -> list[NDArray[Any]]:
        if all(len(text) <= LONG for text in texts):
            return encode(texts)
        return [np.concatenate([encode([part])[0] for part in _parts(encode, text)]) for text in texts]

    return encoded


def _parts(encode: Encode, text: str) -> Iterator[str]:
    start = 0
    while len(text) > LONG and len(text) - start > PART:
        stop = _cut(encode, text, start + PART)
        yield text[start:stop]
        start = stop
    if start < len(text) or not text:
        yield text[start:]


def _cut(encode: Encode, text: str, first: int) -> int:
    """A place to cut from `first` on; the text's end if none is near."""
    for found, _ in zip(_CUT.finditer(text, first, first + PART), range(_TRIES), strict=False):
        cut = found.start()
        before, after = text[max(0, cut - _AROUND) : cut], text[cut : cut + _AROUND]
        whole, left, right = encode([before + after, before, after])
        if np.array_equal(whole, np.concatenate((left, right))):
            return cut
    return len(text)
