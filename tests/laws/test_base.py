import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone

from dynmix.laws import DML, GP, AutoLaw, BiMix, LightGBM, Linear, MultiTaskGP, PowerLaw, PowerLawGP, Ridge
from dynmix.laws.base import by_missing, check_mixtures, check_runs

LAWS = [Linear(), Ridge(), LightGBM(trees=20), DML(), BiMix(), GP(), MultiTaskGP(), PowerLaw(), PowerLawGP()]


def runs(n=24, k=4, t=3, seed=0, noise=0.01):
    """Runs of a law of effective data."""
    rng = np.random.default_rng(seed)
    W = rng.dirichlet(np.full(k, 0.7), size=n)
    a = rng.lognormal(0, 1.5, size=(k, t))
    return W, 2 + (W**0.5 @ a) ** -0.4 + noise * rng.standard_normal((n, t))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
class TestEveryLaw:
    def test_predicts_what_it_saw_better_than_the_mean(self, law):
        W, L = runs()
        predicted = clone(law).fit(W, L).predict(W)
        assert predicted.shape == L.shape
        assert (((predicted - L) ** 2).mean(axis=0) < ((L - L.mean(axis=0)) ** 2).mean(axis=0)).all()

    def test_one_target_is_a_vector(self, law):
        W, L = runs()
        fitted = clone(law).fit(W, L[:, 0])
        assert fitted.predict(W).shape == (24,)
        assert np.isfinite(fitted.score(W, L[:, 0]))

    def test_std_is_positive_or_refused(self, law):
        W, L = runs()
        fitted = clone(law).fit(W, L)
        if isinstance(law, LightGBM):
            with pytest.raises(ValueError, match="no standard deviation"):
                fitted.predict(W, return_std=True)
        else:
            mean, std = fitted.predict(W, return_std=True)
            np.testing.assert_allclose(mean, fitted.predict(W))
            assert std.shape == L.shape
            assert (std > 0).all()

    def test_each_target_is_fitted_to_its_own_runs(self, law):
        W, L = runs()
        L[[1, 5, 6], 0] = np.nan
        L[[2, 9], 1] = np.nan
        fitted = clone(law).fit(W, L).predict(W)
        if not isinstance(law, MultiTaskGP):  # whose targets share what they learn
            np.testing.assert_allclose(
                fitted[:, 1], clone(law).fit(np.delete(W, [2, 9], 0), np.delete(L[:, 1], [2, 9])).predict(W), rtol=1e-3
            )
        assert np.isfinite(fitted).all()

    def test_survives_awkward_runs(self, law):
        W, L = runs(n=8, k=17)
        W[:, 3] = 0
        W[5] = W[4]
        W /= W.sum(axis=1, keepdims=True)
        L[:, 2] = 3.0
        fitted = clone(law).fit(0.997 * W, L).predict(W)
        assert np.isfinite(fitted).all()
        np.testing.assert_allclose(fitted[:, 2], 3.0, atol=0.05)
        np.testing.assert_allclose(fitted, clone(law).fit(W, L).predict(0.997 * W), rtol=1e-4)

    def test_is_an_estimator_of_scikit_learn(self, law):
        assert clone(law).get_params() == law.get_params()


def test_an_unfitted_law_says_so():
    with pytest.raises(ValueError, match="not fitted"):
        AutoLaw().predict(np.eye(2))


W, L = runs(n=6)


@pytest.mark.parametrize(
    ("W", "L", "said"),
    [
        (W[0], L, "W has shape"),
        (W, L[:5], "W has 6 rows and L has 5"),
        (np.where(np.arange(6)[:, None] == 2, np.nan, W), L, r"W\[2, 0\] = nan is not finite"),
        (W * np.where(np.arange(4) == 1, -1, 1), L, r"W\[0, 1\] = -.* is negative"),
        (0.98 * W, L, "row 0 of W sums to 0.98"),
        (W, np.where(np.arange(3) == 1, np.nan, L), "column 1 of L is all NaN"),
        (W, np.where((np.arange(3) == 2) & (np.arange(6)[:, None] > 0), np.nan, L), r"column 2 .* 1 usable"),
        (W, np.where(L[3, 0] == L, np.inf, L), r"L\[3, 0\] = inf"),
        (W.astype(str) + "x", L, "not a table of numbers"),
    ],
)
def test_refusals_say_where(W, L, said):
    with pytest.raises(ValueError, match=said):
        check_runs(W, L)


def test_other_domains_are_refused_at_prediction():
    with pytest.raises(ValueError, match="W has 3 domains, the law was fitted to 4"):
        Ridge().fit(W, L).predict(np.eye(3))


@given(st.integers(0, 2**31), st.floats(0.991, 1.009))
def test_mixtures_sum_to_one_and_input_is_untouched(seed, total):
    given_ = np.random.default_rng(seed).dirichlet(np.ones(5), size=3) * total
    before = given_.copy()
    np.testing.assert_allclose(check_mixtures(given_).sum(axis=1), 1)
    np.testing.assert_array_equal(given_, before)


@given(st.integers(0, 2**31))
def test_patterns_of_missing_cells_cover_each_target_once(seed):
    rng = np.random.default_rng(seed)
    L = np.where(rng.random((6, 5)) < 0.3, np.nan, 1.0)
    seen = []
    for rows, columns in by_missing(L):
        seen += columns.tolist()
        for j in columns:
            np.testing.assert_array_equal(rows, np.flatnonzero(np.isfinite(L[:, j])))
    assert sorted(seen) == list(range(5))
