from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import xlogy

from dynmix.mixers.problem import Problem, lift
from dynmix.mixers.simplex import water_fill
from dynmix.mixers.solvers import solve_clarabel, solve_dual, solve_slsqp


def problem(seed: int, n=3, m=6, alpha=1.0, beta=1.0, gamma=1.0, upper=1.0) -> Problem:
    rng = np.random.default_rng(seed)
    S = rng.normal(size=(n, m)) + 0.3
    C = S / np.abs(S).max(axis=1, keepdims=True)
    prior = rng.dirichlet(np.ones(m))
    bounds = np.maximum(np.full(m, upper), prior)
    zeros = np.zeros((n, m))
    return Problem(C, C, C @ prior, prior, zeros[0], bounds, alpha, beta, gamma, zeros, np.full(n, beta), prior)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("upper", [1.0, 0.3])
def test_the_three_solvers_agree(seed, upper):
    p = problem(seed, upper=upper)
    objectives = []
    for solve in (solve_dual, solve_clarabel, solve_slsqp):
        w, multipliers = solve(p)
        assert p.violation(w) < 1e-9
        assert (w <= p.upper + 1e-9).all()
        assert w.sum() == pytest.approx(1, abs=1e-9)
        assert multipliers.shape == (3,)
        objectives.append(p.objective(w))
    np.testing.assert_allclose(objectives, objectives[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 1e-3])
def test_clarabel_solves_what_has_no_smooth_dual(gamma):
    p = problem(1, gamma=gamma)
    w, _ = solve_clarabel(p)
    assert p.violation(w) < 1e-9
    rng = np.random.default_rng(0)
    others = rng.dirichlet(np.ones(6), size=20_000)
    others = others[[p.violation(x) == 0 for x in others]]
    assert len(others) > 10
    assert p.objective(w) <= min(p.objective(x) for x in others) + 1e-9


@given(st.integers(0, 10_000), st.floats(0, 5), st.floats(0, 5), st.floats(0.1, 5))
@settings(deadline=None, max_examples=25)
def test_no_random_feasible_mixture_beats_the_dual(seed, alpha, beta, gamma):
    p = problem(seed, alpha=alpha, beta=beta, gamma=gamma)
    try:
        w, _ = solve_dual(p)
    except ArithmeticError:  # it says so where it did not converge; what it returns is always certified
        return
    rng = np.random.default_rng(seed)
    # Points between the answer, the prior and random mixtures: many of them feasible, near the optimum and far.
    for other in rng.dirichlet(np.ones(6), size=50):
        for t in (0.01, 0.3, 1.0):
            for x in ((1 - t) * w + t * other, (1 - t) * p.start + t * other):
                if p.violation(x) == 0:
                    assert p.objective(w) <= p.objective(x) + 1e-7 * max(1, abs(p.objective(x)))


def test_lift_moves_onto_the_constraints():
    p = problem(3)
    w, _ = solve_dual(p)
    missed = 0.999 * w + 0.001 * np.eye(6)[np.argmin(p.C[0])]
    assert p.violation(missed) > 0
    assert p.violation(lift(p, missed)) < 1e-15


@given(st.integers(0, 10_000), st.floats(0.2, 3), st.sampled_from([1.0, 0.4]))
def test_the_primal_is_not_below_the_dual_and_they_meet(seed, gamma, upper):
    """The dual function from its definition, a minimum over mixtures: below any feasible value, and at the answer's."""
    p = problem(seed, gamma=gamma, upper=upper)
    w, multipliers = solve_dual(p)

    def dual(lam, u):
        q = p.linear + u @ p.spread - lam @ p.C
        slow = water_fill(-q / gamma, p.upper)
        return lam @ p.floor + q @ slow + gamma * xlogy(slow, slow).sum()

    rng = np.random.default_rng(seed)
    for _ in range(20):
        lam, u = rng.exponential(size=3), rng.normal(size=3)
        assert p.objective(w) >= dual(lam, u / max(1, np.linalg.norm(u))) - 1e-9
    Kw = p.spread @ w
    if np.linalg.norm(Kw) > 1e-3:  # else u is not the direction of Kw, which has none
        assert p.objective(w) == pytest.approx(dual(multipliers, Kw / np.linalg.norm(Kw)), abs=1e-5)


def robust(seed: int, noise: float) -> Problem:
    p, rng = problem(seed), np.random.default_rng(seed + 1)
    return replace(p, R=noise * rng.uniform(0.2, 1, p.C.shape))


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_the_solvers_of_uncertain_scores_agree(seed, noise):
    p = robust(seed, noise)
    exact, multipliers = solve_clarabel(p)
    other, _ = solve_slsqp(p)
    assert p.violation(exact) < 1e-8
    assert (multipliers >= -1e-8).all()
    if p.objective(p.start) - p.objective(exact) > 1e-6:  # else the prior is all there is, and SLSQP starts there
        assert p.objective(other) == pytest.approx(p.objective(exact), abs=1e-6)
