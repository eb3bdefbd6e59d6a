"""The law against losses that follow one, and its best mixture against many drawn at random."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.pretraining.hindsight import Law, section
from benchmarks.pretraining.tables import Cells

DOMAINS = ["a", "b", "noise"]
SPLIT = {"optimised": ["t"], "unseen_tasks": ["u"], "domains": DOMAINS, "unseen_domains": ["c"]}
SETS = ["t", "u", "text/a", "text/b", "text/c"]
SLOPES = np.array([[0.5, 0.0, 0.0], [0.2, 0.0, 0.05], [0.4, 0.0, 0.0], [0.0, 0.9, 0.0], [0.1, 0.1, 0.0]])
PRIOR = np.array([0.2, 0.5, 0.3])


def cell(weights: np.ndarray, tokens: int = 1000, budget: float = 1.0) -> dict:  # type: ignore[type-arg]
    losses = 5 - SLOPES @ np.log(weights * tokens / (PRIOR * 1000))
    return {
        "budget": budget,
        "tokens": tokens,
        "sampled": dict(zip(DOMAINS, weights.tolist(), strict=True)),
        "final": {name: {"loss": loss} for name, loss in zip(SETS, losses.tolist(), strict=True)},
    }


@pytest.fixture
def cells() -> Cells:
    rng = np.random.default_rng(0)
    drawn = {seed: cell(0.1 + 0.7 * rng.dirichlet(3 * np.ones(3)), int(rng.integers(800, 1000))) for seed in range(60)}
    return Cells({"split": SPLIT}, {"natural": {seed: cell(PRIOR) for seed in range(60)}, "other": drawn})


def test_slopes_of_a_law_are_found(cells: Cells) -> None:
    law = Law.fit(cells)
    assert law.sets == SETS
    assert law.runs == 60
    np.testing.assert_allclose(law.slopes, SLOPES, atol=0.01)
    np.testing.assert_allclose(law.explained, 1, atol=1e-3)
    assert "| `t` | 0.50 |  |  | 100 % |" in law.table()


def test_the_page_says_it_where_there_are_enough_runs(cells: Cells) -> None:
    said = "".join(section("some", cells))
    assert "By 60 runs, those that gave every domain at least 15 %" in said
    assert "takes 0.40 (a) to 0.90 nats (b) off its own text" in said
    assert all(f"{d} {100 * w:.1f}" in said for d, w in Law.fit(cells).best(cells).items())
    few = {seed: one for seed, one in cells.cells["other"].items() if seed < 2}
    assert section("some", Cells(cells.settings, cells.cells | {"other": few})) == []
    assert section("some", Cells(cells.settings, {"other": cells.cells["other"]})) == []


def test_runs_that_say_nothing_are_no_law(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    law = replace(Law.fit(cells), slopes=np.zeros((5, 3)))
    with pytest.raises(SystemExit, match="run more"):
        law.best(cells)
    monkeypatch.setattr(Law, "fit", lambda _: law)
    assert section("some", cells) == []


def test_runs_that_do_not_compare_are_left_out(cells: Cells) -> None:
    law = Law.fit(cells)
    wrong = cell(np.array([0.1, 0.1, 0.8]), budget=0.5)  # of fewer operations
    alone = cell(np.array([0.1, 0.1, 0.8]))  # no prior of its seed
    groups = cell(np.array([0.1, 0.1, 0.8])) | {"sampled": {"rest": 1.0}}  # of other domains
    without = cell(np.array([0.01, 0.49, 0.5]))  # hardly any of one
    for one in (wrong, alone, groups, without):
        one["final"] = {name: {"loss": 9.0} for name in SETS}
    more = {
        "half": {0: wrong},
        "unpaired": {99: alone},
        "automixer": {0: groups},
        "mde": {0: without},
        "hindsight": {0: alone},
    }
    assert Law.fit(Cells(cells.settings, cells.cells | more)).slopes == pytest.approx(law.slopes)
    with pytest.raises(SystemExit, match="run others first"):
        Law.fit(Cells(cells.settings, {"natural": cells.cells["natural"], **more}))


def test_no_mixture_that_holds_the_own_text_is_better(cells: Cells) -> None:
    law = Law.fit(cells)
    groups = [["t"], ["u"], ["text/c"]]

    def losses(w: np.ndarray) -> tuple[float, float]:
        change = -law.slopes @ np.log(w / PRIOR)
        return float(np.mean([change[SETS.index(s)] for (s,) in groups])), float(change[2:4].mean())

    best = np.array(list(law.best(cells).values()))
    gain, own = losses(best)
    assert best.sum() == pytest.approx(1)
    assert own == pytest.approx(0, abs=1e-9)
    assert gain < -0.05
    for w in np.random.default_rng(1).dirichlet(np.ones(3), 3000):
        mean, text = losses(w)
        assert text > 0 or mean >= gain


def test_a_domain_that_the_prior_never_samples_is_said_to_be_why_there_is_no_law(cells: Cells) -> None:
    for run in cells.cells["natural"].values():
        run["sampled"]["noise"] = 0.0
    with pytest.raises(SystemExit, match="every domain has some tokens in both"):
        Law.fit(cells)
