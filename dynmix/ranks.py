"""What the processes of one run agree on: one of them writes, decides, and none goes on alone.

`on_every_rank` is for what each does by itself and all must have done; `Ranks` for work that they share, step by step.
Knows torch.distributed and nothing else; without it there is one rank, and everything here does as it is told.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def is_rank_0() -> bool:
    """Whether this process is the one that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_rank_0(value: T) -> T:
    """Return rank 0's value on every rank; each of them must call this, and none goes on before rank 0 is here."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: T) -> list[T]:
    """Return every rank's value, by rank; each of them must call this."""
    if not dist.is_initialized():
        return [value]
    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def on_every_rank(action: Callable[[], T]) -> T:
    """Do it, wait for the others, and return what it did here; raise on all ranks if it failed on one.

    Raises:
        RuntimeError: another rank failed, with its words; or whatever `action` raises here.
    """
    problem: Exception | None = None
    try:
        done = action()
    except Exception as failure:
        problem = failure
    found = gathered(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is None and (others := [words for words in found if words is not None]):
        problem = RuntimeError(f"another rank failed: {others[0]}")
    if problem is not None:
        raise problem
    return done


class Ranks:
    """The processes that do one piece of work together; a single one, unless the work is shared.

    On all of them the same methods are called in the same order. A rank that fails tells the others where they meet it
    next, so that all of them raise and none waits: nothing is reduced that they have not agreed on before. (What cannot
    be helped is a rank that fails in the middle of a collective, as the forward pass of a sharded model is one: the
    others wait in it until the process group's timeout.)

    Attributes:
        rank, size: which of how many; 0 of 1 without torch.distributed, and for work that is not shared.
    """

    def __init__(self, shared: bool = False) -> None:
        shared = shared and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        self._apart = False  # the others know of a failure, or wait where no word reaches them

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around all of the work: an exception here is told to the others."""
        try:
            yield
        except Exception as failure:
            if self.size > 1 and not self._apart:
                gathered((f"{type(failure).__name__}: {failure}", "", None))
            raise

    def exchange(self, what: str, value: T) -> list[T]:
        """Every rank's value, by rank. `what` names the point in the work at which all of them should be.

        Raises:
            RuntimeError: another rank failed, with its words, or is at another point.
        """
        if self.size == 1:
            return [value]
        with self._collective():
            found = gathered((None, what, value))
            if words := [problem for problem, _, _ in found if problem is not None]:
                raise RuntimeError(f"another rank failed: {words[0]}")
            if points := [point for _, point, _ in found if point != what]:
                raise RuntimeError(f"this rank is at {what!r} and another one at {points[0]!r}: they cannot go on")
        return [given for _, _, given in found]

    def sum(self, what: str, tensors: dict[K, Tensor], device: Callable[[K], torch.device]) -> dict[K, Tensor]:
        """Each of the tensors added up over the ranks, in place, in an order that is the same on all of them.

        Args:
            what: as in `exchange`.
            tensors: contiguous ones. One that a rank does not have counts as zeros.
            device: where such a one belongs.
        """
        if self.size == 1:
            return tensors
        own = {key: (x.shape, x.dtype) for key, x in tensors.items()}
        forms = self.exchange(what, own)
        known = {key: form for found in forms for key, form in found.items()}
        if any(found.get(key, form) != form for found in forms for key, form in known.items()):
            raise ValueError(f"{what}: their shapes differ between ranks: is it the same model on all of them?")
        if any(len(found) < len(known) for found in forms):
            for key, (shape, dtype) in known.items():
                if key not in tensors:
                    tensors[key] = torch.zeros(shape, dtype=dtype, device=device(key))
            self.exchange(what, None)  # nobody ran out of memory
        for key in known:
            self._carried(tensors[key], dist.all_reduce)
        return {key: tensors[key] for key in known}

    def broadcast(self, what: str, tensors: Mapping[K, Tensor], owners: Mapping[K, int]) -> None:
        """Fill each of the tensors, contiguous and in one order on all ranks, with what its owner has in it."""
        if self.size > 1:
            self.exchange(what, None)
            for key, tensor in tensors.items():
                self._carried(tensor, partial(dist.broadcast, src=owners[key]))

    def _carried(self, tensor: Tensor, collective: Callable[[Tensor], object]) -> None:
        """Run a collective on a tensor, by way of a device that the process group can talk from."""
        backends = dist.get_backend_config()  # "cpu:gloo,cuda:nccl"
        there = tensor if f"{tensor.device.type}:" in backends else tensor.to(backends.split(":")[0])
        with self._collective():
            collective(there)
        if there is not tensor:
            tensor.copy_(there)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        self._apart = True
        yield
        self._apart = False
