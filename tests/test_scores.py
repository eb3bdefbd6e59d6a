from dataclasses import replace

import numpy as np
import pytest

from dynmix.scores import Column, SamplePlan, SampleScores

COLUMNS = (Column("a", "x", 3), Column("b", "x", 3), Column("a", "y", 9))


def scored(n=4, columns=COLUMNS):
    values = np.arange(n * len(columns), dtype=np.float32).reshape(n, -1)
    return SampleScores(("raw", "web"), np.zeros(n, int), np.arange(n), np.ones(n, int), columns, values)


def test_tasks_and_some_of_the_columns():
    scores = scored()
    assert scores.tasks == ("a", "b")
    some = scores.of([COLUMNS[2], COLUMNS[0]])
    assert some.columns == (COLUMNS[2], COLUMNS[0])
    assert some.scores.tolist() == scores.scores[:, [2, 0]].tolist()
    with pytest.raises(ValueError, match="no column"):
        scores.of([Column("c", "x", 3)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": np.zeros((4, 2))}, r"scores has shape \[4, 2\], want \[4, 3\]"),
        ({"domain": np.zeros(3, int)}, r"domain has shape \[3\]"),
        ({"domain": np.array([0, 1, 2, 0])}, "beyond the 2 domains"),
        ({"tokens": np.array([1, 0, 1, 1])}, "sample 1 has 0 tokens"),
        ({"columns": (COLUMNS[0],) * 3}, "occurs twice"),
        ({"columns": (), "scores": np.zeros((4, 0))}, "nothing to decide from"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(scored(), **changed)
    with pytest.raises(ValueError, match="has step -1"):
        Column("a", "x", -1)


def test_plans_are_checked():
    assert SamplePlan(checkpoints=10).checkpoints == 10
    for arguments, message in (
        ({"every": 0}, "every=0"),
        ({"checkpoints": 0}, "checkpoints=0"),
        ({"metric": {"a": "f1"}}, "f1"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplePlan(**arguments)
