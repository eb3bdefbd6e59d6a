"""K-FAC: Kronecker-factored curvature, its scale repaired layer by layer.

Knows layers and gradients; it knows no domains, no tasks and no scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dynmix.influence.batch import Batch, Batches
from dynmix.influence.capture import Capture
from dynmix.influence.factored import FactoredCurvature, add_squares
from dynmix.influence.factors import FittedFactors, Moments, finite_sequences
from dynmix.influence.gradients import gradients_of
from dynmix.influence.sums import Sums


@dataclass(frozen=True)
class KFAC(FactoredCurvature):
    """Kronecker-factored curvature (Martens & Grosse 2015, arXiv 1503.05671) with the Fisher's own trace in each layer.

    Lambda = r s a^T, where s and a are the eigenvalues of S and A and r = E|G|^2 / (tr S tr A): as S and A are means
    over tokens, s a^T alone is the curvature of a token, too small for the gradient G of a whole sequence. One pass
    over the batches.

    Args: as in `FactoredCurvature`.
    """

    passes: ClassVar[int] = 1

    def _fit(self, capture: Capture, batches: Batches, sums: Sums, previous: FittedFactors | None) -> FittedFactors:
        moments = Moments(capture, self.largest_basis)
        second: dict[str, Tensor] = {}  # moments of the sequences' gradients, summed, [out, in]

        def covariances(batch: Batch, layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
            moments.add(layer, a, g, mask)
            a, g, finite = finite_sequences(a, g)
            to = second.setdefault(layer, capture.zeros(layer, 1)[0])
            add_squares(gradients_of(a, g), to, finite, sums, layer, batch)

        total, length = self._read(capture, batches, covariances, sums)
        factors = self._bases(capture, moments, previous)
        second = capture.ranks.sum("second moments", second, capture.device)
        for layer, f in factors.items():
            own = second.pop(layer) / (total - moments.broken(layer))
            if capture.layers[layer].kind == "norm":  # its gradient is no product of two sides, and this is all of it
                f.Lambda.copy_(own)
                continue
            s, a = (_eigenvalues(x, Q) for x, Q in ((f.S, f.QS), (f.A, f.QA)))
            product = torch.outer(s, a)
            trace = product.sum()
            # Without any gradient there is nothing to scale: no curvature.
            f.Lambda.copy_(torch.where(trace == 0, 0.0, product * (own.sum() / trace)))
        self._report(factors, moments, total)
        return FittedFactors(factors, self.damping, length)


def _eigenvalues(matrix: Tensor, Q: Tensor | None) -> Tensor:
    return matrix if Q is None else torch.einsum("ij,ik,kj->j", Q, matrix, Q).clamp_min(0)
