import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import spearmanr
from sklearn.base import clone

from dynmix.laws import (
    GP,
    MDE,
    AutoLaw,
    Experts,
    LightGBM,
    MDEFeatures,
    MultiTaskGP,
    PowerLaw,
    Ridge,
    WithExperts,
    solve,
)
from dynmix.laws.mde import WITH_EXPERTS, laws_with_experts

TOKENS = {"web": 600, "code": 400, "math": 1000}


def some_experts(k=4, seed=0, alike=0.0):
    rng = np.random.default_rng(seed)
    log_p = -rng.gamma(1.5, 2.0, size=(k, 2000))
    log_p = (1 - alike) * log_p + alike * log_p[:1]
    return Experts(log_p, TOKENS, [f"domain{i}" for i in range(k)])


def runs(experts, n, seed=1):
    """The ensemble's losses and what experts together learn beyond it, which vanishes where one is alone."""
    rng = np.random.default_rng(seed)
    W = rng.dirichlet(np.full(len(experts.names), 0.5), size=n)
    together = (1 - (W**2).sum(axis=1, keepdims=True)) * np.array([0.1, 0.2, -0.1])
    return W, experts.losses(W) - together + 0.003 * rng.standard_normal((n, 3))


def em(experts, criterion, steps):
    """The textbook's: each weight becomes the mean share that its expert has in the tokens."""
    w = np.full(len(experts.names), 1 / len(experts.names))
    seen = [experts.losses(w[None])[0] @ criterion]
    for _ in range(steps):
        w = w * -(criterion @ experts.slopes(w[None]).gradients[0])
        w /= w.sum()
        seen.append(experts.losses(w[None])[0] @ criterion)
    return w, np.array(seen)


@pytest.mark.parametrize("alike", [0.0, 0.7, 0.97])
@pytest.mark.parametrize("criterion", [[1, 1, 1], [0, 1, 0], [5, 0, 1]])
def test_solution_is_that_of_em_and_its_gap_holds(alike, criterion):
    experts, v = some_experts(6, alike=alike), np.array(criterion) / np.sum(criterion)
    found = solve(experts, criterion)
    assert found.gap <= 1e-6
    assert found.weights.sum() == pytest.approx(1)
    assert found.weights.min() >= 0
    assert found.loss == pytest.approx(experts.losses(found.weights[None])[0] @ v)
    _, values = em(experts, v, 300)
    assert (np.diff(values) < 1e-6).all()  # monotone, up to float32
    assert found.loss <= values[-1] + 2e-6
    assert values[-1] >= found.loss - found.gap - 2e-6


