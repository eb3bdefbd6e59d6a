"""Sequences picked out of batches: how many, which ones, and made into batches again.

Knows batches alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dynmix.influence.batch import Batch, Batches


def spread_rows(total: int, count: int | None, stratum: int | None = None) -> list[int]:
    """Numbers of `count` of `total` sequences, evenly spread; of each stratum of so many in a row as many, 2 at least.

    None: all.
    """
    if count is None or count >= total:
        return list(range(total))
    if stratum is None:
        return [i * total // count for i in range(count)]
    of_each = min(stratum, max(2, count * stratum // total))
    return [first + i * stratum // of_each for first in range(0, total, stratum) for i in range(of_each)]


def picked(batches: Batches, sizes: Sequence[int], rows: Sequence[int]) -> Iterator[Batch]:
    """These of the sequences, numbered through batches of these sizes, in batches no larger than the largest of them.

    What of a batch is no tensor with a row per sequence is kept as it is.
    """
    if len(rows) == sum(sizes):
        yield from batches
        return
    ends = np.cumsum(sizes)
    waiting: list[dict[str, Tensor]] = []
    for batch, size, end in zip(batches, sizes, ends.tolist(), strict=False):
        own = [row - (end - size) for row in rows if end - size <= row < end]
        if not own:
            continue
        part = {k: x[own] if isinstance(x, Tensor) and x.ndim and len(x) == size else x for k, x in batch.items()}
        held = sum(len(next(iter(some.values()))) for some in waiting)
        if waiting and (held + len(own) > max(sizes) or not _alike(waiting[0], part, len(own))):
            yield _joined(waiting)
            waiting = []
        if _alike(part, part, len(own)):
            waiting.append(part)
        else:
            yield part
    if waiting:
        yield _joined(waiting)


def _alike(one: Batch, other: Batch, rows: int) -> bool:
    """Whether everything in both are tensors of the same shapes but for their rows."""
    return one.keys() == other.keys() and all(
        isinstance(x, Tensor) and x.ndim and len(x) == rows and x.shape[1:] == one[k].shape[1:]
        for k, x in other.items()
    )


def _joined(parts: list[dict[str, Tensor]]) -> Batch:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
