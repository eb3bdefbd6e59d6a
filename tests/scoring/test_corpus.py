import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.store import TokenStore
from dynmix.scoring.corpus import Corpus, windows


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
        assert corpus.lengths(start, stop).tolist() == [len(s) for s in samples[start:stop]]
    of_domain = np.bincount(domains, weights=[len(sample) for sample in samples])
    assert corpus.tokens.tolist() == of_domain.tolist()


@given(st.lists(st.integers(0, 30), max_size=9), st.integers(2, 9))
def test_windows_cover_every_token_that_has_one_to_score(sizes, length):
    owners, offsets = windows(np.array(sizes, np.int64), length)
    for i, size in enumerate(sizes):
        own = [np.arange(size)[offset : offset + length] for offset in offsets[owners == i]]
        assert all(2 <= len(window) <= length for window in own)
        covered = np.concatenate([*own, np.empty(0)])
        lone = size % length == 1  # a last token on its own
        assert np.array_equal(covered, np.arange(size - lone))
        assert all(len(window) == length for window in own[:-1])


@pytest.mark.parametrize("unit", ["sequence", "document"])
def test_what_the_curvature_is_fitted_on_is_spread_over_the_tokens(stores, unit):
    stores = {"a": stores["a"], "c": stores["c"]}
    corpus = Corpus(stores, unit, 6)
    everything = ids_of(corpus.items(*windows(corpus.lengths(0, len(corpus)), 6)))
    few = ids_of(corpus.spread(20))
    assert few == ids_of(Corpus(stores, unit, 6).spread(20))
    assert all(window in everything for window in few)
    assert len({tuple(window) for window in few}) == len(few) <= 20
    # In order, and so close together that of 20 equal parts of the corpus no two in a row are passed over.
    places = np.array([everything.index(window) for window in few]) / len(everything)
    assert (np.diff(places) > 0).all()
    assert np.diff(places).max() < 0.2
    assert ids_of(corpus.spread(4000)) == everything


def ids_of(items):
    return [item["input_ids"].tolist() for item in items]


def test_documents_without_a_token_to_score_are_no_curvature(tmp_path):
    store = TokenStore.write(tmp_path / "ones", [[1]] * 5)
    assert Corpus({"ones": store}, "document", 4).spread(3) == []


def chats(n, length=6, prompt=2):
    """Rows with prompts that are not learnt, and padding."""
    rng, found = np.random.default_rng(n), []
    for size in rng.integers(prompt + 1, length, n).tolist():
        ids, fill = rng.integers(1, 90, size).tolist(), [0] * (length - size)
        labels = [-100] * prompt + ids[prompt:] + [-100] * len(fill)
        found.append({"input_ids": ids + fill, "labels": labels, "attention_mask": [1] * size + fill})
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"boundaries": "position_ids"},
        {"boundaries": "mask", "packing": "best_fit"},
        {"packing": "best_fit", "pad_token_id": 3},
        {"ignore_token_ids": [5, 7]},
    ],
)
def test_items_are_those_of_the_dataset_that_is_trained_on(stores, options):
    domains = {"chats": chats(9), "a": stores["a"], "c": stores["c"]}
    dataset = MixtureDataset(domains, num_samples=1, sequence_length=6, **options)
    corpus = pickle.loads(pickle.dumps(Corpus(dataset)))
    samples = np.random.default_rng(0).permutation(len(corpus))
    domain, row = corpus.where(0, len(corpus))
    some_masked = False
    for item, n in zip(corpus.items(samples, 0 * samples), samples, strict=True):
        want = dataset.sequence(corpus.names[domain[n]], int(row[n]))
        assert item.keys() == want.keys()
        assert all(torch.equal(torch.as_tensor(item[key]), torch.as_tensor(want[key])) for key in want)
        some_masked |= domain[n] > 0 and bool((item["labels"] != item["input_ids"]).any())
    assert some_masked == bool(options)
    assert all((item["labels"][1:] != -100).any() for item in corpus.spread(500))


def test_domains_of_a_dataset_that_are_gone_are_no_part(stores):
    def dataset(**domains):
        return MixtureDataset(domains, dict.fromkeys(domains, 0.0) | {"a": 1.0}, num_samples=9, sequence_length=6)

    resumed = dataset(a=stores["a"])
    resumed.load_state_dict(dataset(a=stores["a"], c=stores["c"]).state_dict())
    assert resumed.gone == ("c",)
    assert Corpus(resumed).names == ("a",)


def test_rows_without_a_label_are_no_curvature():
    silent = {"input_ids": [1, 2, 3], "labels": [1, -100, -100]}  # the first is what nothing predicts
    assert ids_of(Corpus({"a": [silent, {"input_ids": [4, 5, 6]}]}).spread(50)) == [[4, 5, 6]]


def test_fingerprints_tell_labels_and_boundaries_apart(stores):
    def fingerprint(domain, **options):
        return Corpus(MixtureDataset({"x": domain}, num_samples=1, sequence_length=6, **options)).fingerprints[0]

    plain = Corpus({"x": stores["a"]}, "sequence", 6).fingerprints[0]
    assert fingerprint(stores["a"]) == plain
    assert fingerprint(stores["a"]) == fingerprint(stores["a"])
    ways = [{"boundaries": "mask"}, {"boundaries": "position_ids"}, {"ignore_token_ids": [5]}, {"packing": "best_fit"}]
    assert len({plain, *(fingerprint(stores["a"], **options) for options in ways)}) == 5
    rows = chats(200)
    without = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
    bare = [{"input_ids": row["input_ids"]} for row in rows]
    other = [
        row if 70 < i < 80 else each for i, (row, each) in enumerate(zip(chats(200, prompt=2), without, strict=True))
    ]
    assert len({fingerprint(each) for each in (rows, without, bare, other)}) == 4
    assert fingerprint(rows) == fingerprint(chats(200))


@pytest.mark.parametrize("unit", ["sequence", "document"])
@pytest.mark.parametrize("n", [32, 1 << 14, (1 << 14) + 32, 100_000, 1 << 20])
def test_fingerprints_tell_every_token_of_up_to_a_million(tmp_path, unit, n):
    rng = np.random.default_rng(n)
    tokens = rng.integers(0, 90, n)
    whole = n // 32 * 32
    known = None
    for place in (None, 0, whole // 2, whole - 1, *rng.integers(0, whole, 3)):
        changed = tokens + (np.arange(n) == place)
        store = TokenStore.write(tmp_path / "x", [changed[: n // 3], changed[n // 3 :]])  # its index stays the same
        [found] = Corpus({"x": store}, unit, 32).fingerprints
        known = known or found
        assert (found == known) == (place is None)
