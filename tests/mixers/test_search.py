import numpy as np
import pytest

from dynmix import Influence, TiKMiXD
from dynmix.mixers.problem import Problem
from dynmix.mixers.search import Pareto, Search, largest

NAMES = [f"d{j}" for j in range(6)]
PRIOR = np.full(6, 1 / 6)


def posed(seed: int, error: float = 0.0) -> Problem:
    """A box of half to twice the prior, and three tasks that must not get worse."""
    scores = np.random.default_rng(seed).normal(size=(3, 6))
    influence = Influence(scores, ["a", "b", "c"], NAMES, standard_error=np.full((3, 6), error) if error else None)
    low, high = (dict.fromkeys(NAMES, weight) for weight in (1 / 12, 1 / 3))
    problem = TiKMiXD().problem(influence, dict(zip(NAMES, PRIOR, strict=True)), high, low)
    assert problem is not None
    return problem


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("error", [0.0, 0.1])
def test_what_is_found_is_in_the_box_keeps_the_constraint_and_is_no_smaller(seed, error):
    problem, rng = posed(seed, error), np.random.default_rng(seed)
    constraint, slope = Pareto(problem), rng.normal(size=6)
    search = Search(iterations=10, samples=64, top_k=8, concentration=(1.0, 1000.0), anneal="narrowing")
    w = search.find(lambda W: W @ slope, problem.start, problem, constraint, rng)
    assert w.sum() == pytest.approx(1, abs=1e-12)
    assert (w >= problem.lower - 1e-12).all()
    assert (w <= problem.upper + 1e-12).all()
    assert constraint.holds(w[None])[0]
    assert slope @ w >= slope @ problem.start
    if not error:  # the constraint is a polytope: a linear function's maximum is the programme's
        best = constraint.vertex(slope, problem.lower, problem.upper, problem.start)
        assert slope @ w == pytest.approx(slope @ best, abs=1e-6)


def test_without_a_constraint_a_linear_function_is_largest_in_a_corner_of_the_box():
    problem = posed(0)
    w = Pareto(None).vertex(np.arange(6.0), problem.lower, problem.upper, PRIOR)
    np.testing.assert_allclose(w, [1 / 12, 1 / 12, 1 / 12, 1 / 12, 1 / 3, 1 / 3])
    assert Pareto(None).holds(np.eye(6)).all()


def test_mixtures_are_moved_back_only_as_far_as_the_constraint_asks():
    problem = posed(1)
    constraint, corners = Pareto(problem), np.eye(6)
    kept = constraint.holds(corners)
    assert not kept.all()
    moved = constraint.shrink(corners, PRIOR)
    assert constraint.holds(moved).all()
    np.testing.assert_array_equal(moved[kept], corners[kept])
    further = PRIOR + (moved[~kept] - PRIOR) * (1 + 1e-4) + 1e-5 * (corners[~kept] - PRIOR)
    assert not constraint.holds(further).any()


def test_the_largest_is_the_first_of_equals():
    assert largest(lambda W: np.zeros(len(W)), np.eye(3)).tolist() == [1, 0, 0]
