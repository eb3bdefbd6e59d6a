import numpy as np
import pytest

from dynmix.laws.criteria import criterion_weights, normalised

TARGETS = ["sp_web", "sp_code", "et_arc", "et_piqa", "et_obqa"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("avg", [1 / 5] * 5),
        ("sp_*", [1 / 2, 1 / 2, 0, 0, 0]),
        ("et_*", [0, 0, 1 / 3, 1 / 3, 1 / 3]),
        ("sp_*=1,et_*=1", [1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6]),
        ("sp_web=3, et_arc=1", [3 / 4, 0, 1 / 4, 0, 0]),
    ],
)
def test_criteria_by_name(text, wanted):
    np.testing.assert_allclose(criterion_weights(text, TARGETS), wanted)


def test_a_name_comes_before_a_pattern():
    np.testing.assert_allclose(criterion_weights("a*=1", ["a*", "ab"]), [1, 0])


@pytest.mark.parametrize(
    ("text", "said"),
    [("mmlu", "no target is called 'mmlu'; there are sp_web"), ("sp_web=much", "'much' is no number"), ("avg=0", "avg"),
     ("sp_*=-1", "at least 0"), ("sp_*=0", "not all 0"), ("", "no target is called ''")],
)  # fmt: skip
def test_refusals(text, said):
    with pytest.raises(ValueError, match=said):
        criterion_weights(text, TARGETS)


def test_none_is_the_average():
    np.testing.assert_allclose(normalised(None, 4), 0.25)
