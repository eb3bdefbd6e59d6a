"""Stacks of matrices held as products of thin ones, and what that leaves out.

Knows matrices alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynmix.influence.isolation import random_state_kept
from dynmix.influence.storage import Offload, let_go, moved
from dynmix.observation import Array

_OVERSAMPLING = 8
_ITERATIONS = 4  # of the subspace, Halko et al. 2011 (arXiv 0909.4061), Algorithm 5.1


@dataclass(frozen=True)
class LowRank:
    """Matrices U V^T [n, out, in], for U [n, out, rank] and V [n, in, rank]."""

    U: Tensor
    V: Tensor

    def __len__(self) -> int:
        return len(self.U)

    def to(self, device: torch.device) -> Tensor:
        """Multiplied out, on that device."""
        return self.U.to(device) @ self.V.to(device).mT


Held = Tensor | LowRank
"""A stack of matrices [n, out, in]; `to(device)` gives it whole, and len() says how many."""


def truncated(matrices: Tensor, rank: int, offload: Offload) -> tuple[Held, Tensor]:
    """Each matrix [n, out, in] by its largest singular values, and the squared norms [n] of what is left out.

    Matrices that would not get smaller are held as they are. Found by torch's randomised SVD from a fixed seed; what is
    not finite stays so.
    """
    n, rows, columns = matrices.shape
    exact = matrices.new_zeros(n)
    if rank * (rows + columns) >= rows * columns:
        return moved(offload, matrices), exact
    if not matrices.isfinite().all():
        U, V = matrices.new_full((n, rows, rank), torch.nan), matrices.new_zeros(n, columns, rank)
        return LowRank(moved(offload, U), moved(offload, V)), exact
    with random_state_kept():
        torch.manual_seed(0)
        size = min(rank + _OVERSAMPLING, rows, columns)
        U, S, V = torch.svd_lowrank(matrices, q=size, niter=_ITERATIONS)
    U, V = (U[..., :rank] * S[..., None, :rank]).contiguous(), V[..., :rank].contiguous()
    left_out = torch.linalg.vector_norm(matrices - U @ V.mT, dim=(1, 2)).square()
    return LowRank(moved(offload, U), moved(offload, V)), left_out


def joined(found: Sequence[Mapping[str, Held]], offload: Offload) -> dict[str, Held]:
    """Stacks of the same layers one behind the other; where one is missing, zeros."""
    layers = {layer: None for some in found for layer in some}
    return {layer: _joined([some.get(layer) for some in found], offload) for layer in layers}


def _joined(parts: Sequence[Held | None], offload: Offload) -> Held:
    one = next(part for part in parts if part is not None)
    if isinstance(one, Tensor):
        dense = [part if isinstance(part, Tensor) else torch.zeros_like(one) for part in parts]
        return moved(offload, torch.cat(dense))
    nothing = LowRank(torch.zeros_like(one.U), torch.zeros_like(one.V))
    thin = [part if isinstance(part, LowRank) else nothing for part in parts]
    return LowRank(
        moved(offload, torch.cat([part.U for part in thin])), moved(offload, torch.cat([part.V for part in thin]))
    )


class LeftOut:
    """What is missing of each task's gradient R, and by how much a score can be wrong for it.

    Attributes:
        bound: float64[n_tasks, n_domains], the sum over the layers of |R - R'| |G| (Cauchy-Schwarz).
    """

    def __init__(self, tasks: int, domains: int) -> None:
        self.bound: Array = np.zeros((tasks, domains))
        self._missing, self._whole = np.zeros(tasks), np.zeros(tasks)
        self._norms: dict[str, Array] = {}

    @property
    def relative(self) -> Array:
        """|R - R'| / |R| over all layers, float64[n_tasks]; 0 of nothing."""
        return np.sqrt(self._missing / np.where(self._whole == 0, 1.0, self._whole))

    def note(self, task: int, layer: str, whole: Tensor, missing: Tensor) -> None:
        """Of a task's matrix in a layer, and the squared norm of what is missing of it."""
        self._whole[task] += torch.linalg.vector_norm(whole).item() ** 2
        self._missing[task] += missing.item()
        self._norms.setdefault(layer, np.zeros(len(self._missing)))[task] = missing.sqrt().item()

    def meet(self, gradients: Mapping[str, Tensor]) -> None:
        """The domains' gradients G, [n_domains, out, in] by layer."""
        for layer, stack in gradients.items():
            if layer in self._norms:
                norms = torch.linalg.vector_norm(stack, dim=(1, 2)).cpu().double().numpy()
                self.bound += np.outer(self._norms[layer], norms)
                let_go(stack)

    def add(self, other: LeftOut) -> None:
        """Take in other layers."""
        self.bound += other.bound
        self._missing += other._missing
        self._whole += other._whole
