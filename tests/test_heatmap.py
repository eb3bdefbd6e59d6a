import matplotlib.image
import numpy as np
import pytest

from dynmix.heatmap import draw_influence
from dynmix.observation import Influence


@pytest.mark.parametrize("length", [4, 30, 120])
def test_names_of_any_length_are_drawn_whole(tmp_path, length):
    influence = Influence([[0.1, 0.2, -0.3]], ["t" * length], ["a" * length, "b", "c"], [[0.1, 0.1, 0.1]])
    draw_influence(influence, [tmp_path / "influence.png"])
    picture = matplotlib.image.imread(tmp_path / "influence.png")[..., :3]
    assert all((edge == 1).all() for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]))
    assert np.ptp(picture) == 1
