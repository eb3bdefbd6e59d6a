import subprocess
import sys

import numpy as np
import pytest

from dynmix.mixers.surrogate import Smooth, fit, lightgbm, ridge


def data(count, m, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(m, 5.0), size=count), rng


def r2(model, W, y):
    return 1 - ((model.predict(W) - y) ** 2).mean() / y.var()


def test_each_finds_what_it_is_for():
    W, rng = data(200, 8)
    held, _ = data(200, 8, seed=1)
    slope = rng.normal(size=8)

    def linear(w):
        return w @ slope

    def curved(w):
        return linear(w) + 30 * w[:, 0] * w[:, 1] + np.tanh(8 * (w[:, 2] - 0.12))

    def step(w):
        return (w[:, 0] > 0.12).astype(float)

    assert r2(ridge().fit(W, linear(W)), held, linear(held)) > 0.999
    assert r2(Smooth().fit(W, linear(W)), held, linear(held)) > 0.999
    assert r2(Smooth().fit(W, curved(W)), held, curved(held)) > max(
        0.9, r2(ridge().fit(W, curved(W)), held, curved(held))
    )
    assert fit(W, step(W)).name == "lightgbm"
    assert fit(W, curved(W)).name == "smooth"


def test_smooth_interpolates_without_noise_and_averages_with_it():
    W, rng = data(120, 5)
    truth = 3 * W[:, 0] - W[:, 1] ** 2
    np.testing.assert_allclose(Smooth().fit(W, truth).predict(W), truth, atol=1e-4)
    noisy = truth + 0.3 * rng.normal(size=120)
    smoothed = Smooth().fit(W, noisy).predict(W)
    assert ((smoothed - truth) ** 2).mean() < 0.3 * ((noisy - truth) ** 2).mean()


@pytest.mark.parametrize("count", [8, 16, 64, 512])
def test_lightgbm_learns_from_few_mixtures(count):
    W, _ = data(count, 4)
    prediction = lightgbm(count).fit(W, 5 * W[:, 0]).predict(W)
    assert np.corrcoef(prediction, W[:, 0])[0, 1] > 0.8


def test_constant_targets_and_fixed_weights():
    W, _ = data(32, 4)
    W[:, 3] = 0.25
    for y in (np.zeros(32), W[:, 0]):
        fitted = fit(W, y)
        assert np.isfinite(fitted.model.predict(W)).all()
        assert all(np.isfinite(score) for score in fitted.r2.values())


def test_what_takes_seconds_to_import_is_not_imported_with_the_mixers():
    code = "import sys, dynmix.mixers.tikmix_m as _; assert not {'lightgbm', 'sklearn', 'torch'} & set(sys.modules)"
    code = "import sys, types; package = types.ModuleType('dynmix'); package.__path__ = ['dynmix']\n" \
        "sys.modules['dynmix'] = package\n" + code  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
