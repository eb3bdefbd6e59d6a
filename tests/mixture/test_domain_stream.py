import json
from collections.abc import Iterator
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.mixture.domain_stream import DomainReader, Encoder, kept_aside
from dynmix.mixture.items import Items
from tests.small import word_tokenizer

plain = Encoder(None, "text")


class Letters:
    """A tokenizer as those of transformers: a letter a token, 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


def words() -> Any:
    """The word of a number is its id; 0 is EOS."""
    return word_tokenizer(["<eos>", *map(str, range(1, 1000))], "<eos>", eos_token="<eos>")


def documents(*lengths: int) -> list[dict[str, Any]]:
    ends = np.cumsum([0, *lengths])
    return [{"input_ids": list(range(a, b))} for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def reader(source: Any, length: int, number: int = 0, of: int = 1, state: Any = None, **more: Any) -> DomainReader:
    items = Items("a", source, number, of, state=None if state is None else state["items"])
    return DomainReader(items, plain, length, readers=of, state=state, **more)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 25),
)
def test_sequences_are_the_items_end_to_end(lengths: list[int], length: int, of: int, left: int) -> None:
    docs = documents(*lengths)
    for number in range(of):
        mine = islice(cycle(docs), number, None, of)
        flat = chain.from_iterable(doc["input_ids"] for doc in islice(mine, 5000))
        if not any(doc["input_ids"] for doc in islice(cycle(docs), number, of * len(docs) + 1, of)):
            continue  # this share holds empty items only, pass after pass
        first = reader(docs, length, number, of)
        for _ in range(left):
            assert first.sequence().tolist() == list(islice(flat, length))
        state = json.loads(json.dumps(first.state_dict()))
        assert len(state["carried"]) < length
        again = reader(docs, length, number, of, state)
        assert again.state_dict() == state
        for _ in range(12):
            assert again.sequence().tolist() == first.sequence().tolist() == list(islice(flat, length))


def test_items_of_one_length_pass_through() -> None:
    docs = documents(4, 4, 4)
    one = reader(docs, 4)
    assert [one.sequence().tolist() for _ in docs] == [doc["input_ids"] for doc in docs]


def test_a_state_stays_small_whatever_the_item() -> None:
    one = reader(documents(3, 1_000_000), 16)
    for _ in range(1000):
        one.sequence()
    assert len(json.dumps(one.state_dict())) < 200
    with pytest.raises(ValueError, match="domain 'a' gives other items than it did"):
        reader(documents(3, 500), 16, state=one.state_dict())


def test_a_source_may_give_the_state_that_it_goes_on_to_change() -> None:
    class Source:
        def __init__(self) -> None:
            self.state = {"row": 0}

        def __iter__(self) -> Iterator[dict[str, Any]]:
            while True:
                self.state["row"] += 1
                yield {"input_ids": [self.state["row"]] * 7}

        def state_dict(self) -> dict[str, int]:
            return self.state

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.state = state

    one = reader(Source(), 4)
    for _ in range(9):
        one.sequence()
        state = one.state_dict()
    rest = [one.sequence().tolist() for _ in range(9)]
    again = reader(Source(), 4, state=state)
    assert [again.sequence().tolist() for _ in range(9)] == rest


def test_texts_are_tokenised(tmp_path: Path) -> None:
    letters = Encoder(Letters(), "content")
    assert letters({"content": "ab"}, "a").tolist() == letters("ab", "a").tolist() == [97, 98, 0]
    assert letters({"content": b"\xc3\xa4"}, "a").tolist() == [228, 0]
    assert letters("", "a").tolist() == []
    assert letters({"content": "ab", "input_ids": [7]}, "a").tolist() == [7]
    assert Encoder(lambda text: [len(text)], "text")("four", "a").tolist() == [4]
    words().save_pretrained(tmp_path)
    for each in (tmp_path, str(tmp_path), words()):
        assert Encoder(each, "text")("5 7", "a").tolist() == [5, 7, 0]


def test_a_tokenizer_without_eos_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Letters()
    tokenizer.eos_token_id = None  # type: ignore[assignment]
    assert Encoder(tokenizer, "text")("ab", "a").tolist() == [97, 98]
    assert "no EOS" in caplog.text


@pytest.mark.parametrize(
    ("tokenizer", "item", "message"),
    [
        (None, "text", "pass tokenizer="),
        (Letters(), {"body": "x"}, r"keys \['body'\]: pass text_field="),
        (Letters(), {"text": None}, "under 'text' a NoneType, and no string: filter such out"),
        (Letters(), 3, "is a int: give mappings with input_ids"),
        (words(), "\ud800", "is not for the tokenizer, as one with half a surrogate pair"),
        (Letters(), b"\xff", "not UTF-8"),
        (None, {"input_ids": [[1, 2]]}, r"int64 of shape \(1, 2\)"),
        (None, {"input_ids": [0.5]}, "float64"),
        (lambda text: text, "text", "not a vector of integers"),
        (words(), {"input_ids": [5, 1000]}, "has token 1000, and the vocabulary 1000 ids"),
        (None, {"input_ids": [5, -100]}, "has token -100: ids are not negative"),
    ],
)
def test_items_without_tokens_are_named(tokenizer: Any, item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)domain 'a'.*{message}"):
        Encoder(tokenizer, "text")(item, "a")


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer is a int"):
        Encoder(3, "text")


def test_probes_are_never_trained_on() -> None:
    docs = documents(*[9] * 20)
    probes = kept_aside("a", docs, plain, 4, 3)
    assert probes.rows.tolist() == np.arange(12).reshape(3, 4).tolist()
    one = reader(docs, 4, held=probes.held)
    trained = np.concatenate([one.sequence() for _ in range(60)])
    assert set(trained.tolist()) == set(range(18, 180))


@pytest.mark.parametrize("docs", [documents(8), documents(8, 3), [{"input_ids": [1, 2, 3, 4]}] * 50])
def test_a_domain_of_probes_alone_is_trained_on_and_says_so(docs: Any, caplog: pytest.LogCaptureFixture) -> None:
    probes = kept_aside("a", docs, plain, 4, 3)
    assert not probes.held
    assert 2 <= len(probes.rows) <= 3
    assert "they are trained on as well" in caplog.text


def test_a_domain_without_one_sequence_has_no_probes() -> None:
    with pytest.raises(ValueError, match=r"not one whole sequence \(3 tokens, of 4\)"):
        kept_aside("a", documents(2, 1), plain, 4, 3)


def test_items_that_are_all_empty_end_in_an_error() -> None:
    with pytest.raises(ValueError, match="domain 'a' gave no token"):
        reader([{"input_ids": []}] * 3, 4, 1, 2).sequence()


def test_padding_and_labels_of_an_items_own_are_not_learnt_silently() -> None:
    encode, ids = Encoder(None, "text"), [5, 6, 7, 0]
    for plain in ({"labels": ids}, {"attention_mask": [1, 1, 1, 1]}, {"labels": 1}, {"labels": None}):
        assert encode({"input_ids": ids, **plain}, "a").tolist() == ids
    with pytest.raises(ValueError, match="domain 'a' is padded"):
        encode({"input_ids": ids, "attention_mask": [1, 1, 1, 0]}, "a")
    with pytest.raises(ValueError, match="domain 'a' has labels that are not its input_ids"):
        encode({"input_ids": np.array(ids), "labels": np.array([-100, -100, 7, 0])}, "a")
