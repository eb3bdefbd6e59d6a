import numpy as np
import pytest
from scipy.stats import spearmanr

from dynmix.laws import LightGBM


@pytest.mark.parametrize("count", [12, 25, 300])
def test_few_runs_are_no_constant(count):
    rng = np.random.default_rng(0)
    W = rng.dirichlet(np.ones(4), size=count + 100)
    L = 3 - np.sqrt(W[:, :2])
    law = LightGBM().fit(W[:count], L[:count])
    assert np.ptp(law.predict(W[:count]), axis=0).min() > 0.3 * np.ptp(L[:count], axis=0).min()
    assert spearmanr(law.predict(W[count:])[:, 0], L[count:, 0]).statistic > 0.7
