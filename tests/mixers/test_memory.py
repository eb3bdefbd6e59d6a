"""The average over a run's influences against one written out over all of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix import TiKMiXD
from dynmix.mixers.base import Run
from dynmix.mixers.memory import Memory
from dynmix.observation import Influence

TASKS, DOMAINS = ("code", "maths"), ("books", "python", "web")
PRIOR = dict.fromkeys(DOMAINS, 1 / 3)


def influences(count: int, seed: int, *, errors: bool = True) -> list[Influence]:
    generator = np.random.default_rng(seed)
    made = []
    for scale in generator.uniform(0.1, 100, count):  # nats of one stage are not those of the next
        scores = scale * generator.normal(size=(2, 3))
        made.append(Influence(scores, TASKS, DOMAINS, scale * generator.uniform(0.1, 2, (2, 3)) if errors else None))
    return made


def written_out(seen: list[Influence], kept: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of the last influence's rows, in its nats."""
    scores, errors = np.zeros((2, 3)), np.zeros((2, 3))
    for i in range(2):
        top = [np.abs(one.scores[i]).max() for one in seen]
        relative = [one.standard_error[i] / t for one, t in zip(seen, top, strict=True)]
        weights = [kept ** (len(seen) - 1 - k) / np.mean(e**2) for k, e in enumerate(relative)]
        parts = [w / sum(weights) for w in weights]
        for j in range(3):
            values = [one.scores[i, j] / t for one, t in zip(seen, top, strict=True)]
            scores[i, j] = top[-1] * sum(p * v for p, v in zip(parts, values, strict=True))
            errors[i, j] = top[-1] * np.sqrt(sum((p * e[j]) ** 2 for p, e in zip(parts, relative, strict=True)))
    return scores, errors


@given(count=st.integers(1, 6), seed=st.integers(0, 10**6), kept=st.floats(0.01, 0.99))
def test_the_average_is_that_of_all_influences_by_their_precision(count: int, seed: int, kept: float) -> None:
    memory, seen = Memory(kept), influences(count, seed)
    for one in seen:
        found = memory.add(one)
    scores, errors = written_out(seen, kept)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-9)
    np.testing.assert_allclose(found.standard_error, errors, rtol=1e-9)


@given(seed=st.integers(0, 10**6), errors=st.booleans())
def test_a_run_that_is_resumed_remembers_the_same(seed: int, errors: bool) -> None:
    first, second, third = influences(3, seed, errors=errors)
    memory, resumed = Memory(0.5), Memory(0.5)
    for one in (first, second):
        memory.add(one)
    resumed.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    assert np.array_equal(resumed.add(third).scores, memory.add(third).scores)


def test_a_measurement_that_is_noise_moves_little() -> None:
    sure, noise = (Influence([[1.0, 0, 0]], ["t"], DOMAINS, np.full((1, 3), error)) for error in (0.1, 10.0))
    memory = Memory(0.9)
    memory.add(sure)
    other = Influence([[0.0, 1, 0]], ["t"], DOMAINS, noise.standard_error)
    np.testing.assert_allclose(memory.add(other).scores, [[1, 0, 0]], atol=1e-3)


def test_nothing_is_remembered_of_what_is_not_finite_or_of_other_domains() -> None:
    memory = Memory(0.5)
    first, second = influences(2, 0)
    memory.add(first)
    broken = Influence(np.full((2, 3), np.nan), TASKS, DOMAINS)
    before = memory.state_dict()
    assert memory.add(broken) is broken
    assert memory.state_dict() == before
    others = Influence(second.scores, TASKS, ("books", "python", "news"))
    np.testing.assert_allclose(memory.add(others).scores, others.scores)


def test_a_score_without_an_error_adds_nothing_and_leaves_the_others_their_memory() -> None:
    """A domain of one sequence, as long as it has but one."""
    never, memory = Memory(0.5), Memory(0.5)
    for one in influences(3, 5):
        assert one.standard_error is not None
        smaller = Influence(one.scores[:, :2], TASKS, DOMAINS[:2], one.standard_error[:, :2])
        scores = np.column_stack([smaller.scores, 0.1 * smaller.scores[:, 0]])  # does not change the scale
        found = memory.add(Influence(scores, TASKS, DOMAINS, one.standard_error * [1, 1, np.inf]))
        expected = never.add(smaller)
        np.testing.assert_allclose(found.scores[:, :2], expected.scores, rtol=1e-9)
        np.testing.assert_allclose(found.standard_error[:, :2], expected.standard_error, rtol=1e-9)
        assert found.scores[:, 2].tolist() == scores[:, 2].tolist()
        assert np.isinf(found.standard_error[:, 2]).all()
    before = memory.add(Influence(scores, TASKS, DOMAINS, np.full((2, 3), np.inf)))  # nothing new: what was known stays
    np.testing.assert_allclose(before.scores[:, :2], found.scores[:, :2], rtol=1e-9)
    known = memory.add(Influence(scores, TASKS, DOMAINS, one.standard_error))
    assert np.isfinite(known.standard_error).all()
    kept = memory.add(Influence(2 * scores, TASKS, DOMAINS, one.standard_error * [1, 1, np.inf]))
    np.testing.assert_allclose(kept.scores[:, 2], 2 * known.scores[:, 2], rtol=1e-9)  # in the nats of the last


