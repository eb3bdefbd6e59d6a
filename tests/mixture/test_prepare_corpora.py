"""What real corpora are made of: fields that say the domain, held-out documents, data sets, many pieces, long texts."""

import gzip
import json
import re
import resource
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dynmix.mixture.files import open_path
from dynmix.mixture.prepare import PrepareError, parts, pieces, prepare, read_manifest, shards
from dynmix.mixture.prepare import inputs as inputs_module
from dynmix.mixture.prepare import names as names_module
from dynmix.mixture.prepare.names import safe_name
from dynmix.mixture.prepare.tokenise import is_held_out
from dynmix.mixture.store import TokenStore
from tests.small import byte_tokenizer

TOKENIZER = byte_tokenizer()


def texts(path: Path) -> list[str]:
    return [TOKENIZER.decode(document[:-1].tolist()) for document in TokenStore.open(path)]


def make(inputs, output: Path, **options):
    return prepare(inputs, output, TOKENIZER, progress=False, workers=1, **options)


def jsonl(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# -- the domain by a field --


def test_a_field_says_the_domain_whatever_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BUFFER_BYTES", 40)  # less than the tokens of a file
    records = [{"text": f"document {i}", "source": ["web", "code/c", 7][i % 3]} for i in range(20)]
    jsonl(tmp_path / "in" / "a.jsonl", records[:9])
    (tmp_path / "in" / "x").mkdir()
    (tmp_path / "in" / "x" / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(record) + "\n" for record in records[9:14]).encode())
    )
    columns = {key: [str(record[key]) for record in records[14:]] for key in ("text", "source")}
    pq.write_table(pa.table(columns), tmp_path / "in" / "z.parquet")
    stores = make(tmp_path / "in", tmp_path / "out", domain_from="source")
    assert list(stores) == ["7", "code_c", "web"]
    for name, k in (("web", 0), ("code_c", 1), ("7", 2)):
        assert texts(tmp_path / "out" / name) == [f"document {i}" for i in range(k, 20, 3)]
    assert read_manifest(tmp_path / "out")["stores"]["code_c"]["domain"] == "code/c"


def test_a_path_of_fields_in_json_and_in_parquet(tmp_path):
    records = [{"text": f"t{i}", "meta": {"set": f"s{i % 2}"}} for i in range(4)]
    jsonl(tmp_path / "a.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet")
    flat = [{"text": "flat", "meta.set": "s1", "meta": None}]  # as `Dataset.flatten` names them
    jsonl(tmp_path / "c.jsonl", flat)
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "d.parquet")
    make(sorted(tmp_path.iterdir()), tmp_path / "out", domain_from="meta.set")
    assert texts(tmp_path / "out" / "s1") == ["t1", "t3", "t1", "t3", "flat", "flat"]
    jsonl(tmp_path / "e.jsonl", [{"text": "null", "meta": None}, {"text": "string", "meta": "set"}])
    make(tmp_path / "e.jsonl", tmp_path / "rest", domain_from="meta.set", domain_default="rest")
    assert texts(tmp_path / "rest" / "rest") == ["null", "string"]


def test_what_lacks_the_field_is_named_or_has_a_default(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "s": "x"}, {"text": "b"}, {"text": "c", "s": None}])
    with pytest.raises(PrepareError, match=r"a\.jsonl, line 2: no field 's' .*--domain-default"):
        make(path, tmp_path / "out", domain_from="s")
    make(path, tmp_path / "out", domain_from="s", domain_default="rest")
    assert texts(tmp_path / "out" / "rest") == ["b", "c"]
    jsonl(path, [{"text": "a", "s": ["x"]}])
    with pytest.raises(PrepareError, match=r"a\.jsonl, line 1: field 's' is list; a domain is a string"):
        make(path, tmp_path / "out2", domain_from="s")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(PrepareError, match=r"b\.parquet, row 1: no field 's'"):
        make(tmp_path / "b.parquet", tmp_path / "out2", domain_from="s")


def test_values_that_make_one_name_are_refused(tmp_path, monkeypatch):
    def check(values, message, **options):
        path = jsonl(tmp_path / "a.jsonl", [{"text": str(i), "s": value} for i, value in enumerate(values)])
        with pytest.raises(PrepareError, match=message):
            make(path, tmp_path / "out", domain_from="s", overwrite=options.pop("overwrite", True), **options)
        assert not list((tmp_path / "out").glob("*.idx"))

    check(["a/b", "c", "a_b"], "the values 'a/b' and 'a_b' are both domain 'a_b'")
    check(["web", "web.valid"], "'web.valid' is also what is held out of 'web'", held_out=0.1)
    check([""], "no field 's'")
    check(["a", "\ud800"], "line 2: not UTF-8")
    monkeypatch.setattr(names_module, "_MOST_DOMAINS", 3)
    check(list("abcd"), "field 's' has over 3 values")


