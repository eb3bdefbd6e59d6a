import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from dynmix.mixers.tikmix_d import TiKMiXD
from dynmix.mixers.tikmix_m import TiKMiXM
from tests.mixers.test_tikmix_d import array, named, observed

# Where the quality of the search is not what is proven.
SHORT = {"mixtures": 48, "rounds": 2, "iterations": 4, "samples": 64}
QUICK = SHORT | {"mixtures": 32, "surrogate": "ridge"}


def problem(m, n, seed):
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.full(m, 4.0))
    return rng.normal(0.3, 1, (n, m)), prior, rng


def total(S, rows) -> float:
    return (rows / (np.abs(S).max(axis=1) + 1e-8)).sum(axis=-1)


def best_of(value, S, prior, starts=5, floor=True):
    """The largest `value` in the box and no worse on any task, by SLSQP from several starts."""
    rng = np.random.default_rng(0)
    rules = [{"type": "eq", "fun": lambda w: w.sum() - 1}]
    if floor:
        rules.append({"type": "ineq", "fun": lambda w: S @ (w - prior)})
    found = [value(prior)]
    for _ in range(starts):
        start = prior * rng.uniform(0.7, 1.4, len(prior))
        answer = minimize(lambda w: -value(w), start / start.sum(), method="SLSQP", constraints=rules,
                          bounds=list(zip(prior / 2, 2 * prior, strict=True)), options={"maxiter": 300})  # fmt: skip
        if answer.success:
            found.append(-answer.fun)
    return max(found)


def effects(kind, S, prior, rng):
    """What `measure` returns: the linear influence and an effect of mixing. S is its gradient at the prior, about."""
    if kind == "saturating":  # the more of a domain, the less the next of it brings
        return lambda w: S @ (prior * (1 - np.exp(-1.2 * (w / prior - 1))) / 1.2)
    if kind == "tanh":  # the more is won on a task, the less the next move wins
        size = np.sqrt((S * prior) ** 2 @ np.ones(len(prior)))
        return lambda w: S @ prior + size * np.tanh(S @ (w - prior) / size)
    if kind == "sqrt":
        return lambda w: 2 * S @ np.sqrt(w * prior)
    if kind == "synergy":
        Q = rng.normal(size=(len(S), len(prior), len(prior))) / len(prior) ** 0.5
        return lambda w: S @ w + 0.3 * prior.mean() * ((w / prior - 1) @ Q @ (w / prior - 1))
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "m", "n"), [("saturating", 6, 2), ("sqrt", 6, 2), ("tanh", 16, 5), ("synergy", 16, 5)]
)
def test_reaches_the_known_optimum_of_measured_mixture_effects(kind, m, n):
    S, prior, rng = problem(m, n, seed=m)
    effect = effects(kind, S, prior, rng)
    proposal = TiKMiXM(mixtures=110).propose(observed(S), named(prior), measure=lambda w: effect(array(w)))
    start, best = total(S, effect(prior)), best_of(lambda w: total(S, effect(w)), S, prior)
    assert total(S, effect(array(proposal.weights))) - start >= 0.95 * (best - start), proposal.message


@pytest.mark.parametrize(("m", "n", "noise"), [(5, 1, 0.0), (12, 4, 0.2), (26, 9, 0.0), (26, 9, 0.2)])
def test_linear_targets_against_the_linear_programme(m, n, noise):
    S, prior, rng = problem(m, n, seed=m + 1)
    A = S / np.abs(S).max(axis=1, keepdims=True)
    lp = linprog(-A.sum(axis=0), A_ub=-A, b_ub=-A @ prior, A_eq=np.ones((1, m)), b_eq=[1.0],
                 bounds=np.stack([prior / 2, 2 * prior], axis=1))  # fmt: skip
    size = noise * np.sqrt((S * prior * 0.35) ** 2 @ np.ones(m))
    proposal = TiKMiXM(mixtures=100).propose(
        observed(S), named(prior), measure=lambda w: S @ array(w) + size * rng.normal(size=n)
    )
    got, best, start = A.sum(axis=0) @ array(proposal.weights), -lp.fun, A.sum(axis=0) @ prior
    assert best - got <= (0.02 if noise == 0 else 0.06) * (best - start)
    assert best - got <= 0.02


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
def test_every_proposal_is_a_mixture_in_the_box_and_no_worse_on_any_task(m, n, seed, uncertain):
    S, prior, rng = problem(m, n, seed)
    prior = np.where(rng.random(m) < 0.2, 0, prior) + np.eye(m)[0] * 1e-3
    prior /= prior.sum()
    upper = np.maximum(rng.random(m), 1.5 * prior)
    error = np.full((n, m), 0.02) if uncertain else None
    influence = observed(S, standard_error=error)
    mixer = TiKMiXM(**QUICK | {"mixtures": 16})
    proposal = mixer.propose(influence, named(prior), named(upper), measure=lambda w: rng.normal(size=n))
    w = array(proposal.weights)
    assert abs(w.sum() - 1) < 1e-9
    assert (w >= prior / 2 - 1e-9).all()
    assert (w <= np.minimum(2 * np.where(prior, prior, 1 / m), upper) + 1e-9).all()
    assert (S @ (w - prior) >= -1e-8 * np.abs(S).max(axis=1)).all()


