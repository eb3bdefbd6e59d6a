import contextlib
import io
import logging
import pickle
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixture.flat import FlatTokens
from dynmix.mixture.store import StoreError

LETTERS = {"uint8": "B", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i", "uint64": "Q", "int64": "q"}


def raw(tokens: list[int], dtype: str) -> bytes:
    """The format's definition: one little-endian integer after the other."""
    return struct.pack(f"<{len(tokens)}{LETTERS[dtype]}", *tokens)


def npy(tokens: Any, dtype: str) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(tokens, dtype))
    return stream.getvalue()


@given(data=st.data(), dtype=st.sampled_from(sorted(LETTERS)), header=st.booleans())
@settings(max_examples=25)
def test_tokens_of_a_file_are_those_that_were_written(data: st.DataObject, dtype: str, header: bool) -> None:
    top = min(int(np.iinfo(dtype).max), 2**62)
    tokens = data.draw(st.lists(st.integers(0, 9) | st.integers(0, top), min_size=1, max_size=40))
    end = data.draw(st.none() | st.integers(0, 9))
    with TemporaryDirectory() as folder:
        path = Path(folder, "train.npy")
        path.write_bytes(npy(tokens, dtype) if header else raw(tokens, dtype))
        flat = FlatTokens(path, None if header else dtype, eos_token_id=end)
        assert (flat.dtype, flat.num_tokens, flat.path) == (np.dtype(dtype), len(tokens), path)
        documents: list[list[int]] = [[]]
        for token in tokens:
            documents[-1].append(token)
            if token == end:
                documents.append([])
        documents = documents if documents[-1] else documents[:-1]
        for each in (flat, pickle.loads(pickle.dumps(flat))):
            assert [document.tolist() for document in each] == documents
            assert each.read(np.arange(len(tokens)), 1)[:, 0].tolist() == tokens
            assert each.fingerprint == flat.fingerprint
        if sum(map(len, documents[:1])) == len(tokens):
            assert len(flat) == 1
        assert len(pickle.dumps(FlatTokens(path, flat.dtype))) < 500


def counted(magic: int, count: int, tokens: list[int], dtype: str) -> bytes:
    """A shard of llm.c: 256 int32 in front, the magic number, a version, how many tokens there are, zeros."""
    return struct.pack("<3i", magic, 1, count).ljust(1024, b"\0") + raw(tokens, dtype)


@pytest.mark.parametrize(("magic", "dtype"), [(20240520, "uint16"), (20240801, "uint32"), (20250211, "uint16")])
def test_the_header_of_a_shard_of_llm_c_is_no_tokens(tmp_path: Path, magic: int, dtype: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 50257, 1000).tolist()
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(counted(magic, 1000, tokens, dtype))
    flat = FlatTokens(path, vocab_size=50257, eos_token_id=tokens[5])
    assert (flat.dtype, flat.tokens.tolist(), flat[0].tolist()) == (np.dtype(dtype), tokens, tokens[:6])
    assert pickle.loads(pickle.dumps(flat)).tokens.tolist() == tokens
    with pytest.raises(StoreError, match=r"holds uint.. by its header, not dtype=int64"):
        FlatTokens(path, "int64")


@given(st.sampled_from([(20240520, "uint16"), (20240801, "uint32")]), st.integers(1, 255), st.data())
def test_a_damaged_header_of_llm_c_is_refused(kind: tuple[int, str], flipped: int, data: st.DataObject) -> None:
    magic, dtype = kind
    tokens = np.random.default_rng(0).integers(0, 50257, 1000).tolist()
    content = bytearray(counted(magic, 1000, tokens, dtype))
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.bin")
        if data.draw(st.booleans()):
            path.write_bytes(content[: data.draw(st.integers(4, len(content) - 1))])
        else:
            content[data.draw(st.integers(8, 1023))] ^= flipped
            path.write_bytes(content)
        with pytest.raises(StoreError, match="was cut or damaged"):
            FlatTokens(path)