def test_solution_under_bounds_is_that_of_an_independent_solver():
    experts, high = some_experts(5, seed=3), np.array([0.15, 0.3, 1, 1, 0.2])
    low = np.array([0, 0, 0.4, 0, 0])
    found = solve(experts, lower=low, upper=high)
    assert found.gap <= 1e-6
    assert (found.weights <= high + 1e-9).all()
    assert (found.weights >= low - 1e-9).all()
    log_p = experts._log
    weight = np.repeat(1 / 3 / np.array(list(TOKENS.values())), list(TOKENS.values()))
    other = minimize(
        lambda w: -weight @ np.log(w @ np.exp(log_p)),
        high / high.sum(),
        method="SLSQP",
        jac=lambda w: -(np.exp(log_p) / (w @ np.exp(log_p))) @ weight,
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert found.loss == pytest.approx(other.fun, abs=2e-5)
    assert found.loss <= other.fun + 2e-6


def test_no_mixture_is_better_than_the_bound():
    experts = some_experts(seed=4)
    found = solve(experts, tolerance=1e-2)
    assert (
        experts.losses(np.random.default_rng(0).dirichlet(np.ones(4), size=500)).mean(axis=1) >= found.loss - found.gap
    ).all()


def test_epochs_bound_the_solution_and_it_says_so():
    found = solve(some_experts(), tokens=[1, 10, 10, 10], total_tokens=10, max_epochs=1)
    assert found.weights[0] <= 0.1 + 1e-9
    assert "max_epochs=1 bounds 1 of 4" in found.message


def test_experts_that_are_all_the_same_are_solved_too():
    log_p = np.repeat(-np.random.default_rng(0).gamma(2, 2, size=(1, 2000)), 3, axis=0)
    assert solve(Experts(log_p, TOKENS)).gap <= 1e-6


def test_mde_predicts_without_a_fit_and_refuses_other_columns():
    experts = some_experts()
    W, L = runs(experts, 12)
    np.testing.assert_array_equal(MDE(experts).predict(W), experts.losses(W))
    np.testing.assert_array_equal(clone(MDE(experts)).fit(W, L).predict(W), experts.losses(W))
    with pytest.raises(ValueError, match="L has 2 columns, the experts 3: web, code, math"):
        MDE(experts).fit(W, L[:, :2])
    with pytest.raises(ValueError, match="MDE has no standard deviation"):
        MDE(experts).predict(W, return_std=True)


@pytest.mark.parametrize("law", [Ridge(), GP(), LightGBM(), MultiTaskGP()], ids=lambda law: type(law).__name__)
def test_features_of_the_experts_make_a_law_better(law):
    experts = some_experts(8)
    W, L = runs(experts, 20)
    new, losses = runs(experts, 100, seed=2)
    error = [np.abs(x.fit(W, L).predict(new) - losses).mean() for x in (clone(law), WithExperts(law, experts))]
    assert error[1] < 0.7 * error[0]


def test_features_are_the_losses_beside_the_weights():
    experts = some_experts()
    W, L = runs(experts, 15)
    features = MDEFeatures(experts)
    np.testing.assert_array_equal(features(W), experts.losses(W))
    by_hand = Ridge(extra=features).fit(W, L).predict(W)
    np.testing.assert_allclose(WithExperts(Ridge(), experts).fit(W, L).predict(W), by_hand)


@pytest.mark.parametrize(
    ("law", "corners", "rows"),
    [(GP(), "auto", 15), (GP(), True, 19), (MultiTaskGP(), "auto", 19), (MultiTaskGP(), False, 15)],
)
def test_corners_are_in_the_fit_as_the_paper_found(law, corners, rows):
    experts = some_experts()
    fitted = WithExperts(law, experts, corners).fit(*runs(experts, 15)).law_
    X = fitted.models_[0].X_train_ if isinstance(law, GP) else fitted._cells.X
    assert len(X) == rows


@pytest.mark.parametrize(("law", "rows"), [(Ridge(), 15), (MultiTaskGP(), 19)])
def test_experts_in_the_table_of_runs_are_in_the_fit_as_if_they_were_not(law, rows):
    # `dynmix proxies` writes them there, where they were in the fit of every law, and twice in the process's.
    experts = some_experts()
    W, L = runs(experts, 15)
    alone = WithExperts(law, experts).fit(W, L)
    beside = WithExperts(law, experts).fit(np.vstack([W, np.eye(4)]), np.vstack([L, experts.corners]))
    np.testing.assert_allclose(beside.predict(W), alone.predict(W), rtol=1e-9)
    if isinstance(law, MultiTaskGP):
        assert len(beside.law_._cells.X) == rows


def test_a_corner_that_rounding_left_a_rest_is_of_its_domain_alone():
    experts = some_experts()
    W, L = runs(experts, 15)
    corner = np.array([[1 - 3e-10, 1e-10, 1e-10, 1e-10]])
    fitted = WithExperts(MultiTaskGP(), experts).fit(np.vstack([W, corner]), np.vstack([L, experts.corners[:1]]))
    assert len(fitted.law_._cells.X) == 19


@pytest.mark.parametrize(("mixtures", "rows"), [(3, 7), (4, 4)])
def test_experts_in_a_table_of_few_runs_are_in_every_fit(mixtures, rows):
    experts = some_experts()
    W, L = runs(experts, mixtures)
    fitted = WithExperts(GP(), experts).fit(np.vstack([W, np.eye(4)]), np.vstack([L, experts.corners]))
    assert len(fitted.law_.models_[0].X_train_) == rows


def test_experts_stay_in_the_fit_where_a_target_has_few_other_runs():
    experts = some_experts()
    W, L = runs(experts, 15)
    L[:, 0] = np.nan
    fitted = WithExperts(Ridge(), experts).fit(np.vstack([W, np.eye(4)]), np.vstack([L, experts.corners]))
    assert np.isfinite(fitted.predict(W)).all()


def test_no_law_is_judged_by_runs_that_one_knows_from_its_experts():
    experts = some_experts()
    W, L = runs(experts, 15)
    table, losses = np.vstack([np.eye(4), W]), np.vstack([experts.corners, L])
    laws = {"ridge": Ridge(), "MDE": MDE(experts), "multi-task GP + MDE": WithExperts(MultiTaskGP(), experts)}
    law = AutoLaw(laws).fit(table, losses)
    assert np.isnan(law.left_out_[:4]).all()
    assert np.isfinite(law.left_out_[4:]).all()
    # MDE misses nothing at its experts: they made its error smaller than that on mixtures is.
    miss = np.sqrt(np.mean((experts.losses(W) - L) ** 2, axis=0)) / L.std(axis=0)
    assert law.scores_["MDE"].error == pytest.approx(miss.mean(), rel=1e-6)
    assert "not left out: 4 runs" in law.why_
    few = AutoLaw(laws).fit(table[:7], losses[:7])
    assert "no target has 6 different mixtures, too few" in few.why_
    assert "not left out: 4 runs" in few.why_  # with them there would be seven


def test_a_law_fitted_to_the_corners_knows_them():
    experts = some_experts()
    W, L = runs(experts, 15)
    away = [
        np.abs(WithExperts(GP(), experts, c).fit(W, L).predict(np.eye(4)) - experts.corners).mean()
        for c in (True, False)
    ]
    assert away[0] < 0.02
    assert away[0] < 0.5 * away[1]


def test_every_domain_with_an_expert_is_seen():
    experts = some_experts()
    W = np.random.default_rng(0).dirichlet(np.ones(3), size=10)
    W = np.hstack([W, np.zeros((10, 1))])
    L = experts.losses(W)
    assert Ridge().fit(W, L).seen_.tolist() == [True, True, True, False]
    assert WithExperts(Ridge(), experts).fit(W, L).seen_.all()
    assert AutoLaw({"a": WithExperts(Ridge(), experts)}).fit(W, L).seen_.all()
    assert AutoLaw({"a": Ridge()}).fit(W, L).seen_.sum() == 3


def test_auto_law_chooses_among_laws_with_experts():
    experts = some_experts(6)
    W, L = runs(experts, 20)
    assert tuple(laws_with_experts(experts)) == WITH_EXPERTS
    auto = AutoLaw({"ridge": Ridge()} | laws_with_experts(experts)).fit(W, L)
    assert any("MDE" in name for name in auto.laws_)
    new, losses = runs(experts, 50, seed=2)
    assert spearmanr(auto.predict(new).mean(axis=1), losses.mean(axis=1)).statistic > 0.9
    assert auto.predict(new, return_std=True)[1].min() > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda e: WithExperts(PowerLaw(), e), "PowerLaw is a formula of the weights alone"),
        (lambda e: WithExperts(Ridge(), some_experts(5)), "W has 4 domains, there are 5 experts"),
        (lambda e: WithExperts(Ridge(), e, corners="maybe"), "corners='maybe'"),
    ],
)
def test_refusals(make, said):
    experts = some_experts()
    with pytest.raises(ValueError, match=said):
        make(experts).fit(*runs(experts, 10))
