import functools
import gzip
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynmix.mixture.prepare import PrepareError
from dynmix.mixture.prepare import prepare as make
from dynmix.mixture.prepare import tokenise as tokenise_module
from dynmix.mixture.store import TokenStore
from tests.small import byte_tokenizer

DOCUMENTS = ["one two\n", "Grüße, 世界", "", "x" * 5000, "\u2028 lines \x0c", *[f"document {i}" for i in range(300)]]
prepare = functools.partial(make, progress=False)


TOKENIZER = byte_tokenizer()


def text_of(store: TokenStore) -> list[str]:
    return [str(TOKENIZER.decode(d[:-1].tolist())) for d in store]


def jsonl(documents: list[Any], field: str = "text") -> bytes:
    return "".join(
        json.dumps({"id": 1, field: d}, ensure_ascii=i % 2 == 0) + "\n" for i, d in enumerate(documents)
    ).encode()


def halves(data: bytes) -> tuple[bytes, bytes]:
    """Cut inside a line, so that a member or frame holds no whole number of documents."""
    return data[: len(data) // 2], data[len(data) // 2 :]


def gz(data: bytes) -> bytes:
    return b"".join(map(gzip.compress, halves(data)))


def zst(data: bytes) -> bytes:
    return b"".join(pa.Codec("zstd").compress(part, asbytes=True) for part in halves(data))


def parquet(path: Path, documents: list[Any], kind: pa.DataType | None = None, field: str = "text") -> None:
    column = pa.array(documents, kind or pa.string())
    pq.write_table(pa.table({"id": range(len(documents)), field: column}), path, row_group_size=70)


def write_all_forms(folder: Path) -> None:
    data = jsonl(DOCUMENTS)
    (folder / "plain.jsonl").write_bytes(data + b"\n \n")
    (folder / "dos.v1.json").write_bytes(data.replace(b"\n", b"\r\n"))
    (folder / "members.jsonl.gz").write_bytes(gz(data))
    (folder / "frames.json.zst").write_bytes(zst(data))
    parquet(folder / "columns.parquet", DOCUMENTS)
    parquet(folder / "coded.parquet", DOCUMENTS, pa.dictionary(pa.int32(), pa.string()))
    parquet(folder / "large.parquet", DOCUMENTS, pa.large_string())
    (folder / "shards" / "more").mkdir(parents=True)
    (folder / "shards" / "a.jsonl").write_bytes(jsonl(DOCUMENTS[:100]))
    parquet(folder / "shards" / "b.parquet", DOCUMENTS[100:200])
    (folder / "shards" / "more" / "c.jsonl.gz").write_bytes(gz(jsonl(DOCUMENTS[200:])))
    (folder / ".hidden").write_text("passed over")
    (folder / "_SUCCESS").write_text("passed over")


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    folder, disk = tmp_path / "in", tmp_path / "disk"
    for file, document in ((folder / "web" / "a.jsonl", "one"), (disk / "deep" / "b.jsonl", "two")):
        file.parent.mkdir(parents=True)
        file.write_bytes(jsonl([document]))
    (folder / "web" / "more").symlink_to(disk)
    (folder / "web" / "again").symlink_to(folder / "web")
    (disk / "deep" / "up").symlink_to(disk)
    (folder / "code").symlink_to(disk)
    (folder / "self").symlink_to(folder)
    stores = prepare(folder, tmp_path / "out", TOKENIZER)
    assert {name: text_of(store) for name, store in stores.items()} == {"web": ["one", "two"], "code": ["two"]}


def test_an_output_in_an_input_folder_is_refused_while_nothing_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_bytes(jsonl(["one"]))
    monkeypatch.chdir(tmp_path)
    for inputs in (".", ["web/a.jsonl", tmp_path], {"web": "."}):
        for output in ("stores", ".", "web/deep/stores"):
            with pytest.raises(PrepareError, match=rf"^{output}: it is in the input folder (\.|{tmp_path}), and what"):
                prepare(inputs, output, TOKENIZER)
    assert [path.name for path in tmp_path.rglob("*")] == ["web", "a.jsonl"]
    for output in ("_stores", "web/.stores/deep"):  # such names are passed over
        assert list(prepare(".", output, TOKENIZER, progress=False)) == ["web"]
        assert text_of(prepare(".", output, TOKENIZER, overwrite=True, progress=False)["web"]) == ["one"]
    assert list(prepare("web/a.jsonl", "web", TOKENIZER)) == ["a"]  # beside a file it may be
    with pytest.raises(FileExistsError):
        prepare("web/a.jsonl", "web/a.jsonl", TOKENIZER)


def test_every_form_gives_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    write_all_forms(tmp_path / "in")
    monkeypatch.setattr(tokenise_module, "BATCH_DOCUMENTS", 7)
    stores = prepare(tmp_path / "in", tmp_path / "out", TOKENIZER)
    assert list(stores) == ["coded", "columns", "dos.v1", "frames", "large", "members", "plain", "shards"]
    for name, store in stores.items():
        assert store.path == tmp_path / "out" / name
        assert store.dtype == np.uint16
        assert text_of(store) == [d for d in DOCUMENTS if d], name
        assert all(d[-1] == 0 for d in store)
    assert len(os.listdir(tmp_path / "out")) == 2 * len(stores) + 1
    assert (tmp_path / "out" / "manifest.json").exists()


def test_eos_and_dtype_follow_the_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(["ab", "", "c"], field="body"))
    run = functools.partial(prepare, [str(source)], tmp_path / "out", text_field="body", overwrite=True)
    with caplog.at_level(logging.INFO):
        plain = run(TOKENIZER, append_eos=False)["a"]
    assert [len(d) for d in plain] == [2, 1]
    assert "2 documents, and 1 empty ones skipped" in caplog.text
    assert [len(d) for d in run(TOKENIZER)["a"]] == [3, 2]
    assert [len(d) for d in run(byte_tokenizer(eos=False))["a"]] == [2, 1]
    assert "no EOS token" in caplog.text
    assert run(byte_tokenizer(65499))["a"].dtype == np.uint16
    assert run(byte_tokenizer(65500))["a"].dtype == np.int32


