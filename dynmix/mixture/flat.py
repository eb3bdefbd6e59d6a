"""Flat files of token ids: nanoGPT's `.bin` (raw uint16), OLMo's `.npy` (raw too, in spite of its name), true npy,
and llm.c's `.bin` (a header of 256 int32: magic, version, number of tokens, zeros).

Knows the bytes of one file; nothing of tokenizers, domains or mixtures. Megatron's pair `.bin`/`.idx` is `TokenStore`.
"""

import codecs
import functools
import logging
import operator
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike

from dynmix.mixture.documents import ArrayDocuments, Ints, Tokens, check_vocabulary, sampled_hash, spread
from dynmix.mixture.shared import SharedArray, shared
from dynmix.mixture.store import StoreError, check_same, mapped, with_room

logger = logging.getLogger("dynmix.mixture")

_MAGIC = b"\x93NUMPY"
_COUNTED = (20240520, 20240801)  # magic numbers of llm.c: ids of 16 and of 32 bits; who copied it has some of their own
_HEADER_BYTES = 1024  # of llm.c
_BLOCK, _BLOCKS = 8192, 64  # bytes that the type of a raw file is told from
_SMALL, _ENOUGH = 16, 16  # see `_dtype_of_bytes`
# Of zip (torch.save), gzip, zstd, pickle, parquet, arrow, gguf and safetensors.
_OTHER = re.compile(
    rb"PK\x03\x04|\x1f\x8b\x08|\x28\xb5\x2f\xfd|\x80[\x02\x03][\x8a(}\]cX]|\x80[\x04\x05]\x95|PAR1|ARROW1|GGUF"
    rb"|.{4}\0{4}\{[\" }]",
    re.DOTALL,
)
_SCAN = 1 << 22


class FlatTokens(ArrayDocuments):
    """Token ids in one file, end to end, read through a memory map; pickles by path.

    A file with an npy header must be a vector of integers, of the size that the header says. One with a header of llm.c
    has as many ids of 16 or 32 bits as it says. Any other is taken as raw little-endian integers. The type of raw ones
    is told from their bytes where it can be: the upper halves of wider integers are zero, or nearly. A file that is too
    short or too uniform for that is refused, and one that looks like text, bytes, big-endian or negative wide integers,
    or a file of another format. The log (`dynmix.mixture`) says what was told where there is no `vocab_size` to check
    it. A `dtype` that is given is taken, with a warning where the bytes look like another.

    Args:
        path: the file.
        dtype: integer type of a token in it; None: the header's, or told from the bytes.
        vocab_size: ids must be below it. Up to 2^26 tokens are checked on opening, and whatever is read.
        eos_token_id: the last token of each document; None: the file is one document. Takes one pass over the file,
            and 8 bytes per document.

    Attributes:
        path: absolute.
        tokens: all token ids, a read-only memory-mapped array of shape [num_tokens].
        vocab_size: as given.

    Raises:
        StoreError: no such file, an empty one, a size that is no multiple of the type's, a damaged header, a header of
            another type or shape, a token that is no id.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: DTypeLike | None = None,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | None = None,
    ) -> None:
        if vocab_size is not None and operator.index(vocab_size) < 1:
            raise StoreError(f"vocab_size={vocab_size}: at least 1")
        file = Path(os.path.abspath(path))
        if not file.is_file():
            raise StoreError(f"{file}: no such file" + (", but a folder" if file.is_dir() else ""))
        if file.stat().st_size == 0:
            raise StoreError(f"{file} is empty; copy or write it anew")
        asked = None if dtype is None else _integer(dtype)
        found, offset = with_room(file, lambda: _layout(file))
        if found is None:
            found = _raw_dtype(file, asked, vocab_size)
        elif asked is not None and asked != found:
            raise StoreError(f"{file} holds {found.name} by its header, not dtype={asked.name}; leave dtype out")
        self._map(file, found, offset, vocab_size)
        try:
            check_vocabulary(self, str(file), vocab_size)
        except ValueError as error:
            raise StoreError(f"{error} (it was read as {found.name})") from error
        self._bounds = None if eos_token_id is None else _bounds(self.tokens, operator.index(eos_token_id))

    def _map(self, path: Path, dtype: np.dtype[Any], offset: int, vocab_size: int | None) -> None:
        self.path, self.where, self.vocab_size, self._offset = path, str(path), vocab_size, offset
        self.tokens = mapped(path, dtype, offset)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.path, self.dtype, self._offset, self.vocab_size, self._bounds, self.num_tokens

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *mapping, self._bounds, num_tokens = state
        self._map(*mapping)
        check_same(str(self.path), (num_tokens,), (self.num_tokens,))

    def __len__(self) -> int:
        return 1 if self._bounds is None else len(self._bounds.array) - 1

    @property
    def has_borders(self) -> bool:
        """Whether an `eos_token_id` was given."""
        return self._bounds is not None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the numbers of tokens and of documents, and of 16,384 tokens from all over the file."""
        return sampled_hash(self, [f"{self.num_tokens} {len(self)}".encode()])

    def starts(self, documents: Ints) -> Ints:
        """First token of each of `documents`, int64[n]; for document `len(self)`, one past the last token."""
        bounds = np.array([0, self.num_tokens]) if self._bounds is None else self._bounds.array
        found: Ints = bounds[documents]
        return found


