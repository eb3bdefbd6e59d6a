"""What a measurement will hold at its peak, beside the model, known before it starts.

What is kept follows from shapes alone: the gradients of tasks and domains, the factors of the curvature. What a micro-
batch holds while it is run is found by running one sequence and counting every tensor that is alive at once. Knows
layers and curvatures; nothing of what is measured, nor of how much memory there is.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynmix.influence.adam import AdamDiagonal
from dynmix.influence.base import Curvature
from dynmix.influence.batch import Batch, Loss, next_token_loss, token_mask
from dynmix.influence.capture import Capture, NothingMeasuredError, layer_parts
from dynmix.influence.carried import Carried
from dynmix.influence.datainf import DataInf
from dynmix.influence.ekfac import EKFAC
from dynmix.influence.factored import FactoredCurvature
from dynmix.influence.factors import side_shape
from dynmix.influence.isolation import isolated
from dynmix.influence.layers import LayerFilter
from dynmix.influence.storage import Offload

_HEAP = 0.35
"""Of what is alive: resident sets of processes with glibc's allocator were 1.3 to 1.5 times that, and 1.05 times with
MALLOC_MMAP_THRESHOLD_=131072, which is slow. A GPU's allocator is not counted."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes that a group influence holds at its peak, beside the model; independent of the number of sequences.

    Attributes:
        factors: of the curvature, once it is fitted.
        fitting: what is there beside that while it is fitted: covariances, and the domains' gradients and a batch, or
            the work of an eigen-decomposition.
        gradients: two of each task (its gradient and a draw of its noise) and one of each domain.
        batch: activations, logits and output gradients of one micro-batch.
        layer: the largest layer's gradients once more, as they are preconditioned.
        sequences: of the micro-batch.
        elsewhere: of factors and gradients, what is not on the layers' device.
        on_cpu: whether the model is there.
    """

    factors: int
    fitting: int
    gradients: int
    batch: int
    layer: int
    sequences: int
    elsewhere: int
    on_cpu: bool

    @property
    def alive(self) -> int:
        """Of tensors, on the layers' device."""
        measuring = self.gradients + max(self.batch, self.layer) - self.elsewhere
        return self.factors + max(self.fitting, measuring)

    @property
    def heap(self) -> int:
        """What a CPU's allocator keeps of blocks that were freed."""
        return int(_HEAP * self.alive) if self.on_cpu else 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.alive + self.heap

    def __str__(self) -> str:
        parts = {
            "factors": self.factors,
            "gradients": self.gradients,
            f"a batch of {self.sequences}": self.batch,
            "fitting": self.fitting,
            "a layer's work": self.layer,
            "elsewhere": self.elsewhere,
            "the allocator": self.heap,
        }
        words = ", ".join(f"{name} {size_in_words(size)}" for name, size in parts.items() if size)
        return f"{size_in_words(self.total)} beside the model (of these, not all at once: {words})"


def peak_memory(
    model: nn.Module,
    sequence: Batch | None,
    *,
    domains: int,
    tasks: int,
    micro_batch: int,
    curvature: Curvature | None = None,
    layers: LayerFilter = None,
    loss: Loss = next_token_loss,
    offload: Offload = None,
    layer_groups: int = 1,
    rank: int | None = None,
) -> PeakMemory:
    """Say what `group_influence` will need; runs one sequence through the model, and leaves no trace in it.

    Args:
        model, curvature, layers, loss, offload, layer_groups, rank: as in `group_influence`. Of a curvature that is not
            dynmix's own nothing is known, and nothing counted.
        sequence: a batch of one sequence, as long as the longest. None: nothing is run, so that the model may be on the
            meta device; a micro-batch is not counted, and layers that share their input are as if they did not.
        domains, tasks: how many.
        micro_batch: sequences of the largest batch.
    """
    curvature = EKFAC() if curvature is None else curvature
    parts, idle = [], list[NothingMeasuredError]()
    for part in layer_parts(model, layers, layer_groups):
        capture, alive, sequences = Capture(model, layers=part, loss=loss), _Alive(), micro_batch
        if sequence is not None:
            try:
                with isolated(model), alive:
                    capture.rerun(sequence)
            except NothingMeasuredError as why:
                idle.append(why)
                continue
            sequences //= len(token_mask(sequence))
        parts.append(_of(capture, curvature, alive.peak * sequences, micro_batch, domains, tasks, offload, rank))
    if not parts:
        raise idle[-1]
    return max(parts, key=lambda peak: peak.alive)


