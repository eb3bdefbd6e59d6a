import numpy as np
from scipy.stats import spearmanr

from dynmix.laws import DML


def law(W):
    t = np.random.default_rng(3).uniform(-2, 2, size=(W.shape[1], 3))
    return np.array([1.5, 2.0, 3.0]) + np.exp(W @ t)


def test_recovers_an_exponential_law():
    rng = np.random.default_rng(0)
    W, new = rng.dirichlet(np.full(5, 0.5), size=(2, 60))
    predicted = DML().fit(W, law(W)).predict(new)
    assert min(spearmanr(p, y).statistic for p, y in zip(predicted.T, law(new).T, strict=True)) > 0.995


def test_predictions_stay_near_the_runs():
    rng = np.random.default_rng(1)
    W = rng.dirichlet(np.full(17, 0.3), size=12)
    L = rng.lognormal(1, 0.3, size=(12, 4))
    predicted = DML().fit(W, L).predict(np.eye(17))
    assert (predicted <= L.max(axis=0) + np.ptp(L, axis=0)).all()
    assert (predicted >= L.min(axis=0) - np.ptp(L, axis=0)).all()
