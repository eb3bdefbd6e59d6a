"""Plain text: a document ends at a blank line, wherever the file is cut."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.mixture.prepare import PrepareError, prepare
from dynmix.mixture.prepare.inputs import File
from dynmix.mixture.prepare.pieces import Fields
from dynmix.mixture.store import TokenStore
from tests.small import word_tokenizer

TOKENIZER = word_tokenizer(["<eos>", "line", "and", "another", "?"], "?", eos_token="<eos>")
LINES = st.sampled_from(["", " ", "\t", "one", " two ", "Grüße, 世界", "x" * 40, "\x0c"])


def slowly(text: str) -> list[str]:
    """All at once, line by line."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip(" \t\r\x0c"):
            found[-1].append(line)
        else:
            found.append([])
    return ["\n".join(lines).rstrip("\r") for lines in found if lines]


@given(
    lines=st.lists(LINES, max_size=30),
    piece=st.integers(1, 60),
    end=st.sampled_from(["\n", "\r\n"]),
    closed=st.booleans(),
)
def test_paragraphs_are_documents_wherever_it_is_cut(
    lines: list[str], piece: int, end: str, closed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    text = end.join(lines) + (end if closed else "")
    path.write_bytes(text.encode())
    pieces = list(File(path).pieces(Fields("text"), piece))
    assert sum(each.size for each in pieces) == path.stat().st_size
    assert [text for each in pieces for _, text, _ in each.records(Fields("text"))] == slowly(text)


def test_a_line_that_ends_with_a_block_ends_no_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynmix.mixture.prepare.inputs._BLOCK", 16)
    file = tmp_path / "a.txt"
    for length in range(60):
        file.write_text("x" * length + " " * 20 + "y\nthe same\n\nnext\n")
        found = [text for piece in File(file).pieces(Fields("text"), 8) for _, text, _ in piece.records(Fields("text"))]
        assert found == ["x" * length + " " * 20 + "y\nthe same", "next"]
        file.write_text("x" * length + "\nthe same\n\nnext\n")
        found = [text for piece in File(file).pieces(Fields("text"), 8) for _, text, _ in piece.records(Fields("text"))]
        assert found == [("x" * length + "\nthe same").lstrip(), "next"]


def test_text_becomes_a_store_and_a_held_out_one(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"line {i}\nand another" for i in range(100)))
    stores = prepare(tmp_path / "book.txt", tmp_path / "out", TOKENIZER, held_out=0.2, progress=False)
    assert 0 < len(TokenStore.open(tmp_path / "out/book.valid")) == 100 - len(stores["book"])
    assert stores["book"][0].tolist() == [1, 4, 2, 3, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\n\nalso\nnot \xff\xfe this\n", "the text from line 3 on: not UTF-8"),
        (b"fine\n\nalso\n" + bytes(512), "the text from line 3 on: it has NUL bytes"),
        ("line\n\nand another\n".encode("utf-16-le"), "the text from line 1 on: it has NUL bytes"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(PrepareError, match=f"bad.txt, {message}"):
        prepare(tmp_path / "bad.txt", tmp_path / "out", TOKENIZER, progress=False)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + (b"line\n\n" if name == "a.txt" else b'{"text": "line"}\n') * 3
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    store = prepare(tmp_path / name, tmp_path / "out", TOKENIZER, progress=False)["a"]
    assert [document.tolist() for document in store] == [[1, 0]] * 3