def test_a_tokenizer_folder_and_its_truncation_is_not_applied(tmp_path: Path) -> None:
    truncating = byte_tokenizer()
    truncating.backend_tokenizer.enable_truncation(4)
    truncating.backend_tokenizer.enable_padding(length=9)
    truncating.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x" * 100, "y"]))
    for name, tokenizer in (("folder", tmp_path / "tokenizer"), ("object", truncating)):
        assert text_of(prepare(tmp_path / "a.jsonl", tmp_path / name, tokenizer)["a"]) == ["x" * 100, "y"]
    assert (truncating.backend_tokenizer.truncation or {})["max_length"] == 4
    with pytest.raises(PrepareError, match=r"tokenizer='.*absent'"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "absent")


def test_a_slow_tokenizer_works_too(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    (tmp_path / "a.jsonl").write_bytes(jsonl(["ab", "ü"]))
    store = prepare(tmp_path / "a.jsonl", tmp_path / "out", ByT5Tokenizer())["a"]
    assert [d.tolist() for d in store] == [[100, 101, 1], [198, 191, 1]]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_truncation_at_any_length_is_an_error_and_leaves_no_store(tmp_path: Path, suffix: str) -> None:
    data = jsonl(DOCUMENTS[5:])
    first = 0  # length of the first member or frame
    if suffix == ".parquet":
        parquet(tmp_path / "whole.parquet", DOCUMENTS[5:])
        packed = (tmp_path / "whole.parquet").read_bytes()
    else:
        member = gzip.compress if suffix.endswith("gz") else functools.partial(pa.Codec("zstd").compress, asbytes=True)
        parts = [member(part) for part in halves(data)]
        first, packed = len(parts[0]), b"".join(parts)
    cut = tmp_path / f"cut{suffix}"
    near = {first - 1, first + 1} if first else set()
    for size in sorted({*range(0, len(packed), len(packed) // 60 + 1), len(packed) - 1, *near}):
        cut.write_bytes(packed[:size])
        with pytest.raises(PrepareError, match=rf"cut{suffix}, (after line|after row) \d+: damaged or truncated"):
            prepare(cut, tmp_path / "out", TOKENIZER)
        assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []
    if first:  # whole members, but the text ends inside a line
        cut.write_bytes(packed[:first])
        with pytest.raises(PrepareError, match=r"line \d+: not JSON"):
            prepare(cut, tmp_path / "out", TOKENIZER)


def test_parquet_is_held_against_its_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"a word {i}" for i in range(500)]})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, path, **options)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"a word 77", b"a ward 77"))
    with pytest.raises(PrepareError, match=r"a.parquet, after row \d+: damaged or truncated: .*CRC"):
        prepare(path, tmp_path / "out", TOKENIZER)
    path.write_bytes(whole)
    assert len(prepare(path, tmp_path / "out", TOKENIZER)["a"]) == 500


