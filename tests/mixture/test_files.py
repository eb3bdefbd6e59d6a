import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixture.documents import Documents, JoinedDocuments
from dynmix.mixture.files import choose, open_path
from dynmix.mixture.flat import FlatTokens
from dynmix.mixture.prepare.names import HELD_OUT
from dynmix.mixture.store import StoreError, TokenStore


def tokens(documents: Documents) -> list[int]:
    return documents.read(np.array([0]), documents.num_tokens)[0].tolist()


def flat(path: Path, first: int) -> list[int]:
    content = list(range(first, first + 100))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<100H", *content))
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stores a and deep/c, and names to be passed over."""
    tmp_path = tmp_path / "corpus"
    TokenStore.write(tmp_path / "a", [[1, 2], [3]])
    TokenStore.write(tmp_path / "deep" / "c", [[4], [], [5, 6]])
    (tmp_path / "manifest.json").write_text("{}")
    for hidden in (".x.bin", "_x.npy", ".cache/x.bin", "a.bin.1-ab.tmp"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"123")
    return tmp_path


def test_a_folder_is_its_token_files_in_sorted_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokens(open_path(folder)) == tokens(open_path(f"{folder}/")) == [1, 2, 3, 4, 5, 6]
    assert [document.tolist() for document in open_path(folder)] == [[1, 2], [3], [4], [], [5, 6]]
    monkeypatch.chdir(folder.parent)
    assert tokens(open_path(f"./{folder.name}")) == tokens(open_path(f"file://{folder}")) == [1, 2, 3, 4, 5, 6]
    both = flat(folder / "flat" / "y.npy", 300), flat(folder / "flat" / "x.bin", 500)
    found = open_path(folder)
    assert isinstance(found, JoinedDocuments)
    assert [type(part) for part in found.parts] == [TokenStore, TokenStore, FlatTokens, FlatTokens]
    assert tokens(found) == [1, 2, 3, 4, 5, 6, *both[1], *both[0]]


def test_globs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for pattern in ("*.idx", "*.bin", "a*", "./*.idx", f"{folder}/?.*", "../*/a.idx", "[a].bin"):
        found = open_path(pattern)
        assert isinstance(found, TokenStore), pattern
        assert found.path == folder / "a"
    assert tokens(open_path("**/*.idx")) == tokens(open_path("*")) == [1, 2, 3, 4, 5, 6]
    assert tokens(open_path("de*")) == [4, 5, 6]
    (folder / "w[1]").mkdir()
    expected = flat(folder / "w[1]" / "x[*].bin", 300)
    assert tokens(open_path("w[1]")) == tokens(open_path("w[1]/x[*].bin")) == expected
    TokenStore.write(folder / "w[2]" / "y?", [[8]])
    assert tokens(open_path("w[2]/y?")) == tokens(open_path("w[2]/y?.bin")) == [8]
    assert tokens(open_path("*/c")) == [4, 5, 6]
    with pytest.raises(StoreError, match=r"nothing\*: no token files .*, there is nothing"):
        open_path("nothing*")


def test_doubled_slashes_are_one(folder: Path) -> None:
    for path in (f"{folder}//", f"/{folder}//a", f"{folder.parent}//{folder.name}//*", f"file://{folder}//**//*.bin"):
        assert tokens(open_path(path))[:3] == [1, 2, 3]


def test_what_is_here_is_local_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TokenStore.write(tmp_path / "lib::v1" / "deep" / "a::b", [[1, 2, 3]])
    monkeypatch.chdir(tmp_path)
    inside = ("", "/deep/a::b", "/deep/a::b.idx", "/*", "/**/*.bin", "/deep/a::*", "/[d]eep")
    for path in (*(f"lib::v1{each}" for each in inside), "lib::*", "l*/deep/a::b", str(tmp_path / "lib::v1" / "deep")):
        assert tokens(open_path(path)) == [1, 2, 3], path
    with pytest.raises(StoreError, match="lib::v1/none: no such file or folder, seen from"):
        open_path("lib::v1/none")


def test_links_that_lead_back_add_nothing(folder: Path) -> None:
    (folder / "self").symlink_to(folder)
    (folder / "deep" / "up").symlink_to("..")
    for path in (folder, f"{folder}/*", f"{folder}/**/*.bin", f"{folder}/**", f"{folder.parent}/c*"):
        assert tokens(open_path(path)) == [1, 2, 3, 4, 5, 6]


def test_single_files(folder: Path) -> None:
    for name in ("a", "a.bin", "a.idx"):
        assert isinstance(open_path(folder / name), TokenStore)
    expected = flat(folder / "train.bin", 300)
    found = open_path(folder / "train.bin", vocab_size=400)
    assert isinstance(found, FlatTokens)
    assert (tokens(found), found.vocab_size) == (expected, 400)
    with pytest.raises(StoreError, match="has token 399, and the vocabulary 399 ids"):
        open_path(folder / "train.bin", vocab_size=399)


def test_what_are_no_token_files_is_refused_with_a_remedy(folder: Path) -> None:
    (folder / "raw").mkdir()
    with pytest.raises(StoreError, match="raw: no token files .*, there is nothing"):
        open_path(folder / "raw")
    for name in ("x.jsonl", "y.jsonl"):
        (folder / "raw" / name).write_text("{}")
    with pytest.raises(StoreError, match=r"there are 2 others \(\.jsonl\)\. Text is made a store by `dynmix prepare`"):
        open_path(folder / "raw")
    with pytest.raises(StoreError, match=r"x\.jsonl is no token file .*dynmix prepare.*`tokenizer=`\. A .*FlatTokens"):
        open_path(folder / "raw" / "x.jsonl")
    for name in ("nowhere", "nowhere.bin", "nowhere.npy"):
        with pytest.raises(StoreError, match=rf"{name}: no such file or folder, seen from .* were looked for\.$"):
            open_path(folder / name)
    for text in ("Is this a path? ", "A long text. " * 1000):
        with pytest.raises(StoreError, match=r"no such file or folder.* If it is text and no path, give datasets"):
            open_path(text)
    flat(folder / "flat" / "train.bin", 300)
    with pytest.raises(StoreError, match=r"train\.bin and no \.idx: if it is a flat file, give .*flat/train\.bin; if"):
        open_path(folder / "flat" / "train")


def test_a_store_that_lost_its_index_is_not_taken_for_a_flat_file(folder: Path) -> None:
    TokenStore.write(folder / "b", [[7]])
    os.unlink(folder / "b.idx")
    for path in (folder, folder / "*.bin"):
        with pytest.raises(StoreError, match=r"b\.bin has no \.idx, and other files beside it have one"):
            open_path(path)
    os.unlink(folder / "b.bin")
    (folder / "b.idx").write_bytes((folder / "a.idx").read_bytes())
    with pytest.raises(StoreError, match=r"b\.bin: no such file, and b\.idx is there without it"):
        open_path(folder)


def test_what_is_held_out_is_not_among_what_is_trained_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    TokenStore.write(folder / f"a{HELD_OUT}", [[7]])
    for path in (folder, folder / "**" / "*.idx"):
        assert tokens(open_path(path)) == [1, 2, 3, 4, 5, 6]
    assert "left out 1 held-out stores, such as" in caplog.text
    for name in ("a.valid", "a.valid.idx", "*.valid.idx"):
        assert tokens(open_path(folder / name)) == [7]
    for above in ("text.validated", "2.valid"):  # a folder's name asks for nothing that is in folders of it
        shutil.copytree(folder, folder.parent / above / "stores")
        for path in ("stores", "stores/*", "../text.validated"):
            assert tokens(open_path(folder.parent / above / path)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("train", "other"), [("train.bin", "val.bin"), ("x_train_01.bin", "x_val_00.bin"), ("train.npy", "a.test.npy")]
)
def test_flat_files_of_other_splits_are_left_out_beside_those_of_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, train: str, other: str
) -> None:
    held_out = flat(tmp_path / "x" / other, 300)
    assert tokens(open_path(tmp_path / "x")) == held_out
    assert "left out" not in caplog.text
    expected = flat(tmp_path / "x" / train, 500)
    for path in (tmp_path / "x", tmp_path / "*"):
        assert tokens(open_path(path)) == expected
    assert f"left out 1 held-out files, such as {tmp_path / 'x' / other}" in caplog.text
    assert tokens(open_path(tmp_path / "x" / other)) == held_out


@settings(max_examples=30)
@given(st.sets(st.sampled_from("abcd"), max_size=3), st.sets(st.sampled_from("efgh"), max_size=3), st.randoms())
def test_a_store_is_chosen_once_and_sorted(stores: set[str], flats: set[str], random: object) -> None:
    names = [f"r/s/{stem}{end}" for stem in stores for end in (".bin", ".idx")] + [f"r/{stem}.npy" for stem in flats]
    random.shuffle(names)  # type: ignore[attr-defined]
    expected = sorted([f"r/s/{stem}.idx" for stem in stores] + [f"r/{stem}.npy" for stem in flats])
    if expected:
        assert choose(names, "r") == choose([*names, "r/.x.npy", "r/_y/z.bin"], "r/") == expected
