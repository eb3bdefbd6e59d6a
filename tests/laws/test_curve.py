import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.laws import DML, PowerLaw
from dynmix.laws.curve import Floor


def mixtures(rng, n=5, k=3):
    W = rng.dirichlet(np.ones(k), size=n)
    W[0] = np.eye(k)[0]  # weights of exactly 0
    return W


@pytest.mark.parametrize(("law", "size"), [(PowerLaw(), 8), (DML(), 4)])
@given(seed=st.integers(0, 2**31))
def test_gradients_are_those_of_finite_differences(law, size, seed):
    rng = np.random.default_rng(seed)
    law._floor, curve = Floor(np.array([0.0, 1.0]), np.array([2.0, 0.5]), np.ones(2)), law._curve
    u, W = 0.5 * rng.standard_normal((2, size)), mixtures(rng)
    f, J = curve(u, W)
    np.testing.assert_array_equal(f, curve(u, W, slope=False)[0])
    for p in range(size):
        step = 1e-5 * np.eye(size)[p]
        difference = (curve(u + step, W)[0] - curve(u - step, W)[0]) / 2e-5
        np.testing.assert_allclose(J[:, :, p], difference, rtol=1e-5, atol=1e-7)
