import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dynmix.mixture import prepare as prepare_module
from dynmix.mixture.documents import JoinedDocuments
from dynmix.mixture.store import TokenStore
from dynmix.mixture.text import check_stores, tokenised, vocabulary_size
from dynmix.mixture.view import DocumentView
from tests.small import word_tokenizer

datasets = pytest.importorskip("datasets")

TEXTS = ["w1 w2 w3", "", "w4", "w5 w5"]
TOKENS = [[1, 2, 3, 0], [4, 0], [5, 5, 0]]


def words(first: int = 0, count: int = 10) -> PreTrainedTokenizerFast:
    """A word is a token: "w7" is 7 - first; 0 is EOS."""
    known = ["<eos>", *(f"w{i + first}" for i in range(1, count))]
    return word_tokenizer(known, "<eos>", pre_tokenizers.Whitespace(), eos_token="<eos>")


def texts(content: list[str] = TEXTS) -> Any:
    return datasets.Dataset.from_dict({"text": content, "number": list(range(len(content)))})


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were prepared."""
    folders: list[Path] = []
    prepare = prepare_module.prepare

    def counted(inputs: Any, output: Path, *args: Any, **options: Any) -> Any:
        folders.append(output)
        return prepare(inputs, output, *args, **options)

    monkeypatch.setattr(prepare_module, "prepare", counted)
    return folders


def test_text_is_tokenised_once_for_a_dataset_and_a_tokenizer(tmp_path: Path, prepared: list[Path]) -> None:
    for _ in range(2):
        store = tokenised(texts(), words(), "text", tmp_path)
        assert [document.tolist() for document in store] == TOKENS
    assert len(prepared) == 1
    words().save_pretrained(str(tmp_path / "tokenizer"))
    assert tokenised(texts(), tmp_path / "tokenizer", "text", tmp_path).path == store.path
    assert len(prepared) == 1
    others = [
        tokenised(texts(["w1 w2 w3", "w4", "w6"]), words(), "text", tmp_path),
        tokenised(texts().select([3, 0]), words(), "text", tmp_path),
        tokenised(texts(), words(first=1), "text", tmp_path),
    ]
    assert [other[-1].tolist() for other in others] == [[6, 0], [1, 2, 3, 0], [4, 4, 0]]
    assert len({other.path for other in others} | {store.path}) == len(prepared) == 4


def test_what_broke_off_is_made_anew(tmp_path: Path, prepared: list[Path]) -> None:
    store = tokenised(texts(), words(), "text", tmp_path)
    Path(f"{store.path}.idx").unlink()
    assert [document.tolist() for document in tokenised(texts(), words(), "text", tmp_path)] == TOKENS
    assert len(prepared) == 2


def test_vocabulary_size_is_that_of_the_tokenizer_as_it_is() -> None:
    tokenizer = words()
    assert vocabulary_size(tokenizer) == 10
    tokenizer.add_tokens(["<new>"])
    assert vocabulary_size(tokenizer) == 11


def test_stores_of_another_tokenizer_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    store = tokenised(texts(), words(), "text", tmp_path)
    plain = TokenStore.write(tmp_path / "plain", [[1]])  # nothing says what it was made with
    check_stores([plain, store, [1]], words())
    for documents in (store, JoinedDocuments([plain, store]), DocumentView([store], np.array([0]), np.array([1]))):
        with pytest.raises(ValueError, match="made with another tokenizer"):
            check_stores([plain, documents], words(first=1))


def test_a_process_waits_for_the_one_that_tokenises(tmp_path: Path, prepared: list[Path]) -> None:
    from dynmix.mixture.remote import one_at_a_time

    context = multiprocessing.get_context("fork")
    done = context.SimpleQueue()

    def second() -> None:
        with one_at_a_time(tmp_path, "key"):
            done.put("second")

    with one_at_a_time(tmp_path, "key"):
        process = context.Process(target=second)
        process.start()
        process.join(0.2)
        done.put("first")
    process.join()
    assert [done.get(), done.get()] == ["first", "second"]
