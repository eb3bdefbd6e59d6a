"""Rows of several collections counted through as one number, and such numbers in a file.

A number is the row, plus the rows of all collections before its own: one integer a row, as narrow as fits. Knows
nothing of what the rows are.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynmix.whole_file import whole_file

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.unsignedinteger]


def numbered(sizes: Sequence[int], part: npt.ArrayLike, row: npt.ArrayLike, part_name: str, row_name: str) -> Numbers:
    """Numbers of rows `row` of collections `part` that have `sizes`; unsigned integers just wide enough for them all.

    The names are what an error calls collections and rows.

    Raises:
        ValueError: no rows, arrays that are no integers of one length, a collection or a row that is not there.
    """
    given, rows = np.asarray(part), np.asarray(row)
    if given.ndim != 1 or given.shape != rows.shape or not given.size:
        raise ValueError(
            f"{part_name} and {row_name} must be vectors of one length, at least 1, not of shape {given.shape} and"
            f" {rows.shape}"
        )
    for name, values in ((part_name, given), (row_name, rows)):
        if values.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, not {values.dtype}")
    if (bad := np.flatnonzero((given < 0) | (given >= len(sizes)))).size:
        raise ValueError(f"{part_name}[{bad[0]}] is {given[bad[0]]}: there are 0 to {len(sizes) - 1}")
    limits = np.array(sizes, np.int64)
    if (bad := np.flatnonzero((rows < 0) | (rows >= limits[given]))).size:
        which = given[bad[0]]
        raise ValueError(
            f"{row_name}[{bad[0]}] is {rows[bad[0]]}, of {part_name} {which}, which has {limits[which]} of them"
        )
    numbers = rows.astype(np.int64) + (np.cumsum(limits) - limits)[given]
    found: Numbers = numbers.astype(np.min_scalar_type(max(0, int(limits.sum()) - 1)))
    return found


def split(numbers: npt.NDArray[np.integer], ends: Ints) -> tuple[Ints, Ints]:
    """Collection and row of each number; `ends` are the cumulative sizes of the collections. int64[n] each."""
    number = numbers.astype(np.int64)
    part = np.searchsorted(ends, number, side="right")
    return part, number - np.concatenate([[0], ends])[part]


def digest(numbers: Numbers) -> str:
    """Hash of the numbers, the same on every machine."""
    content = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)
    found = hashlib.blake2b(content.dtype.str.encode(), digest_size=16)
    found.update(np.ascontiguousarray(content).data)
    return found.hexdigest()


def write_numbers(file: Path, numbers: Numbers) -> None:
    """Write `numbers` as an npy file, whole or not at all; a file that holds them already is left alone.

    So any number of processes may write the same, and those that have it mapped keep what they have.
    """
    with suppress(ValueError):
        if digest(read_numbers(file)) == digest(numbers):
            return
    with whole_file(file, shared=True) as beside, open(beside, "xb") as stream:
        np.lib.format.write_array(stream, numbers.astype(numbers.dtype.newbyteorder("<"), copy=False))


def read_numbers(file: Path) -> Numbers:
    """The numbers in `file`, memory-mapped. Raises ValueError if it is no vector of unsigned integers in npy format."""
    try:
        found = np.lib.format.open_memmap(file, mode="r")
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no whole npy file ({error})") from error
    if found.ndim != 1 or found.dtype.kind != "u":
        raise ValueError(f"{file} is no vector of unsigned integers, but {found.dtype} of shape {found.shape}")
    return found.view(np.ndarray)