def test_a_store_that_is_there_is_not_replaced_by_a_value(tmp_path):
    make(jsonl(tmp_path / "web.jsonl", [{"text": "old"}]), tmp_path / "out")
    path = jsonl(tmp_path / "a.jsonl", [{"text": "new", "s": "web"}])
    with pytest.raises(PrepareError, match="value 'web': a store 'web' is there already; .*overwrite"):
        make(path, tmp_path / "out", domain_from="s")
    assert texts(tmp_path / "out" / "web") == ["old"]
    make(path, tmp_path / "out", domain_from="s", overwrite=True)
    assert texts(tmp_path / "out" / "web") == ["new"]
    assert len(read_manifest(tmp_path / "out")["preparations"]) == 1


@given(st.text(min_size=1))
@example("é" * 150)
def test_any_value_becomes_a_name_that_a_store_can_have(value):
    name = safe_name(value)
    assert name not in (".", "..", "")
    assert len(name.encode()) <= 200
    assert not name.startswith((".", "_"))
    assert not set(name) & set('/\\:*?"<>|\0\n')
    assert Path(name).name == name
    assert not name.endswith((".bin", ".idx"))


def test_every_value_is_read_where_the_folder_of_stores_is(tmp_path):
    values = ["/r/python", "_r_python", ".r.python", "r_python", "_", "web"]
    stores = make(jsonl(tmp_path / "a.jsonl", [{"text": v, "s": v} for v in values]), tmp_path / "out", domain_from="s")
    assert len(stores) == len(values)
    assert {"r_python", "web"} < {*stores}
    found = open_path(tmp_path / "out")
    assert sorted(TOKENIZER.decode(each[:-1].tolist()) for each in found) == sorted(values)


def test_flipped_bytes_of_a_table_are_told_of_with_its_name(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"]}), file)
    good = file.read_bytes()
    told = []
    for each in re.finditer(b"text", good):
        file.write_bytes(good[: each.start()] + b"\xf1" + good[each.start() + 1 :])
        try:
            make(file, tmp_path / "out", overwrite=True)
        except PrepareError as error:  # and no other
            told.append("a.parquet" in str(error))
    assert told
    assert all(told)
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["12345678"] * 40}).save_to_disk(folder)
    parts = {"dataset_info.json": (b"{", b"x"), "state.json": (b"_fingerprint", b"_fingerprinx")}
    parts["data-00000-of-00001.arrow"] = tuple(
        np.array(each, np.int32).tobytes() for each in ([8, 16, 24], [8, -1, 24])
    )
    for name, (old, new) in parts.items():
        good = (folder / name).read_bytes()
        assert old in good
        (folder / name).write_bytes(good.replace(old, new, 1))
        with pytest.raises(PrepareError, match=r"saved.*damaged"):
            make({"web": folder}, tmp_path / "out", overwrite=True)
        (folder / name).write_bytes(good)
    assert len(make({"web": folder}, tmp_path / "out", overwrite=True)["web"]) == 40


def test_many_domains_take_few_open_files(tmp_path):
    count = 120
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "s": f"d{i % count:03d}"} for i in range(2 * count)])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, limits[1]))
    try:
        stores = make(path, tmp_path / "out", domain_from="s")
        assert [len(stores[name]) for name in stores] == [2] * count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert texts(tmp_path / "out" / "d007") == ["t7", "t127"]


# -- documents that are held out --


def test_the_side_of_a_document_is_a_function_of_its_text(tmp_path):
    every = [f"document {i % 400}" for i in range(1000)]
    for name, some in (("a", every), ("b", every[::-3])):
        jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": text} for text in some])
    stores = make(tmp_path / "in", tmp_path / "out", held_out=0.1)
    assert list(stores) == ["a", "b"]
    held = {text for text in every if is_held_out(text.encode(), 0.1)}
    assert 20 < len(held) < 60
    for name, some in (("a", every), ("b", every[::-3])):
        assert texts(tmp_path / "out" / name) == [text for text in some if text not in held]
        assert texts(tmp_path / "out" / f"{name}.valid") == [text for text in some if text in held]
    make(tmp_path / "in" / "a.jsonl", tmp_path / "more", held_out=0.3)
    assert held <= set(texts(tmp_path / "more" / "a.valid"))
    with pytest.raises(PrepareError, match=r"a\.valid\.bin, .*: there already"):
        make(jsonl(tmp_path / "a.valid.jsonl", [{"text": "x"}]), tmp_path / "out")
    facts = read_manifest(tmp_path / "out")["stores"]
    assert [facts[name]["held_out"] for name in ("a", "a.valid")] == [False, True]


