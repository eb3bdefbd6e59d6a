"""Shards: what became of one piece, an Arrow file of tokens; and stores made of shards.

A shard is whole or absent, and an Arrow file without its end does not open.
Its rows are documents: `domain`, `held_out`, `bytes` (of the text in UTF-8; 0 for the empty string, which is no
document) and `tokens`. Nothing is known here of text and tokenizers.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dynmix.mixture.store import TokenStore
from dynmix.whole_file import whole_file

_BUFFER_BYTES = 1 << 26  # of tokens of all stores that are being written, before they go to their files
_FEW = 16  # stores that are synced one by one; the disk takes milliseconds for each


class Document(NamedTuple):
    """A row of a shard without its tokens."""

    domain: str
    held_out: bool
    bytes: int


@dataclass
class Summary:
    """What is in a shard, or in several."""

    documents: Counter[str] = field(default_factory=Counter)  # of each domain
    empty: Counter[str] = field(default_factory=Counter)  # texts of each domain that are empty, and no documents
    tokens: int = 0  # of all

    def add(self, other: Summary) -> None:
        """Count what is in another one, too."""
        self.documents.update(other.documents)
        self.empty.update(other.empty)
        self.tokens += other.tokens


def write_shard(
    path: Path, batches: Iterable[tuple[Sequence[Document], Sequence[NDArray[Any]]]], dtype: np.dtype[Any]
) -> Summary:
    """Write batches of documents and their token ids, of `dtype`; a batch is what has to fit into memory."""
    summary = Summary()
    # A worker of a parent that was killed may still be at the same one.
    with (
        whole_file(path, shared=True) as beside,
        open(beside, "wb") as file,
        pa.ipc.new_file(file, _schema(dtype)) as writer,
    ):
        for documents, ids in batches:
            batch = _batch(documents, ids, dtype)
            writer.write_batch(batch)
            summary.add(_summary(batch))
    return summary


def read_summary(path: Path) -> Summary | None:
    """What is in the shard at `path`; None if there is none that opens."""
    summary = Summary()
    try:
        for batch in _batches(path):
            summary.add(_summary(batch))
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return summary


def write_stores(
    shards: Iterable[Path], folder: Path, name_of: Callable[[str, bool], str], scratch: Path
) -> dict[str, dict[str, Any]]:
    """Make stores in `folder` of shards' documents, in their order, replacing what is there; return facts of each.

    Memory: `_BUFFER_BYTES` and 4 bytes per document; one file is open at a time. `name_of` makes a store's name of its
    domain and whether it is held out; `scratch` is an empty folder on the same file system.
    """
    stores: dict[tuple[str, bool], _Store] = {}
    buffered = 0
    for shard in shards:
        for batch in _batches(shard):
            for key, part in _parts(batch):
                if key not in stores:
                    stores[key] = _Store(name_of(*key), scratch / f"{len(stores)}.bin", *key)
                buffered += stores[key].add(part)
            if buffered > _BUFFER_BYTES:
                for store in stores.values():
                    store.flush()
                buffered = 0
    for store in stores.values():
        store.flush()
    full, few = [store for store in stores.values() if store.lengths], len(stores) <= _FEW
    if not few:
        os.sync()
    facts = {store.name: store.publish(folder, sync=few) for store in full}
    if not few:
        os.sync()
    return facts


class _Store:
    """A store in the making."""

    def __init__(self, name: str, scratch: Path, domain: str, held_out: bool) -> None:
        self.name, self.scratch, self.domain, self.held_out = name, scratch, domain, held_out
        self.lengths = array("i")
        self.bytes = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._dtype: np.dtype[Any] | None = None
        self._buffer: list[bytes] = []

    def add(self, part: pa.RecordBatch) -> int:
        """Take the documents of a batch; return the bytes of their tokens."""
        tokens, lengths, sizes = _arrays(part)
        self.lengths.frombytes(lengths[sizes > 0].tobytes())
        self.bytes += int(sizes.sum())
        self._dtype = tokens.dtype
        self._buffer.append(tokens.tobytes())
        self._hash.update(self._buffer[-1])
        return tokens.nbytes

    def flush(self) -> None:
        """Write out what is held in memory."""
        if self._buffer:
            with open(self.scratch, "ab") as file:
                file.writelines(self._buffer)
            self._buffer = []

    def publish(self, folder: Path, sync: bool) -> dict[str, Any]:
        """Make it a store in `folder`; return what the manifest says of it."""
        assert self._dtype is not None
        lengths = np.frombuffer(self.lengths, np.int32)
        store = TokenStore.adopt(folder / self.name, self.scratch, lengths, self._dtype, sync=sync)
        with open(folder / f"{self.name}.idx", "rb") as file:
            index = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return {
            "domain": self.domain,
            "documents": len(store),
            "tokens": store.num_tokens,
            "bytes": self.bytes,
            "dtype": store.dtype.name,
            "held_out": self.held_out,
            "hash": {"bin": self._hash.hexdigest(), "idx": index.hexdigest()},
        }


def _schema(dtype: np.dtype[Any]) -> pa.Schema:
    tokens = pa.list_(pa.from_numpy_dtype(dtype))
    return pa.schema({"domain": pa.string(), "held_out": pa.uint8(), "bytes": pa.int64(), "tokens": tokens})


def _batch(documents: Sequence[Document], ids: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> pa.RecordBatch:
    domains = [document.domain.encode() for document in documents]
    columns = [
        pa.StringArray.from_buffers(len(domains), pa.py_buffer(_ends(domains)), pa.py_buffer(b"".join(domains))),
        _array(np.array([document.held_out for document in documents], np.uint8)),
        _array(np.array([document.bytes for document in documents], np.int64)),
        pa.ListArray.from_arrays(_array(_ends(ids)), _array(np.concatenate(ids))),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_schema(dtype))


def _ends(values: Sequence[Any]) -> NDArray[np.int32]:
    return np.cumsum([0, *map(len, values)], dtype=np.int64).astype(np.int32)


def _array(values: NDArray[Any]) -> pa.Array:
    # pa.array and to_numpy would import pandas, which takes a worker longer than everything else.
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _numpy(array: pa.Array) -> NDArray[Any]:
    values = np.frombuffer(array.buffers()[1], str(array.type))
    return values[array.offset : array.offset + len(array)]


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def _arrays(batch: pa.RecordBatch) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int64]]:
    """Tokens of all documents end to end, tokens of each, bytes of each."""
    lists = batch.column("tokens")
    return _numpy(lists.flatten()), np.diff(_numpy(lists.offsets)), _numpy(batch.column("bytes"))


def _summary(batch: pa.RecordBatch) -> Summary:
    tokens, _, sizes = _arrays(batch)
    documents, empty = Counter[str](), Counter[str]()
    for domain, size in zip(batch.column("domain").to_pylist(), sizes.tolist(), strict=True):
        (documents if size else empty)[domain] += 1
    return Summary(documents, empty, len(tokens))


def _parts(batch: pa.RecordBatch) -> Iterator[tuple[tuple[str, bool], pa.RecordBatch]]:
    """Slices of a batch for one store each."""
    keys = zip(batch.column("domain").to_pylist(), batch.column("held_out").to_pylist(), strict=True)
    first = 0
    for (domain, held_out), run in itertools.groupby(keys):
        count = sum(1 for _ in run)
        yield (domain, bool(held_out)), batch.slice(first, count)
        first += count
