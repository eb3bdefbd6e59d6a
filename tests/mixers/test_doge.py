"""DoGE's update rule against numbers computed by hand (arXiv 2310.15393, Algorithm 1)."""

from math import exp

import numpy as np
import pytest

from dynmix.mixers.base import Run
from dynmix.mixers.doge import DoGE
from dynmix.observation import Influence, Observation

RUN = Run({"a": 10, "b": 10}, 20, {"a": 0.8, "b": 0.2})


def products(scores, tasks, guards=(), domains=("a", "b")):
    return Observation(100, gradient=Influence(scores, tasks, domains, guards=guards), steps=100)


def test_generalising_to_tasks_by_hand():
    mixer = DoGE(step_size=0.01)
    mixer.start(RUN)
    # W = (1 + 0.5, 0.2 + 0.3), the guard left out; exponents 0.01 * 100 * W; from uniform: exp(1.5) : exp(0.5)
    mixer.observe(products([[1.0, 0.2], [0.5, 0.3], [9.0, 9.0]], ["t", "u", "g"], ["g"]))
    assert mixer.propose(None, RUN.weights).weights["a"] == pytest.approx(1 / (1 + exp(-1)))
    # Again: the exponents add up. The mean of the two is what the paper trains on.
    mixer.observe(products([[1.0, 0.2], [0.5, 0.3], [9.0, 9.0]], ["t", "u", "g"], ["g"]))
    assert mixer.propose(None, RUN.weights).weights["a"] == pytest.approx(1 / (1 + exp(-2)))
    assert mixer.mean["a"] == pytest.approx((1 / (1 + exp(-1)) + 1 / (1 + exp(-2))) / 2)


def test_universal_generalisation_is_the_product_with_the_sum_over_domains():
    g = np.array([[1.0, 0.5, -0.2], [0.3, -0.4, 0.8]])  # gradients of a and b
    mean = g.mean(axis=0)
    mixer = DoGE(target="domains", step_size=0.01, initial="prior")
    mixer.start(RUN)
    mixer.observe(products([[5.0, 1.0], g @ mean], ["t", "domains"], ["domains"]))
    # g_a (g_a + g_b) = 1.29 - 0.06 = 1.23; g_b (g_a + g_b) = 0.89 - 0.06 = 0.83
    up, down = 0.8 * exp(1.23), 0.2 * exp(0.83)
    assert mixer.propose(None, RUN.weights).weights["a"] == pytest.approx(up / (up + down))


def test_a_domain_that_nearly_vanished_can_come_back():
    mixer = DoGE(step_size=0.01)
    mixer.start(RUN)
    # Gradients of norm 20, as early in training: an exponent of 400 a boundary is beyond float64 after the second.
    for sign in (1, 1, 1, -1, -1, -1):
        mixer.observe(products([[sign * 400.0, 0.0]], ["t"]))
    weights = mixer.propose(None, RUN.weights).weights
    assert weights["b"] > 0.99
    assert weights["a"] > 0


def test_a_domain_of_weight_0_is_not_given_any():
    # The least weight that there is would be drawn.
    mixer = DoGE(step_size=0.01, initial="prior")
    mixer.start(Run(RUN.tokens, RUN.total_tokens, {"a": 1.0, "b": 0.0}))
    mixer.observe(products([[-400.0, 400.0]], ["t"]))
    assert mixer.propose(None, {"a": 1.0, "b": 0.0}).weights == {"a": 1.0, "b": 0.0}


def test_domains_are_matched_by_name():
    mixer = DoGE(step_size=0.01)
    mixer.start(RUN)
    mixer.observe(products([[0.0, 1.0]], ["t"], domains=("b", "a")))
    assert mixer.propose(None, RUN.weights).weights == pytest.approx({"a": 1 / (1 + exp(-1)), "b": 1 / (1 + exp(1))})


def test_a_target_that_was_not_measured_is_said():
    for target, rows, kind in (("domains", products([[1.0, 2.0]], ["t"]), "guard"), ("tasks", None, "task")):
        mixer = DoGE(target=target)
        mixer.start(RUN)
        with pytest.raises(ValueError, match=f"needs a {kind} row"):
            mixer.observe(rows or products([[1.0, 2.0]], ["g"], ["g"]))
    assert DoGE.needs == {"gradient", "guards"}
