"""Integers in memory that worker processes see and may write, whether they are forked or spawned.

Knows nothing of what the integers mean.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing import resource_sharer
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dynmix.mixture.store import with_room

_MEMORY = Path("shared memory")  # in the error where too many files are open
_SENT = 128  # descriptors that go with a process


class SharedArray:
    """An array of integers, zero at first, shared with every process that is started while this one holds it.

    Memory is taken page by page when it is first written, so a large shape costs nothing; it has no name anywhere and
    is given back when the last process ends, killed or not. Sent to a starting process it stays one memory; pickled or
    copied in any other way it becomes an independent copy of its content. `array` is a writable view on the memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.int64) -> None:
        file = with_room(_MEMORY, _anonymous_file)
        file.truncate(np.dtype(dtype).itemsize * int(np.prod(shape)))
        self._map(file, shape, dtype)

    def _map(self, file: IO[bytes], shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self._file = file  # kept open: its descriptor is what a spawned process is given; the map has one of its own
        weakref.finalize(self, file.close)  # or Python warns of a file that was left open
        content = with_room(_MEMORY, lambda: mmap.mmap(file.fileno(), 0))
        self.array: npt.NDArray[Any] = np.frombuffer(content, dtype).reshape(shape)

    def __reduce__(self) -> tuple[Callable[..., "SharedArray"], tuple[Any, ...]]:
        process: Any = get_spawning_popen()
        if process is None:
            return shared, (self.array.copy(),)
        # Python's fork server takes some 250 descriptors with a process: that asks this one for further ones itself.
        few = process.method != "forkserver" or len(process._fds) < _SENT
        descriptor = DupFd(self._file.fileno()) if few else resource_sharer.DupFd(self._file.fileno())
        return _attach, (descriptor, self.array.shape, self.array.dtype)


def shared(values: npt.NDArray[np.integer]) -> SharedArray:
    """A copy of `values` in shared memory."""
    found = SharedArray(values.shape, values.dtype)
    found.array[...] = values
    return found


def is_starting_process() -> bool:
    """Whether pickling happens now on behalf of a child process that is being started."""
    return get_spawning_popen() is not None


def _anonymous_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("dynmix"), "r+b")
    return tempfile.TemporaryFile()


def _attach(descriptor: Any, shape: tuple[int, ...], dtype: npt.DTypeLike) -> SharedArray:
    found = SharedArray.__new__(SharedArray)
    found._map(os.fdopen(descriptor.detach(), "r+b"), shape, dtype)
    return found
