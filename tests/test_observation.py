import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynmix.observation import Array, Influence

numbers = st.floats(allow_nan=True, allow_infinity=True, width=64)


@given(st.data(), st.integers(1, 4), st.integers(1, 5))
def test_survives_strict_json_bit_for_bit(data: st.DataObject, n_tasks: int, n_domains: int) -> None:
    matrix, row = arrays(np.float64, (n_tasks, n_domains), elements=numbers), arrays(np.float64, n_tasks)
    influence = Influence(
        scores=data.draw(matrix),
        tasks=[f"t{i}" for i in range(n_tasks)],
        domains=[f"d{i}" for i in range(n_domains)],
        standard_error=data.draw(st.none() | matrix.map(np.abs)),
        task_loss=data.draw(st.none() | row),
        scored_tokens=data.draw(st.none() | arrays(np.float64, n_domains, elements=st.floats(1, 1e6))),
    )
    text = json.dumps(influence.to_dict(), allow_nan=False)
    again = Influence.from_dict(json.loads(text))
    assert (again.tasks, again.domains) == (influence.tasks, influence.domains)
    for name in ("scores", "standard_error", "task_loss", "task_loss_standard_error", "scored_tokens"):
        before, after = getattr(influence, name), getattr(again, name)
        assert (before is None) == (after is None)
        if before is not None:
            np.testing.assert_array_equal(after, before)


def test_copies_converts_and_freezes() -> None:
    scores = np.ones((1, 2), dtype=np.float32)
    influence = Influence(scores=scores, tasks=["t"], domains=("a", "b"))
    scores[:] = 5
    assert influence.scores.dtype == np.float64
    assert influence.scores.tolist() == [[1.0, 1.0]]
    assert influence.tasks == ("t",)
    with pytest.raises(ValueError, match="read-only"):
        influence.scores[0, 0] = 2.0
    with pytest.raises(AttributeError):
        influence.scores = scores  # type: ignore[misc, assignment]


def test_finite_looks_at_the_scores_only() -> None:
    assert Influence([[1.0]], ["t"], ["d"], standard_error=[[np.inf]]).finite
    assert not Influence([[np.nan]], ["t"], ["d"]).finite
    assert not Influence([[-np.inf]], ["t"], ["d"]).finite


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [[1.0, 2.0]]}, r"scores has shape \[1, 2\].*\[2, 2\]"),
        ({"scores": [[1.0, 2.0], [3.0]]}, "scores is not an array of numbers"),
        ({"standard_error": [[1.0], [2.0]]}, "standard_error has shape"),
        ({"standard_error": [[1.0, 1.0], [1.0, -1e-9]]}, "standard_error has a negative entry"),
        ({"task_loss": [1.0]}, "task_loss has shape"),
        ({"task_loss_standard_error": [-1.0, 1.0]}, "task_loss_standard_error has a negative entry"),
        ({"scored_tokens": [1.0]}, r"scored_tokens has shape \[1\]"),
        ({"scored_tokens": [1.0, 0.0]}, "scored_tokens has an entry that is not above 0: 0.0"),
        ({"tasks": ["t", "t"]}, r"tasks has a name twice: \['t'\]"),
        ({"domains": ["a", ""]}, "domains must be non-empty strings"),
        ({"domains": "ab"}, "domains must be a sequence of names"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"scores": np.eye(2), "tasks": ["t", "u"], "domains": ["a", "b"]}
    Influence(**good)
    with pytest.raises(ValueError, match=message):
        Influence(**(good | change))


def test_from_dict_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="tasks"):
        Influence.from_dict({"scores": [[1.0]], "domains": ["a"]})


@given(st.integers(0, 2**32 - 1))
def test_of_sequences_is_the_slope_of_what_a_mixture_of_sequences_trains_on(seed: int) -> None:
    rng = np.random.default_rng(seed)
    S, T, w, move = rng.normal(size=(2, 4)), rng.uniform(1, 100, 4), rng.dirichlet(np.ones(4)), rng.normal(size=4)
    move -= move.mean()

    def mixed(w: Array) -> Array:
        return np.asarray(S @ (w * T) / (w @ T))

    influence = Influence(S, ["t", "u"], list("abcd"), standard_error=np.ones_like(S), scored_tokens=T)
    of_sequences = influence.of_sequences(w)
    np.testing.assert_allclose(of_sequences.scores @ w, mixed(w))
    step = 1e-6 * w.min()
    slope = (mixed(w + step * move) - mixed(w - step * move)) / (2 * step)
    np.testing.assert_allclose(of_sequences.scores @ move, slope, rtol=1e-4, atol=1e-5 * np.abs(S).max() * T.max())
    assert of_sequences.standard_error is not None
    np.testing.assert_allclose(of_sequences.standard_error[0] / T, 1 / (w @ T))
    assert of_sequences.of_sequences(w) is of_sequences


def test_of_sequences_with_as_many_tokens_is_the_influence_itself() -> None:
    for scored in (None, [7.0, 7.0]):
        influence = Influence([[0.1, 0.3]], ["t"], ["a", "b"], scored_tokens=scored)
        assert influence.of_sequences(np.array([0.3, 0.7])) is influence
