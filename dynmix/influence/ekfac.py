"""EK-FAC: Kronecker-factored eigenbases, with the exact second moments in them as eigenvalues.

Knows layers and gradients; it knows no domains, no tasks and no scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dynmix.influence.batch import Batch, Batches
from dynmix.influence.capture import Capture
from dynmix.influence.factored import FactoredCurvature, add_squares
from dynmix.influence.factors import FittedFactors, Moments, Rotation, finite_sequences
from dynmix.influence.storage import on
from dynmix.influence.sums import Sums


@dataclass(frozen=True)
class EKFAC(FactoredCurvature):
    """Eigenvalue-corrected Kronecker-factored curvature (George et al. 2018; Grosse et al. 2023, arXiv 2308.03296).

    Lambda is the mean over sequences of (QS^T G QA)^2, where G is the gradient of a sequence's summed loss. Two passes
    over the batches: covariances, whose eigenvectors are the bases, then eigenvalues.

    Args: as in `FactoredCurvature`.
    """

    passes: ClassVar[int] = 2

    def _fit(self, capture: Capture, batches: Batches, sums: Sums, previous: FittedFactors | None) -> FittedFactors:
        moments = Moments(capture, self.largest_basis)
        total, length = self._read(capture, batches, lambda batch, *caught: moments.add(*caught))
        factors = self._bases(capture, moments, previous)
        rotation = Rotation(capture)

        def eigenvalues(batch: Batch, layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
            a, g, finite = finite_sequences(a, g)
            f = factors[layer]
            add_squares(rotation(layer, a, g, f), f.Lambda, finite, sums, layer, batch)

        self._read(capture, batches, eigenvalues, sums)
        for layer, stack in sums.gradients.items():
            with on(stack, capture.device(layer)) as there:
                there.copy_(factors[layer].restored(there))
        capture.ranks.sum("eigenvalues", {layer: f.Lambda for layer, f in factors.items()}, capture.device)
        for layer, f in factors.items():
            f.Lambda /= total - moments.broken(layer)
        self._report(factors, moments, total)
        return FittedFactors(factors, self.damping, length)
