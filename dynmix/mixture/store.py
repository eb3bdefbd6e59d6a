"""Token stores: tokenised documents on disk, memory-mapped, in Megatron's indexed format (`.bin` and `.idx`).

Stores made by Megatron's tools open here and ours open there. This module must not know of tokenizers, domains or
mixtures: a store is documents of integers, nothing more.

The layout, all little-endian. `.bin`: the tokens of all documents, end to end. `.idx`: magic, version, dtype code,
number of sequences S, length D + 1 of the document table, int32[S] sequence lengths in tokens, int64[S] sequence
starts in bytes, int64[D + 1] document table (document i is sequences table[i]:table[i + 1]), and for multimodal data
int8[S] modes, which are ignored. A store written here has one sequence a document.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import struct
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NoReturn, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from dynmix.mixture.documents import ArrayDocuments, Ints, checked, sampled_hash

with contextlib.suppress(ImportError):  # on Windows, which has no such limit
    import resource  # not where it is needed: with no file left that may be opened nothing can be imported

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CHUNK = 1 << 20

T = TypeVar("T")

UINT16_LIMIT = 65500
"""Megatron's bound: vocabularies below it are stored as uint16, larger ones as int32."""


class StoreError(ValueError):
    """A token store that cannot be opened, or documents that cannot be written to one."""


class TokenStore(ArrayDocuments):
    """Documents of token ids on disk, read through memory maps; `TokenStore(path)` is the same as `open`.

    `store[i]` is document i, a read-only 1-D view; `len(store)` counts documents. Pickles by path.

    Attributes:
        path: absolute path without `.bin`/`.idx`.
        tokens: every token of every document end to end, a read-only memory-mapped array of shape [num_tokens].
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = stem_of(path)
        self.where = str(self.path)
        bin_path, idx_path = _pair(self.path)
        for file, other in ((idx_path, bin_path), (bin_path, idx_path)):
            if not file.is_file():
                state = "is there without it" if other.is_file() else "is missing too"
                raise StoreError(
                    f"{file}: no such file, and {other.name} {state}; a store is both files, write it anew"
                )
            if file.stat().st_size == 0:
                _reject(file, "is empty")
        self._index = mapped(idx_path, np.dtype("u1"))
        dtype, self._starts, self._table = _parse_index(self._index, idx_path)
        lengths = self._index[_HEADER.size :][: 4 * len(self._starts)].view("<i4")
        end = _check_starts(lengths, self._starts, dtype.itemsize, idx_path)
        _check_table(self._table, len(lengths), idx_path)
        if end == 0:
            _reject(idx_path, f"lists {len(self)} documents and no tokens")
        if (size := bin_path.stat().st_size) != end:
            kind = "truncated" if size < end else "too long"
            _reject(bin_path, f"is {kind}: {size} bytes, where {idx_path.name} lists {end} ({dtype.name} tokens)")
        self.tokens = mapped(bin_path, dtype)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokenStore:
        """Map the store at `path` (with or without `.bin`/`.idx`) and check the whole index against both files' sizes.

        Raises:
            StoreError: a file is missing, empty, truncated, too long, of another format, or the two do not match.
        """
        return cls(path)

    @classmethod
    def write(
        cls, path: str | os.PathLike[str], documents: Iterable[ArrayLike], dtype: DTypeLike | None = None
    ) -> TokenStore:
        """Write `documents` (1-D integer arrays or lists, streamed) as a store, replacing one at `path`; open it.

        `dtype=None` is uint16 while every token is below `UINT16_LIMIT`, else int32. Memory: 4 bytes per document while
        writing, 20 at the end. Both files are written under temporary names beside `path`, synced, then renamed, the
        index last: a crash leaves the old store, or none that opens, and perhaps files named `*.tmp`.

        Raises:
            StoreError: a document is not 1-D or not of integers, a token is negative or too large for the dtype
                (the message names document and value), there are no tokens, or no integer store has this dtype.
        """
        stem = stem_of(path)
        tokens = Path(f"{stem}.bin.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        code = None if dtype is None else _code(np.dtype(dtype))
        stem.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(tokens, "x+b") as file:
                lengths, code = _write_tokens(file, documents, code)
            return cls.adopt(stem, tokens, np.frombuffer(lengths, np.int32), _CODES[code])
        finally:
            tokens.unlink(missing_ok=True)

    @classmethod
    def adopt(
        cls,
        path: str | os.PathLike[str],
        tokens: str | os.PathLike[str],
        lengths: NDArray[np.int32],
        dtype: DTypeLike,
        *,
        sync: bool = True,
    ) -> TokenStore:
        """Make a file of documents of these lengths, end to end, a store at `path`, replacing one there; open it.

        The file is moved, so it is on the same file system. A crash leaves what one of `write` does. With `sync`
        everything is on the disk before it is renamed; without, the caller sees to that, for many at once.

        Raises:
            StoreError: there are no tokens, no integer store has this dtype, or the file is of another size.
        """
        stem, index, code = stem_of(path), Path(f"{tokens}.idx.tmp"), _code(np.dtype(dtype))
        bin_path, idx_path = _pair(stem)
        if not lengths.any():
            raise StoreError(f"{stem}: {len(lengths)} documents with no token in any: a store needs at least one")
        stem.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(tokens, "r+b") as bin_file, open(index, "xb") as idx_file:
                _write_index(idx_file, lengths, code)
                for file in (bin_file, idx_file) if sync else ():
                    file.flush()
                    os.fsync(file.fileno())
            # The old index goes first: between the renames it would describe the new tokens, and could fit by length.
            idx_path.unlink(missing_ok=True)
            os.replace(tokens, bin_path)
            os.replace(index, idx_path)
        finally:
            index.unlink(missing_ok=True)
        if sync:
            _sync_folder(stem.parent)
        return cls(stem)

    def __len__(self) -> int:
        return len(self._table) - 1

    def __getitem__(self, index: SupportsIndex) -> NDArray[Any]:
        i = checked(index, self, "document")
        start, stop = self.starts(np.array([i, i + 1])).tolist()
        return self.tokens[start:stop]

    def __getstate__(self) -> tuple[Path, int, int]:
        return self.path, len(self), self.num_tokens

    def __setstate__(self, state: tuple[Path, int, int]) -> None:
        path, *then = state
        TokenStore.__init__(self, path)
        check_same(str(path), tuple(then), (len(self), self.num_tokens))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the index (the documents' number, order, lengths and dtype) and of 16,384 tokens from all over.

        Of tokens too, because stores of as many documents of one length have the same index.
        """
        return sampled_hash(self, [self._index.data])

    def starts(self, documents: Ints) -> Ints:
        """First token of each of `documents`, int64[n]; for document D, one past the last token."""
        sequence = self._table[documents]
        starts = self._starts[np.minimum(sequence, len(self._starts) - 1)] // self.tokens.itemsize
        return np.where(sequence == len(self._starts), len(self.tokens), starts)