def _integer(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise StoreError(f"dtype={dtype!r} is no type of numpy; for tokens mostly uint16 or uint32") from error
    if found.kind not in "iu":
        raise StoreError(f"dtype={found}: token ids are integers, mostly uint16 or uint32")
    # Files are little-endian, unless it is said explicitly that they are not.
    return found.newbyteorder("<") if found.byteorder == "=" else found


def _layout(file: Path) -> tuple[np.dtype[Any] | None, int]:
    """Type and first byte of the tokens by the file's header; None and 0 for a file without one."""
    with open(file, "rb") as stream:
        header = stream.read(_HEADER_BYTES)
    head = header[:128]
    if not head.startswith(_MAGIC) and not _MAGIC.startswith(head):
        # A header with a flipped byte must not become tokens.
        if b"NUMPY" in head[:8] or b"'descr'" in head:
            _damaged(file, "its first bytes are not those of one")
        return _counted_layout(file, header)
    try:
        found: Any = np.lib.format.open_memmap(file, mode="r")
    except OSError:  # too many open files are no damage
        raise
    except Exception as error:  # a damaged header is damaged Python, and numpy lets through what its parser raises
        _damaged(file, str(error))
    # One flipped bit makes a header big-endian, and nobody writes such files.
    if found.ndim != 1 or found.dtype.kind not in "iu" or found.dtype.str.startswith(">"):
        raise StoreError(
            f"{file} is an npy file of {found.dtype.str}, shape {list(found.shape)}: a vector of little-endian integers"
            " is needed"
        )
    if not found.size:
        raise StoreError(f"{file} is an npy file with no tokens")
    if (size := file.stat().st_size) != found.offset + found.nbytes:
        _damaged(file, f"{size} bytes, where its header says {found.offset + found.nbytes}")
    return found.dtype, int(found.offset)


def _counted_layout(file: Path, header: bytes) -> tuple[np.dtype[Any] | None, int]:
    """`_layout` by a header of llm.c."""
    magic, _, count = np.frombuffer(header[:12].ljust(12, b"\0"), "<i4").tolist()
    size = file.stat().st_size - _HEADER_BYTES
    if len(header) == _HEADER_BYTES and not any(header[12:]) and count > 0 and size in (2 * count, 4 * count):
        return np.dtype(f"<u{size // count}"), _HEADER_BYTES
    if magic in _COUNTED:
        raise StoreError(
            f"{file} was cut or damaged: its first bytes are those of llm.c, which zeros up to byte {_HEADER_BYTES} and"
            f" then {count} tokens follow, and it has {_HEADER_BYTES + size} bytes; copy or write it anew"
        )
    return None, 0


def _damaged(file: Path, why: str) -> NoReturn:
    raise StoreError(f"{file} is a damaged or truncated npy file: {why}; copy or write it anew")


def _raw_dtype(file: Path, asked: np.dtype[Any] | None, vocab_size: int | None) -> np.dtype[Any]:
    size = file.stat().st_size
    told = _dtype_of_bytes(mapped(file, np.dtype(np.uint8)), vocab_size)
    found = told if asked is None else asked
    if found is None:
        raise StoreError(
            f"{file}: its {size} bytes may be uint16 as well as another type, or no tokens; give FlatTokens(path,"
            " dtype=...) as the domain"
        )
    if size % found.itemsize:
        raise StoreError(
            f"{file} has {size} bytes, no whole number of {found.name} ({found.itemsize} bytes): it was cut, or is of"
            " another dtype"
        )
    if told is not None and told.itemsize != found.itemsize:
        logger.warning("%s is read as %s, and its bytes look like %s", file, found.name, told.name)
    if asked is None and vocab_size is None:
        _say_told(file.parent, found.name)
    return found


@functools.cache  # once for all shards of a folder
def _say_told(folder: Path, name: str) -> None:
    logger.warning(
        "%s: flat files are read as %s, told from their bytes; to be sure give tokenizer=, or FlatTokens(path, dtype=)",
        folder,
        name,
    )


def _dtype_of_bytes(raw: Tokens, vocab_size: int | None) -> np.dtype[Any] | None:
    """Type of a raw file by its bytes, whole or cut; None where several would do.

    Vocabularies end far below 16 * 2^16. So as 16-bit words, tokens of 32 bits have such small numbers in every second
    place (high) and any in the others (low), and those of 64 bits have two words more that are zero.
    """
    if _OTHER.match(raw[:16].tobytes()) or _is_text(raw[:4096].tobytes()):
        return None
    blocks = [raw[at : at + _BLOCK] for at in (spread(len(raw), _BLOCK, _BLOCKS) // 8 * 8).tolist()]
    sample = np.concatenate(blocks)
    low, high = sample[: len(sample) // 4 * 4].view("<u2").reshape(-1, 2).T
    words = sample[: len(sample) // 8 * 8].view("<u2").reshape(-1, 4)
    if len(words) and not words[:, 2:].any() and words[:, 1].max() < _SMALL:
        return np.dtype("<i8") if np.count_nonzero(words[:, 0]) >= _ENOUGH else None
    if high.any():
        if (
            high.max() >= _SMALL
            or (len(low) > 1 and low.max() < 256)
            or (vocab_size is not None and vocab_size <= 1 << 16)
        ):
            return np.dtype("<u2") if _are_16_bits(low, high) else None
        return np.dtype("<u4") if len(low) >= _ENOUGH and low.max() >= 4096 else None
    return np.dtype("<u4") if np.count_nonzero(low) >= _ENOUGH else None


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return len(head) >= 64 and min(head) >= 9  # ids have small high bytes, and text has no such characters


def _are_16_bits(even: Tokens, odd: Tokens) -> bool:
    """Whether these words, every second one of a file, look like ids of 16 bits, by their low and high bytes.

    Small ids are the most frequent, so the high byte varies less than the low one. The other way round they are
    big-endian, and text or single bytes have the same in both. Every second word is like the others, but in numbers of
    32 and 64 bits: big-endian, with negative ones among them, floating.
    """
    words = np.concatenate([even, odd])
    low, high = words & 255, words >> 8
    if not high.any():
        return True
    # By measurement: of 13,440 pieces of 50 to 100,000 ids, by BPEs of 4,096, 16,384 and 50,257 on 14 kinds of text, 3
    # are refused, of 50 to 200 ids; of 200 pieces from 1,000 words on of each other kind none is taken. What has words
    # of 16 bits itself is not told from ids: half floats, sound, UTF-16, negative int16.
    noise = 1 / np.sqrt(len(words))
    return not (
        (low.max() < 128 and high.max() < 128)
        or _difference(low, high) < 0.05 + 2.5 * noise
        or _entropy(high) > _entropy(low)
        or _difference(even >> 8, odd >> 8) > 0.1 + 3 * noise
        or np.isin(odd, [*range(_SMALL), 0xFFFF]).mean() > max(0.9, np.isin(even, range(_SMALL)).mean())
    )


def _difference(first: Tokens, second: Tokens) -> float:
    """Total variation between the upper halves of bytes."""
    shares = [np.bincount(each >> 4, minlength=16) / len(each) for each in (first, second)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def _entropy(values: Tokens) -> float:
    shares = np.bincount(values) / len(values)
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


def _bounds(tokens: Tokens, end: int) -> SharedArray:
    """Where documents begin that end with the token `end`, and the end of the last one."""
    ends = [first + 1 + np.flatnonzero(tokens[first : first + _SCAN] == end) for first in range(0, len(tokens), _SCAN)]
    found = np.concatenate([[0], *ends, [len(tokens)]])
    return shared(found[:-1] if len(found) > 2 and found[-1] == found[-2] else found)
