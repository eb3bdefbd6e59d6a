"""ADO: the fitted laws against known ones, the rule against numbers computed by hand (arXiv 2410.11820)."""

from math import log, sqrt

import numpy as np
import pytest

from dynmix.mixers.ado import ADO, BIN_STEPS, MAX_BINS, MIN_BINS, fit_law
from dynmix.mixers.base import Run
from dynmix.observation import Observation


@pytest.mark.parametrize(("eps", "beta", "alpha"), [(2.0, 30.0, 0.2), (1.5, 200.0, 0.3), (3.0, 1000.0, 0.5)])
def test_a_law_without_noise_is_found(eps, beta, alpha):
    n = np.arange(1, 200) * 1e6
    log_eps, log_reducible, found, log_last = fit_law(np.log(n), eps + beta * n**-alpha)
    assert np.exp([log_eps, log_reducible]) == pytest.approx([eps, beta * n[-1] ** -alpha], rel=1e-6)
    assert found == pytest.approx(alpha, rel=1e-6)
    assert log_last == log(n[-1])


def test_outliers_do_not_move_the_fit():
    n = np.arange(1, 200) * 1e6
    loss = 2 + 30 * n**-0.2
    loss[::40] *= 1.5
    assert fit_law(np.log(n), loss)[2] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("loss", [np.full(20, 2.0), np.linspace(2, 3, 20)], ids=["flat", "rising"])
def test_a_loss_that_does_not_fall_gives_a_law_of_finite_numbers(loss):
    assert np.isfinite(fit_law(np.log(np.arange(1, 21)), loss)).all()


def trained(mixer, steps, start=0, weights=(0.5, 0.3, 0.2)):
    """Steps of 100 tokens each, drawn as the weights say, with losses on known laws; c's loss does not fall."""
    for step in range(start + 1, start + steps + 1):
        n = 100.0 * step
        loss = {"a": 2 + 4 * n**-0.4, "b": 1 + 8 * n**-0.2, "c": 3.0}
        tokens = {name: int(100 * w) for name, w in zip("abc", weights, strict=True)}
        mixer.observe(Observation(step, tokens, {name: loss[name] for name, count in tokens.items() if count}))


RUN = Run({"a": 1, "b": 1, "c": 1}, 10**9, {"a": 0.5, "b": 0.3, "c": 0.2})


def test_the_policy_by_hand():
    mixer = ADO(warmup=10, floor=0.05)
    mixer.start(RUN)
    trained(mixer, 10 + BIN_STEPS * (MIN_BINS - 1) + BIN_STEPS - 1)
    assert mixer.propose(None, RUN.weights).solver == "prior"
    trained(mixer, 1, 49)
    proposal = mixer.propose(None, RUN.weights)
    # Drawn as the weights say, h stays at mu: rho ~ mu^1.5 alpha (L - eps), at n = 5000 tokens. Means over ten steps
    # lie a little off the law, so to a few parts in a thousand.
    a = 0.5**1.5 * 0.4 * 4 * 5000**-0.4
    b = 0.3**1.5 * 0.2 * 8 * 5000**-0.2
    rho = np.array([a / (a + b), b / (a + b), 0.05]) / 1.05
    assert [proposal.weights[name] for name in "abc"] == pytest.approx(
        0.1 * rho + 0.9 * np.array([0.5, 0.3, 0.2]), abs=1e-3
    )

    # The next step averages rho in with 1 / (t + 1), by the laws that were fitted.
    before = mixer.state_dict()["mean"]
    trained(mixer, 1, 50)
    after = mixer.state_dict()["mean"]
    assert before == pytest.approx([0.5, 0.3, 0.2])
    assert after == pytest.approx(np.array(before) * 51 / 52 + rho / 52, abs=1e-4)


def test_credit_follows_what_was_drawn_and_enters_with_its_root():
    mixer = ADO(warmup=0)
    mixer.start(RUN)
    trained(mixer, 1, weights=(0.9, 0.1, 0.0))
    assert mixer.state_dict()["credit"] == pytest.approx([0.9 * 0.5 + 0.09, 0.9 * 0.3 + 0.01, 0.9 * 0.2])
    state = mixer.state_dict() | {"laws": [[0.0, 0.0, 0.3, log(100)]] * 3, "credit": [0.64, 0.36, 0.04]}
    mixer.load_state_dict(state)
    rho = np.array([0.5 * 0.8, 0.3 * 0.6, 0.2 * 0.2]) / 0.62
    policy = mixer.propose(None, RUN.weights).weights
    assert [policy[name] for name in "abc"] == pytest.approx(0.1 * rho + 0.9 * np.array([0.5, 0.3, 0.2]))
    assert sqrt(0.64) == 0.8


def test_the_state_stays_small_and_its_curve_covers_the_run():
    mixer = ADO(warmup=0)
    mixer.start(RUN)
    steps = 3 * BIN_STEPS * MAX_BINS
    trained(mixer, steps)
    state = mixer.state_dict()
    assert len(state["bins"]) < MAX_BINS
    curve = np.exp(np.array(state["bins"])[:, 0])
    assert (np.diff(curve) > 0).all()
    assert curve[-1] > 0.98 * 100 * steps
    assert mixer.propose(None, RUN.weights).weights["b"] > 0.3  # what falls fastest still


def test_a_domain_of_weight_0_stays_out():
    weights = {"a": 0.6, "b": 0.4, "c": 0.0}
    mixer = ADO(warmup=0)
    mixer.start(Run({"a": 1, "b": 1, "c": 1}, 10**9, weights))
    trained(mixer, 100, weights=(0.6, 0.4, 0.0))
    proposal = mixer.propose(None, weights)
    assert proposal.solver == "ADO"
    assert proposal.weights["c"] == 0


def test_the_warm_up_of_a_short_run_is_a_tenth_of_its_tokens():
    mixer = ADO()  # the authors' 1000 steps would be the whole run
    mixer.start(Run({"a": 1, "b": 1, "c": 1}, 20_000, {"a": 0.5, "b": 0.3, "c": 0.2}))
    trained(mixer, 20 + BIN_STEPS * MIN_BINS - 1)
    assert mixer.propose(None, RUN.weights).solver == "prior"
    trained(mixer, 1, 20 + BIN_STEPS * MIN_BINS)
    assert mixer.propose(None, RUN.weights).solver == "ADO"
