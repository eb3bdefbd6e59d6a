import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from dynmix.laws.bounds import Bounds


def random_bounds(rng):
    low = 0.15 * rng.random(5)
    return Bounds.of(5, low, np.minimum(low + 0.3 + 0.5 * rng.random(5), 1))


def feasible(w, bounds):
    return abs(w.sum() - 1) < 1e-9 and (w >= bounds.low - 1e-9).all() and (w <= bounds.high + 1e-9).all()


@given(st.integers(0, 2**31))
def test_nearest_is_feasible_and_nearer_than_others(seed):
    rng = np.random.default_rng(seed)
    bounds, w = random_bounds(rng), rng.dirichlet(np.full(5, 0.3))
    found = bounds.nearest(w)
    assert feasible(found, bounds)
    drawn = rng.dirichlet(np.ones(5), size=20)
    others = [bounds.nearest(x) for x in drawn]
    np.testing.assert_array_equal(bounds.nearest(drawn), others)
    assert all(np.linalg.norm(found - w) <= np.linalg.norm(other - w) + 1e-9 for other in others)


@given(st.integers(0, 2**31))
def test_cheapest_is_what_a_linear_programme_finds(seed):
    rng = np.random.default_rng(seed)
    bounds, cost = random_bounds(rng), rng.standard_normal(5)
    found = bounds.cheapest(cost)
    assert feasible(found, bounds)
    best = linprog(cost, A_eq=np.ones((1, 5)), b_eq=[1], bounds=list(zip(bounds.low, bounds.high, strict=True)))
    assert cost @ found == pytest.approx(best.fun, abs=1e-9)


def test_what_bounds_is_said():
    bounds = Bounds.of(3, tokens=[10, 10, 1], total_tokens=10, max_epochs=2, seen=np.array([True, False, True]))
    np.testing.assert_allclose(bounds.high, [1, 0, 0.2])
    assert "max_epochs=2 bounds 1 of 3 domains" in bounds.message
    assert "columns [1]" in bounds.message
    assert Bounds.of(3).message == ""
