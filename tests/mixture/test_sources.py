import contextlib
import pickle
import struct
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, IterableDataset

from dynmix import FlatTokens, MixtureDataset, TokenStore
from dynmix.mixture.documents import Documents
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.prepare import prepare
from dynmix.mixture.sources import as_sequences, open_documents, open_domains
from dynmix.mixture.store import StoreError
from dynmix.mixture.view import DocumentView, RowView
from tests.small import word_tokenizer

datasets = pytest.importorskip("datasets")

Content = list[list[int]]


# The word of a number is its id; 0 is EOS.
TOKENIZER = word_tokenizer(
    ["<eos>", *map(str, range(1, 1000))], "<eos>", pre_tokenizers.Whitespace(), eos_token="<eos>"
)


def store(folder: Path, content: Content) -> Any:
    return TokenStore.write(folder / "store", content)


def store_path(folder: Path, content: Content) -> Any:
    return str(store(folder, content).path)


def stores(folder: Path, content: Content) -> Any:
    for k, document in enumerate(content):
        TokenStore.write(folder / "stores" / f"{k:02}", [document, []] if document else [[], [1]])
    return folder / "stores" / "*.idx"


def flat(folder: Path, content: Content) -> Any:
    tokens = list(chain(*content))
    (folder / "train.bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
    return FlatTokens(folder / "train.bin", dtype="uint16")


def flat_npy(folder: Path, content: Content) -> Any:
    np.save(folder / "x.npy", np.array(list(chain(*content)), np.uint32))
    return folder / "x.npy"


def hf_ids(folder: Path, content: Content) -> Any:
    return datasets.Dataset.from_dict({"input_ids": content})


def hf_saved(folder: Path, content: Content) -> Any:
    hf_ids(folder, content).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def hf_view(folder: Path, content: Content) -> Any:
    return hf_ids(folder, content[::-1]).select(range(len(content))[::-1])


def view(folder: Path, content: Content) -> Any:
    return DocumentView([hf_ids_documents(content[::-1])], np.zeros(len(content), int), range(len(content))[::-1])


def hf_ids_documents(content: Content) -> Documents:
    opened = open_documents(datasets.Dataset.from_dict({"input_ids": content}))
    assert isinstance(opened, Documents)
    return opened


def listed(folder: Path, content: Content) -> Any:
    return [*([store(folder, content[:1])] if content[0] else []), hf_ids(folder, content[bool(content[0]) :])]


def remote(folder: Path, content: Content) -> Any:
    made = store(folder, content)
    for end in (".bin", ".idx"):
        fsspec.filesystem("memory").pipe(f"/sources/{folder.name}/x{end}", Path(f"{made.path}{end}").read_bytes())
    return f"memory://sources/{folder.name}"


KINDS: list[Callable[[Path, Content], Any]] = [
    *(store, store_path, stores, flat, flat_npy, hf_ids, hf_saved, hf_view, view, listed, remote)
]


@given(
    st.lists(st.lists(st.integers(1, 999), max_size=9), min_size=1, max_size=6).filter(any),
    st.integers(1, 9),
    st.data(),
)
@settings(max_examples=25)
def test_every_kind_of_source_is_the_tokens_of_its_documents(
    content: Content, length: int, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    if kind is stores:
        content = [document or [1] for document in content]
    every = list(chain(*content))
    checked = data.draw(st.sampled_from([None, TOKENIZER]))
    expected = [every[at : at + length] for at in range(0, len(every) // length * length, length)]
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = kind(folder, content)
        if not expected:
            with pytest.raises(ValueError, match=f"domain 'x' has not one whole sequence .{len(every)} tokens, of"):
                as_sequences("x", source, length, cache_dir=folder / "cache")
            return
        rows = as_sequences("x", source, length, cache_dir=folder / "cache", tokenizer=checked)
        for each in (rows, pickle.loads(pickle.dumps(rows))):
            assert [row["input_ids"].tolist() for row in each] == expected


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[MixtureDataset, dict[str, list[int]]]:
    """One domain of each kind, and the tokens of each."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("mixed")
    domains, tokens = {}, {}
    for kind in KINDS:
        name = kind.__name__
        (folder / name).mkdir()
        content = [rng.integers(1, 999, n).tolist() for n in rng.integers(1, 90, 25)]
        domains[name], tokens[name] = kind(folder / name, content), list(chain(*content))
    content = [rng.integers(1, 999, n).tolist() for n in rng.integers(1, 90, 25)]
    domains["text"] = datasets.Dataset.from_dict({"text": [" ".join(map(str, document)) for document in content]})
    tokens["text"] = list(chain(*([*document, 0] for document in content)))
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "cache_dir": folder / "cache"}
    return MixtureDataset(domains, "uniform", num_samples=600, sequence_length=16, block=32, **options), tokens


def test_a_mixture_of_all_kinds_gives_the_rows_of_the_schedule(
    mixed: tuple[MixtureDataset, dict[str, list[int]]],
) -> None:
    dataset, tokens = mixed
    assert dataset.sizes == {name: len(content) // 16 for name, content in tokens.items()}
    domain, row, _ = dataset.schedule.assign(0, 600)
    assert set(domain.tolist()) == set(range(len(tokens)))
    expected = [
        tokens[dataset.domains[d]][16 * r : 16 * r + 16] for d, r in zip(domain.tolist(), row.tolist(), strict=True)
    ]
    for each in (dataset, pickle.loads(pickle.dumps(dataset))):
        loaded = torch.cat([batch["input_ids"] for batch in DataLoader(each, batch_size=50)])
        assert loaded.tolist() == expected
    assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint


def test_domains_that_join_view_any_kind(mixed: tuple[MixtureDataset, dict[str, list[int]]], tmp_path: Path) -> None:
    dataset, tokens = pickle.loads(pickle.dumps(mixed))
    names = list(dataset.domains)
    dataset.extend({"new": (range(len(names)), [2] * len(names))}, tmp_path)
    assert [dataset.sequence("new", k)["input_ids"].tolist() for k in range(len(names))] == [
        tokens[name][32:48] for name in names
    ]


def generator() -> Any:
    yield {"input_ids": [1]}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return generator()


class Columns:
    """As a DataFrame of pandas is: `[]` is a column."""

    columns = ("input_ids",)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, name: Any) -> Any:
        return {"input_ids": [[1]] * 3}[name]


class Endless:
    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [index]}


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (generator, "function"),
        (generator(), "generator"),
        (iter([]), "list_iterator"),
        (Stream(), "Stream"),
        (datasets.Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset(), "IterableDataset"),
        (DataLoader([1]), "DataLoader"),
    ],
)
def test_what_has_no_random_access_is_refused_with_the_remedy(source: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"domain 'x' is a {kind}, which has no random access: .*MixtureStream"):
        MixtureDataset({"x": source}, num_samples=1, sequence_length=1)
    with pytest.raises(ValueError, match=f"the source is a {kind}, .*MixtureStream"):
        open_documents(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.array(3), "domain 'x' is a ndarray: give a token store, a path"),
        (None, "domain 'x' is a NoneType: give a token store, a path"),
        (Endless(), "domain 'x' is a Endless: give a token store"),
        ({"train": 1, "test": 2}, r"domain 'x' is a dict of \['train', 'test'\]: give one of these"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": [[1]]})}),
            r"domain 'x' is a DatasetDict of \['train'\]",
        ),
        (
            datasets.Dataset.from_dict({"content": ["a"], "n": [1], "l": [[1]]}),
            r"neither input_ids nor 'text': its columns are 'content' \(string\), 'n' \(int64\), 'l' \(List\); rename",
        ),
        (datasets.Dataset.from_dict({"text": ["a"]}), "domain 'x': a dataset with 'text' and no input_ids: give tok"),
        (datasets.Dataset.from_dict({"input_ids": ["a"]}), "domain 'x': column 'input_ids' of the dataset is string"),
        (datasets.Dataset.from_dict({"input_ids": [[], []]}), r"has not one whole sequence \(0 tokens, of 1\)"),
        ("nowhere", r"domain 'x': nowhere: no such file or folder"),
        (["Some text.", "More of it."], r"domain 'x': .*text and no path, give datasets\.Dataset\.from_dict"),
        *(
            (rows, r"item 0 of domain 'x' is no dict with input_ids, but a .* TokenStore\.write")
            for rows in ([1, 2], [[1], [2]], np.arange(4), np.ones((2, 2), int), torch.ones(4).long(), torch.ones(2, 2))
        ),
        ([{"input_ids": [-100]}], "item 0 of domain 'x' have -100: token ids are not negative"),
        (
            Columns(),
            r"domain 'x' is a Columns, which has columns and no items .*\.from_pandas",
        ),
        ([], "domain 'x' has not one whole sequence"),
    ],
)
def test_what_is_no_source_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureDataset({"x": source}, num_samples=1, sequence_length=1)


def test_text_needs_a_column_of_strings(tmp_path: Path) -> None:
    for content, message in (
        ([1], "int64, not a string"),
        (["", ""], "domain 'x'.*empty"),
        (["a", None], "null.*filter"),
    ):
        with pytest.raises(ValueError, match=message):
            as_sequences("x", datasets.Dataset.from_dict({"text": content}), 1, tokenizer=TOKENIZER, cache_dir=tmp_path)
    renamed = datasets.Dataset.from_dict({"content": ["7 8"]})
    opened = open_documents(renamed, tokenizer=TOKENIZER, text_field="content", cache_dir=tmp_path)
    assert [document.tolist() for document in opened] == [[7, 8, 0]]  # type: ignore[attr-defined]


def test_rows_of_one_length_need_no_sequence_length() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]]})
    assert [row["input_ids"].tolist() for row in as_sequences("x", rows, None)] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert len(as_sequences("x", rows, 3)) == 2
    ragged = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4], [5]]})
    with pytest.raises(ValueError, match="sequence_length is missing: domain 'x' is documents"):
        as_sequences("x", ragged, None)


def test_labels_of_a_dataset_are_those_of_its_items() -> None:
    ids = {"input_ids": [[1, 2], [3, 4]]}
    assert isinstance(open_documents(datasets.Dataset.from_dict(ids | {"labels": ids["input_ids"]})), Documents)
    classes = datasets.Dataset.from_dict(ids | {"labels": [0, 1]})
    with pytest.raises(ValueError, match=r"labels of item 0 of domain 'x' are int64 of shape \(\), not 2 integers"):
        MixtureDataset({"x": classes}, num_samples=2).sequence("x", 0)
    dataset = MixtureDataset({"x": datasets.Dataset.from_dict(ids | {"labels": [[-100, 2], [3, 7]]})}, num_samples=2)
    assert sorted(dataset[g]["labels"].tolist() for g in range(2)) == [[-100, 2], [3, 7]]


def test_padded_and_transformed_rows_stay_as_they_are() -> None:
    whole = {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 1]]}
    for mask in (whole["attention_mask"], [None, None], [None, [1, 1]]):
        assert isinstance(open_documents(datasets.Dataset.from_dict(whole | {"attention_mask": mask})), Documents)
    padded = datasets.Dataset.from_dict(whole | {"attention_mask": [[1, 1], [1, 0]]})
    assert open_documents(padded) is padded
    dataset = MixtureDataset({"x": padded}, num_samples=2)
    assert sorted(dataset[g]["labels"].tolist() for g in range(2)) == [[1, 2], [3, -100]]
    with pytest.raises(ValueError, match="has padding, labels or a transform, and such rows are not joined"):
        open_documents([padded, padded])
    transformed = datasets.Dataset.from_dict({"text": ["7 8"]})
    transformed.set_transform(lambda batch: {"input_ids": [[7, 8] for _ in batch["text"]]})
    assert [row["input_ids"] for row in as_sequences("x", transformed, 2)] == [[7, 8]]


def test_ids_beyond_the_vocabulary_of_the_tokenizer_are_refused(tmp_path: Path) -> None:
    for kind in (store, flat, hf_ids):
        as_sequences("x", kind(tmp_path, [[5, 999]]), 1, tokenizer=TOKENIZER)
        with pytest.raises(StoreError, match="domain 'x': .*has token 1000, and the vocabulary 1000 ids"):
            as_sequences("x", kind(tmp_path, [[5, 1000]]), 1, tokenizer=TOKENIZER)


def test_rows_of_sequences_of_another_tokenizer_are_refused_as_their_documents_are(tmp_path: Path) -> None:
    made = PackedSequences(prepare({"a": datasets.Dataset.from_dict({"text": ["5 7"]})}, tmp_path, TOKENIZER)["a"], 1)
    beyond = PackedSequences(store(tmp_path, [[5, 1000]]), 1)
    other = word_tokenizer(["<eos>", *map(str, range(999, 0, -1))], "<eos>", pre_tokenizers.Whitespace())
    for view in (lambda rows: rows, lambda rows: RowView([RowView([rows], [0], [0])], [0], [0])):
        assert len(open_domains({"x": view(made)}, 1, tokenizer=TOKENIZER)["x"])
        with pytest.raises(ValueError, match="a: made with another tokenizer"):
            open_domains({"x": view(made)}, 1, tokenizer=other)
        with pytest.raises(ValueError, match="store.*has token 1000, and the vocabulary 1000 ids"):
            open_domains({"x": view(made), "y": view(beyond)}, 1, tokenizer=TOKENIZER)


def test_a_store_that_many_views_are_on_is_searched_for_such_ids_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, searched = PackedSequences(store(tmp_path, [[5, 7]]), 1), list[Documents]()
    monkeypatch.setattr("dynmix.mixture.sources.check_vocabulary", lambda documents, *_: searched.append(documents))
    open_domains({name: RowView([rows], [0], [row]) for row, name in enumerate("ab")}, 1, tokenizer=TOKENIZER)
    assert searched == [rows.store]


def test_sequences_that_do_not_say_where_documents_end_are_not_taken_for_one(tmp_path: Path) -> None:
    documents = store(tmp_path, [[5, 6], [7, 8, 9]])
    known, unknown = (PackedSequences(documents, 5, each_document=apart) for apart in (True, False))
    apart = MixtureDataset({"x": RowView([known], [0], [0])}, num_samples=1, boundaries="position_ids")
    assert apart[0]["position_ids"].tolist() == [0, 1, 0, 1, 2]
    for rows in (unknown, RowView([known, unknown], [0, 1], [0, 0])):
        assert MixtureDataset({"x": rows}, num_samples=1)[0]["labels"].tolist() == [5, 6, 7, 8, 9]
        with pytest.raises(ValueError, match="domain 'x': its sequences were packed without boundaries"):
            MixtureDataset({"x": rows}, num_samples=1, boundaries="position_ids")


def test_items_with_ids_beyond_the_vocabulary_are_refused() -> None:
    good, bad = (
        {"input_ids": [999] * 4, "labels": [-100, 1, 2, 3]},
        {"input_ids": [1000] * 4, "labels": [-100, 1, 2, 3]},
    )
    columns = {"input_ids": [[1000] * 4] * 9, "labels": [[-100, 1, 2, 3]] * 9}
    for source in ([good, bad], datasets.Dataset.from_dict(columns)):
        with pytest.raises(ValueError, match="domain 'x' has token 1000, and the vocabulary 1000 ids"):
            as_sequences("x", source, None, tokenizer=TOKENIZER)
        assert len(as_sequences("x", source, None)) == len(source)
    assert len(as_sequences("x", [good] * 3, None, tokenizer=TOKENIZER)) == 3


def test_documents_of_flat_files_end_with_the_eos_of_the_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([5, 999, 0, 7, 0, 8, 9, 0], np.uint16))
    for apart in ({"each_document": True}, {"packing": "best_fit"}):
        options: dict[str, Any] = apart | {"tokenizer": TOKENIZER}
        rows = as_sequences("x", path, 3, **options)
        assert isinstance(rows, PackedSequences)
        assert [document.tolist() for document in rows.store] == [[5, 999, 0], [7, 0], [8, 9, 0]]
        for source, asked in ((path, apart), ([FlatTokens(path)], options)):
            with pytest.raises(StoreError, match="domain 'x': .* does not say where its documents end"):
                as_sequences("x", source, 3, **asked)
        assert not caplog.records
        as_sequences("x", FlatTokens(path, eos_token_id=1), 3, **options)
        assert "is one document: the token that was to end" in caplog.text
        caplog.clear()
    # Where nothing asks for them, no pass over the file looks for documents.
    assert len(as_sequences("x", path, 4, tokenizer=TOKENIZER).store) == 1  # type: ignore[attr-defined]


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    for wrong in (7, Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))):
        with pytest.raises(
            StoreError, match=f"domain 'x': tokenizer= is a {type(wrong).__name__}: give a tokenizer of"
        ):
            as_sequences("x", store(tmp_path, [[1]]), 1, tokenizer=wrong)  # type: ignore[arg-type]


def test_a_saved_dataset_that_is_cut_or_of_several_splits_is_refused(tmp_path: Path) -> None:
    folder = hf_saved(tmp_path, [[1, 2, 3]] * 500)
    file = next(folder.glob("*.arrow"))
    content = file.read_bytes()
    for cut in range(0, len(content), 97):
        file.write_bytes(content[:cut])
        with contextlib.suppress(StoreError):
            assert [row["input_ids"].tolist() for row in as_sequences("x", folder, 1500)] == [[1, 2, 3] * 500]
    (folder / "state.json").write_text("{")
    with pytest.raises(StoreError, match="saved is a damaged or incomplete dataset"):
        open_documents(folder)
    datasets.DatasetDict({"train": hf_ids(tmp_path, [[1]])}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(StoreError, match="splits is a DatasetDict: give the folder of one of its splits"):
        open_documents(tmp_path / "splits")


@pytest.mark.parametrize("column", ["input_ids", "labels", "attention_mask"])
def test_a_dataset_whose_lists_overlap_is_refused(column: str) -> None:
    def lists(*bounds: int) -> Any:
        return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(range(1, 7)))

    table = pa.table({"input_ids": lists(0, 2, 4, 6), column: lists(0, 5, 2, 6)})
    with pytest.raises(StoreError, match="domain 'x': a damaged dataset: .*; save it anew"):
        as_sequences("x", datasets.Dataset(datasets.table.InMemoryTable(table)), 2)


def test_a_folder_or_glob_of_saved_datasets_is_one_after_the_other(tmp_path: Path) -> None:
    for name, ids in (("b", [[3, 4], [5]]), ("a", [[1, 2]])):
        datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(tmp_path / "all" / name)
    for path in (tmp_path / "all", tmp_path / "all" / "*", tmp_path / "all" / "*" / "*.json"):
        assert [document.tolist() for document in open_documents(path)] == [[1, 2], [3, 4], [5]]
    assert [document.tolist() for document in open_documents(tmp_path / "all" / "b*")] == [[3, 4], [5]]
    datasets.Dataset.from_dict({"input_ids": [[6]], "labels": [[7]]}).save_to_disk(tmp_path / "all" / "c")
    with pytest.raises(ValueError, match="has padding, labels or a transform, and such rows are not joined"):
        open_documents(tmp_path / "all")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": [[8]]})}).save_to_disk(
        tmp_path / "all" / "d"
    )
    with pytest.raises(StoreError, match="d is a DatasetDict: give the folder of one of its splits"):
        open_documents(tmp_path / "all")
    TokenStore.write(tmp_path / "all" / "store", [[9]])
    assert [document.tolist() for document in open_documents(tmp_path / "all")] == [[9]]


def test_a_damaged_index_is_an_error_or_the_same_rows(tmp_path: Path) -> None:
    path = store(tmp_path, [[1, 2, 60_000], [], [4, 5, 6, 7], [8]]).path
    file, expected = Path(f"{path}.idx"), [[1, 2, 60_000], [4, 5, 6]]
    content = file.read_bytes()
    damaged = [content[:cut] for cut in range(len(content))]
    for at in range(len(content)):
        # Any dtype code; of the others some bits, all bits, and two counts.
        flipped = {content[at] ^ mask for mask in (1, 4, 128, 255)} | {0, 1}
        values = range(16) if at == 17 else flipped
        damaged += [content[:at] + bytes([value]) + content[at + 1 :] for value in values]
    same = 0
    for each in damaged:
        file.write_bytes(each)
        with contextlib.suppress(ValueError):  # StoreError, and that of a row that is read
            assert [row["input_ids"].tolist() for row in as_sequences("x", path, 3)][:2] == expected
            same += 1
    assert same > 1