def test_a_domain_on_one_side_is_told(tmp_path, caplog):
    jsonl(tmp_path / "in" / "one.jsonl", [{"text": next(f"{i}" for i in range(99) if not is_held_out(b"%d" % i, 0.1))}])
    jsonl(tmp_path / "in" / "two.jsonl", [{"text": next(f"{i}" for i in range(99) if is_held_out(b"%d" % i, 0.1))}])
    assert list(make(tmp_path / "in", tmp_path / "out", held_out=0.1)) == ["one"]
    assert "nothing was held out of the small domains one" in caplog.text
    assert "everything was held out of the small domains two" in caplog.text


def test_what_an_earlier_preparation_held_out_is_told_of(tmp_path, caplog):
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(100)])
    make(path, tmp_path / "out", held_out=0.5)
    assert "earlier preparation" not in caplog.text
    make(path, tmp_path / "out", overwrite=True)
    assert f"{tmp_path / 'out'}: a.valid are of an earlier preparation" in caplog.text
    facts = read_manifest(tmp_path / "out")["stores"]
    assert [facts[name]["held_out"] for name in ("a", "a.valid")] == [False, True]


def test_a_domain_called_as_one_held_out_stays_in_the_manifest(tmp_path):
    make(jsonl(tmp_path / "web.valid.jsonl", [{"text": "x"}]), tmp_path / "out")
    make(jsonl(tmp_path / "web.jsonl", [{"text": "y"}]), tmp_path / "out")
    assert list(read_manifest(tmp_path / "out")["stores"]) == ["web", "web.valid"]


def test_impossible_options_are_named(tmp_path):
    for options, message in (
        ({"held_out": 0.0}, r"held_out=0\.0 .*above 0 and below 1"),
        ({"held_out": 1.0}, "held_out=1"),
        ({"domain_default": "x"}, "domain_default='x': a name, and only with domain_from"),
        ({"domain_from": "text"}, "domain_from='text' .* is the field of the texts"),
    ):
        with pytest.raises(PrepareError, match=message):
            make(tmp_path, tmp_path / "out", **options)
    with pytest.raises(PrepareError, match="workers=0"):
        prepare(tmp_path, tmp_path / "out", TOKENIZER, workers=0)
    for name in ("a.bin.jsonl", "b.idx.jsonl"):
        with pytest.raises(PrepareError, match="a store's files are called so; rename it"):
            make(jsonl(tmp_path / name, [{"text": "a"}]), tmp_path / "out")
    jsonl(tmp_path / "in" / "a.jsonl", [{"text": "a"}])
    jsonl(tmp_path / "in" / "a.valid.jsonl", [{"text": "a"}])
    with pytest.raises(PrepareError, match=r"'a\.valid' is also what is held out of 'a'"):
        make(tmp_path / "in", tmp_path / "out", held_out=0.1)


# -- data sets, and names given --


def test_hf_datasets_and_named_inputs(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(700)], "s": ["x", "y"] * 350})
    some = whole.select(range(699, -1, -7))
    whole.save_to_disk(tmp_path / "saved")
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    stores = make({"one": some, "two": tmp_path / "saved", "three": [tmp_path / "a.jsonl"] * 1}, tmp_path / "out")
    assert list(stores) == ["one", "two", "three"]
    assert texts(tmp_path / "out" / "one") == [f"row {i}" for i in range(699, -1, -7)]
    assert texts(tmp_path / "out" / "two") == [f"row {i}" for i in range(700)]
    make(tmp_path / "saved", tmp_path / "out2")
    assert texts(tmp_path / "out2" / "saved") == [f"row {i}" for i in range(700)]
    make(whole, tmp_path / "out3", domain_from="s")
    assert texts(tmp_path / "out3" / "y") == [f"row {i}" for i in range(1, 700, 2)]
    split = datasets.DatasetDict({"train": whole, "test": some})
    assert list(make(split, tmp_path / "out4")) == ["train", "test"]
    split.save_to_disk(tmp_path / "both")
    assert list(make(tmp_path / "both", tmp_path / "out6")) == ["test", "train"]
    for inputs, message in (
        (whole, "a data set has no name"),
        ({"a": whole.to_iterable_dataset()}, "IterableDataset cannot be read from any row on"),
        ({"a": whole.with_transform(dict)}, r"a\[0\]: a data set with a transform, which"),
        ({"a": split}, r"inputs\['a'\]: a DatasetDict of \['train', 'test'\]: give one of these, or a list"),
        ({"a": whole.rename_column("text", "body")}, r"a\[0\]: no field 'text'; there are 'body', 's'"),
        ({"a": datasets.Dataset.from_dict({"text": ["a", None]})}, r"a\[0\], row 2: field 'text' is null"),
        ({}, "no files given"),
    ):
        with pytest.raises(PrepareError, match=message):
            make(inputs, tmp_path / "out5")


# -- pieces --


