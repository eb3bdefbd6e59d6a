from collections import Counter

import numpy as np
import pytest

from dynmix.mixture.store import TokenStore
from dynmix.scores import Column
from dynmix.scoring import ngram_scores, perplexity_scores, read_losses, score_corpus
from dynmix.scoring.baselines import _hashed


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(0)
    draw = {"low": lambda n: rng.integers(0, 40, n), "high": lambda n: rng.integers(30, 70, n)}
    return {
        name: TokenStore.write(folder / name, [of(n) for n in [30, 1, 0, *rng.integers(5, 60, 30)]])
        for name, of in draw.items()
    }


def tasks():
    rng = np.random.default_rng(1)
    return {
        "low": [{"input_ids": rng.integers(0, 40, n)} for n in (20, 50, 3)],
        "high": [{"input_ids": rng.integers(30, 70, n)} for n in (40, 1, 30)],
    }


def test_ngrams_have_one_bucket_each_and_do_not_reach_over_an_end():
    samples = [np.array([5, 6, 5, 6]), np.array([], np.int64), np.array([5]), np.array([6, 5, 6])]
    (ones, of_ones), (twos, of_twos), (fives, _) = _hashed(samples, (1, 2, 5), 1 << 60)
    assert of_ones.tolist() == [0, 0, 0, 0, 2, 3, 3, 3]
    assert of_twos.tolist() == [0, 0, 0, 3, 3]
    assert len(fives) == 0
    five, six = ones[:2]
    assert ones.tolist() == [five, six, five, six, five, six, five, six]
    assert twos.tolist() == [twos[0], twos[1], twos[0], twos[1], twos[0]]
    assert len({five, six, twos[0], twos[1]}) == 4


def test_padding_counts_as_tokens_of_a_run_and_as_no_ngram():
    fill = {"input_ids": [3, 4, 0, 0], "attention_mask": [1, 1, 0, 0]}
    found = ngram_scores({"a": [fill, {"input_ids": [3, 4, 0, 0]}]}, tasks())
    assert found.tokens.tolist() == [4, 4]
    assert (found.scores[0] != found.scores[1]).all()


def test_buckets_are_filled_evenly():
    hashes, _ = next(_hashed([np.arange(40_000)], (1,), 100))
    counts = np.bincount(hashes, minlength=100)
    assert 300 < counts.min() < counts.max() < 500  # 400 and 20 times its square root


@pytest.mark.parametrize(("unit", "length"), [("document", None), ("sequence", 16)])
def test_ngram_scores_are_dsirs_importance_weights_a_token(stores, unit, length):
    buckets, n = 500, (1, 2)

    def bag(samples):
        return Counter(h for sample in samples for hashes, _ in _hashed([sample], n, buckets) for h in hashes.tolist())

    found = ngram_scores(stores, tasks(), unit=unit, sequence_length=length, n=n, buckets=buckets)
    assert found.columns == (Column("low", "ngram", 1), Column("high", "ngram", 1))
    samples = {
        (d, r): store[r] if unit == "document" else store.tokens[r * length : (r + 1) * length]
        for d, store in enumerate(stores.values())
        for r in range(len(store) if unit == "document" else store.num_tokens // length)
    }
    kept = [key for key, sample in samples.items() if len(sample)]
    assert [*zip(found.domain.tolist(), found.row.tolist(), strict=True)] == kept
    assert found.tokens.tolist() == [len(samples[key]) for key in kept]
    raw = bag(samples.values())
    for column, examples in enumerate(tasks().values()):
        target = bag([one["input_ids"] for one in examples])
        for key, score in zip(kept, found.scores[:, column].tolist(), strict=True):
            want = sum(
                times * np.log((target[h] + 1) / (target.total() + buckets) / ((raw[h] + 1) / (raw.total() + buckets)))
                for h, times in bag([samples[key]]).items()
            )
            assert score == pytest.approx(want / len(samples[key]), rel=1e-4, abs=1e-5)


def test_ngram_scores_tell_domains_apart(stores):
    found = ngram_scores(stores, tasks(), unit="sequence", sequence_length=16)
    for column, name in enumerate(("low", "high")):
        own = found.domain == list(stores).index(name)
        assert found.scores[own, column].mean() > found.scores[~own, column].mean() + 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [({"tasks": {}}, "0 tasks"), ({"n": ()}, r"n=\(\)"), ({"n": (0, 1)}, r"n=\(0, 1\)"), ({"buckets": 0}, "buckets=0")],
)
def test_nothing_to_count_is_refused(stores, change, said):
    with pytest.raises(ValueError, match=said):
        ngram_scores(**{"domains": stores, "tasks": tasks(), "unit": "document"} | change)


def test_a_task_without_tokens_is_refused(stores):
    with pytest.raises(ValueError, match=r"tasks\['none'\] has no token"):
        ngram_scores(stores, {"none": []}, unit="document")


def test_perplexity_scores_are_minus_the_losses(setting, tmp_path):
    score_corpus(**setting.arguments(out=tmp_path))
    losses = read_losses(tmp_path)
    last = perplexity_scores(tmp_path)
    assert last.columns == (Column("perplexity", "step-8", 8),)
    assert np.array_equal(last.scores[:, 0], -losses.scores[:, 1])
    assert np.array_equal(perplexity_scores(tmp_path, "step-3").scores[:, 0], -losses.scores[:, 0])
    with pytest.raises(ValueError, match="'step-9' scored nothing in .*'step-3', 'step-8'"):
        perplexity_scores(tmp_path, "step-9")
