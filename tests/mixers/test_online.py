"""LossProportional by hand, and what all mixers that learn from the training must keep."""

import copy
import json
import logging
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixers.ado import ADO
from dynmix.mixers.base import Run
from dynmix.mixers.doge import DoGE
from dynmix.mixers.doremi import DoReMi
from dynmix.mixers.odm import ODM
from dynmix.mixers.online import LossProportional
from dynmix.observation import Influence, Observation

MAKERS = {
    "loss-proportional": LossProportional,
    "odm": ODM,
    "doremi": DoReMi,
    "doremi-mean": lambda: DoReMi(average=True, initial="prior"),
    "doge": lambda: DoGE(smoothing=0.01),
    "doge-domains": lambda: DoGE(target="domains", average=True),
    "ado": lambda: ADO(warmup=0),
}
DOMAINS = ("a", "b", "c", "d")
WEIGHTS = {"a": 0.4, "b": 0.35, "c": 0.25, "d": 0.0}
every_mixer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def run(names=DOMAINS):
    return Run(dict.fromkeys(names, 1000), 4000, {name: WEIGHTS[name] for name in names})


def training(seed, steps, start=0, names=DOMAINS):
    """Observations of made-up steps: falling losses, batches that lack domains, gradients at each fifth step."""
    for step in range(start + 1, start + steps + 1):
        rng = np.random.default_rng([seed, step])
        values = rng.normal(size=(6, 4))
        held = {x for x, name in enumerate(DOMAINS) if name != "d" and values[0, x] > -1}
        shown = [x for x in map(DOMAINS.index, names) if x in held]
        loss = {DOMAINS[x]: 2 + x + 5 * step**-0.3 + 0.1 * values[1, x] for x in shown}
        yield Observation(
            step,
            tokens={name: 100 + 10 * DOMAINS.index(name) for name in loss},
            loss=loss,
            reference_loss=dict.fromkeys(loss, 2.0),
            excess_loss={name: max(x - 3, 0) for name, x in loss.items()},
        )
        if step % 5 == 0:
            columns = [DOMAINS.index(name) for name in names]
            gradient = Influence(values[2:4][:, columns], ["t", "g"], names, guards=["g"])
            yield Observation(step, gradient=gradient, steps=5)


def started(make, names=DOMAINS):
    mixer = make()
    mixer.start(run(names))
    return mixer


def learn(mixer, observations):
    """Show the mixer what it would be shown in a run."""
    for seen in observations:
        if ("gradient" if seen.gradient else "loss") in mixer.needs:
            mixer.observe(seen)


def test_loss_proportional_by_hand():
    mixer = started(lambda: LossProportional(smoothing=0.75), ("a", "b", "c"))
    mixer.observe(Observation(1, {"a": 5, "b": 5}, {"a": 2.0, "b": 4.0}))
    # c counts as an average one: 3
    assert mixer.propose(None, WEIGHTS).weights == pytest.approx({"a": 2 / 9, "b": 4 / 9, "c": 3 / 9})
    mixer.observe(Observation(2, {"b": 5, "c": 5}, {"b": 2.0, "c": 2.5}))
    # a: 2; b: 0.75 * 4 + 0.25 * 2 = 3.5; c: 2.5
    assert mixer.propose(None, WEIGHTS).weights == pytest.approx({"a": 0.25, "b": 0.4375, "c": 0.3125})


@every_mixer
def test_a_rehearsal_right_after_the_start_keeps_the_prior(make):
    mixer = started(make)
    assert copy.deepcopy(mixer).propose(None, WEIGHTS).weights == pytest.approx(WEIGHTS)
    bounded = copy.deepcopy(mixer).propose(None, WEIGHTS, {"a": 0.3}).weights
    assert bounded == pytest.approx({"a": 0.3, "b": 0.7 * 7 / 12, "c": 0.7 * 5 / 12, "d": 0})
    assert mixer.start(run()) is None


