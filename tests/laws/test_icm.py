import numpy as np
import pytest
from scipy.optimize import approx_fprime

from dynmix.laws import GP, MultiTaskGP
from dynmix.laws.icm import _Cells


def runs(n, seed=0, noise=0.01):
    """Three targets that are mixtures of one function, and a fourth of its own."""
    rng = np.random.default_rng(seed)
    W = rng.dirichlet(np.ones(3), size=n)
    shared, own = np.sqrt(W[:, 0]) - 0.5 * W[:, 1], W[:, 2] ** 0.3
    return W, np.stack([shared, 2 + 2 * shared, -shared, own], axis=1) + noise * rng.standard_normal((n, 4))


def test_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((5, 2))
    Z[1, 0] = np.nan
    cells = _Cells(rng.standard_normal((5, 3)), Z, rank=1)
    u = 0.3 * rng.standard_normal(2 * 1 + 2 + 2 + 2)
    numeric = approx_fprime(u, lambda x: cells.loss(x)[0], 1e-7)
    np.testing.assert_allclose(cells.loss(u)[1], numeric, rtol=1e-4, atol=1e-4)


def test_a_target_with_few_runs_learns_from_the_others():
    W, L = runs(30)
    new, losses = runs(100, seed=1)
    L[6:, 1] = np.nan
    alone = np.abs(GP().fit(W, L).predict(new)[:, 1] - losses[:, 1]).mean()
    assert np.abs(MultiTaskGP().fit(W, L).predict(new)[:, 1] - losses[:, 1]).mean() < 0.5 * alone


def test_error_bar_covers_new_runs():
    W, L = runs(30, noise=0.05)
    new, losses = runs(200, seed=1, noise=0.05)
    mean, std = MultiTaskGP().fit(W, L).predict(new, return_std=True)
    assert 0.85 < (np.abs(mean - losses) < 1.96 * std).mean() <= 1


def test_too_many_cells_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="120 known losses are more than max_cells=100"):
        MultiTaskGP(max_cells=100).fit(*runs(30))
