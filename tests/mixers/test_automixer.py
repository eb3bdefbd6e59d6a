"""What is decided from scores; runs that regroup their corpus are in `callbacks/test_automixer.py`."""

import numpy as np
import pytest

from dynmix import AutoMixer
from dynmix.mixers.base import Run
from dynmix.scores import Column, SampleScores

PRIOR = {"web": 0.25, "noise": 0.75}
GROUPS = {"group:a": 0.6, "group:b": 0.4, "group:rest": 0.0}


def scores(**run):
    """20 sequences of 10 tokens: 4 help a, 4 help b, and 12 help nothing."""
    values = np.full((20, 2), -1.0)
    values[:4, 0] = values[4:8, 1] = 8.0
    columns = (Column("a", "step-1", 1), Column("b", "step-1", 1))
    return SampleScores(
        ("web", "noise"), np.repeat([0, 1], [8, 12]), np.arange(20), np.full(20, 10), columns, values, **run
    )


def proposed(mixer, **run):
    return mixer.propose(None, PRIOR, {"noise": 0.6}, samples=scores(**run)).weights


@pytest.mark.parametrize(("own", "of_run"), [(2.0, None), (None, 2.0), (2.0, 9.0), (9.0, 2.0)])
def test_the_lower_limit_of_the_mixer_and_the_run_bounds_the_groups_over_the_rest_of_it(own, of_run):
    weights = proposed(AutoMixer(keep=1.0, max_epochs=own), tokens_left=200, max_epochs=of_run)
    assert weights == pytest.approx({"group:a": 0.4, "group:b": 0.4, "group:rest": 0.2})
    weights = proposed(AutoMixer(keep=1.0, max_epochs=own), tokens_left=130, max_epochs=of_run)
    assert weights == pytest.approx({"group:a": 0.5, "group:b": 0.5, "group:rest": 0.0})


def test_groups_that_the_run_lets_hold_a_part_leave_the_others_to_the_raw_domains(caplog):
    weights = proposed(AutoMixer(keep=1.0), tokens_left=400, max_epochs=1.5)
    assert "within the run's max_epochs=1.5 they hold 75%, the raw domains the rest" in caplog.text
    groups = {"group:a": 0.15, "group:b": 0.15, "group:rest": 0.45}
    assert weights == pytest.approx(groups | {"web": 0.25 * 0.4, "noise": 0.25 * 0.6})
    caplog.clear()
    weights = proposed(AutoMixer(keep=1.0, max_epochs=1), tokens_left=400, max_epochs=3.0)
    assert "they are seen 2.0 times, not 1 at most" in caplog.text
    assert weights == pytest.approx({"group:a": 0.2, "group:b": 0.2, "group:rest": 0.6})


@pytest.mark.parametrize(
    ("upper", "want"),
    [
        ({}, (0, 0.6, 0.4, 0)),
        ({"group:a": 0.3}, (0, 0.3, 0.7, 0)),
        ({"group:a": 0.3, "group:b": 0.5}, (0, 0.3, 0.5, 0.2)),  # rest, and not the raw domains
        ({"group:a": 0.3, "group:b": 0.4, "group:rest": 0.1, "web": 0.5}, (0.25, 0.3, 0.4, 0.05)),
    ],
)
def test_raw_domains_stay_away_while_the_groups_hold_the_stage(upper, want):
    prior = {"web": 0.0, **GROUPS}
    weights = AutoMixer().propose(None, prior, upper).weights
    assert list(weights) == list(prior)
    assert tuple(weights.values()) == pytest.approx(want)


def test_raw_domains_that_have_weight_keep_it():
    prior = {"web": 0.5, "group:a": 0.5, "group:rest": 0.0}
    assert AutoMixer().propose(None, prior, {"group:a": 0.9}).weights == pytest.approx(prior)


def test_a_domain_that_is_called_as_a_group_is_refused():
    first = {"web": 0.5, "group:code": 0.5}
    with pytest.raises(ValueError, match="domain 'group:code': AutoMixer calls its own groups group:"):
        AutoMixer().start(Run(dict.fromkeys(first, 100), 1000, first))
    AutoMixer().start(Run(dict.fromkeys(first, 100), 1000, {"web": 1.0, "group:code": 0.0}))  # one that entered
