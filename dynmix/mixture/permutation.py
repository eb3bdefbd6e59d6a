"""Keyed bijections on [0, n): a fresh shuffle for every key, computed element by element, with no table.

A generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002) over the grid
Z_a x Z_b with a ~ b ~ sqrt(n) and n <= a * b < n + a, and cycle walking for the few cells beyond n. This module knows
integers only: what is shuffled, and why, is its caller's business.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
UInts = npt.NDArray[np.uint64]

_ROUNDS = 6  # even, so that the two halves end on the side they began on
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_LOW_32 = np.uint64(32)


def mix(*words: int | npt.NDArray[np.integer]) -> UInts:
    """Hash of integers below 2**64, uint64, elementwise over broadcast arrays (SplitMix64's finaliser, chained)."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # wrapping is the point
        for word in words:
            state = (state ^ np.asarray(word).astype(np.uint64)) + _STEP
            state ^= state >> np.uint64(30)
            state *= _MULTIPLY_1
            state ^= state >> np.uint64(27)
            state *= _MULTIPLY_2
            state ^= state >> np.uint64(31)
    return np.asarray(state)


def permute(index: npt.NDArray[np.integer], length: int | UInts, key: int | UInts) -> UInts:
    """Image of each index under the bijection on [0, length) that belongs to (length, key).

    `length`, 1 to 2**62, and `key`, uint64, are scalars or one an element of `index`. The image of an element depends
    on its own index, length and key alone, so any split of a call gives the same.
    """
    numbers, lengths, keys = (np.asarray(given).astype(np.uint64) for given in (index, length, key))
    return _walked(numbers, lengths, *_sides(lengths), keys)


def permute_runs(first: Ints, count: Ints, length: UInts, key: UInts) -> UInts:
    """Images of the indices from `first` to `first + count - 1` under each of many bijections, end to end.

    The same as `permute`, but what depends on the bijection alone is computed once for all its indices. All arguments
    are [n], one a bijection.
    """
    ends = np.cumsum(count)
    index = np.repeat(first - ends + count, count)
    index += np.arange(len(index))
    side, other = (np.repeat(each, count) for each in _sides(length))
    return _walked(index.view(np.uint64), np.repeat(length, count), side, other, np.repeat(key, count))


def _sides(length: UInts) -> tuple[UInts, UInts]:
    side = np.ceil(np.sqrt(length)).astype(np.uint64)  # correctly rounded, hence the same on every machine
    return np.asarray(side), np.asarray((length + side - np.uint64(1)) // side)


def _walked(index: UInts, length: UInts, side: UInts, other: UInts, key: UInts) -> UInts:
    image = _network(index, side, other, key)
    outside = image >= length
    if outside.any():  # cycle walking
        length, side, other, key = (np.broadcast_to(a, image.shape)[outside] for a in (length, side, other, key))
        image[outside] = _walked(image[outside], length, side, other, key)
    return image


def _network(index: UInts, side: UInts, other: UInts, key: UInts) -> UInts:
    # In place throughout: a new array for every step would take three times as long.
    left, right, noise, spare = (np.empty(np.broadcast_shapes(index.shape, key.shape), np.uint64) for _ in range(4))
    np.floor_divide(index, other, out=left)
    np.subtract(index, np.multiply(left, other, out=noise), out=right)
    round_key = key.copy()
    for _ in range(_ROUNDS):
        round_key += _STEP
        np.multiply(right, _MULTIPLY_1, out=noise)
        noise += round_key
        noise ^= np.right_shift(noise, _LOW_32, out=spare)
        noise *= _MULTIPLY_2
        noise >>= _LOW_32
        noise *= side
        noise >>= _LOW_32
        left += noise
        np.minimum(left, np.subtract(left, side, out=spare), out=left)  # mod side: below it the difference is huge
        left, right, side, other = right, left, other, side
    left *= other
    left += right
    return left