@every_mixer
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32),
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    bound=st.floats(0.4, 1),
)
def test_proposals_are_mixtures_inside_the_bounds(make, seed, steps, bound):
    mixer, done = started(make), 0
    prior, upper = dict(WEIGHTS), {"a": bound, "c": bound}
    for stage in steps:
        learn(mixer, training(seed, stage, done))
        done += stage
        before = dict(prior)
        weights = mixer.propose(None, prior, upper).weights
        assert prior == before
        assert upper == {"a": bound, "c": bound}
        assert set(weights) == set(DOMAINS)
        assert sum(weights.values()) == pytest.approx(1)
        assert all(0 <= w <= upper.get(name, 1) + 1e-12 for name, w in weights.items())
        prior = weights


@every_mixer
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), before=st.integers(0, 80), after=st.integers(0, 50))
def test_a_mixer_restored_from_json_goes_on_bit_for_bit(make, seed, before, after):
    mixer = started(make)
    learn(mixer, training(seed, before))
    prior = mixer.propose(None, WEIGHTS).weights
    state = json.loads(json.dumps(mixer.state_dict(), allow_nan=False))
    restored = started(make)
    restored.load_state_dict(state)
    kept = copy.deepcopy(state)
    for one in (mixer, restored):
        learn(one, training(seed, after, before))
    assert restored.propose(None, prior) == mixer.propose(None, prior)
    assert restored.state_dict() == mixer.state_dict()
    assert state == kept, "the state that was loaded was changed"


@every_mixer
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), order=st.permutations(DOMAINS))
def test_the_order_of_the_domains_does_not_matter(make, seed, order):
    weights = []
    for names in (DOMAINS, tuple(order)):
        mixer = started(make, names)
        learn(mixer, training(seed, 60, names=names))
        weights.append(mixer.propose(None, WEIGHTS).weights)
        assert list(weights[-1]) == list(names) or weights[-1] == WEIGHTS
    assert weights[0] == pytest.approx(weights[1], rel=1e-4, abs=1e-6)


@every_mixer
def test_what_is_no_finite_number_does_not_poison_the_state(make, caplog):
    mixer = started(make)
    learn(mixer, training(0, 60))
    mixer.propose(None, WEIGHTS)
    with caplog.at_level(logging.WARNING):
        for bad in (nan, inf, -inf):
            values = {"a": bad, "b": bad, "c": bad}
            tokens = dict.fromkeys(values, 10)
            gradient = Influence([[bad, 0, 0, 0], [bad, 0, 0, 0]], ["t", "g"], DOMAINS, guards=["g"])
            learn(mixer, [Observation(61, tokens, values, values, values), Observation(61, gradient=gradient)])
    assert len(caplog.records) == 1
    assert "no finite number" in caplog.text
    json.dumps(mixer.state_dict(), allow_nan=False)
    learn(mixer, training(0, 20, 60))
    assert all(np.isfinite(w) for w in mixer.propose(None, WEIGHTS).weights.values())


@every_mixer
def test_descriptions_and_states_are_plain(make):
    mixer = make()
    assert mixer.describe()["name"] == type(mixer).__name__
    json.dumps(mixer.describe(), allow_nan=False)
    mixer.start(run())
    with pytest.raises(ValueError, match=f"not a state of {type(mixer).__name__}"):
        mixer.load_state_dict({})


@every_mixer
def test_observing_before_the_start_says_so(make):
    with pytest.raises(ValueError, match="call start"):
        learn(make(), training(0, 5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LossProportional(smoothing=1), "smoothing=1: must be at least 0 and below 1"),
        (lambda: ODM(alpha=nan), "alpha=nan"),
        (lambda: DoReMi(eta=-1), "eta=-1: must be finite and above 0"),
        (lambda: DoReMi(smoothing=2), "smoothing=2: a share between 0 and 1"),
        (lambda: DoReMi(initial="natural"), "initial='natural': 'uniform' or 'prior'"),
        (lambda: DoGE(target="all"), "target='all': 'tasks' or 'domains'"),
        (lambda: DoGE(step_size=inf), "step_size=inf"),
        (lambda: ADO(s=-1), "s=-1"),
        (lambda: ADO(gamma=0), "gamma=0"),
        (lambda: ADO(floor=1), "floor=1"),
        (lambda: ADO(warmup=-1), "warmup=-1"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
