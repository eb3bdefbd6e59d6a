"""The numbers of the tables, against scipy's tests and cells that are written down here."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from benchmarks.pretraining.tables import (
    Cells,
    against_prior,
    difference,
    efficiency,
    interval,
    markdown,
    overspent,
    overview,
    share_of_tokens,
    sweeps,
)

SPLIT = {"optimised": ["t"], "unseen_tasks": ["u"], "domains": ["a", "noise"], "unseen_domains": ["b"]}


def cell(loss: float, curve: list[tuple[int, float]] = ()) -> dict:  # type: ignore[assignment, type-arg]
    points = [{"tokens": tokens, "loss": {"t": value, "u": 9.0}} for tokens, value in curve]
    final = {name: {"loss": loss} for name in ("t", "u", "text/a", "text/noise", "text/b")}
    return {"final": final, "curve": points, "tokens": 100}


def cells(**losses: list[float]) -> Cells:
    return Cells({"split": SPLIT}, {name: {s: cell(x) for s, x in enumerate(own)} for name, own in losses.items()})


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6).filter(lambda values: np.std(values) > 1e-3))
def test_the_interval_is_that_of_students_test(values: list[float]) -> None:
    mean, half = interval(values)
    low, high = ttest_1samp(values, 0).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_differences_are_paired_by_seed() -> None:
    found = cells(natural=[5.0, 6.0, 7.0], other=[4.9, 5.8])
    mean, half = interval([-0.1, -0.2])
    assert difference(found, "other", "natural", found.mean("optimised tasks")) == f"{mean:+.3f} ± {half:.3f}"
    assert against_prior(found, "other", found.mean("unseen tasks")) == f"5.350 ({mean:+.3f} ± {half:.3f})"
    assert against_prior(found, "natural", found.mean("unseen tasks")) == "6.000"
    alone = cells(natural=[5.0], other=[4.9])
    assert difference(alone, "other", "natural", alone.mean("optimised tasks")) == "-0.100"
    assert difference(alone, "other", "third", alone.mean("optimised tasks")) == ""


def test_traps_are_no_part_of_a_mean() -> None:
    found = cells(natural=[5.0])
    found.cells["natural"][0]["final"]["text/noise"]["loss"] = 100.0
    assert found.mean("domains' own text")(found.cells["natural"][0]) == 5.0


@pytest.mark.parametrize(("accuracies", "shown"), [((0.5, 0.7), "60.0 %"), ((None, None), None)])
def test_pairs_are_shown_where_examples_have_choices(accuracies: tuple[float | None, ...], shown: str | None) -> None:
    found = cells(natural=[5.0, 6.0])
    for own, accuracy in zip(found.cells["natural"].values(), accuracies, strict=True):
        own["final"]["blimp"] = {"loss": 1.0, "accuracy": accuracy}
    head, _, row = overview(found).splitlines()
    assert ("blimp pairs" in head) is (shown is not None)
    assert shown is None or shown in row


def test_the_share_of_tokens_is_read_off_the_curve() -> None:
    prior = cell(3.0, [(50, 4.0), (100, 3.0)])
    assert share_of_tokens(cell(0, [(40, 5.0), (80, 2.0), (100, 1.0)]), prior, ["t"]) == pytest.approx(
        (40 + 40 * 2 / 3) / 100
    )
    assert share_of_tokens(cell(0, [(20, 2.5)]), prior, ["t"]) == 0.2
    assert np.isnan(share_of_tokens(cell(0, [(20, 3.5), (100, 3.1)]), prior, ["t"]))
    assert share_of_tokens(prior, prior, ["t"]) == 1.0
    found = Cells(
        {"split": SPLIT}, {"natural": {0: prior, 1: prior}, "x": {0: cell(0, [(20, 2.5)]), 1: cell(0, [(20, 4.0)])}}
    )
    assert "| `x` | 20 % (not reached on 1 of 2 seeds) |" in efficiency(found)


def test_variants_stand_beside_what_they_vary() -> None:
    found = cells(**{"base[start=unimax]": [5.0, 5.0], "base[start=unimax,stages=2]": [4.0, 4.0], "other": [6.0]})
    table = sweeps(
        found, "base[start=unimax]", {"stages": ["base[start=unimax,stages=2]", "missing"], "else": ["other"]}
    )
    rows = table.splitlines()
    assert (
        rows[0]
        == "| sweep | variant | seeds | optimised tasks | unseen tasks | domains' own text | unseen domains' text |"
    )
    assert rows[2].startswith("| stages | `[stages=2]` | 2 | -1.000 ± 0.000 |")
    assert rows[3].startswith("| else | `other` | 1 | +1.000 |")
    assert len(rows) == 4


def test_what_went_over_the_budget_is_said() -> None:
    found = cells(natural=[5.0], cheap=[4.0], dear=[3.0, 3.0])
    for (name, _), spent in zip(found.cells.items(), (100.0, 100.9, 112.0), strict=True):
        for own in found.cells[name].values():
            own |= {"budget": 100.0, "spent": {"flops": {"training": 60.0, "before": spent - 60.0}}}
    assert overspent(found) == "Over the budget, by what was bought last: `dear` 12 %.\n"
    del found.cells["dear"]
    assert overspent(found) == ""


def test_a_bar_in_a_name_is_no_end_of_a_cell() -> None:
    assert markdown(["set", "`a|b`"], [["`c|d`", "1"]]) == "| set | `a\\|b` |\n|---|---:|\n| `c\\|d` | 1 |"