def test_a_zstd_window_that_is_too_large_is_named_with_the_remedy(tmp_path: Path) -> None:
    line = b'{"text": "one"}\n'
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([18 << 3])  # a window of 2**28 bytes
    (tmp_path / "long.jsonl.zst").write_bytes(frame + (len(line) << 3 | 1).to_bytes(3, "little") + line)
    with pytest.raises(PrepareError, match="larger window than the 128 MiB .*unpack it with `zstd -d --long=31`"):
        prepare(tmp_path / "long.jsonl.zst", tmp_path / "out", TOKENIZER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        (b'{"text": "a"}\n\n["text"]\n', "a.jsonl, line 3: a JSON list, want one object a line"),
        (b'{"text": "\xff"}\n', "a.jsonl, line 1: not UTF-8"),
        (b'{"text": "a"}\n{"text": "\xed\xa0\x80"}\n', "a.jsonl, line 2: not UTF-8"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "a.jsonl, line 2: not UTF-8.*surrogate"),
        (b'{"content": "a", "id": 3}\n', "a.jsonl, line 1: no field 'text'; there are 'content', 'id': name the"),
        (b'{"text": "a"}\n{}\n', "a.jsonl, line 2: no field 'text'; there are none"),
        (b'{"text": 3}\n', "a.jsonl, line 1: field 'text' is int, not a string"),
        (b'{"text": null}\n', "a.jsonl, line 1: field 'text' is null, not a string"),
        (b"[" * 100_000 + b"\n", "a.jsonl, line 1: not JSON"),
        (b"", "domain 'a': no documents in .*a.jsonl"),
        (b"\n\n", "domain 'a': no documents"),
        (b'{"text": ""}\n', "domain 'a': all 1 documents are empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(PrepareError, match=message):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", TOKENIZER)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_of_several_bad_inputs_the_first_one_is_named(tmp_path: Path, workers: int) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(jsonl(["a long way to what is wrong"] * 10_000) + b"{")
    second.write_bytes(b"{")  # found out long before
    with pytest.raises(PrepareError, match="a.jsonl, line 10001: not JSON"):
        prepare({"a": first, "b": second}, tmp_path / "out", TOKENIZER, workers=workers)


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    def check(message: str) -> None:
        with pytest.raises(PrepareError, match=message):
            prepare(tmp_path / "a.parquet", tmp_path / "out", TOKENIZER)

    path = tmp_path / "a.parquet"
    path.write_bytes(jsonl(["not parquet"]))
    check("a.parquet, after row 0: damaged or truncated")
    parquet(path, ["a"], field="body")
    check("a.parquet: no field 'text'; there are 'id', 'body': name the one that holds the text with text_field")
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    check("a.parquet: 2 fields 'text'; rename all but one")
    parquet(path, [1], pa.int64())
    check("a.parquet: field 'text' is int64, not a string")
    parquet(path, ["a", None])
    check("a.parquet, row 2: field 'text' is null")
    parquet(path, [])
    check("domain 'a': no documents")
    bad = pa.StringArray.from_buffers(2, *pa.array([b"ok", b"\xff"], pa.binary()).buffers()[1:])
    pq.write_table(pa.table({"text": bad}), path)
    check("a.parquet, row 2: not UTF-8")


def test_not_gzip_and_damaged_gzip(tmp_path: Path) -> None:
    good = gzip.compress(jsonl(DOCUMENTS))
    for content in (jsonl(["a"]), good + b"garbage", good[:200] + b"????" + good[204:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(PrepareError, match=r"a\.jsonl\.gz, after line \d+: damaged"):
            prepare(tmp_path / "a.jsonl.gz", tmp_path / "out", TOKENIZER)


def test_bad_inputs_are_named_before_anything_is_read(tmp_path: Path) -> None:
    def check(inputs: Any, message: str) -> None:
        with pytest.raises(PrepareError, match=message):
            prepare(inputs, tmp_path / "out", TOKENIZER)
        assert not (tmp_path / "out").exists()

    folder = tmp_path / "in"
    check(folder, "in: no such file or folder")
    check([], "no files given")
    folder.mkdir()
    (tmp_path / "a.txt").write_text("a")
    check({"web": [], "code": [tmp_path / "a.txt"]}, r"inputs\['web'\]: no files given; leave the domain out")
    check(folder, "in: an empty folder")
    (folder / "web").mkdir()
    check(folder, "web: an empty folder")
    (folder / "web" / "a.jsonl").write_bytes(jsonl(["a"]))
    (folder / "web" / "b.doc").write_text("b")
    check(folder, r"b\.doc: unknown suffix; known are \.txt, \.jsonl, .*\.parquet")
    (folder / "web" / "b.doc").unlink()
    os.mkfifo(folder / "web" / "b.jsonl")  # opened, it would be waited for
    check(folder, r"web/b\.jsonl: no file, but a link to nothing, a pipe")
    check(folder / "web" / "b.jsonl", r"web/b\.jsonl: no file")
    (folder / "web" / "b.jsonl").unlink()
    (folder / "web" / "b.jsonl").symlink_to("nowhere")
    check(folder, r"web/b\.jsonl: no file, but a link to nothing, a pipe")
    (folder / "web" / "b.jsonl").unlink()
    (folder / "web.json").write_bytes(jsonl(["a"]))
    check(folder, r"web and .*web\.json are both domain 'web'|web\.json and .*web are both domain 'web'")
    check([folder / "web.json", folder / "web.json"], "both domain 'web'")
    check({1: folder / "web.json"}, "domain 1: a int; names are strings")
    for name in ("../web", "/web", "a/web", ".", "..", "a\0b", "\udcff"):
        check({name: folder / "web.json"}, f"domain {re.escape(repr(name))}: no name of a file in the output folder")
    (folder / "web" / os.fsdecode(b"\xff.jsonl")).write_bytes(jsonl(["a"]))
    check({"web": folder / "web"}, r"\\udcff\.jsonl': the name is not UTF-8")


def test_existing_stores_are_kept_unless_overwritten(tmp_path: Path) -> None:
    for name, text in (("a", "old"), ("b", "old")):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([text]))
    run: Callable[..., dict[str, TokenStore]] = functools.partial(prepare, output=tmp_path / "out", tokenizer=TOKENIZER)
    run(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_bytes(jsonl(["new"]))
    both = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(PrepareError, match=r"b\.bin, .*b\.idx: there already; .*overwrite"):
        run(both)
    assert not (tmp_path / "out" / "a.bin").exists()
    assert {n: text_of(s) for n, s in run(both, overwrite=True).items()} == {"a": ["old"], "b": ["new"]}
    (tmp_path / "b.jsonl").write_bytes(jsonl(["newer"]) + b"{")
    with pytest.raises(PrepareError, match="line 2"):
        run(both, overwrite=True)
    assert text_of(TokenStore.open(tmp_path / "out" / "b")) == ["new"]
    (tmp_path / "b.jsonl").write_bytes(jsonl(["newer"]))
    assert {n: text_of(s) for n, s in run(both, overwrite=True).items()} == {"a": ["old"], "b": ["newer"]}
    assert len(os.listdir(tmp_path / "out")) == 5


def test_progress_shows_the_tokens_of_all_domains(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("web", "code[en]"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gz(jsonl(DOCUMENTS)))
    inputs = [tmp_path / "web.jsonl.gz", tmp_path / "code[en].jsonl.gz"]
    make(inputs, tmp_path / "out", TOKENIZER)
    shown = capfd.readouterr().err
    tokens = sum(TokenStore.open(tmp_path / "out" / name).num_tokens for name in ("web", "code[en]"))
    assert f"{tokens:,} tokens, " in shown.replace("\n", " ")
    assert "/s" in shown
    assert "code[en]" in shown
    prepare(inputs, tmp_path / "quiet", TOKENIZER)
    assert capfd.readouterr().err == ""
