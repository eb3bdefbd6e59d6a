import copy
import gc
import multiprocessing
import os
import pickle
import resource
from typing import Any

import pytest

from dynmix.mixture.shared import SharedArray


def write_seven(shared: SharedArray) -> None:
    shared.array[1, 2] += 7


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_and_its_parent_see_each_others_writing(method: str) -> None:
    shared = SharedArray((3, 4))
    process: Any = multiprocessing.get_context(method).Process(target=write_seven, args=(shared,))  # type: ignore[attr-defined]
    shared.array[1, 2] = 1
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert shared.array.sum() == shared.array[1, 2] == 8


@pytest.mark.filterwarnings("error")
def test_what_is_no_longer_held_is_closed_without_a_warning() -> None:
    shared = SharedArray((2,))
    descriptor = shared._file.fileno()
    del shared
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def add_one(several: list[SharedArray]) -> None:
    for shared in several:
        shared.array += 1


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_is_given_more_of_them_than_a_fork_server_takes(method: str) -> None:
    several = [SharedArray((2,)) for _ in range(300)]
    process: Any = multiprocessing.get_context(method).Process(target=add_one, args=(several,))  # type: ignore[attr-defined]
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert all(shared.array.tolist() == [1, 1] for shared in several)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda shared: pickle.loads(pickle.dumps(shared))])
def test_a_copy_has_a_memory_of_its_own(make_copy: Any) -> None:
    shared = SharedArray((2, 2))
    shared.array[0, 1] = 5
    twin = make_copy(shared)
    shared.array[0, 0] = 1
    assert twin.array.tolist() == [[0, 5], [0, 0]]


@pytest.mark.parametrize("dtype", ["u1", "u2", "i8"])
def test_integers_of_other_types(dtype: str) -> None:
    shared = SharedArray((3,), dtype)
    shared.array[:] = [1, 0, 200]
    twin = copy.deepcopy(shared)
    assert twin.array.dtype == dtype
    assert twin.array.tolist() == [1, 0, 200]


def test_untouched_memory_costs_nothing() -> None:
    before = resident_pages()
    shared = SharedArray((1 << 27,))  # 1 GiB
    shared.array[-1] = 1
    assert resident_pages() - before < 10_000  # 40 MiB


def resident_pages() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])
    except OSError:
        pytest.skip("needs /proc")


def test_more_of_them_than_open_files_are_allowed_at_first() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        several = [SharedArray((2,)) for _ in range(70)]
        assert not any(shared.array.any() for shared in several)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
