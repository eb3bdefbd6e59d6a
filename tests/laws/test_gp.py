import numpy as np
import pytest

from dynmix.laws import GP, PowerLaw, PowerLawGP


def runs(n, seed=0):
    rng = np.random.default_rng(seed)
    W = rng.dirichlet(np.ones(4), size=n)
    smooth = np.stack([2 - np.sqrt(W[:, 0]) * W[:, 1], 3 + np.log(W[:, 2] + 0.01)], axis=1)
    return W, smooth + 0.01 * rng.standard_normal((n, 2))


@pytest.mark.parametrize("features", ["root", "sqrt", "log"])
def test_learns_a_smooth_law_and_how_sure_it_is(features):
    W, L = runs(60)
    new, losses = runs(300, seed=1)
    mean, std = GP(features).fit(W, L).predict(new, return_std=True)
    assert (np.abs(mean - losses).mean(axis=0) < 0.3 * losses.std(axis=0)).all()
    assert 0.8 < (np.abs(mean - losses) < 1.96 * std).mean() <= 1


def test_a_kernel_from_some_of_the_runs_still_uses_all():
    W, L = runs(80)
    some = GP(kernel_runs=30).fit(W, L)
    assert some.models_[0].X_train_.shape == (80, 4)
    assert np.abs(some.predict(W) - GP().fit(W, L).predict(W)).max() < 0.2


def test_unknown_features_are_refused():
    with pytest.raises(ValueError, match="features='cube'"):
        GP("cube").fit(*runs(9))


def test_residual_process_mends_what_the_power_law_misses():
    W, L = runs(200)
    bump = np.exp(-((W[:, :1] - 0.4) ** 2) / 0.01)
    new, losses = runs(200, seed=1)
    wanted = losses + np.exp(-((new[:, :1] - 0.4) ** 2) / 0.01)
    error = {law: np.abs(law.fit(W, L + bump).predict(new) - wanted).mean() for law in (PowerLaw(), PowerLawGP())}
    law, mended = error.values()
    assert mended < 0.6 * law


def test_residual_process_keeps_the_error_bar_honest():
    W, L = runs(150)
    new, losses = runs(300, seed=1)
    mean, std = PowerLawGP().fit(W, L).predict(new, return_std=True)
    assert 0.8 < (np.abs(mean - losses) < 1.96 * std).mean() <= 1
