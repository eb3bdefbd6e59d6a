import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.laws.exponential import _ExponentialCurve
from dynmix.laws.power import _PowerCurve


def mixtures(rng, n=5, k=3):
    W = rng.dirichlet(np.ones(k), size=n)
    W[0] = np.eye(k)[0]  # weights of exactly 0
    return W


@pytest.mark.parametrize(("curve", "size"), [(_PowerCurve, 8), (_ExponentialCurve, 4)])
@given(seed=st.integers(0, 2**31))
def test_gradients_are_those_of_finite_differences(curve, size, seed):
    rng = np.random.default_rng(seed)
    law = curve(np.array([0.0, 1.0]), np.array([2.0, 0.5]))
    u, W = 0.5 * rng.standard_normal((2, size)), mixtures(rng)
    f, J = law(u, W)
    np.testing.assert_array_equal(f, law(u, W, slope=False)[0])
    for p in range(size):
        step = 1e-5 * np.eye(size)[p]
        difference = (law(u + step, W)[0] - law(u - step, W)[0]) / 2e-5
        np.testing.assert_allclose(J[:, :, p], difference, rtol=1e-5, atol=1e-7)
