import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, RidgeCV

from dynmix.laws import Linear, Ridge


def runs(n, k=4, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    W = rng.dirichlet(np.ones(k), size=n)
    slopes = np.random.default_rng(7).standard_normal((k, 2))
    return W, 3 + W @ slopes + noise * rng.standard_normal((n, 2))


def test_least_squares_is_scikit_learns():
    W, L = runs(30)
    np.testing.assert_allclose(Linear().fit(W, L).predict(W), LinearRegression().fit(W, L).predict(W), atol=1e-8)


def test_least_squares_of_fewer_runs_than_domains_goes_through_them():
    W, L = runs(5, k=9)
    np.testing.assert_allclose(Linear().fit(W, L).predict(W), L, atol=1e-8)


def test_penalty_is_the_leave_one_out_one():
    W, L = runs(20, noise=0.5)
    penalties = np.logspace(-4, 2, 9)
    unit = ((W - W.mean(axis=0)) ** 2).sum() / W.size
    law = Ridge(penalties).fit(W, L)
    theirs = RidgeCV(penalties * unit, alpha_per_target=True).fit(W, L)
    np.testing.assert_allclose(law.penalty_ * unit, theirs.alpha_)
    np.testing.assert_allclose(law.predict(W), theirs.predict(W), atol=1e-8)


def test_error_bar_covers_new_runs():
    W, L = runs(40)
    new, losses = runs(2000, seed=1)
    mean, std = Ridge().fit(W, L).predict(new, return_std=True)
    assert 0.9 < (np.abs(losses - mean) < 1.96 * std).mean() < 0.99


def test_error_bar_of_least_squares_is_the_textbooks_prediction_interval():
    W, L = runs(9)
    L[:2, 1] = np.nan
    new = runs(5, seed=1)[0]
    _, std = Linear().fit(W, L).predict(new, return_std=True)
    for i in range(2):
        known = np.isfinite(L[:, i])
        X = W[known]  # weights sum to 1, so that they hold the level
        left = L[known, i] - X @ np.linalg.lstsq(X, L[known, i], rcond=None)[0]
        unknown = ((new @ np.linalg.inv(X.T @ X)) * new).sum(axis=1)
        np.testing.assert_allclose(std[:, i], np.sqrt((left @ left) / (known.sum() - 4) * (1 + unknown)))


def test_a_linear_law_is_not_shrunk():
    W, L = runs(30, noise=0)
    assert np.abs(Ridge().fit(W, L).predict(np.eye(4)) - Linear().fit(W, L).predict(np.eye(4))).max() < 1e-3


def test_all_runs_alike_give_their_mean():
    W, L = runs(6)
    same = np.repeat(W[:1], 6, axis=0)
    assert Ridge().fit(same, L).predict(W) == pytest.approx(np.repeat(L.mean(axis=0)[None], 6, axis=0))
