import numpy as np
import pytest
from scipy.stats import spearmanr

from dynmix.laws import PowerLaw


def law_of(k, t, seed, alpha=0.3):
    rng = np.random.default_rng(seed)
    a = rng.lognormal(0, 2, size=(k, t))
    c = rng.uniform(1, 3, size=t)
    return lambda W: c + 2 * (W**0.5 @ a) ** -alpha


def mixtures(n, k, seed):
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.4), size=n)


@pytest.mark.parametrize(("k", "n"), [(5, 40), (17, 60)])
def test_recovers_a_law_of_its_kind(k, n):
    law, W = law_of(k, 3, seed=k), mixtures(n, k, 1)
    new = mixtures(200, k, 2)
    predicted = PowerLaw().fit(W, law(W)).predict(new)
    assert min(spearmanr(p, y).statistic for p, y in zip(predicted.T, law(new).T, strict=True)) > 0.99


def test_its_error_bar_covers_new_runs():
    rng = np.random.default_rng(0)
    law, W, new = law_of(6, 4, seed=3), mixtures(30, 6, 1), mixtures(300, 6, 2)
    fitted = PowerLaw().fit(W, law(W) + 0.02 * rng.standard_normal((30, 4)))
    mean, std = fitted.predict(new, return_std=True)
    covered = np.abs(law(new) + 0.02 * rng.standard_normal((300, 4)) - mean) < 1.96 * std
    assert 0.85 < covered.mean() <= 1


def test_a_diverged_run_does_not_bend_it():
    law, W, new = law_of(5, 2, seed=4), mixtures(40, 5, 1), mixtures(100, 5, 2)
    L = law(W)
    clean = PowerLaw().fit(W, L).predict(new)
    L[7] = L.max(axis=0) + 0.5 * L.std(axis=0)
    assert np.abs(PowerLaw().fit(W, L).predict(new) - clean).max() < 0.5 * L.std()


def test_parameters_stay_in_their_ranges():
    law, W = law_of(4, 3, seed=5), mixtures(50, 4, 1)
    L = law(W)
    fitted = PowerLaw(tau=3, tau_alpha=1, tau_exponent=1).fit(W, L)
    assert ((fitted.floor_ > 0) & (fitted.floor_ < L.min(axis=0))).all()
    assert (fitted.alpha_ > 0).all()
    assert (fitted.exponent_ > 0).all()
    assert fitted.log_worth_.shape == (3, 4)


def test_a_domain_that_no_run_had_is_uncertain():
    W = mixtures(30, 5, 1)
    W[:, 2] = 0
    W /= W.sum(axis=1, keepdims=True)
    law = law_of(5, 1, seed=6)
    fitted = PowerLaw().fit(W, law(W))
    _, std = fitted.predict(np.stack([np.eye(5)[2], W.mean(axis=0)]), return_std=True)
    assert std[0] > 2 * std[1]


def test_targets_that_are_not_losses_may_be_negative():
    law, W = law_of(4, 2, seed=7), mixtures(40, 4, 1)
    L = law(W) - 10
    assert np.abs(PowerLaw().fit(W, L).predict(W) - L).mean() < 0.1 * L.std()


@pytest.mark.parametrize("count", [25, 64])
def test_regmix_runs_from_few_of_them(shared, count):
    folder = shared / "reference" / "regmix"
    if not folder.is_dir():
        pytest.skip(f"no runs at {folder}")
    table = np.loadtxt(folder / "regmix_train_1m.csv", delimiter=",", skiprows=1)
    W, L = table[:, 1:18], table[:, 18:]
    order = np.random.default_rng(0).permutation(len(W))
    some, rest = order[:count], order[count:]
    predicted = PowerLaw().fit(W[some], L[some]).predict(W[rest])
    found = np.mean([spearmanr(p, y).statistic for p, y in zip(predicted.T, L[rest].T, strict=True)])
    assert found > {25: 0.97, 64: 0.98}[count]
