from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixture.quota import TOTAL
from dynmix.mixture.weights import checked_cdf, integer_cdf, matched


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-300, 1)), min_size=1, max_size=50).filter(lambda w: sum(w) > 0))
@settings(deadline=None)
def test_an_integer_cdf_keeps_every_positive_weight(values: list[float]) -> None:
    weights = np.array(values) / sum(values)
    units = np.diff(integer_cdf(weights), prepend=0)
    assert units.sum() == TOTAL
    assert ((units > 0) == (weights > 0)).all()
    assert np.abs(units - weights * TOTAL).max() <= len(values) + 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.6], "sum to 1.1, not to 1: divide"),
        ([0.5, 0.5 + 3e-6], "sum to 1.000003"),
        ([-0.5, 1.5], "weight -0.5 of domain number 0"),
        ([0.5, float("nan")], "weight nan of domain number 1"),
        ([0.0, 0.0], "sum to 0"),
        ([[1.0]], "shape"),
        ([], "shape"),
    ],
)
def test_what_is_no_distribution_is_refused(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integer_cdf(weights)


def test_sums_almost_one_are_normalised() -> None:
    assert integer_cdf([0.5, 0.5 + 4e-7])[-1] == TOTAL


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50).filter(lambda weights: sum(weights) > 1e-3))
def test_weights_of_a_stage_can_be_published_again(weights: list[float]) -> None:
    cdf = integer_cdf(np.array(weights) / sum(weights))
    again = integer_cdf(np.diff(cdf, prepend=0) / TOTAL)
    assert again.tolist() == cdf.tolist()
    assert ((np.diff(cdf, prepend=0) > 0) == (np.array(weights) / sum(weights) > 0)).all()


def test_a_cdf_that_is_given_is_checked_and_a_copy() -> None:
    sizes, cdf = {"a": 3, "b": 0, "c": 5}, np.array([1 << 31, 1 << 31, TOTAL])
    found = checked_cdf(cdf, sizes)
    assert found.tolist() == checked_cdf({"c": 0.5, "b": 0, "a": 0.5}, sizes).tolist() == cdf.tolist()
    assert not np.shares_memory(found, cdf)
    for wrong, message in [
        (cdf[:2], r"or the 3 integers of an integer_cdf, not int64 of shape \(2,\)"),
        (cdf / TOTAL, "not float64"),
        (cdf - 1, "must ascend from 0 to"),
        (cdf[[2, 1, 2]], "must ascend from 0 to"),
        ([1 << 30, 1 << 31, TOTAL], "domain 'b' has weight but no rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            checked_cdf(wrong, sizes)


def test_what_is_given_by_name_comes_in_order() -> None:
    assert list(matched({"b": 2, "a": 1}, ["a", "b"], "sizes").items()) == [("a", 1), ("b", 2)]
    with pytest.raises(ValueError, match=r"sizes must have the domains \['a'\]: missing \['a'\], unknown \['b'\]"):
        matched({"b": 2}, ["a"], "sizes")