@given(st.sampled_from(["uint16", "uint32", "int64"]), st.integers(1, 300), st.integers(0, 2**32), st.data())
@settings(max_examples=25)
def test_the_type_of_a_raw_file_is_told_or_the_file_is_refused(
    dtype: str, n: int, seed: int, data: st.DataObject
) -> None:
    """Whole or cut at any byte: never tokens that nobody wrote."""
    vocabulary = data.draw(st.sampled_from([5, 300, 5_000, 50_257, 65_536, 150_000, 262_144]))
    rng, size, frequent = (
        np.random.default_rng(seed),
        min(vocabulary, np.iinfo(dtype).max + 1),
        data.draw(st.booleans()),
    )
    # As in a language, or such as no language is.
    tokens = (float(size) ** rng.random(n)).astype(np.int64) - 1 if frequent else rng.integers(0, size, n)
    content = raw(tokens.tolist(), dtype)
    cut = data.draw(st.integers(0, 17))
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.bin")
        path.write_bytes(content[: len(content) - cut])
        message = ""
        try:
            flat = FlatTokens(path, vocab_size=data.draw(st.sampled_from([None, vocabulary])))
        except StoreError as error:
            message = str(error)
        if message:  # a corpus is never refused, but for its cut end
            assert n < 100 or vocabulary < 5_000 or not frequent or f"no whole number of {dtype}" in message
            return
        assert flat.tokens.tolist() == tokens[: flat.num_tokens].tolist()
        assert flat.dtype == dtype


@given(st.integers(200, 2000), st.integers(0, 2**32), st.sampled_from([5_000, 50_257, 65_000]), st.data())
@settings(max_examples=60, derandomize=True)  # one in many thousands of random files looks like ids
def test_what_is_not_uint16_is_not_taken_for_it(n: int, seed: int, vocabulary: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    tokens = (float(vocabulary) ** rng.random(n)).astype(np.int64) - 1
    masked = np.where(rng.random(n) < 0.1, data.draw(st.sampled_from([-1, -100])), tokens)
    others = {
        **{dtype: tokens.astype(dtype).tobytes() for dtype in (">u2", ">u4", ">i8")},
        **{f"{dtype} masked": masked.astype(dtype).tobytes() for dtype in ("<i4", "<i8")},
        "ascii": rng.choice(list(b"the quick brown fox\n"), 2 * n).astype(np.uint8).tobytes(),
        "utf-8": "".join(rng.choice(list("Größe, Füße \u4f60\u597d"), 4 * n)).encode(),
        "bytes": rng.bytes(8 * n),
        "floats": rng.normal(size=n).astype(np.float32).tobytes(),
        "zip": b"PK\x03\x04" + tokens.astype("<u2").tobytes(),
        "safetensors": struct.pack("<Q", 9000) + b'{"model' + tokens.astype("<u2").tobytes(),
        "pickle": pickle.dumps(tokens.astype("<u2"), data.draw(st.integers(2, 5))),
    }
    with TemporaryDirectory() as folder:
        for name, content in others.items():
            path = Path(folder, f"{name}.bin")
            path.write_bytes(content)
            if (masked < 0).any() or "masked" not in name:
                with pytest.raises(StoreError, match=r"or no tokens; give FlatTokens\(path, dtype="):
                    FlatTokens(path)


def test_the_log_says_once_a_folder_what_was_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = (50_000 ** np.random.default_rng(0).random(1000)).astype("<u2")
    for name in ("a.bin", "b.bin"):
        tokens.tofile(tmp_path / name)
        FlatTokens(tmp_path / name, "uint16")
        FlatTokens(tmp_path / name, vocab_size=50_000)
    assert not caplog.records
    for name in ("a.bin", "b.bin"):
        pickle.loads(pickle.dumps(FlatTokens(tmp_path / name)))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{tmp_path}: flat files are read as uint16, told from their bytes" in caplog.text


@pytest.mark.parametrize("header", [True, False])
def test_many_files_take_more_handles_than_few_allow(tmp_path: Path, header: bool) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.npy"
    path.write_bytes((npy if header else raw)([*range(1000)], "uint16"))
    dtype = None if header else "uint16"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        found = [FlatTokens(path, dtype) for _ in range(100)]
        assert all(int(flat.tokens[-1]) == 999 for flat in found)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_whole_npy_file_is_told_from_one_cut_at_any_byte_or_flipped(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 65_536, 50).tolist()
    content, path = npy(tokens, "uint16"), tmp_path / "x.npy"
    opened = 0
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        with pytest.raises(StoreError, match=r"x\.npy (is|has|it)|x\.npy: its"):
            FlatTokens(path)
    for at in range(len(content) - 2 * len(tokens)):
        for mask in (1, 2, 16, 255):
            path.write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :])
            with contextlib.suppress(ValueError):
                assert FlatTokens(path).read(np.arange(50), 1)[:, 0].tolist() == tokens
                opened += 1
    assert opened


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "x.bin is empty"),
        (bytes(7), {"dtype": "uint16"}, r"x.bin has 7 bytes, no whole number of uint16 \(2 bytes\): it was cut"),
        (bytes(6), {"dtype": "uint32"}, "no whole number of uint32"),
        (raw([*range(5000)], "uint16")[:-1], {}, "x.bin has 9999 bytes, no whole number of uint16"),
        (raw([1, 2, 3], "uint16"), {"dtype": "float16"}, "dtype=float16: token ids are integers"),
        (raw([1, 2, 3], "uint16"), {"dtype": "uint17"}, "dtype='uint17' is no type of numpy"),
        (raw([1, 2, 3], "uint16"), {"dtype": "uint16", "vocab_size": 0}, "vocab_size=0: at least 1"),
        (raw([1, 7], "uint16"), {"dtype": "uint16", "vocab_size": 7}, r"x.bin has token 7, and the vocabulary 7 ids"),
        (raw([1, -7], "int16"), {"dtype": "int16"}, r"x.bin has token -7: ids are not negative.*read as int16"),
        (raw([0] * 99, "uint16"), {}, r"its 198 bytes may be uint16 as well as another type, or no tokens; give FlatT"),
        (npy([1, 2], "uint32"), {"dtype": "uint16"}, "holds uint32 by its header, not dtype=uint16"),
        (npy([1, 2], "float32"), {}, "an npy file of <f4"),
        (npy([1, 2], ">i4"), {}, "an npy file of >i4"),
        (npy([[1, 2]], "uint32"), {}, r"shape \[1, 2\]: a vector of little-endian integers is needed"),
        (npy([], "uint32"), {}, "no tokens"),
        (npy([1, 2], "uint32") + b"x", {}, "damaged or truncated npy file: 137 bytes, where its header says 136"),
        (npy([{}], "object"), {}, "x.bin is a damaged or truncated npy file"),
        (counted(20240520, 1000, [*range(999)], "uint16"), {}, "then 1000 tokens follow, and it has 3022 bytes"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: bytes, options: dict[str, Any], message: str) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(StoreError, match=message):
        FlatTokens(tmp_path / "x.bin", **options)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"y\.bin: no such file$"):
        FlatTokens(tmp_path / "y.bin")
    with pytest.raises(StoreError, match="no such file, but a folder"):
        FlatTokens(tmp_path)


