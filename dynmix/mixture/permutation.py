"""Keyed bijections on [0, n): a fresh shuffle for every key, computed element by element, with no table.

A generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002) over the grid
Z_a x Z_b with a ~ b ~ sqrt(n) and n <= a * b < n + a, and cycle walking for the few cells beyond n. This module knows
integers only: what is shuffled, and why, is its caller's business.
"""

import numpy as np
import numpy.typing as npt

UInts = npt.NDArray[np.uint64]

_ROUNDS = 6  # even, so that the two halves end on the side they began on
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_LOW_32 = np.uint64(32)


def mix(*words: int | npt.NDArray[np.integer]) -> UInts:
    """Hash of a sequence of integers, elementwise over broadcast arrays (SplitMix64's finaliser, chained).

    Args:
        words: non-negative integers below 2**64, or arrays of them.

    Returns:
        uint64 array of the broadcast shape (0-dimensional for plain integers).
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # wrapping is the point
        for word in words:
            state = (state ^ np.asarray(word).astype(np.uint64)) + _STEP
            state = (state ^ (state >> np.uint64(30))) * _MULTIPLY_1
            state = (state ^ (state >> np.uint64(27))) * _MULTIPLY_2
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def permute(index: npt.NDArray[np.integer], length: int | UInts, key: int | UInts) -> UInts:
    """Image of each index under the bijection on [0, length) that belongs to (length, key).

    The image of one element depends on its own index, length and key alone, so any split of a call gives the same.

    Args:
        index: integers in [0, length), any shape.
        length: 1 to 2**62, scalar or one an element.
        key: uint64, scalar or one an element.

    Returns:
        uint64 array of the shape of `index`.
    """
    left_index = np.asarray(index).astype(np.uint64)
    length = np.asarray(length).astype(np.uint64)
    key = np.asarray(key).astype(np.uint64)
    side = np.ceil(np.sqrt(length)).astype(np.uint64)  # correctly rounded, hence the same on every machine
    other = (length + side - np.uint64(1)) // side
    left = left_index // other
    right = left_index - left * other
    with np.errstate(over="ignore"):
        round_key = key
        for _ in range(_ROUNDS):
            round_key = round_key + _STEP
            noise = right * _MULTIPLY_1 + round_key
            noise = (noise ^ (noise >> _LOW_32)) * _MULTIPLY_2
            left = left + ((noise >> _LOW_32) * side >> _LOW_32)
            left = np.minimum(left, left - side)  # mod side: below `side` the difference wraps to a huge number
            left, right, side, other = right, left, other, side
    image = np.asarray(left * other + right)
    outside = image >= length
    if outside.any():  # cycle walking
        length, key = (np.broadcast_to(array, image.shape)[outside] for array in (length, key))
        image[outside] = permute(image[outside], length, key)
    return image
