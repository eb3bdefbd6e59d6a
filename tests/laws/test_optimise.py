import numpy as np
import pytest

from dynmix.laws import LightGBM, PowerLaw, Ridge, best_mixture, sample_mixtures
from dynmix.laws.base import Law

CENTRE = np.array([0.5, 0.3, 0.15, 0.05])


class Bowl(Law):
    """Least at CENTRE for target 0, at the last domain alone for target 1; well known near domain 0 only."""

    def _fit(self, W, L):
        pass

    def _predict(self, W, with_std):
        away = ((W - CENTRE) ** 2).sum(axis=1)
        return np.stack([1 + away, 2 - W[:, -1]], axis=1), np.stack([1 - W[:, 0], 1 - W[:, 0]], 1) if with_std else None


@pytest.fixture(scope="module")
def bowl():
    return Bowl().fit(np.eye(4), np.zeros((4, 2)))


def test_finds_the_minimum_of_a_criterion(bowl):
    found = best_mixture(bowl, [1, 0])
    np.testing.assert_allclose(found.weights, CENTRE, atol=5e-3)
    assert found.predicted == pytest.approx(1, abs=1e-4)
    assert best_mixture(bowl, [0, 1]).weights[-1] > 0.99


def test_reports_targets_their_deviation_and_the_best_run(bowl):
    found = best_mixture(bowl, compare=np.eye(4))
    np.testing.assert_allclose(found.targets.mean(), found.predicted)
    assert found.std == pytest.approx(1 - found.weights[0])
    assert found.predicted <= found.best_run


def test_bounds_and_epochs_hold(bowl):
    found = best_mixture(bowl, [1, 0], lower=[0, 0, 0, 0.2], upper=[0.4, 1, 1, 1])
    assert found.weights[0] <= 0.4 + 1e-9
    assert found.weights[3] >= 0.2 - 1e-9
    found = best_mixture(bowl, [0, 1], tokens=[1e9, 1e9, 1e9, 1e8], total_tokens=1e9, max_epochs=4, smoothing=0.01)
    assert found.weights[3] == pytest.approx(0.4, abs=0.02)
    assert found.weights[3] <= 0.4 + 1e-9
    assert "bounds 1 of 4" in found.message


def test_smoothing_is_the_papers(bowl):
    found = best_mixture(bowl, [0, 1], smoothing=0.01)
    np.testing.assert_allclose(found.weights.min(), 0.01 / 4, rtol=0.05)


def test_caution_prefers_what_is_known(bowl):
    assert best_mixture(bowl, [1, 0], caution=1).weights[0] > CENTRE[0] + 0.1


def test_caution_is_refused_where_nothing_says_what_is_known():
    W = np.random.default_rng(0).dirichlet(np.ones(3), size=20)
    with pytest.raises(ValueError, match="LightGBM has no standard deviation"):
        best_mixture(LightGBM().fit(W, W @ [3.0, 2.0, 1.0]), caution=1)


@pytest.mark.parametrize("law", [Ridge(), PowerLaw()], ids=lambda law: type(law).__name__)
def test_is_no_worse_than_any_run_by_the_law(law):
    rng = np.random.default_rng(0)
    W = rng.dirichlet(np.full(5, 0.5), size=40)
    L = 2 + (W**0.5 @ rng.lognormal(0, 1, size=(5, 2))) ** -0.4
    found = best_mixture(law.fit(W, L), compare=W, starts=3)
    assert found.predicted <= found.best_run + 1e-12
    assert found.weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(4))
def test_the_answer_of_a_law_of_steps_is_better_than_its_least(seed):
    rng = np.random.default_rng(seed)
    rates = rng.lognormal(0, 1, size=8)

    def loss(W):
        return 2 + (W**0.5 @ rates) ** -0.4

    W = sample_mixtures(np.ones(8), 40, seed=seed)
    law = LightGBM().fit(W, loss(W) + rng.normal(0, 0.03, 40))
    found = best_mixture(law, upper=0.6, compare=W)
    drawn = sample_mixtures(np.ones(8), 20_000, seed=9)
    drawn = drawn[drawn.max(axis=1) <= 0.6]
    least = drawn[np.argmin(law.predict(drawn))]
    assert loss(found.weights[None])[0] < loss(least[None])[0]
    assert found.weights.max() <= 0.6 + 1e-9
    assert np.isnan(found.std)
    assert "likes best" in found.message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"criterion": [1, 1, 1]}, "2 weights"),
        ({"criterion": [-1, 1]}, "2 weights"),
        ({"upper": 0.2}, "no mixture fits"),
        ({"lower": 0.3}, "no mixture fits"),
        ({"lower": [0.5, 0, 0, 0], "upper": [0.4, 1, 1, 1]}, "lower <= upper"),
        ({"upper": [1, 1]}, "4 of them"),
        ({"max_epochs": 2}, "max_epochs needs tokens"),
        ({"tokens": [1, 1, 1, 1], "total_tokens": 10}, "bound nothing without max_epochs"),
        ({"max_epochs": 2, "tokens": [1, 1, 1, 1], "total_tokens": 0}, "total_tokens=0"),
        ({"max_epochs": float("nan"), "tokens": [1, 1, 1, 1], "total_tokens": 1}, "max_epochs=nan"),
        ({"max_epochs": 1, "tokens": [1, 1, 1, 1], "total_tokens": 10}, "fewer total_tokens"),
        ({"smoothing": 2}, "smoothing=2"),
    ],
)
def test_refusals(bowl, options, said):
    with pytest.raises(ValueError, match=said):
        best_mixture(bowl, **options)


def test_a_domain_that_no_run_had_gets_no_weight():
    W = np.random.default_rng(0).dirichlet(np.ones(4), size=9)
    W[:, 3] = 0
    law = Bowl().fit(W / W.sum(axis=1, keepdims=True), np.zeros((9, 2)))
    found = best_mixture(law, [0, 1], smoothing=0.01)  # target 1 wants the last domain alone
    assert found.weights[3] == 0
    assert "no run had the domains of columns [3]" in found.message
    with pytest.raises(ValueError, match=r"columns \[3\]"):
        best_mixture(law, lower=[0, 0, 0, 0.1])