def test_measures_as_often_as_it_says_and_only_in_the_box():
    S, prior, _ = problem(6, 2, seed=0)
    asked = []
    TiKMiXM(low=0.8, high=1.2, **QUICK | {"mixtures": 40}).propose(
        observed(S), named(prior), measure=lambda w: asked.append(array(w)) or S @ array(w)
    )
    asked = np.array(asked)
    assert len(asked) == 40
    assert abs(asked.sum(axis=1) - 1).max() < 1e-12
    assert (asked >= 0.8 * prior - 1e-9).all()
    assert (asked <= 1.2 * prior + 1e-9).all()


def test_guards_hold_but_do_not_count():
    S, prior, _ = problem(8, 3, seed=4)
    influence = observed(S, guards=["task2"])

    def propose(slope):
        return TiKMiXM(**QUICK).propose(
            influence, named(prior), measure=lambda w: [*(S @ array(w))[:2], slope * array(w)[0]]
        )

    assert propose(1e3).weights == propose(-1e3).weights
    w = array(propose(0.0).weights)
    assert (S @ (w - prior) > -1e-9).all()
    assert total(S[:2], S[:2] @ (w - prior)) > 0.01


def test_without_the_pareto_constraint_it_goes_further():
    S = np.array([[1.0, -0.8, -1.0, -0.9], [-0.5, 0.0, 0.1, 1.0]])
    prior = np.full(4, 0.25)
    A = S / np.abs(S).max(axis=1, keepdims=True)
    held, free = (
        array(TiKMiXM(pareto=p, **QUICK).propose(observed(S), named(prior), measure=lambda w: S @ array(w)).weights)
        for p in (True, False)
    )
    assert (S @ (held - prior) >= -1e-9).all()
    assert (A @ free).sum() > (A @ held).sum() + 0.01


def test_without_measure_it_is_tikmix_d_and_says_so_once(caplog):
    S, prior, _ = problem(6, 3, seed=1)
    mixer = TiKMiXM()
    with caplog.at_level(logging.WARNING):
        proposal = mixer.propose(observed(S), named(prior))
        mixer.propose(observed(S), named(prior))
    assert proposal.weights == TiKMiXD().propose(observed(S), named(prior)).weights
    assert "linear" in proposal.message
    assert [record.message.count("linear") for record in caplog.records] == [1]


def test_what_no_search_improves_on_is_kept():
    S, prior, _ = problem(5, 2, seed=2)
    # Every move costs: the prior is best by measurement, whatever the scores say.
    proposal = TiKMiXM(**SHORT).propose(
        observed(S), named(prior), measure=lambda w: np.full(2, -np.abs(array(w) - prior).sum())
    )
    assert np.abs(array(proposal.weights) - prior).sum() < 0.02


def test_influence_that_is_not_finite_keeps_the_prior_and_measures_nothing():
    S, prior, _ = problem(5, 2, seed=2)
    S[0, 0] = np.nan
    proposal = TiKMiXM().propose(observed(S), named(prior), measure=lambda w: pytest.fail("measured"))
    assert proposal.solver == "prior"
    np.testing.assert_allclose(array(proposal.weights), prior)


def test_the_same_proposal_again_and_after_a_resume():
    S, prior, _ = problem(6, 2, seed=3)

    def asked(mixer, count):
        """The mixtures that are measured for each proposal, and what is proposed."""
        proposals = []
        for _ in range(count):
            mixtures = []
            measure = lambda w, to=mixtures: to.append(array(w)) or S @ np.sqrt(array(w))  # noqa: E731
            mixtures.append(array(mixer.propose(observed(S), named(prior), measure=measure).weights))
            proposals.append(np.array(mixtures))
        return proposals

    small = {"mixtures": 16, "samples": 32, "iterations": 4, "rounds": 2}
    whole, first, second = asked(TiKMiXM(**small), 2), TiKMiXM(**small), TiKMiXM(**small)
    assert (whole[0] != whole[1]).any()
    asked(first, 1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    np.testing.assert_array_equal(asked(second, 1)[0], whole[1])
    with pytest.raises(ValueError, match="state"):
        second.load_state_dict({"step": 1})


def test_scale_of_a_task_does_not_matter():
    S, prior, _ = problem(6, 2, seed=5)
    scale = np.array([1.0, 1e3])
    small, large = (
        array(TiKMiXM(**SHORT).propose(observed(c[:, None] * S), named(prior),
                                       measure=lambda w, c=c: c * (S @ np.sqrt(array(w)))).weights)
        for c in (np.ones(2), scale)
    )  # fmt: skip
    np.testing.assert_allclose(small, large, atol=0.01)


def test_influences_are_of_sequences_as_drawn_samples_are():
    """A sample that is drawn is of sequences; with few scored tokens in some domains' ones, so must the scores be."""
    S, T = np.array([[1.0, 0.5, -1.0, 0.3], [0.2, 0.3, 0.1, -0.5]]), np.array([4.0, 500.0, 60.0, 90.0])
    prior = np.array([0.2, 0.3, 0.3, 0.2])

    def measure(weights):
        w = array(weights)
        return S @ (w * T) / (w @ T)

    mixer = TiKMiXM(direct=TiKMiXD(max_change=1e-3), **QUICK)
    proposal = mixer.propose(observed(S, scored_tokens=T), named(prior), measure=measure)
    gain = measure(proposal.weights) - measure(named(prior))
    assert gain.max() > 1e-5
    np.testing.assert_allclose(list(proposal.predicted_gain.values()), gain, rtol=0.05)
    assert "the linear prediction correlates 1.00 with" in proposal.message


@pytest.mark.parametrize("surrogate", ["ridge", "lightgbm", "smooth"])
def test_a_named_surrogate_is_used(surrogate):
    S, prior, _ = problem(6, 1, seed=6)
    quick = QUICK | {"mixtures": 64, "surrogate": surrogate}
    proposal = TiKMiXM(anneal="literal", **quick).propose(observed(S), named(prior), measure=lambda w: S @ array(w))
    assert proposal.solver == f"tikmix-m:{surrogate}" or surrogate == "lightgbm"
    assert proposal.predicted_gain["task0"] == pytest.approx((S @ (array(proposal.weights) - prior))[0])
    assert f"{surrogate} " in proposal.message


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0], r"shape \[1\]"), ([1.0, np.nan], r"not finite on \['task1'\].*domain0"), ([[1.0, 2.0]], "shape")],
)
def test_a_wrong_measurement_is_refused(returned, message):
    S, prior, _ = problem(4, 2, seed=0)
    with pytest.raises(ValueError, match=message):
        TiKMiXM().propose(observed(S), named(prior), measure=lambda w: returned)


