import json

import numpy as np
import pytest

from dynmix.influence.sets import ratio_of_sums
from dynmix.influence.tally import Tally
from dynmix.influence.task_gradients import TaskGradients

FOLDS = (3, 2)


def gradients() -> TaskGradients:
    return TaskGradients(
        tasks=("t", "u"),
        folds=FOLDS,
        tokens=np.array([30.0, 20.0, 25.0, 40.0, 44.0]),
        loss=np.array([2.0, 3.0]),
        loss_standard_error=np.array([0.1, 0.2]),
        layers=("layer",),
        parameters={},
    )


def test_scores_and_errors_are_those_of_the_units_themselves() -> None:
    """Both sides by `ratio_of_sums` of all units and folds; the part that both see, from every fold's residual."""
    rng, R = np.random.default_rng(0), gradients()
    products = [rng.normal(1.0, 2.0, (n, 5)) for n in (6, 9)]
    tokens = [rng.integers(5, 30, n).astype(float) for n in (6, 9)]
    tally, other = Tally(3, FOLDS), Tally(3, FOLDS)
    for domain, (p, n) in enumerate(zip(products, tokens, strict=True)):
        tally.add(domain, p[:2], n[:2])  # in any parts, and over processes by addition
        other.add(domain, p[2:], n[2:])
    tally.table += other.table
    restored = Tally(3, FOLDS)
    restored.load_state_dict(json.loads(json.dumps(tally.state_dict())))
    assert (restored.table == tally.table).all()
    assert restored.units.tolist() == [6, 9, 0]
    assert restored.tokens.tolist() == [*(n.sum() for n in tokens), 0]
    found = restored.influence(R, ["a", "b", "unseen"])
    assert found.standard_error is not None
    for j, (p, n) in enumerate(zip(products, tokens, strict=True)):
        for i, rows in enumerate(R.rows):
            score, over_domain = ratio_of_sums(p[:, rows].sum(1, keepdims=True), n)
            assert found.scores[i, j] == pytest.approx(float(score[0]))
            share, k = R.tokens[rows] / R.tokens[rows].sum(), FOLDS[i]
            of_folds = p[:, rows].sum(0) / n.sum()
            _, over_task = ratio_of_sums(of_folds[:, None] * R.tokens[rows].sum(), R.tokens[rows])
            residuals = p[:, rows] - share * p[:, rows].sum(1, keepdims=True)
            both = min(ratio_of_sums(residuals, n)[1].sum() * k / (k - 1), over_domain[0], over_task[0])
            assert found.standard_error[i, j] ** 2 == pytest.approx(over_domain[0] + over_task[0] - both)
    assert np.isnan(found.scores[:, 2]).all()
    assert np.isnan(found.standard_error[:, 2]).all()


def test_one_unit_has_an_infinite_error() -> None:
    tally = Tally(1, FOLDS)
    tally.add(0, np.ones((1, 5)), np.array([7.0]))
    found = tally.influence(gradients(), ["a"])
    assert found.scores[:, 0] == pytest.approx([3 / 7, 2 / 7])
    assert found.standard_error is not None
    assert np.isinf(found.standard_error).all()


def test_the_state_of_a_window_that_has_just_opened_is_empty() -> None:
    restored = Tally(2, FOLDS)
    restored.add(1, np.ones((1, 5)), np.array([7.0]))
    restored.load_state_dict(json.loads(json.dumps(Tally(2, FOLDS).state_dict())))
    assert not restored.table.any()


def test_a_state_of_other_tasks_is_refused() -> None:
    tally = Tally(2, FOLDS)
    tally.add(1, np.ones((1, 5)), np.array([7.0]))
    with pytest.raises(ValueError, match="sums a domain were saved"):
        Tally(2, (3, 3)).load_state_dict(tally.state_dict())