@pytest.mark.parametrize(("blank", "errors"), [(0.0, True), (0.0, False), (1e-200, True)])
def test_a_task_without_any_influence_says_nothing_of_later_boundaries(blank: float, errors: bool) -> None:
    before, now, later = influences(3, seed=3, errors=errors)
    now = replace(now, scores=np.array([now.scores[0], [blank, 0, 0]]))
    memory, other = Memory(0.8), Memory(0.8**2)
    memory.add(before)
    found = memory.add(now)
    json.dumps(memory.state_dict(), allow_nan=False)
    if not blank:
        assert found.scores[1].tolist() == [0.0] * 3
        assert found.standard_error is None or (found.standard_error[1] == now.standard_error[1]).all()
    other.add(before)
    found, expected = memory.add(later), other.add(later)  # as if nothing had been measured between them
    assert found.scores[1] == pytest.approx(expected.scores[1])
    assert not errors or found.standard_error[1] == pytest.approx(expected.standard_error[1])


def test_tikmix_d_decides_by_what_it_remembers_of_a_run() -> None:
    seen, run = influences(3, 3), Run(dict.fromkeys(DOMAINS, 100), 100, PRIOR)
    mixer, memory = TiKMiXD(memory=0.7, confidence=0), Memory(0.7)
    mixer.start(run)
    for one in seen:
        found = mixer.propose(one, PRIOR)
        assert found == TiKMiXD(confidence=0).propose(memory.add(one), PRIOR)
    alone = TiKMiXD(confidence=0).propose(seen[-1], PRIOR)
    assert found.weights != pytest.approx(alone.weights, abs=1e-3)
    mixer.start(run)
    assert mixer.state_dict() == {}
    assert mixer.propose(seen[-1], PRIOR).weights == pytest.approx(alone.weights, abs=1e-6)


def test_outside_of_a_run_nothing_is_remembered() -> None:
    first, second = influences(2, 4)
    mixer = TiKMiXD()
    mixer.propose(first, PRIOR)
    assert mixer.propose(second, PRIOR) == TiKMiXD().propose(second, PRIOR)
    assert mixer.state_dict() == {}


def test_memory_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"memory=1\.0: below 1"):
        TiKMiXD(memory=1.0)


def test_against_the_run_a_later_boundary_may_take_back_what_an_earlier_one_decided() -> None:
    # At first the noise says that maths needs web; then it is known not to, and code would lose by a way back.
    wrong = Influence([[0.0, 1.0, 0.2], [0.0, 0.0, 1.0]], TASKS, DOMAINS, np.full((2, 3), 0.3))
    right = Influence([[0.0, 1.0, 0.9], [1.0, 0.0, -0.2]], TASKS, DOMAINS, np.full((2, 3), 1e-3))
    run = Run(dict.fromkeys(DOMAINS, 100), 100, PRIOR)
    found = {}
    for against in ("stage", "run"):
        mixer = TiKMiXD(confidence=0, against=against)  # type: ignore[arg-type]
        mixer.start(run)
        first = mixer.propose(wrong, PRIOR)
        found[against] = mixer.propose(right, first.weights)
    fresh = TiKMiXD(confidence=0).propose(right, PRIOR)
    assert found["run"].weights == pytest.approx(fresh.weights, abs=1e-3)
    assert found["stage"].weights != pytest.approx(fresh.weights, abs=1e-2)
    move = np.array([found["run"].weights[name] - first.weights[name] for name in DOMAINS])
    assert found["run"].predicted_gain["code"] == pytest.approx(float(right.scores[0] @ move), abs=1e-3)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_against_the_run_the_largest_change_is_from_the_stage_that_ends(seed: int) -> None:
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 8))
    names = tuple(f"d{j}" for j in range(m))
    first = rng.dirichlet(np.ones(m)) * (rng.random(m) < 0.8) + 1e-3 * (np.arange(m) == 0)
    weights = dict(zip(names, (first / first.sum()).tolist(), strict=True))
    mixer = TiKMiXD(confidence=0.25, max_change=0.03, against="run")
    mixer.start(Run(dict.fromkeys(names, 100), 100, weights))
    far = dict(zip(names, rng.dirichlet(np.ones(m)).tolist(), strict=True))
    prior = weights
    for _ in range(4):
        found = mixer.propose(Influence(rng.normal(size=(2, m)), ("t", "u"), names, np.full((2, m), 0.1)), prior)
        assert max(abs(found.weights[name] - prior[name]) for name in names) <= 0.03 + 1e-9
        # As where something else had decided in between, and then on from there.
        prior = far if prior is weights else dict(found.weights)
