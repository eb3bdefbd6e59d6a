import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.mixture.store import TokenStore
from dynmix.scoring.corpus import Corpus, by_length, windows


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(0)
    sizes = {"a": [3, 0, 8, 1, 20, 5], "b": [2], "c": rng.integers(0, 30, 40).tolist()}
    return {name: TokenStore.write(folder / name, [rng.integers(0, 90, n) for n in own]) for name, own in sizes.items()}


@pytest.mark.parametrize("unit", ["sequence", "document"])
def test_samples_are_those_of_the_domains_one_after_the_other(stores, unit):
    stores = {name: store for name, store in stores.items() if unit == "document" or name != "b"}
    corpus = pickle.loads(pickle.dumps(Corpus(stores, unit, 6)))
    domains, rows = corpus.where(0, len(corpus))
    samples = corpus.read(0, len(corpus))
    assert len(samples) == len(corpus) == corpus.sizes.sum()
    for sample, domain, row in zip(samples, domains, rows, strict=True):
        store = stores[corpus.names[domain]]
        want = store[row] if unit == "document" else store.tokens[6 * row : 6 * row + 6]
        assert np.array_equal(sample, want)
    for start, stop in ((0, 1), (3, 9), (len(corpus) - 1, len(corpus))):
        assert [s.tolist() for s in corpus.read(start, stop)] == [s.tolist() for s in samples[start:stop]]
    of_domain = np.bincount(domains, weights=[len(sample) for sample in samples])
    assert corpus.tokens.tolist() == of_domain.tolist()


@given(st.lists(st.integers(0, 30), max_size=9), st.integers(2, 9))
def test_windows_cover_every_token_that_has_one_to_score(sizes, length):
    samples = [100 * i + np.arange(size) for i, size in enumerate(sizes)]
    found, owners = windows(samples, length)
    assert all(2 <= len(window) <= length for window in found)
    for i, sample in enumerate(samples):
        own = [window for window, owner in zip(found, owners, strict=True) if owner == i]
        covered = np.concatenate([*own, np.empty(0)])
        lone = len(sample) % length == 1  # a last token on its own
        assert np.array_equal(covered, sample[: len(sample) - lone])
        assert all(len(window) == length for window in own[:-1])


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 100))
def test_batches_hold_each_sequence_once_within_the_limit(lengths, limit):
    lengths = np.array(lengths, np.int64)
    batches = [*by_length(lengths, limit)]
    assert sorted(i for rows in batches for i in rows) == [*range(len(lengths))]
    for rows in batches:
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= limit
    longest = [lengths[rows].max() for rows in batches]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("unit", ["sequence", "document"])
def test_what_the_curvature_is_fitted_on_is_spread_over_the_tokens(stores, unit):
    stores = {"a": stores["a"], "c": stores["c"]}
    corpus = Corpus(stores, unit, 6)
    everything = [window.tolist() for window in windows(corpus.read(0, len(corpus)), 6)[0]]
    few = [window.tolist() for window in corpus.spread(20)]
    assert few == [window.tolist() for window in Corpus(stores, unit, 6).spread(20)]
    assert all(window in everything for window in few)
    assert len({tuple(window) for window in few}) == len(few) <= 20
    # In order, and so close together that of 20 equal parts of the corpus no two in a row are passed over.
    places = np.array([everything.index(window) for window in few]) / len(everything)
    assert (np.diff(places) > 0).all()
    assert np.diff(places).max() < 0.2
    every = [window.tolist() for window in corpus.spread(4000)]
    assert every == everything


def test_documents_without_a_token_to_score_are_no_curvature(tmp_path):
    store = TokenStore.write(tmp_path / "ones", [[1]] * 5)
    assert Corpus({"ones": store}, "document", 4).spread(3) == []