@settings(max_examples=25)
@given(
    st.lists(st.text(st.sampled_from("ab\né"), max_size=30), min_size=1, max_size=30),
    st.integers(1, 200),
    st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"]),
    st.booleans(),
)
def test_pieces_of_any_size_are_all_of_the_input(tmp_path_factory, documents, size, suffix, newline):
    path = tmp_path_factory.mktemp("pieces") / f"a{suffix}"
    data = "\n".join(json.dumps({"text": text}) for text in documents) + "\n" * newline
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": documents}), path, row_group_size=max(1, size // 10))
    else:
        path.write_bytes(gzip.compress(data.encode()) if suffix.endswith("gz") else data.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_module, "_BATCH_BYTES", size)
        patch.setattr(inputs_module, "_GROUP_BYTES", 4 * size)
        fields, file = pieces.Fields("text"), inputs_module.File(path)
        cut = list(file.pieces(fields, size))
    found = [(text, piece.where(number)) for piece in cut for number, text, _ in piece.records(fields)]
    unit = "row" if suffix == ".parquet" else "line"
    assert found == [(text, f"{unit} {i}") for i, text in enumerate(documents, 1)]
    assert sum(piece.size for piece in cut) == file.size


def test_a_large_row_group_is_shared_out_and_a_bad_row_in_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_module, "_GROUP_BYTES", 1000)
    monkeypatch.setattr(inputs_module, "_BATCH_BYTES", 300)
    documents = [f"document {i}" * 3 for i in range(200)]
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", use_dictionary=False)
    cut = list(inputs_module.File(tmp_path / "a.parquet").pieces(pieces.Fields("text"), 1000))
    assert len(cut) > 5
    make(tmp_path / "a.parquet", tmp_path / "out")
    assert texts(tmp_path / "out" / "a") == documents
    documents[150] = None
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", use_dictionary=False)
    with pytest.raises(PrepareError, match=r"a\.parquet, row 151: field 'text' is null"):
        make(tmp_path / "a.parquet", tmp_path / "out2")


def test_of_several_bad_lines_the_first_is_named_also_by_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_module, "SMALLEST", 200)
    good = '{"text": "a"}\n'
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(good * 200)
    (tmp_path / "in" / "b.jsonl").write_text(good * 50 + "{\n" + good * 20 + "[\n" + good * 9)
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(gzip.compress(good.encode() * 99)[:-9])
    with pytest.raises(PrepareError, match=r"b\.jsonl, line 51: not JSON"):
        prepare(tmp_path / "in", tmp_path / "out", TOKENIZER, progress=False, workers=2)


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_module, "_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(inputs_module, "SMALLEST", 1 << 19)
    data = b'{"text": "a"}\n' + b'{"text": "' + b"x" * (1 << 22)
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    with pytest.raises(PrepareError, match=r"a\.jsonl, after byte 0: a line of over 1,048,576 bytes"):
        make(tmp_path / "a.jsonl", tmp_path / "out")
    with pytest.raises(PrepareError, match=r"b\.jsonl\.gz, line 2: a line of over 1,048,576 bytes"):
        make(tmp_path / "b.jsonl.gz", tmp_path / "out")


# -- very long texts --


def trained(pre_tokenizer, **kind) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**kind))
    tokenizer.pre_tokenizer = pre_tokenizer
    corpus = ["the cat sat on the mat\nand then the\n\n  dog 123 sat, too.  the end\n"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


TOKENIZERS = [
    trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    trained(pre_tokenizers.Metaspace()),
]


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(["the", "cat", " ", "\n", "  ", "12", ", ", ".", "é世界", "sat on", "xyz"]), max_size=150),
    st.integers(0, 2),
    st.integers(5, 60),
)
def test_long_texts_give_the_ids_that_they_give_whole(words, which, part):
    text, calls = "".join(words), []

    def encode(some):
        calls.append(some)
        return [np.array(each.ids, np.int32) for each in TOKENIZERS[which].encode_batch(some)]

    whole = encode([text])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LONG", 2 * part)
        patch.setattr(parts, "PART", part)
        patch.setattr(parts, "_AROUND", 24)
        found, short = parts.in_parts(encode)([text, "the cat"])
    assert np.array_equal(found, whole)
    assert np.array_equal(short, encode(["the cat"])[0])


def test_a_long_text_is_cut_and_one_without_a_place_for_it_is_not(monkeypatch):
    monkeypatch.setattr(parts, "LONG", 100)
    monkeypatch.setattr(parts, "PART", 50)
    longest = []

    def encode(some):
        longest.append(max(map(len, some)))
        return [np.array(each.ids, np.int32) for each in TOKENIZERS[0].encode_batch(some)]

    monkeypatch.setattr(parts, "_AROUND", 20)
    parts.in_parts(encode)(["the cat sat on the mat " * 50])
    assert max(longest) < 100
    parts.in_parts(encode)(["x" * 1000])
    assert max(longest) == 1000
