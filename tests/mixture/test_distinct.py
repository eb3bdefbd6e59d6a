import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix import TokenStore
from dynmix.mixture import distinct
from dynmix.mixture.distinct import distinct_epochs, distinct_share
from dynmix.mixture.documents import ArrayDocuments


class InMemory(ArrayDocuments):
    """One document."""

    where, fingerprint = "these tokens", ""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = np.array(tokens, np.uint16)

    def __len__(self) -> int:
        return 1

    def starts(self, documents: np.ndarray) -> np.ndarray:
        return documents * self.num_tokens


@given(tokens=st.lists(st.integers(0, 3), max_size=60), gram=st.integers(1, 9), chunk=st.integers(1, 70))
def test_share_is_that_of_the_grams_that_differ_however_they_are_read(tokens: list[int], gram: int, chunk: int) -> None:
    grams = [tuple(tokens[i : i + gram]) for i in range(len(tokens) - gram + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distinct, "_CHUNK", chunk)
        share = distinct_share(InMemory(tokens), gram=gram)
    assert share == (len(set(grams)) / len(grams) if grams else 1)


def test_a_sample_of_the_grams_tells_the_share_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 1000, 20_000)
    copies = np.tile(text, 10)
    copies[rng.random(len(copies)) < 0.015] = 1001  # a near-duplicate each
    documents = InMemory([*copies.tolist(), *rng.integers(0, 1000, 50_000).tolist()])
    every = distinct_share(documents)
    assert 0.25 < every < 0.45  # 20,000 and 50,000 of 250,000 are new, and of the other grams one in nine
    monkeypatch.setattr(distinct, "_KEPT", 2_000)
    assert distinct_share(documents) == pytest.approx(every, abs=0.03)
    assert distinct_share(documents) != every


def test_limits_count_each_text_once_and_take_any_documents(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    clean = rng.integers(0, 30_000, 5000)
    store = TokenStore.write(tmp_path / "clean", [clean[:3000], clean[3000:]])
    TokenStore.write(tmp_path / "again", [clean[:1000]] * 5)
    limits = distinct_epochs({"clean": store, "again": tmp_path / "again"}, 2)
    assert limits == {"clean": pytest.approx(2, abs=1e-3), "again": pytest.approx(0.4, abs=0.01)}


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="gram=0"):
        distinct_share(InMemory([1, 2, 3]), gram=0)
    with pytest.raises(ValueError, match=re.escape("domain 'rows' is no documents")):
        distinct_epochs({"rows": [{"input_ids": [1, 2, 3]}]})
    with pytest.raises(ValueError, match="epochs=0"):
        distinct_epochs({"these": InMemory([1, 2, 3])}, 0)
