import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.mixers.base import Run
from dynmix.mixers.static import Fixed, Natural, Staged, Static, Temperature, Uniform, UniMax

PRIOR = {"a": 0.2, "b": 0.3, "c": 0.5}


def run(tokens, total=1000, weights=None):
    return Run(tokens, total, weights or dict.fromkeys(tokens, 1 / len(tokens)))


def test_static_keeps_the_prior_and_measures_only_if_asked():
    assert Static().propose(None, PRIOR).weights == PRIOR
    assert Static().propose(None, PRIOR, upper={"c": 0.6}).weights == PRIOR
    assert Static().propose(None, PRIOR, upper={"c": 0.4}).weights == pytest.approx({"a": 0.24, "b": 0.36, "c": 0.4})
    assert Static().needs == frozenset()
    assert Static(observe=True).needs == {"influence"}
    assert Static(observe=True).describe() == {"name": "Static", "observe": True}
    assert Static().start(run({"a": 1, "b": 1, "c": 1})) is None


def test_weights_that_are_given_are_0_for_domains_that_are_gone():
    resumed = Run({"a": 1, "b": 1, "c": 1}, 1000, {"a": 0.2, "b": 0.3, "c": 0.5}, gone=("c",))
    for mixer in (Fixed({"b": 0.4, "a": 0.6}), Staged([{"a": 1.0, "b": 0.0}, {"a": 0.6, "b": 0.4}])):
        mixer.start(resumed)
        assert mixer.propose(None, PRIOR, upper={"c": 0.0}).weights == {"a": 0.6, "b": 0.4, "c": 0.0}
        with pytest.raises(ValueError, match=r"missing \['c'\]"):
            mixer.start(run({"a": 1, "b": 1, "c": 1}))


def test_natural_uniform_and_temperature():
    tokens = {"a": 900, "b": 100}
    assert Natural().start(run(tokens)) == pytest.approx({"a": 0.9, "b": 0.1})
    assert Uniform().start(run(tokens)) == {"a": 0.5, "b": 0.5}
    assert Temperature(tau=2).start(run(tokens)) == pytest.approx({"a": 0.75, "b": 0.25})  # 30 : 10
    assert Temperature(tau=float("inf")).start(run(tokens)) == {"a": 0.5, "b": 0.5}
    # XLM-R: q ~ n^0.3. 900^0.3 / (900^0.3 + 100^0.3) = 9^0.3 / (9^0.3 + 1) = 1.933182 / 2.933182
    assert Temperature().start(run(tokens))["a"] == pytest.approx(0.659073, abs=1e-6)


@pytest.mark.parametrize(
    ("budget", "shares"),
    [
        # caps of 4 epochs: 40, 400, 4000. 40 < 900/3, 400 < 860/2, the rest of the budget to the last
        (900, {"s": 40, "m": 400, "l": 460}),
        # 40 < 300/3, then 130 each
        (300, {"s": 40, "m": 130, "l": 130}),
        (30, {"s": 10, "m": 10, "l": 10}),
        # more than all caps together: the caps are the proportions
        (10_000, {"s": 40, "m": 400, "l": 4000}),
    ],
)
def test_unimax_against_algorithm_1(budget, shares):
    tokens = {"l": 1000, "s": 10, "m": 100}  # in no order
    expected = {name: share / sum(shares.values()) for name, share in shares.items()}
    assert UniMax().start(run(tokens, total=budget)) == pytest.approx(expected)
    assert UniMax(budget=budget).start(run(tokens, total=1)) == pytest.approx(expected)
    assert list(UniMax().start(run(tokens))) == list(tokens)


def test_unimax_against_another_implementation():
    # The example in the documentation of unimax-sampling on PyPI: characters, a budget of 250e9, 4 epochs.
    characters = {
        "swe": 179955884499,
        "fas": 184595788282,
        "ekk": 42541080893,
        "isl": 10027573389,
        "fao": 549707867,
    }
    probabilities = {
        "swe": 0.27692116663466665,
        "fas": 0.27692116663466665,
        "ekk": 0.2769211666346667,
        "isl": 0.160441174224,
        "fao": 0.008795325872,
    }
    assert UniMax(max_epochs=4, budget=250_000_000_000).start(run(characters)) == pytest.approx(
        probabilities, rel=1e-12
    )