def _of(
    capture: Capture,
    curvature: Curvature,
    batch: int,
    sequences: int,
    domains: int,
    tasks: int,
    offload: Offload,
    rank: int | None,
) -> PeakMemory:
    sizes = {name: math.prod(layer.shape) * capture.dtype(name).itemsize for name, layer in capture.layers.items()}
    whole, rows = sum(sizes.values()), max(2 * tasks, domains)
    factors, covariances, largest = _factors(curvature, capture)
    factored = isinstance(curvature, FactoredCurvature | Carried)
    gradients = (2 * tasks + domains) * whole
    if rank is not None:  # one task's whole; only fitting factors sums up domains before the tasks are read
        shapes = [(size, capture.layers[name].shape) for name, size in sizes.items()]
        thin = sum(min(size, size * rank * sum(shape) // math.prod(shape)) for size, shape in shapes)
        gradients = 2 * tasks * thin + (2 + domains if factored else max(2, domains)) * whole
    if isinstance(curvature, DataInf):  # its sums, beside what they are of
        gradients = max(gradients, 2 * rows * whole)
    on_cpu = next(capture.model.parameters()).device.type == "cpu"
    moves = offload == "disk" or (offload == "cpu" and not on_cpu)
    return PeakMemory(
        factors=factors,
        fitting=covariances + max(batch + (0 if moves else domains * whole), 3 * largest) if factored else 0,
        gradients=gradients,
        batch=batch,
        layer=(3 if factored else 1) * rows * max(sizes.values()),
        sequences=sequences,
        elsewhere=gradients + (factors if isinstance(curvature, FactoredCurvature) else 0) if moves else 0,
        on_cpu=on_cpu,
    )


def _factors(curvature: Curvature, capture: Capture) -> tuple[int, int, int]:
    """Bytes of what preconditions, of the covariances that it was made from, and of the largest of these."""
    if isinstance(curvature, AdamDiagonal):
        return sum(4 * p.numel() for p in capture.model.parameters()), 0, 0
    factored = curvature.curvature if isinstance(curvature, Carried) else curvature
    if not isinstance(factored, FactoredCurvature):
        return 0, 0, 0
    bases = covariances = largest = 0
    shared = set[tuple[str, ...]]()
    for name, layer in capture.layers.items():
        size = capture.dtype(name).itemsize
        sides = [
            side_shape(layer, factored.largest_basis, outputs=out, head=name == capture.head) for out in (False, True)
        ]
        if (group := capture.sharing.get(name, (name,))) in shared:
            sides = sides[1:]
        shared.add(group)
        bases += size * (math.prod(layer.shape) + sum(n[0] ** 2 for n in sides if len(n) == 2))
        covariances += size * sum(math.prod(n) for n in sides)
        largest = max(largest, *(size * math.prod(n) for n in sides))
    if isinstance(curvature, Carried):  # both are carried on, and those before while new ones are fitted
        return bases + covariances, bases + covariances, largest
    return bases, covariances, largest


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that are made while it is on, and are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = set(_storages((args, kwargs)))
        found = func(*args, **(kwargs or {}))
        for key, storage in _storages(found).items():
            if key in given or key in self._sizes:
                continue
            self._sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._gone, key)
            self._now += self._sizes[key]
            self.peak = max(self.peak, self._now)
        return found

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    return {id(s): s for x in tree_leaves(values) if isinstance(x, Tensor) for s in [x.untyped_storage()]}


def size_in_words(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
