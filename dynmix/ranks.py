"""What the processes of one run agree on: one of them writes, decides, and none goes on alone.

Knows torch.distributed and nothing else; without it there is one rank, and everything here does as it is told.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

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


def on_every_rank(action: Callable[[], None]) -> None:
    """Do it, wait for the others, and raise on all ranks if it failed on one.

    Raises:
        RuntimeError: another rank failed, with its words; or whatever `action` raises here.
    """
    problem: Exception | None = None
    try:
        action()
    except Exception as failure:
        problem = failure
    if dist.is_initialized():
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is None and (others := [words for words in found if words is not None]):
            problem = RuntimeError(f"another rank failed: {others[0]}")
    if problem is not None:
        raise problem
