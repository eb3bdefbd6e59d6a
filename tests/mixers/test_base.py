import pytest

from dynmix.mixers import Mixer, Static, TiKMiXD


def test_mixers_follow_the_protocol():
    assert isinstance(Static(), Mixer)
    assert isinstance(TiKMiXD(), Mixer)


def test_static_keeps_the_prior_inside_its_bounds():
    prior = {"a": 0.6, "b": 0.4}
    assert Static().propose(None, prior).weights == prior
    assert Static().propose(None, prior, upper={"a": 0.5}).weights == pytest.approx({"a": 0.5, "b": 0.5})
    assert Static().needs == frozenset()
    assert Static(observe=True).needs == {"influence"}
