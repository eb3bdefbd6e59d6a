import json

import numpy as np
import pytest

from dynmix.mixers import Proposal, Static


def test_static_keeps_the_prior_inside_its_bounds():
    prior = {"a": 0.6, "b": 0.4}
    assert Static().propose(None, prior).weights == prior
    assert Static().propose(None, prior, upper={"a": 0.5}).weights == pytest.approx({"a": 0.5, "b": 0.5})
    assert Static().needs == frozenset()
    assert Static(observe=True).needs == {"influence"}


def test_what_a_proposal_says_can_be_written_down():
    said = Proposal({"a": 1.0}, predicted_gain={"t": np.float32(0.5)}, multipliers={"t": np.int64(2)})
    assert json.loads(json.dumps([said.predicted_gain, said.multipliers])) == [{"t": 0.5}, {"t": 2.0}]
    for wrong in (None, {"t": None}, {"t": np.zeros(2)}, [0.1]):
        with pytest.raises(ValueError, match="predicted_gain=.*a dict of numbers by name"):
            Proposal({"a": 1.0}, predicted_gain=wrong)
    with pytest.raises(ValueError, match="message=3: a str"):
        Proposal({"a": 1.0}, message=3)
