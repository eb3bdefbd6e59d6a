"""ODM's update rule against numbers computed by hand (arXiv 2312.02406, Algorithm 1)."""

from math import exp, log, sqrt

import pytest

from dynmix.mixers.base import Run
from dynmix.mixers.odm import ODM
from dynmix.observation import Observation

RUN = Run({"a": 10, "b": 10}, 20, {"a": 0.8, "b": 0.2})


def test_one_domain_a_batch_by_hand():
    mixer = ODM(alpha=0.5)
    mixer.start(RUN)
    mixer.observe(Observation(1, {"a": 64}, {"a": 4.0}))
    mixer.observe(Observation(2, {"b": 64}, {"b": 3.0}))
    # R_a = 0.5 * 0 + 0.5 * 4 / 0.8 = 2.5, R_b = 0.5 * 3 / 0.2 = 7.5
    # The policy of step 3: e_3 = min(1/2, sqrt(ln 2 / 6)) = 0.339889, e_2 = sqrt(ln 2 / 4) = 0.416277
    # softmax(e_2 R): b over a is exp(0.416277 * 5) = 8.015575, so a has 0.110919
    # a: (1 - 2 * 0.339889) * 0.110919 + 0.339889 = 0.375408
    assert sqrt(log(2) / 6) == pytest.approx(0.339889, abs=1e-6)
    assert exp(0.416277 * 5) == pytest.approx(8.015575, abs=1e-4)
    assert mixer.propose(None, RUN.weights).weights == pytest.approx({"a": 0.375408, "b": 0.624592}, abs=1e-6)

    # The batches to come are drawn with what was proposed.
    mixer.observe(Observation(3, {"a": 64}, {"a": 1.0}))
    # R_a = 0.5 * 2.5 + 0.5 * 1 / 0.375408 = 2.581885; e_4 = sqrt(ln 2 / 8) = 0.294353
    # b over a: exp(0.339889 * (7.5 - 2.581885)) = 5.320744; a: 0.158209 * (1 - 0.588705) + 0.294353 = 0.359423
    assert mixer.propose(None, RUN.weights).weights["a"] == pytest.approx(0.359423, abs=1e-6)


def test_a_batch_of_several_domains_counts_each_by_its_share_of_the_draws():
    mixer = ODM(alpha=0.0)
    mixer.start(RUN)
    mixer.observe(Observation(1, {"a": 60, "b": 20}, {"a": 4.0, "b": 3.0}))
    assert mixer.state_dict()["reward"] == pytest.approx({"a": 4 * 0.75 / 0.8, "b": 3 * 0.25 / 0.2})
    # Drawn as the weights say, the rewards are the losses, however small a weight is.
    mixer.observe(Observation(2, {"a": 80, "b": 20}, {"a": 4.0, "b": 3.0}))
    assert mixer.state_dict()["reward"] == pytest.approx({"a": 4.0, "b": 3.0})


def test_a_domain_that_was_not_observed_keeps_its_reward():
    mixer = ODM(alpha=0.9)
    mixer.start(RUN)
    mixer.observe(Observation(1, {"a": 5, "b": 5}, {"a": 4.0, "b": 3.0}))
    before = mixer.state_dict()["reward"]
    mixer.observe(Observation(2, {"a": 5}, {"a": 4.0}))
    after = mixer.state_dict()["reward"]
    assert after["b"] == before["b"]
    assert after["a"] > before["a"]


def test_a_domain_of_weight_0_is_explored_unless_a_bound_keeps_it_out():
    mixer = ODM()
    mixer.start(Run({"a": 10, "b": 10}, 20, {"a": 1.0, "b": 0.0}))
    mixer.observe(Observation(1, {"a": 5, "b": 5}, {"a": 4.0, "b": 3.0}))  # b: of a stage before
    assert mixer.state_dict()["reward"]["b"] == 0
    assert mixer.propose(None, {"a": 1.0, "b": 0.0}).weights["b"] > 0.3
    assert mixer.propose(None, {"a": 1.0, "b": 0.0}, {"b": 0.0}).weights == {"a": 1.0, "b": 0.0}


def test_a_run_of_one_domain():
    mixer = ODM()
    mixer.start(Run({"a": 10}, 20, {"a": 1.0}))
    mixer.observe(Observation(1, {"a": 5}, {"a": 4.0}))
    assert mixer.propose(None, {"a": 1.0}).weights == {"a": 1.0}
