"""DoReMi's update rule against numbers computed by hand (arXiv 2305.10429, Algorithm 1)."""

from math import log

import pytest

from dynmix.mixers.base import Run
from dynmix.mixers.doremi import DoReMi
from dynmix.observation import Observation

RUN = Run({"a": 10, "b": 10}, 20, {"a": 0.8, "b": 0.2})


def seen(step, **excess):
    loss = {name: 2.0 + x for name, x in excess.items()}
    return Observation(step, dict.fromkeys(excess, 8), loss, dict.fromkeys(excess, 2.0), excess)


def test_the_update_by_hand():
    mixer = DoReMi(eta=1, smoothing=0.1)
    mixer.start(RUN)
    # alpha' = (0.5 * 3, 0.5 * 1) / 2 = (0.75, 0.25); alpha = 0.9 alpha' + 0.05 = (0.725, 0.275)
    mixer.observe(seen(1, a=log(3), b=0.0))
    assert mixer.propose(None, RUN.weights).weights == pytest.approx({"a": 0.725, "b": 0.275})
    # The batch holds b alone, a keeps its ln 3: alpha' ~ (0.725 * 3, 0.275 * 2) = (2.175, 0.55), a: 0.798165
    mixer.observe(seen(2, b=log(2)))
    assert mixer.propose(None, RUN.weights).weights["a"] == pytest.approx(0.9 * 2.175 / 2.725 + 0.05)
    # What the paper trains the main model on: the mean over the steps, without the initial weights
    assert mixer.mean["a"] == pytest.approx((0.725 + 0.9 * 2.175 / 2.725 + 0.05) / 2)


def test_eta_scales_the_exponent_and_the_prior_may_be_the_start():
    mixer = DoReMi(eta=0.5, smoothing=0, initial="prior")
    mixer.start(RUN)
    mixer.observe(seen(1, a=0.0, b=log(9)))  # (0.8 * 1, 0.2 * 3)
    assert mixer.propose(None, RUN.weights).weights == pytest.approx({"a": 0.8 / 1.4, "b": 0.6 / 1.4})


def test_the_average_is_proposed_if_asked_for():
    mixer = DoReMi(smoothing=0, average=True)
    mixer.start(RUN)
    mixer.observe(seen(1, a=log(3), b=0.0))  # (3/4, 1/4)
    mixer.observe(seen(2, a=log(3), b=0.0))  # (9/10, 1/10)
    assert mixer.propose(None, RUN.weights).weights == pytest.approx({"a": 0.825, "b": 0.175})


def test_a_domain_not_seen_yet_counts_as_an_average_one():
    mixer = DoReMi(smoothing=0)
    mixer.start(Run(dict.fromkeys("abc", 10), 20, {"a": 0.4, "b": 0.4, "c": 0.2}))
    mixer.observe(seen(1, a=log(4), b=0.0))  # c: ln 2
    weights = mixer.propose(None, {"a": 0.4, "b": 0.4, "c": 0.2}).weights
    assert weights == pytest.approx({"a": 4 / 7, "b": 1 / 7, "c": 2 / 7})


def test_a_huge_excess_does_not_overflow():
    mixer = DoReMi()
    mixer.start(RUN)
    mixer.observe(seen(1, a=1e6, b=0.0))
    assert mixer.propose(None, RUN.weights).weights == pytest.approx({"a": 0.9995, "b": 0.0005})


def test_no_reference_model_is_said():
    mixer = DoReMi()
    mixer.start(RUN)
    with pytest.raises(ValueError, match="reference="):
        mixer.observe(Observation(1, {"a": 8}, {"a": 2.0}))
    assert mixer.needs == {"loss", "reference_loss"}