@pytest.mark.parametrize(
    "wrong",
    [{"low": 1.2}, {"high": 0.9}, {"low": -1}, {"high": np.inf}, {"mixtures": 8}, {"iterations": 0}, {"top_k": 0},
     {"samples": 4}, {"concentration": (2.0, 1.0)}, {"concentration": (0.0, 1.0)}, {"anneal": "up"},
     {"surrogate": "forest"}, {"seed": -1}, {"rounds": 7, "mixtures": 16}],
)  # fmt: skip
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TiKMiXM(**wrong)


def test_a_domain_that_joined_can_be_drawn():
    """One with the weight 0 that helps most is given some: at most `high` times the mean weight."""
    S, prior = np.array([[0.1, 0.2, 3.0]]), np.array([0.5, 0.5, 0.0])
    got = array(TiKMiXM(**QUICK).propose(observed(S), named(prior), measure=lambda w: S @ array(w)).weights)
    assert 0.1 < got[2] <= 2 / 3 + 1e-9
    assert (got[:2] >= prior[:2] / 2 - 1e-9).all()


def test_bounds_that_cut_the_prior_move_the_box():
    S, prior, _ = problem(5, 2, seed=8)
    upper = named(np.where(np.arange(5) == 0, 0.0, 1.0))
    w = array(TiKMiXM(**QUICK).propose(observed(S), named(prior), upper, measure=lambda w: S @ array(w)).weights)
    assert w[0] == 0
    assert w.sum() == pytest.approx(1)


def test_the_description_is_json():
    assert json.loads(json.dumps(TiKMiXM().describe()))["mixtures"] == 256


def test_measurements_that_are_nothing_but_noise_do_not_move_it_from_tikmix_ds_answer():
    S, prior, rng = problem(8, 3, seed=4)
    names = named(prior)
    inside = {name: 2 * w for name, w in names.items()}
    direct = TiKMiXD().propose(observed(S), names, inside, lower={name: w / 2 for name, w in names.items()})
    stayed = 0
    for seed in range(3):
        proposal = TiKMiXM(seed=seed, **SHORT).propose(observed(S), names, measure=lambda w: rng.normal(size=3))
        stayed += proposal.solver == "tikmix-d"
        if proposal.solver == "tikmix-d":
            np.testing.assert_allclose(array(proposal.weights), array(direct.weights), atol=1e-6)
    assert stayed >= 2


def test_one_fit_as_in_the_paper_takes_as_many_measurements():
    S, prior, _ = problem(6, 2, seed=2)
    for rounds in (0, 1, 4):
        calls = []

        def measure(weights):
            calls.append(weights)  # noqa: B023
            return S @ array(weights)

        proposal = TiKMiXM(**QUICK | {"mixtures": 40, "rounds": rounds}).propose(
            observed(S), named(prior), measure=measure
        )
        assert len(calls) == 40
        assert proposal.predicted_gain["task0"] >= -1e-8


def test_direct_may_be_the_arguments_of_tikmix_d():
    assert TiKMiXM({"confidence": 2.0, "upper": 0.5}).direct.confidence == 2.0
    assert TiKMiXM({"name": "tikmix-d", "alpha": 0.5}).direct.alpha == 0.5
    for wrong in ({"name": "odm"}, "tikmix-d", {"gama": 1}):
        with pytest.raises(ValueError, match="tikmix-d|TiKMiXD"):
            TiKMiXM(wrong)
