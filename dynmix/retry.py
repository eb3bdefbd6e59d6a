"""What is done where memory runs out: the same again, in smaller batches, on all ranks or on none.

Knows what an exhausted allocator says; nothing of what is measured.
"""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size  # type: ignore[import-untyped]

from dynmix.ranks import gathered

logger = logging.getLogger("dynmix")

T = TypeVar("T")


def within_memory(measure: Callable[[], T], shrink: Callable[[], int | None]) -> T:
    """Return what `measure` returns; where memory runs out, on any rank, all of them do it again after `shrink`.

    Every rank must call this, and any part of `measure` that talks to other ranks must fail on all of them.

    Args:
        measure: is called again from its start.
        shrink: lets the next attempt take less memory, and returns the sequences that a batch now has at most; None if
            it cannot get smaller.

    Raises:
        MemoryError: memory ran out on another rank, and nothing could get smaller; or whatever `measure` raises here.
    """
    while True:
        found, failure = _attempt(measure)
        short = None if failure is None or not _out_of_memory(failure) else str(failure).split("\n")[0]
        if not (words := [each for each in gathered(short) if each is not None]):
            if failure is not None:
                raise failure
            return found[0]
        if (sequences := shrink()) is None:
            raise failure or MemoryError(f"another rank: {words[0]}")
        logger.warning(
            "out of memory in a measurement, which starts again with at most %d sequences a batch, as will those after "
            "it: %s",
            sequences, words[0],
        )  # fmt: skip
        del found, failure  # its frames hold what is to be freed, as do cycles among hooks
        gc.collect()
        clear_device_cache()


def _attempt(measure: Callable[[], T]) -> tuple[list[T], Exception | None]:
    try:
        return [measure()], None
    except Exception as failure:
        return [], failure


def _out_of_memory(failure: Exception) -> bool:
    # numpy's and python's own is MemoryError; that of torch's CPU allocator is any RuntimeError with its words.
    return isinstance(failure, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(failure)
