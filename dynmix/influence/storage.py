"""Where what a measurement keeps of each layer lives between its uses: on the layer's device, the CPU, or the disk.

Knows tensors and files; nothing of what is in them.
"""

from __future__ import annotations

import math
import mmap
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Offload = Literal["cpu", "disk"] | None
"""None: on the layer's device. "disk": in files that are mapped into memory, and gone with the process."""

_files: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by the address of the data


def check_offload(offload: Offload) -> None:
    """Raise ValueError if it is none of them."""
    if offload not in (None, "cpu", "disk"):
        raise ValueError(f'offload={offload!r}: "cpu", "disk", or None for the layers\' own device')


def zeros(offload: Offload, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of a layer of that device, where they are to live."""
    if offload != "disk" or not all(shape):
        return torch.zeros(*shape, dtype=dtype, device="cpu" if offload else device)
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(prefix="dynmix-") as file:  # has no name: its space is freed with the mapping
        file.truncate(size)
        pages = mmap.mmap(file.fileno(), size)
    tensor = torch.frombuffer(pages, dtype=dtype).view(*shape)  # holds on to its pages
    _files[tensor.data_ptr()] = pages
    return tensor


def moved(offload: Offload, tensor: Tensor) -> Tensor:
    """A tensor that was made elsewhere, where it is to live."""
    if offload is None:
        return tensor
    there = zeros(offload, tensor.shape, tensor.dtype, tensor.device)
    there.copy_(tensor)
    let_go(there)
    return there


@contextmanager
def on(tensor: Tensor, device: torch.device) -> Iterator[Tensor]:
    """The tensor, or a part of one, on that device; what is changed in it there is changed where it lives."""
    there = tensor.to(device)
    yield there
    if there is not tensor:
        tensor.copy_(there)
    let_go(tensor)


def let_go(tensor: object) -> None:
    """Take what is in a file out of memory until its next use; of anything else nothing."""
    if isinstance(tensor, Tensor) and (pages := _files.get(tensor.untyped_storage().data_ptr())) is not None:
        pages.madvise(mmap.MADV_DONTNEED)  # of a shared mapping nothing is lost
