import numpy as np
import pytest

from dynmix.laws import AutoLaw, BiMix, Linear, PowerLaw, Ridge
from dynmix.laws.auto import default_laws, folds
from dynmix.laws.base import Law


def mixtures(n, k=4, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.5), size=n)


def curved(W):
    a = np.random.default_rng(9).lognormal(0, 1.5, size=(W.shape[1], 3))
    return 2 + (W**0.5 @ a) ** -0.4


def straight(W):
    noise = np.random.default_rng(5).standard_normal((len(W), 2))
    return 3 + W @ np.random.default_rng(8).uniform(-1, 1, size=(W.shape[1], 2)) + 0.01 * noise


FEW = {"power law": PowerLaw(), "ridge": Ridge(), "BiMix": BiMix()}


class Failing(Law):
    def _fit(self, W, L):
        raise ValueError("it never works")

    def _predict(self, W, with_std):
        raise AssertionError("it was never fitted")


@pytest.mark.parametrize(("law", "wanted"), [(curved, "power law"), (straight, "ridge")])
def test_chooses_the_law_that_made_the_runs(law, wanted):
    W = mixtures(30)
    auto = AutoLaw(FEW).fit(W, law(W))
    assert next(iter(auto.laws_)) == wanted
    assert wanted in auto.why_
    assert min(auto.scores_, key=lambda name: auto.scores_[name].error) == wanted
    for name in FEW:
        assert name in auto.report_


def test_error_bar_covers_new_runs_and_any_law_has_one():
    W, new = mixtures(40), mixtures(400, seed=1)
    for laws in (FEW, {"line": Linear()}):
        mean, std = AutoLaw(laws).fit(W, curved(W)).predict(new, return_std=True)
        assert 0.8 < (np.abs(curved(new) - mean) < 1.96 * std).mean() <= 1


def test_an_average_is_the_mean_of_its_laws():
    W = mixtures(25)
    auto = AutoLaw(FEW).fit(W, curved(W))
    np.testing.assert_allclose(auto.predict(W), np.mean([law.predict(W) for law in auto.laws_.values()], axis=0))


def test_left_out_predictions_are_of_laws_that_did_not_see_the_run():
    W = mixtures(20)
    L = curved(W)
    auto, fold = AutoLaw({"ridge": Ridge()}).fit(W, L), folds(W, 5, 0)
    for k in range(5):
        others = Ridge().fit(W[fold != k], L[fold != k])
        np.testing.assert_allclose(auto.left_out_[fold == k], others.predict(W[fold == k]))


def test_runs_of_one_mixture_share_a_fold():
    W = mixtures(12)
    fold = folds(np.vstack([W, W[:5] + 1e-12]), 4, 0)
    np.testing.assert_array_equal(fold[12:], fold[:5])
    assert set(fold) == set(range(4))


def test_too_few_runs_get_the_power_law_and_the_reason():
    W = mixtures(5)
    auto = AutoLaw(FEW).fit(W, curved(W))
    assert list(auto.laws_) == ["power law"]
    assert "too few to compare" in auto.report_
    mean, std = auto.predict(W, return_std=True)
    assert np.isfinite(mean).all()
    assert (std > 0).all()


def test_no_error_bar_of_few_runs_is_less_than_the_runs_own_deviation():
    """A line through four runs in eight domains misses none of them, which says nothing of the next one."""
    W = mixtures(4, k=8)
    L = curved(W)
    _, std = AutoLaw({"ridge": Ridge()}).fit(W, L).predict(mixtures(50, k=8, seed=1), return_std=True)
    assert (std >= L.std(axis=0) - 1e-12).all()


def test_a_law_that_fails_is_reported_and_not_chosen():
    W = mixtures(20)
    auto = AutoLaw({"broken": Failing(), **FEW}).fit(W, curved(W))
    assert "broken" not in auto.laws_
    assert "it never works" in auto.report_
    with pytest.raises(ValueError, match="no law could be fitted to every fold: broken: it never works"):
        AutoLaw({"broken": Failing()}).fit(W, curved(W))
    with pytest.raises(ValueError, match="laws is empty"):
        AutoLaw({}).fit(W, curved(W))


def test_missing_cells_duplicates_and_an_absent_domain():
    rng = np.random.default_rng(0)
    W = mixtures(30, k=6)
    W[:, 1] = 0
    W[20:] = W[:10]
    W = 0.997 * W / W.sum(axis=1, keepdims=True)
    L = curved(W / W.sum(axis=1, keepdims=True)) + 0.01 * rng.standard_normal((30, 3))
    whole = L.copy()
    L[rng.random(L.shape) < 0.2] = np.nan
    mean, std = AutoLaw(FEW).fit(W, L).predict(W, return_std=True)
    assert np.abs(mean - whole).mean() < 0.2 * whole.std()
    assert (std > 0).all()


def test_a_target_with_very_few_runs_is_a_clear_answer():
    W = mixtures(15)
    L = curved(W)
    L[2:, 1] = np.nan
    auto = AutoLaw(FEW).fit(W, L)
    assert np.isfinite(auto.predict(W)).all()


def test_the_same_runs_give_the_same_law():
    W = mixtures(20)
    one, two = (AutoLaw(FEW).fit(W, curved(W)) for _ in range(2))
    np.testing.assert_array_equal(one.predict(W), two.predict(W))
    assert one.why_ == two.why_


def test_every_default_law_gets_a_score_from_8_runs_of_17_domains():
    W = mixtures(8, k=17)
    auto = AutoLaw().fit(W, curved(W))
    assert set(auto.scores_) == set(default_laws(8, 3))
    assert not any(score.failure for score in auto.scores_.values())
    assert np.isfinite(auto.predict(mixtures(50, k=17, seed=2), return_std=True)).all()
