import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixers.candidates import around, centre, hit_and_run, into, spread


def box(m, seed):
    prior = np.random.default_rng(seed).dirichlet(np.ones(m))
    return prior, 0.5 * prior, np.minimum(2 * prior, 1)


def check(w, lower, upper):
    assert abs(w.sum(axis=-1) - 1).max() < 1e-12
    assert (w >= lower - 1e-12).all()
    assert (w <= upper + 1e-12).all()


@pytest.mark.parametrize("m", [1, 2, 3, 10, 100, 1000])
def test_always_as_many_mixtures_as_asked_for_and_all_valid(m):
    _, lower, upper = box(m, 0)
    w, _ = spread(64, lower, upper, np.random.default_rng(0))
    assert w.shape == (64, m)
    check(w, lower, upper)
    if m > 1:
        assert (w.std(axis=0) > 0.1 * lower).all()  # spread, not a point


def test_rejection_where_it_works_and_hit_and_run_where_it_does_not():
    uniform = np.full(5, 0.2)
    assert spread(200, 0.5 * uniform, 2 * uniform, np.random.default_rng(0))[1] > 0.3
    uniform = np.full(100, 0.01)
    assert spread(200, 0.5 * uniform, 2 * uniform, np.random.default_rng(0))[1] < 0.02


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6), st.floats(0, 1), st.floats(0.01, 1e4))
def test_degenerate_boxes(m, seed, fixed, concentration):
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.full(m, 0.3))
    held = rng.random(m) < fixed
    lower, upper = np.where(held, prior, rng.random() * prior), np.where(held, prior, (1 + rng.random()) * prior)
    for w in (spread(8, lower, upper, rng)[0], around(8, prior, concentration, lower, upper, rng),
              into(rng.random((8, m)), lower, upper)):  # fmt: skip
        check(w, lower, upper)
        np.testing.assert_allclose(w[:, held], np.broadcast_to(prior[held], (8, held.sum())), atol=1e-12)


def test_the_same_seed_draws_the_same():
    _, lower, upper = box(40, 1)
    first, second = (spread(32, lower, upper, np.random.default_rng(7))[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (first != spread(32, lower, upper, np.random.default_rng(8))[0]).any()


def test_hit_and_run_is_uniform_on_the_slice():
    # Reference: uniform on the simplex (Dirichlet(1)), rejected outside of the box.
    lower, upper = np.array([0.05, 0.1, 0.0, 0.2]), np.array([0.6, 0.3, 0.7, 0.5])
    rng = np.random.default_rng(0)
    plain = rng.dirichlet(np.ones(4), size=400_000)
    plain = plain[((plain >= lower) & (plain <= upper)).all(axis=1)]
    w = hit_and_run(20_000, centre(lower, upper), lower, upper, rng)
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        quantile = np.quantile(plain, level, axis=0)
        np.testing.assert_allclose((w <= quantile).mean(axis=0), level, atol=0.015)


def test_a_large_concentration_is_near_and_a_small_one_is_far():
    prior, lower, upper = box(20, 2)
    far, near = (around(400, prior, c, lower, upper, np.random.default_rng(0)).std(axis=0) for c in (20.0, 2e5))
    assert (near < 0.2 * far).all()


@pytest.mark.parametrize(("lower", "upper"), [([0.6, 0.6], [1, 1]), ([0, 0], [0.4, 0.4]), ([0.5, 0.2], [0.4, 0.9])])
def test_a_box_without_a_mixture_is_refused(lower, upper):
    with pytest.raises(ValueError, match="no mixture lies between them"):
        spread(4, np.array(lower), np.array(upper), np.random.default_rng(0))
