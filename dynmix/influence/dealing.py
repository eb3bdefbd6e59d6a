"""How the ranks of a distributed run share a measurement: batches are dealt in turn, eigen-decompositions by cost.

Every rank is given all batches and measures its share of them: the first batch of a pass is rank 0's, the next rank
1's, and so on through all of the pass's sets, so that many small sets are no more than one large one. What they find is
put together at the end of the pass: losses and products in the batches' order (`Turns.gathered`), sums of gradients and
factors by addition (`dynmix.ranks.Ranks.sum`). A model that is sharded makes every forward and backward pass a meeting
of all ranks, so all of them run as many: one that has no batch left repeats one, for nothing. A single process has
every turn, and nothing else changes.

Knows batches and ranks; nothing of what is measured.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dynmix.influence.batch import Batch, Batches, checked, token_mask
from dynmix.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """One batch of a set: its number in it, the number of its first sequence, and whether it is this rank's to run."""

    number: int
    first: int
    batch: Batch
    mine: bool


class Turns:
    """The turns of one pass over sets of batches.

    Args:
        ranks: who shares it.
        again: runs a batch as the pass does and forgets what comes of it.
    """

    def __init__(self, ranks: Ranks, again: Callable[[Batch], object]) -> None:
        self._ranks, self._again = ranks, again
        self._dealt = 0
        self._last: Batch | None = None
        self._seen = 0  # a checksum of all batches

    def __call__(self, batches: Batches, but: Collection[int] = ()) -> Iterator[Turn]:
        """Go through one set. Those with a number in `but` are nobody's, and are left out."""
        first = 0
        for number, batch in enumerate(batches):
            sequences = len(token_mask(checked(batch)))
            if number not in but:
                if self._ranks.size > 1:
                    self._seen = _checksum(batch, self._seen)
                self._last = batch
                self._dealt += 1
                yield Turn(number, first, batch, (self._dealt - 1) % self._ranks.size == self._ranks.rank)
            first += sequences

    def gathered(self, what: str, found: Sequence[dict[int, T]]) -> list[dict[int, T]]:
        """End the pass: what was found, set by set, on all ranks: number of the batch -> that.

        Raises:
            RuntimeError: another rank failed.
            ValueError: the ranks were not given the same batches.
        """
        left = self._dealt % self._ranks.size
        if self._last is not None and left and self._ranks.rank >= left:
            self._again(self._last)
        everything = self._ranks.exchange(what, (self._seen, found))
        if len({seen for seen, _ in everything}) > 1:
            raise ValueError(
                f"{what}: the ranks were given different batches, or in another order: sets of which each rank measures"
                " its share must be the same on all of them, whole (no DistributedSampler, no shuffling)"
            )
        merged: list[dict[int, T]] = [{} for _ in found]
        for _, sets in everything:
            for into, own in zip(merged, sets, strict=True):
                into.update(own)
        return [dict(sorted(own.items())) for own in merged]


def dealt_by_cost(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Which rank does what: the dearest first, each to whoever has the least to do."""
    load = [0.0] * ranks
    owners = {}
    for key in sorted(costs, key=costs.__getitem__, reverse=True):
        owners[key] = load.index(min(load))
        load[owners[key]] += costs[key]
    return owners


def _checksum(batch: Batch, start: int) -> int:
    for value in batch.values():
        if isinstance(value, Tensor):
            start = zlib.crc32(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes(), start)
    return start
