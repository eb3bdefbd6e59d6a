import json

import numpy as np
import pytest

from dynmix.mixers import Proposal


def test_what_a_proposal_says_can_be_written_down():
    said = Proposal({"a": 1.0}, predicted_gain={"t": np.float32(0.5)}, multipliers={"t": np.int64(2)})
    assert json.loads(json.dumps([said.predicted_gain, said.multipliers])) == [{"t": 0.5}, {"t": 2.0}]
    for wrong in (None, {"t": None}, {"t": np.zeros(2)}, [0.1]):
        with pytest.raises(ValueError, match="predicted_gain=.*a dict of numbers by name"):
            Proposal({"a": 1.0}, predicted_gain=wrong)
    with pytest.raises(ValueError, match="message=3: a str"):
        Proposal({"a": 1.0}, message=3)
