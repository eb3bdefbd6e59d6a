import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import xlogy

from dynmix.mixers.simplex import cap, normalized, water_fill

sizes = st.integers(2, 8)


@st.composite
def filled(draw):
    n = draw(sizes)
    z = np.array(draw(st.lists(st.floats(-30, 30), min_size=n, max_size=n)))
    upper = np.array(draw(st.lists(st.floats(0.01, 1.5), min_size=n, max_size=n)))
    return z, upper * max(1.0, 1.05 / upper.sum())


@given(filled())
def test_water_fill_is_on_the_simplex_under_the_bounds_and_proportional_where_free(case):
    z, upper = case
    w = water_fill(z, upper)
    assert w.sum() == pytest.approx(1, abs=1e-12)
    assert (w >= 0).all()
    assert (w <= upper + 1e-12).all()
    free = (w < upper - 1e-9) & (w > 1e-200)
    if free.sum() > 1:
        nu = z[free] - np.log(w[free])
        assert np.ptp(nu) < 1e-6
        # What is capped would be larger if it were not.
        assert (z[~free & (w > 0)] - np.log(w[~free & (w > 0)]) >= nu.min() - 1e-6).all()


def test_water_fill_minimises_the_kl_divergence():
    z, upper = np.array([2.0, 1.0, 0.0, -1.0]), np.array([0.3, 0.25, 1.0, 1.0])

    def kl(w):
        return xlogy(w, w).sum() - w @ z

    slow = minimize(
        kl,
        np.full(4, 0.25),
        bounds=[(1e-12, b) for b in upper],
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(water_fill(z, upper), slow.x, atol=1e-5)
    assert kl(water_fill(z, upper)) <= slow.fun + 1e-9


def test_water_fill_survives_arguments_thousands_apart():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        w = water_fill(np.array([5000.0, 0.0, -5000.0]), np.array([0.5, 0.3, 1.0]))
    np.testing.assert_allclose(w, [0.5, 0.3, 0.2])


def test_bounds_that_leave_no_mixture_are_refused():
    with pytest.raises(ValueError, match="sum to 0.8"):
        water_fill(np.zeros(2), np.array([0.4, 0.4]))
    with pytest.raises(ValueError, match="sum to 0.8"):
        cap(np.array([0.5, 0.5]), np.array([0.4, 0.4]))


def test_cap_leaves_what_fits_and_pours_the_excess_in_proportion():
    w = np.array([0.6, 0.3, 0.1])
    np.testing.assert_array_equal(cap(w, np.ones(3)), w)
    np.testing.assert_allclose(cap(w, np.array([0.2, 1, 1])), [0.2, 0.6, 0.2])
    np.testing.assert_allclose(cap(np.array([1.0, 0, 0]), np.array([0.4, 0.5, 1.0])), [0.4, 0.2, 0.4])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5, "b": 0.6}, "sum to 1.1"),
        ({"a": 1.0}, r"missing \['b'\]"),
        ({"a": 0.5, "b": 0.5, "c": 0}, r"unknown \['c'\]"),
        ({"a": -0.5, "b": 1.5}, "at least 0"),
        ({"a": float("nan"), "b": 0.5}, "finite"),
    ],
)
def test_weights_are_validated(weights, message):
    with pytest.raises(ValueError, match=message):
        normalized(weights, ["a", "b"])


@given(filled(), st.integers(0, 10_000))
def test_lower_bounds_hold_and_what_is_free_stays_proportional(case, seed):
    z, upper = case
    rng = np.random.default_rng(seed)
    upper = np.minimum(upper, 1.0)
    if upper.sum() < 1.01:
        return
    lower = upper * rng.uniform(0, 1, len(z)) * (rng.random(len(z)) < 0.5) / upper.sum()
    w = water_fill(z, upper, lower)
    assert w.sum() == pytest.approx(1, abs=1e-12)
    assert (w >= lower - 1e-12).all()
    assert (w <= upper + 1e-12).all()
    free = (w > lower + 1e-9) & (w < upper - 1e-9) & (w > 1e-200)
    if free.any():
        nu = np.median(z[free] - np.log(w[free]))
        np.testing.assert_allclose(z[free] - np.log(w[free]), nu, atol=1e-6)
        held = ~free & (lower > 1e-6) & (w < lower + 1e-9)
        assert (z[held] - np.log(lower[held]) <= nu + 1e-6).all()


def test_a_weight_below_its_bound_is_lifted_and_the_others_give_in_proportion():
    np.testing.assert_allclose(cap(np.array([0.6, 0.3, 0.1]), np.ones(3), np.array([0, 0, 0.4])), [0.4, 0.2, 0.4])
    np.testing.assert_allclose(cap(np.array([1.0, 0.0]), np.ones(2), np.array([0, 0.25])), [0.75, 0.25])
    with pytest.raises(ValueError, match=r"lower bounds sum to 1\.2"):
        water_fill(np.zeros(2), np.ones(2), np.array([0.6, 0.6]))


def test_bounds_that_hold_all_but_for_rounding_leave_none_without_a_number() -> None:
    left = np.array([0.1, 0.2, 0.3, 0.4 - 5e-13])  # their sum is 1 but for what bounds are allowed to miss
    found = cap(np.array([0.4, 0.3, 0.2, 0.1, 0.0]), np.append(left, 0.0))
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found[-1] == 0