def test_a_dtype_that_the_bytes_contradict_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, tokens = tmp_path / "x.bin", np.random.default_rng(0).integers(0, 50_000, 1000)
    path.write_bytes(raw(tokens.tolist(), "uint32"))
    with caplog.at_level(logging.WARNING):
        assert FlatTokens(path, "uint32").num_tokens == FlatTokens(path, vocab_size=50_000).num_tokens == 1000
        assert FlatTokens(path, "int32").num_tokens == 1000
        assert not caplog.records
        assert FlatTokens(path, "uint16").num_tokens == 2000
    assert "is read as uint16, and its bytes look like uint32" in caplog.text


def test_the_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 5000).tolist()
    found = []
    for name, dtype, content in (("a", "uint16", tokens), ("b", "uint32", tokens), ("c", "uint16", [*tokens[:-1], 7])):
        (tmp_path / name).write_bytes(raw(content, dtype))
        found.append(FlatTokens(tmp_path / name, dtype).fingerprint)
    assert found[0] == found[1] != found[2]


def test_a_file_that_is_replaced_before_a_worker_opens_it_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(300))
    sent = pickle.dumps(FlatTokens(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", np.arange(400))
    with pytest.raises(
        StoreError, match=r"a\.npy was replaced since it was opened: its size was \(300,\) and is \(400,\)"
    ):
        pickle.loads(sent)
