import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.mixture.index import digest, numbered, read_numbers, split, write_numbers
from dynmix.mixture.shared import shared


@given(sizes=st.lists(st.integers(0, 70_000), min_size=1, max_size=6).filter(any), data=st.data())
def test_numbers_count_the_rows_through_and_split_brings_them_back(sizes: list[int], data: st.DataObject) -> None:
    every = [(part, row) for part, size in enumerate(sizes) for row in {0, size // 2, size - 1} if size]
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=20))
    part, row = zip(*chosen, strict=True)
    numbers = numbered(sizes, part, row, "part", "row")
    assert numbers.tolist() == [sum(sizes[:p]) + r for p, r in chosen]
    assert numbers.dtype == next(t for t in ("u1", "u2", "u4") if np.iinfo(t).max >= sum(sizes) - 1)
    assert [each.tolist() for each in split(numbers, np.cumsum(sizes))] == [list(part), list(row)]


@pytest.mark.parametrize(
    ("part", "row", "message"),
    [
        ([0, 3], [0, 0], r"part\[1\] is 3: there are 0 to 2"),
        ([0, -1], [0, 0], r"part\[1\] is -1"),
        ([0, 2, 2], [4, 6, 7], r"row\[2\] is 7, of part 2, which has 7 of them"),
        ([0, 0], [-2, 0], r"row\[0\] is -2, of part 0"),
        ([1], [0], r"row\[0\] is 0, of part 1, which has 0 of them"),
        ([0], np.array([2**64 - 1], np.uint64), r"row\[0\] is 18446744073709551615"),
        ([], [], r"at least 1, not of shape \(0,\)"),
        ([0, 0], [1], r"of one length.*\(2,\) and \(1,\)"),
        ([[0]], [[1]], "must be vectors"),
        ([0.0], [1], "part must be integers, not float64"),
        ([0], [True], "row must be integers, not bool"),
    ],
)
def test_rows_that_are_not_there_are_named(part: Any, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numbered([5, 0, 7], part, row, "part", "row")


def test_a_hash_tells_other_numbers_and_other_widths() -> None:
    numbers = np.array([1, 2, 3], np.uint8)
    assert digest(numbers) == digest(shared(numbers).array) == digest(numbers.astype("<u1"))
    others = [numbers[::-1], numbers[:2], numbers.astype(np.uint16), np.array([1, 0], np.uint8), np.array([1], "u2")]
    assert len({digest(numbers), *map(digest, others)}) == 6
    big_endian = np.array([1, 2, 300], ">u2")
    assert digest(big_endian) == digest(big_endian.astype("<u2"))


def test_a_file_holds_numbers_memory_mapped(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.npy"
    write_numbers(file, np.array([7, 0, 65535], np.uint16))
    assert read_numbers(file).tolist() == [7, 0, 65535]
    assert read_numbers(file).dtype == np.uint16
    assert not read_numbers(file).flags.writeable
    assert file.stat().st_size == 128 + 3 * 2
    written = file.stat().st_ino
    write_numbers(file, np.array([7, 0, 65535], np.uint16))
    assert file.stat().st_ino == written  # who has it mapped keeps it
    write_numbers(file, np.array([7, 1], np.uint16))
    assert read_numbers(file).tolist() == [7, 1]
    assert [path.name for path in file.parent.iterdir()] == ["a.npy"]


def test_a_crash_leaves_the_old_file_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise OSError("no space")

    write_numbers(tmp_path / "old.npy", np.array([1], np.uint8))
    monkeypatch.setattr(os, "replace", crash)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="no space"):
            write_numbers(tmp_path / f"{name}.npy", np.array([2], np.uint8))
    assert read_numbers(tmp_path / "old.npy").tolist() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["old.npy"]


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    with pytest.raises(ValueError, match="a.npy: no such file"):
        read_numbers(file)
    for content in (b"", b"nothing of the kind"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="a.npy is no whole npy file"):
            read_numbers(file)
    write_numbers(file, np.arange(100, dtype=np.uint8))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="a.npy is no whole npy file"):
        read_numbers(file)
    for other in (np.zeros(3), np.zeros((2, 2), np.uint8), np.zeros(3, np.int64), np.array([{}])):
        with open(file, "wb") as stream:
            np.lib.format.write_array(stream, other)
        with pytest.raises(ValueError, match=r"a.npy is no (vector of unsigned integers|whole npy file)"):
            read_numbers(file)
