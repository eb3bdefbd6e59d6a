import os
import pickle
import resource
import struct
import subprocess
import sys
from itertools import accumulate, chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynmix.mixture import store as store_module
from dynmix.mixture.store import StoreError, TokenStore

FORMATS = {
    1: ("B", "uint8"),
    2: ("b", "int8"),
    3: ("h", "int16"),
    4: ("i", "int32"),
    5: ("q", "int64"),
    8: ("H", "uint16"),
}
FLOATS = {6: ("d", "float64"), 7: ("f", "float32")}


def megatron_write(
    path: Path, documents: list[list[list[int]]], code: int, modes: bytes = b"", version: int = 1
) -> tuple[bytes, bytes]:
    """An independent writer of the format: documents of sequences of tokens, one value at a time."""
    letter = (FORMATS | FLOATS)[code][0]
    sequences = [s for d in documents for s in d]
    data = b"".join(struct.pack(f"<{letter}", t) for s in sequences for t in s)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, len(sequences), len(documents) + 1)
    position, starts = 0, b""
    for s in sequences:
        index += struct.pack("<i", len(s))
        starts += struct.pack("<q", position)
        position += len(s) * struct.calcsize(f"<{letter}")
    table = [0, *accumulate(len(d) for d in documents)]
    index += starts + b"".join(struct.pack("<q", t) for t in table) + modes
    Path(f"{path}.bin").write_bytes(data)
    Path(f"{path}.idx").write_bytes(index)
    return data, index


def megatron_read(path: Path) -> tuple[str, list[list[int]]]:
    """An independent reader: dtype name, and every document, its sequences joined."""
    index, data = Path(f"{path}.idx").read_bytes(), Path(f"{path}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, n, m = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    at = 34
    lengths = struct.unpack_from(f"<{n}i", index, at)
    starts = struct.unpack_from(f"<{n}q", index, at + 4 * n)
    table = struct.unpack_from(f"<{m}q", index, at + 12 * n)
    assert len(index) == at + 12 * n + 8 * m
    letter, name = FORMATS[code]
    sequences = [list(struct.unpack_from(f"<{k}{letter}", data, p)) for k, p in zip(lengths, starts, strict=True)]
    return name, [list(chain(*sequences[a:b])) for a, b in pairwise(table)]


def tokens_up_to(top: int) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, top), max_size=12), min_size=1, max_size=9).filter(any)


@pytest.mark.parametrize(("code", "name"), [(c, n) for c, (_, n) in FORMATS.items()])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_round_trip_through_an_independent_reader_keeps_documents(code: int, name: str, data: st.DataObject) -> None:
    documents = data.draw(tokens_up_to(int(np.iinfo(name).max)))
    with TemporaryDirectory() as folder:
        path = Path(folder, "web.v1")
        store = TokenStore.write(path, (d for d in documents), dtype=name)
        assert megatron_read(path) == (name, documents)
        assert [d.tolist() for d in store] == documents
        assert store.tokens.tolist() == list(chain(*documents))
        assert (len(store), store.num_tokens, store.dtype) == (len(documents), sum(map(len, documents)), np.dtype(name))
        assert sorted(os.listdir(folder)) == ["web.v1.bin", "web.v1.idx"]


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_opens_what_megatron_writes_with_many_sequences_a_document(data: st.DataObject) -> None:
    code = data.draw(st.sampled_from(sorted(FORMATS)))
    info = np.iinfo(FORMATS[code][1])
    sequence = st.lists(st.integers(int(info.min), int(info.max)), max_size=5)
    documents = data.draw(
        st.lists(st.lists(sequence, max_size=4), min_size=1, max_size=5).filter(lambda d: any(map(any, d)))
    )
    with TemporaryDirectory() as folder:
        path = Path(folder, "a")
        sequences = sum(map(len, documents))
        megatron_write(path, documents, code, modes=bytes(sequences) if data.draw(st.booleans()) else b"")
        store = TokenStore.open(path)
        joined = [list(chain(*d)) for d in documents]
        assert [store[i].tolist() for i in range(len(store))] == joined
        assert [store[i - len(store)].tolist() for i in range(len(store))] == joined
        ends = list(accumulate(map(len, joined), initial=0))
        assert store.starts(np.arange(len(store) + 1)[::-1]).tolist() == ends[::-1]


