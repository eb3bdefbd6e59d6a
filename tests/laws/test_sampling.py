import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.laws import sample_mixtures


@given(st.integers(0, 2**31), st.integers(0, 20))
def test_are_mixtures_and_the_first_ones_stay_when_more_are_asked_for(seed, count):
    W = sample_mixtures([1, 5, 100], count, seed=seed)
    assert W.shape == (count, 3)
    np.testing.assert_allclose(W.sum(axis=1), 1)
    assert (W >= 0).all()
    np.testing.assert_array_equal(W, sample_mixtures([1, 5, 100], count + 3, seed=seed)[:count])


@pytest.mark.parametrize(
    ("frequency", "centre"), [(0.0, [1 / 3] * 3), (1.0, [0.1, 0.2, 0.7]), (0.5, [13 / 60, 4 / 15, 31 / 60])]
)
def test_their_mean_lies_between_uniform_and_the_tokens_shares(frequency, centre):
    W = sample_mixtures([1e6, 2e6, 7e6], 4000, frequency=frequency)
    np.testing.assert_allclose(W.mean(axis=0), centre, atol=0.03)


def test_a_smaller_scale_means_fewer_domains():
    few, many = (sample_mixtures(np.ones(8), 500, scale=(s, s)) for s in (0.5, 8))
    assert few.max(axis=1).mean() > many.max(axis=1).mean() + 0.2


@pytest.mark.parametrize(
    ("tokens", "options", "said"),
    [
        ([1, 0], {}, "above 0"),
        ([], {}, "above 0"),
        ([1, 1], {"frequency": 2}, "frequency=2"),
        ([1, 1], {"scale": (2, 1)}, "scale"),
    ],
)
def test_refusals(tokens, options, said):
    with pytest.raises(ValueError, match=said):
        sample_mixtures(tokens, 3, **options)
