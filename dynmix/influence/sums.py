"""Summed gradients of sets of batches, where others may read some of the batches first.

Fitting a curvature reads batches that are often the domains' own. What it sees of them is kept here, so that they need
not be read again. Knows batches and arrays; no model, no curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dynmix.influence.batch import Batch, Batches
from dynmix.influence.storage import on


class Sums:
    """Gradients of each set's summed loss, from those of its batches that were met.

    A batch is known by being the same object, which only lists and tuples promise; batches of other containers (a
    DataLoader) are never waited for.

    Args:
        sets: the batches of each.
        stored: makes zeros for a layer, [n, out, in].

    Attributes:
        gradients: layer -> [n_sets, out, in], of the batches that this rank has run.
        met: for each set, number of the batch -> the losses and tokens that `Capture.run` returned for it, on any rank.
    """

    def __init__(self, sets: Sequence[Batches], stored: Callable[[str, int], Tensor]) -> None:
        self._stored = stored
        self.gradients: dict[str, Tensor] = {}
        self.met: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in sets]
        self._waiting: dict[int, list[tuple[int, int]]] = {}  # id of a batch -> its sets, and its numbers there
        self._added: dict[int, list[tuple[int, int]]] = {}  # the same by the batch's number in the pass
        for index, batches in enumerate(sets):
            for number, batch in enumerate(batches if isinstance(batches, list | tuple) else ()):
                self._waiting.setdefault(id(batch), []).append((index, number))

    def waits_for(self, batch: Batch) -> bool:
        """Whether it is a batch of a set, and was not met yet."""
        return id(batch) in self._waiting

    def add(self, layer: str, batch: Batch, gradient: Tensor) -> None:
        """Add the gradient of the batch's summed loss, [out, in], to the sets that hold it."""
        if layer not in self.gradients:
            self.gradients[layer] = self._stored(layer, len(self.met))
        for index, _ in self._waiting[id(batch)]:
            with on(self.gradients[layer][index], gradient.device) as total:
                total += gradient

    def added(self, batch: Batch, number: int) -> None:
        """Every layer's gradient of batch `number` of a pass is added, on some rank; it is waited for no more."""
        if (places := self._waiting.pop(id(batch), None)) is not None:
            self._added[number] = places

    def ended(self, found: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """The pass is over: number of the batch -> losses and tokens."""
        for number, places in self._added.items():
            for index, own in places:
                self.met[index][own] = found[number]