@given(documents=tokens_up_to(70_000), chunk=st.integers(1, 7))
@example(documents=[[3], [65499]], chunk=1)
@example(documents=[[3], [65500]], chunk=1)
@settings(max_examples=25, deadline=None)
def test_dtype_follows_the_largest_token_and_what_was_written_is_widened(
    documents: list[list[int]], chunk: int
) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "_CHUNK", chunk)
        store = TokenStore.write(Path(folder, "a"), documents)
        assert store.dtype == ("int32" if max(map(max, filter(None, documents))) >= 65500 else "uint16")
        assert [d.tolist() for d in store] == documents


def test_names_path_suffixes_indices_and_pickling(tmp_path: Path) -> None:
    store = TokenStore.write(tmp_path / "deep" / "a.bin", [np.array([1, 2], np.uint64), [], (3,)])
    assert store.path == tmp_path / "deep" / "a"
    for name in ("a", "a.bin", "a.idx"):
        assert TokenStore.open(str(tmp_path / "deep" / name)).path == store.path
    copy = pickle.loads(pickle.dumps(store))
    assert [d.tolist() for d in copy] == [[1, 2], [], [3]]
    assert len(pickle.dumps(store)) < 500
    assert repr(store).endswith("documents=3, tokens=3, dtype=uint16)")
    assert store[np.int64(-1)].tolist() == [3]
    for bad in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            store[bad]
    with pytest.raises(ValueError, match="read-only"):
        store[0][0] = 5