def test_fixed_has_its_weights_from_the_first_sample_on_and_inside_the_bounds():
    given_weights = {"b": 0.75, "a": 0.25}
    mixer = Fixed(given_weights)
    given_weights["b"] = 7.0
    assert mixer.start(run({"a": 1, "b": 1})) == {"a": 0.25, "b": 0.75}
    assert mixer.propose(None, {"a": 0.5, "b": 0.5}).weights == {"a": 0.25, "b": 0.75}
    assert mixer.propose(None, {"a": 0.5, "b": 0.5}, {"b": 0.6}).weights == pytest.approx({"a": 0.4, "b": 0.6})
    assert mixer.describe() == {"name": "Fixed", "weights": {"b": 0.75, "a": 0.25}}


def test_staged_goes_through_its_list_and_stays_at_the_end():
    stages = [{"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}, {"b": 1.0, "a": 0.0}]
    mixer = Staged(stages)
    prior = mixer.start(run({"a": 1, "b": 1}))
    assert prior == stages[0]
    assert mixer.propose(None, prior).weights == stages[1]
    state = json.loads(json.dumps(mixer.state_dict()))
    resumed = Staged(stages)
    resumed.start(run({"a": 1, "b": 1}))
    resumed.load_state_dict(state)
    for staged in (mixer, resumed):
        assert [staged.propose(None, prior).weights for _ in range(3)] == [stages[2]] * 3
    assert mixer.propose(None, prior, {"b": 0.9}).weights == pytest.approx({"a": 0.1, "b": 0.9})
    json.dumps(mixer.describe())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Temperature(0), "tau=0: a temperature is above 0"),
        (lambda: Temperature(float("nan")), "tau=nan"),
        (lambda: UniMax(max_epochs=0), "max_epochs=0: must be above 0"),
        (lambda: UniMax(budget=-1), "budget=-1"),
        (lambda: Fixed({"a": 0.5, "b": 0.6}), "weights: weights sum to 1.1"),
        (lambda: Fixed({"a": -0.5, "b": 1.5}), "finite and at least 0"),
        (lambda: Staged([]), "at least one mapping"),
        (lambda: Staged({"a": 1.0}), "a list of"),
        (lambda: Staged([{"a": 1.0}, {"b": 1.0}]), r"stage 1: .*missing \['a'\], unknown \['b'\]"),
        (lambda: Staged([{"a": 1.0}, {"a": float("inf")}]), "stage 1: weights must be finite"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("mixer", [Fixed({"a": 0.5, "x": 0.5}), Staged([{"a": 0.5, "x": 0.5}])])
def test_domains_that_are_not_the_runs_are_named_at_the_start(mixer):
    with pytest.raises(ValueError, match=rf"{type(mixer).__name__}: .*missing \['b'\], unknown \['x'\]"):
        mixer.start(run({"a": 1, "b": 1}))


@given(
    tokens=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10**13), min_size=1),
    total=st.integers(1, 10**14),
    room=st.floats(1.01, 3),
)
def test_planned_weights_are_a_mixture_that_does_not_depend_on_the_order(tokens, total, room):
    for make in (Natural, Uniform, Temperature, UniMax):
        mixer = make()
        weights = mixer.start(run(tokens, total))
        assert list(weights) == list(tokens)
        assert sum(weights.values()) == pytest.approx(1)
        assert min(weights.values()) > 0
        backwards = make().start(run(dict(reversed(tokens.items())), total))
        assert weights == pytest.approx(backwards)
        bounds = dict.fromkeys(tokens, min(1.0, room / len(tokens)))
        proposed = mixer.propose(None, weights, bounds).weights
        assert sum(proposed.values()) == pytest.approx(1)
        assert all(proposed[name] <= bounds[name] + 1e-12 for name in tokens)
        json.dumps(mixer.describe())
