import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmix.mixture.permutation import mix, permute


@given(length=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=25, deadline=None)
def test_it_is_a_bijection(length: int, key: int) -> None:
    image = permute(np.arange(length), length, key)
    assert sorted(image.tolist()) == list(range(length))


@given(
    lengths=st.lists(st.integers(1, 10**12), min_size=1, max_size=30), seed=st.integers(0, 2**32), key=st.integers(0, 9)
)
@settings(max_examples=25, deadline=None)
def test_an_element_depends_on_nothing_but_itself(lengths: list[int], seed: int, key: int) -> None:
    index = np.random.default_rng(seed).integers(0, lengths)
    keys = mix(key, np.arange(len(lengths)))
    together = permute(index, np.array(lengths, np.uint64), keys)
    alone = [int(permute(np.array(i), n, int(k))) for i, n, k in zip(index, lengths, keys, strict=True)]
    assert together.tolist() == alone
    assert (together < np.array(lengths)).all()


@pytest.mark.parametrize("length", [2, 3, 5, 16, 50])
def test_every_image_is_equally_likely_over_keys(length: int) -> None:
    trials = 20_000
    for index in (0, length - 1):
        image = permute(np.full(trials, index), length, mix(7, np.arange(trials)))
        expected = trials / length
        chi_square = float(((np.bincount(image.astype(np.int64), minlength=length) - expected) ** 2 / expected).sum())
        assert chi_square < length - 1 + 6 * np.sqrt(2 * length)


def test_every_order_of_a_few_elements_occurs_equally_often() -> None:
    trials = 24_000
    image = permute(np.tile(np.arange(4), trials), 4, np.repeat(mix(1, np.arange(trials)), 4)).reshape(trials, 4)
    _, often = np.unique(image, axis=0, return_counts=True)
    assert len(often) == 24
    assert ((often - 1000) ** 2 / 1000).sum() < 23 + 6 * np.sqrt(46)


def test_neighbours_part() -> None:
    image = permute(np.arange(100_000), 100_000, 3).astype(np.float64)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), image)[0, 1]) < 0.02


def test_mix_tells_words_and_their_order_apart() -> None:
    words = np.arange(300)
    hashes = mix(words[:, None], words[None, :])
    assert len(np.unique(hashes)) == hashes.size
    assert int(mix(1)) != int(mix(1, 0)) != int(mix(0, 1))
    bits = np.unpackbits((mix(words) ^ mix(words ^ 1)).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.02