def test_fingerprint_tells_other_documents_and_not_other_names(tmp_path: Path) -> None:
    prints = [
        TokenStore.write(tmp_path / name, documents, dtype).fingerprint
        for name, documents, dtype in [
            ("a", [[1, 2], [3]], None),
            ("b", [[1, 2], [3]], None),
            ("c", [[1], [2, 3]], None),
            ("d", [[1, 2], [3]], "int32"),
            ("e", [[1, 2], [3], []], None),
            ("f", [[1, 4], [3]], None),
        ]
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 5


@pytest.mark.parametrize(
    ("documents", "dtype", "message"),
    [
        ([[1], [2, -3]], None, "document 1 has token -3"),
        ([[1], [2, 300]], "uint8", "document 1 has token 300: uint8"),
        ([[1], [70_000]], "uint16", "document 1 has token 70000: uint16"),
        ([[70_000], [2**31]], None, "document 1 has token 2147483648: int32"),
        ([[2**63]], None, "document 0 has token 9223372036854775808"),
        ([[-1]], "int64", "document 0 has token -1"),
        ([[1], np.broadcast_to(np.uint8(1), 2**31)], None, "document 1 has 2147483648 tokens"),
        ([[1], [1.5]], None, "document 1 is an array of float64"),
        ([np.array([1.0])], "int32", "document 0 is an array of float64"),
        ([[True]], None, "document 0 is an array of bool"),
        ([[2**70]], None, "document 0 is an array of object"),
        (["ab"], None, "document 0 is an array of <U2"),
        ([1, 2], None, r"document 0 is an array of int64, shape \[\]"),
        ([[1], [[1, 2]]], None, r"document 1 .* shape \[1, 2\]"),
        ([[1, [2]]], None, "document 0 is a list that is no array"),
        ([], None, "0 documents with no token"),
        ([[], []], None, "2 documents with no token"),
        ([[1]], "float32", "dtype=float32.*uint16"),
        ([[1]], "uint32", "dtype=uint32"),
    ],
)
def test_bad_documents_are_named_and_leave_the_old_store_alone(
    tmp_path: Path, documents: Any, dtype: str | None, message: str
) -> None:
    TokenStore.write(tmp_path / "a", [[7, 8]])
    with pytest.raises(StoreError, match=message):
        TokenStore.write(tmp_path / "a", documents, dtype)
    assert TokenStore.open(tmp_path / "a")[0].tolist() == [7, 8]
    assert len(os.listdir(tmp_path)) == 2


def test_a_failing_source_of_documents_leaves_nothing(tmp_path: Path) -> None:
    def documents() -> Any:
        yield [1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenStore.write(tmp_path / "a", documents())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("calls", [0, 1])
def test_a_crash_between_the_renames_never_leaves_a_pair_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The new store has the old one's lengths, so that an old index would fit the new tokens."""
    TokenStore.write(tmp_path / "a", [[7, 8]])
    replace, done = os.replace, list[None]()

    def crash(source: Path, target: Path) -> None:
        if len(done) == calls:
            raise OSError("power cut")
        replace(source, target)
        done.append(None)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        TokenStore.write(tmp_path / "a", [[1, 2]])
    with pytest.raises(StoreError, match=r"a\.idx: no such file, and a\.bin is there without it"):
        TokenStore.open(tmp_path / "a")


def test_every_truncation_and_any_excess_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data, index = megatron_write(path, [[[1, 2, 3]], [[4]], [[5, 6], [7]]], 8)
    for suffix, content in ((".idx", index), (".bin", data)):
        for size in (*range(len(content)), len(content) + 1, len(content) + 2, len(content) + 100):
            Path(f"{path}{suffix}").write_bytes((content + bytes(100))[:size])
            with pytest.raises(StoreError, match=rf"a\{suffix}.*(empty|truncated|too long)"):
                TokenStore.open(path)
        Path(f"{path}{suffix}").write_bytes(content)
    assert len(TokenStore.open(path)) == 3


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"a\.idx: no such file, and a\.bin is missing too"):
        TokenStore.open(tmp_path / "a")
    TokenStore.write(tmp_path / "a", [[1]])
    (tmp_path / "a.bin").unlink()
    with pytest.raises(StoreError, match=r"a\.bin: no such file, and a\.idx is there without it"):
        TokenStore.open(tmp_path / "a")


def patched(index: bytes, at: int, form: str, value: int) -> bytes:
    new = bytearray(index)
    struct.pack_into(form, new, at, value)
    return bytes(new)


@pytest.mark.parametrize(
    ("at", "form", "value", "message"),
    [
        (0, "<B", 78, "begins with"),
        (9, "<Q", 2, "version 2"),
        (17, "<B", 0, "dtype code 0"),
        (17, "<B", 9, "dtype code 9"),
        (17, "<B", 7, "dtype float32"),
        (17, "<B", 4, "does not start where"),
        (18, "<Q", 2**62, "truncated"),
        (26, "<Q", 2**61, "truncated"),
        (34, "<i", -3, "sequence 0 has length -3"),
        (38, "<i", 5, "sequence 2 does not start"),
        (46, "<i", 9, "a.bin is truncated"),
        (46, "<i", 1, "a.bin is too long"),
        (50, "<q", 2, "sequence 0 does not start"),
        (58, "<q", -(2**63), "sequence 1 does not start"),
        (82, "<q", 1, "runs from 1 to 4"),
        (90, "<q", 3, "document 1 ends before"),
        (106, "<q", 3, "runs from 0 to 3"),
    ],
)
def test_damaged_fields_are_named(tmp_path: Path, at: int, form: str, value: int, message: str) -> None:
    _, index = megatron_write(tmp_path / "a", [[[1, 2, 3]], [[4]], [[5, 6], [7, 8]]], 8)
    (tmp_path / "a.idx").write_bytes(patched(index, at, form, value))
    with pytest.raises(StoreError, match=message):
        TokenStore.open(tmp_path / "a")


def test_no_tokens_and_no_documents_are_refused(tmp_path: Path) -> None:
    megatron_write(tmp_path / "a", [[[]], [[]]], 8)
    with pytest.raises(StoreError, match=r"a\.bin is empty"):
        TokenStore.open(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(b"xx")
    with pytest.raises(StoreError, match="2 documents and no tokens"):
        TokenStore.open(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 0, 0))
    with pytest.raises(StoreError, match="document table that is empty"):
        TokenStore.open(tmp_path / "a")


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_flipped_bytes_raise_or_leave_the_tokens(data: st.DataObject) -> None:
    documents = [[[1, 2, 3]], [[4]], [[5, 6], [7]], [[8, 9, 10]]]
    with TemporaryDirectory() as folder:
        path = Path(folder, "a")
        content, index = megatron_write(path, documents, 8)
        damaged = bytearray(index)
        for at in data.draw(st.lists(st.integers(0, len(index) - 1), min_size=1, max_size=3, unique=True)):
            damaged[at] ^= data.draw(st.integers(1, 255))
        Path(f"{path}.idx").write_bytes(damaged)
        try:
            store = TokenStore.open(path)
        except StoreError:
            return
        # What no check can see: int16 for uint16, and a document's end moved to another sequence's.
        assert store.tokens.tobytes() == content
        assert [t for d in store for t in d.tolist()] == list(range(1, 11))


@given(data=st.data())
@settings(max_examples=25)
def test_damaged_ranges_raise_or_leave_the_tokens(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a")
        content, index = megatron_write(path, [[[1, 2, 3]], [[]], [[4], [5, 6]], [[7]]], 8)
        first = data.draw(st.integers(0, len(index) - 1))
        last = data.draw(st.integers(first + 1, len(index)))
        put = data.draw(
            st.sampled_from([b"", bytes(last - first), b"\xff" * (last - first), index[:first][-8:]])
            | st.binary(max_size=last - first)
        )
        Path(f"{path}.idx").write_bytes(index[:first] + put + index[last:])
        try:
            store = TokenStore.open(path)
        except StoreError:
            return
        assert store.tokens.tobytes() == content
        assert [t for d in store for t in d.tolist()] == list(range(1, 8))


def test_header_counts_beyond_all_memory_allocate_nothing(tmp_path: Path) -> None:
    _, index = megatron_write(tmp_path / "a", [[[1, 2, 3]]], 8)
    for at in (18, 26):
        for count in (2**31, 2**40, 2**63, 2**64 - 1):
            (tmp_path / "a.idx").write_bytes(patched(index, at, "<Q", count))
            with pytest.raises(StoreError, match=r"a\.idx.* is truncated"):
                TokenStore.open(tmp_path / "a")


def test_an_index_of_other_tokens_is_refused_unless_it_fits(tmp_path: Path) -> None:
    megatron_write(tmp_path / "a", [[[1, 2, 3]], [[4]]], 8)
    for documents, code, kind in (([[[1, 2]], [[4]]], 8, "too long"), ([[[1, 2, 3]], [[4]]], 4, "truncated")):
        megatron_write(tmp_path / "b", documents, code)
        (tmp_path / "a.idx").write_bytes((tmp_path / "b.idx").read_bytes())
        with pytest.raises(StoreError, match=rf"a\.bin is {kind}"):
            TokenStore.open(tmp_path / "a")
    megatron_write(tmp_path / "b", [[[9]], [[9, 9, 9]]], 8)  # as many tokens: nothing in the format tells
    (tmp_path / "a.idx").write_bytes((tmp_path / "b.idx").read_bytes())
    assert [d.tolist() for d in TokenStore.open(tmp_path / "a")] == [[1], [2, 3, 4]]


@pytest.mark.parametrize("name", ["white space", "naïve.日本", "new\nline", "a.bin.b", "-x", "%41", "'\"$;"])
def test_paths_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert TokenStore.write(tmp_path / name, [[1, 2]]).path == tmp_path / name
    assert TokenStore.open(tmp_path / f"{name}.idx")[0].tolist() == [1, 2]


def test_more_stores_than_open_files_are_allowed_at_first(tmp_path: Path) -> None:
    TokenStore.write(tmp_path / "a", [[1, 2]])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        stores = [TokenStore.open(tmp_path / "a") for _ in range(70)]
        assert all(store[0].tolist() == [1, 2] for store in stores)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_store_that_is_replaced_before_a_worker_opens_it_is_refused(tmp_path: Path) -> None:
    sent = pickle.dumps(TokenStore.write(tmp_path / "a", [[1, 2], [3, 4]]))
    assert len(pickle.loads(sent)) == 2
    for documents in ([[1, 2], [3, 4], [5]], [[1, 2, 3, 4]]):
        TokenStore.write(tmp_path / "a", documents)
        with pytest.raises(StoreError, match=r"a was replaced since it was opened: its size was \(2, 4\) and is"):
            pickle.loads(sent)


def test_room_is_made_where_not_one_more_file_can_be_opened() -> None:
    code = """
import os
from dynmix.mixture.shared import SharedArray
try:
    while True:
        os.dup(0)
except OSError:
    print(SharedArray((3,)).array.tolist())
"""
    command = ["sh", "-c", 'ulimit -Sn 64; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "[0, 0, 0]\n", done.stderr


@given(chunk=st.integers(1, 4), at=st.integers(0, 8))
@settings(max_examples=25, deadline=None)
def test_checks_see_the_same_in_chunks_of_any_size(chunk: int, at: int) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "_CHUNK", chunk)
        path = Path(folder, "a")
        _, index = megatron_write(path, [[[n] * (n % 3 + 1)] for n in range(9)], 8)
        assert len(TokenStore.open(path)) == 9
        Path(f"{path}.idx").write_bytes(patched(index, 34 + 36 + 8 * at, "<q", 1))
        with pytest.raises(StoreError, match=f"sequence {at} does not start"):
            TokenStore.open(path)
        Path(f"{path}.idx").write_bytes(patched(index, 34 + 108 + 8 * at, "<q", 9 if at else 1))
        if at < 8:
            with pytest.raises(StoreError, match=f"document {at} ends before" if at else "runs from 1"):
                TokenStore.open(path)


@pytest.mark.parametrize("sync", [True, False])
def test_tokens_and_index_are_on_the_disk_before_either_is_renamed(sync, tmp_path, monkeypatch):
    events, (fsync, replace) = [], (os.fsync, os.replace)
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.path.getsize(file)) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append(paths[1].suffix) or replace(*paths))
    (tmp_path / "raw").write_bytes(bytes(20))
    TokenStore.adopt(tmp_path / "s", tmp_path / "raw", np.array([4, 6], np.int32), np.uint16, sync=sync)
    sizes = [(tmp_path / f"s{suffix}").stat().st_size for suffix in (".bin", ".idx")] if sync else []
    assert events[: len(sizes) + 2] == [*sizes, ".bin", ".idx"]
    assert len(events) == (5 if sync else 2)  # last of all the folder


def test_a_file_of_tokens_is_adopted_as_a_store(tmp_path):
    tokens = np.arange(10, dtype=np.uint16)
    for sync in (True, False):
        (tmp_path / "raw").write_bytes(tokens.tobytes())
        store = TokenStore.adopt(tmp_path / "s", tmp_path / "raw", np.array([4, 0, 6], np.int32), np.uint16, sync=sync)
        assert [document.tolist() for document in store] == [[0, 1, 2, 3], [], [4, 5, 6, 7, 8, 9]]
        same = TokenStore.write(tmp_path / "same", [tokens[:4], [], tokens[4:]], dtype=np.uint16)
        assert (tmp_path / "s.idx").read_bytes() == (tmp_path / "same.idx").read_bytes()
        assert store.fingerprint == same.fingerprint
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx", "same.bin", "same.idx"]
    (tmp_path / "raw").write_bytes(tokens.tobytes())
    with pytest.raises(StoreError, match="no token in any"):
        TokenStore.adopt(tmp_path / "s", tmp_path / "raw", np.zeros(2, np.int32), np.uint16)
    assert len(TokenStore.open(tmp_path / "s")) == 3