def check_same(where: str, then: tuple[int, ...], now: tuple[int, ...]) -> None:
    """Raise StoreError if data has another size now, as a worker opens it, than when it was pickled."""
    if then != now:
        raise StoreError(f"{where} was replaced since it was opened: its size was {then} and is {now}; start anew")


def stem_of(path: str | os.PathLike[str]) -> Path:
    """`path`, absolute, without a trailing `.bin` or `.idx`; other dots belong to the name."""
    text = os.path.abspath(path)
    return Path(text[:-4] if text.endswith((".bin", ".idx")) else text)


def _pair(stem: Path) -> tuple[Path, Path]:
    return Path(f"{stem}.bin"), Path(f"{stem}.idx")


def mapped(file: Path, dtype: np.dtype[Any], offset: int = 0) -> NDArray[Any]:
    """The file's content from byte `offset` on, read-only. A map keeps its file open, see `with_room`."""
    return with_room(file, lambda: np.memmap(file, dtype=dtype, mode="r", offset=offset).view(np.ndarray))


def with_room(file: Path, open_it: Callable[[], T]) -> T:
    """What `open_it` returns; if too many files are open, the limit is raised as far as it may be."""
    try:
        return open_it()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now == most:
        raise StoreError(
            f"{file}: {now} files are open, two for each store, one for each flat file, six for each plan of best fit;"
            " allow more of them with `ulimit -n`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return with_room(file, open_it)


def _reject(file: Path, what: str) -> NoReturn:
    raise StoreError(f"{file} {what}; copy or write the store anew")


def _code(dtype: np.dtype[Any]) -> int:
    """Megatron's number for an integer dtype."""
    for code, name in _CODES.items():
        if np.dtype(name) == dtype and dtype.kind in "iu":
            return code
    known = ", ".join(np.dtype(name).name for name in _CODES.values() if name[1] != "f")
    raise StoreError(f"dtype={dtype}: tokens are stored as one of {known}")


def _parse_index(index: NDArray[np.uint8], file: Path) -> tuple[np.dtype[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Dtype, sequence starts in bytes and document table, as views; sizes are compared before anything is sliced."""
    if len(index) < _HEADER.size:
        _reject(file, f"is truncated: {len(index)} bytes, where the header alone has {_HEADER.size}")
    magic, version, code, sequences, table = _HEADER.unpack_from(index.data)
    if magic != _MAGIC:
        _reject(file, f"is not an index in Megatron's indexed format: it begins with {magic!r}, not {_MAGIC!r}")
    if version != 1:
        _reject(file, f"has version {version}, and only version 1 is known")
    if code not in _CODES:
        _reject(file, f"has dtype code {code}, and only {min(_CODES)} to {max(_CODES)} are known")
    dtype = np.dtype(_CODES[code])
    if dtype.kind == "f":
        _reject(file, f"has dtype {dtype.name}: token ids are integers")
    size = _HEADER.size + 12 * sequences + 8 * table
    if len(index) not in (size, size + sequences):
        kind = "truncated" if len(index) < size else "too long"
        _reject(
            file, f"is {kind}: {len(index)} bytes, where {sequences} sequences and {table - 1} documents take {size}"
        )
    start = _HEADER.size + 4 * sequences
    middle = start + 8 * sequences
    return dtype, index[start:middle].view("<i8"), index[middle:size].view("<i8")


def _check_starts(lengths: NDArray[np.int32], starts: NDArray[np.int64], itemsize: int, file: Path) -> int:
    """Bytes of all sequences, having checked that each one starts where the one before it ends."""
    end = 0
    for first in range(0, len(lengths), _CHUNK):
        part = lengths[first : first + _CHUNK].astype(np.int64)
        if (bad := np.flatnonzero(part < 0)).size:
            _reject(file, f"is damaged: sequence {first + bad[0]} has length {part[bad[0]]}")
        ends = end + np.cumsum(part) * itemsize
        if (bad := np.flatnonzero(starts[first : first + _CHUNK] != ends - part * itemsize)).size:
            _reject(file, f"is damaged: sequence {first + bad[0]} does not start where the one before it ends")
        end = int(ends[-1])
    return end


def _check_table(table: NDArray[np.int64], sequences: int, file: Path) -> None:
    if len(table) == 0 or table[0] != 0 or table[-1] != sequences:
        ends = f"runs from {table[0]} to {table[-1]}" if len(table) else "is empty"
        _reject(file, f"has a document table that {ends}, where it should run from 0 to {sequences}, its sequences")
    for first in range(0, len(table), _CHUNK):
        part = table[first : first + _CHUNK + 1]
        if (bad := np.flatnonzero(part[1:] < part[:-1])).size:
            _reject(file, f"is damaged: document {first + bad[0]} ends before it begins")


def _write_tokens(file: IO[bytes], documents: Iterable[ArrayLike], code: int | None) -> tuple[array[int], int]:
    """Append every document's tokens to `file`; returns the lengths (int32) and the dtype code they were written in."""
    auto = code is None
    dtype = np.dtype(_CODES[8 if code is None else code])
    top = UINT16_LIMIT - 1 if auto else int(np.iinfo(dtype).max)
    lengths = array("i")
    for number, document in enumerate(documents):
        tokens = _as_tokens(document, number)
        if tokens.size and tokens.max() > top and auto and dtype.itemsize == 2:
            dtype, top = np.dtype("<i4"), int(np.iinfo("<i4").max)
            _widen(file, sum(lengths))
        if tokens.size and (tokens.min() < 0 or tokens.max() > top):
            value = tokens.min() if tokens.min() < 0 else tokens.max()
            raise StoreError(f"document {number} has token {value}: {dtype.name} stores take tokens from 0 to {top}")
        file.write(tokens.astype(dtype, copy=False).tobytes())
        lengths.append(len(tokens))
    return lengths, _code(dtype)


def _as_tokens(document: ArrayLike, number: int) -> NDArray[Any]:
    want = "a document is a 1-D array or list of integers"
    try:
        tokens = np.asarray(document)
    except (ValueError, TypeError) as error:
        raise StoreError(f"document {number} is a {type(document).__name__} that is no array: {want}") from error
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise StoreError(f"document {number} is an array of {tokens.dtype}, shape {list(tokens.shape)}: {want}")
    if tokens.size > np.iinfo(np.int32).max:
        raise StoreError(f"document {number} has {tokens.size} tokens: the index counts with int32, split it")
    return tokens


def _widen(file: IO[bytes], count: int) -> None:
    """Turn `count` uint16 tokens into int32 in place, from the last chunk to the first so that none is overwritten."""
    for first in reversed(range(0, count, _CHUNK)):
        file.seek(2 * first)
        part = np.frombuffer(file.read(2 * _CHUNK), "<u2")
        file.seek(4 * first)
        file.write(part.astype("<i4").tobytes())
    file.seek(4 * count)


def _write_index(file: IO[bytes], lengths: NDArray[np.int32], code: int) -> None:
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(_CODES[code]).itemsize
    file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
    file.write(lengths.astype("<i4", copy=False).tobytes())
    file.write(starts.astype("<i8", copy=False).tobytes())
    file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def _sync_folder(folder: Path) -> None:
    """Make the renames last; where a folder cannot be opened (Windows) the file system has no such call."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
