"""DataInf (Kwon et al. 2024, arXiv 2310.00902): inverse-curvature products in closed form, from gradients alone.

The mean of the inverses stands for the inverse of the mean, Eq. 5: with G_1 ... G_n the gradients of n sequences,
(1/n sum_i G_i G_i^T + lambda)^-1 is taken as 1/n sum_i (G_i G_i^T + lambda)^-1, and each of these is a rank-one update
of 1/lambda. Knows layers and gradients; no domains, no tasks and no scores.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from dynmix.influence.batch import Batch, Batches
from dynmix.influence.capture import Capture
from dynmix.influence.dealing import Turns
from dynmix.influence.gradients import gradients_of
from dynmix.influence.storage import let_go, on

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataInf:
    """The curvature of DataInf (Kwon et al. 2024, arXiv 2310.00902, Eq. 5), a block a layer.

    Args:
        damping: lambda, as a multiple of the layer's mean eigenvalue, mean(G^2): 0.1 as in the authors' code.

    Cheap to set up, and made for few layers: every product reads the batches twice and keeps nothing of them. Sequences
    with a gradient that is not finite are left out, with a warning.

    Raises:
        ValueError: a damping that is not above 0 and finite.
    """

    damping: float = 0.1
    passes: ClassVar[int] = 4  # two for the tasks' product and two for the domains'

    def __post_init__(self) -> None:
        if not (self.damping > 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must be finite and > 0, got {self.damping}")

    def fit(self, capture: Capture, batches: Batches) -> FittedDataInf:
        """Nothing is read before the first product."""
        return FittedDataInf(capture, batches, self.damping)


@dataclass(frozen=True)
class FittedDataInf:
    """DataInf's operator over the sequences of `batches`, for the curvature of the mean loss per token.

    G are gradients of sequences' summed losses, whose second moment is the curvature of a loss that is as many times
    the mean loss per token as a sequence has tokens.
    """

    capture: Capture
    batches: Batches
    damping: float

    @torch.no_grad()
    def precondition_all(self, gradients: dict[str, Tensor]) -> None:
        """In place, V [m, out, in] of each layer becomes tokens/lambda (V - 1/n sum_i <G_i, V>/(lambda + |G_i|^2) G_i).

        A layer without any gradient in the batches gives 0. Raises ValueError if no sequence has a finite gradient.
        """
        norms, dots, counts = self._met(gradients)
        finite = torch.stack([norm.isfinite() for norm in norms.values()]).all(0)
        used = int(finite.sum())
        if not used:
            raise ValueError("curvature: no sequence has a finite gradient")
        if used < len(finite):
            logger.warning(
                "curvature: %d of %d sequences are not finite and were left out", len(finite) - used, len(finite)
            )
        tokens = counts[finite].mean().item()
        shares: dict[str, Tensor] = {}  # of each sequence's gradient in the sum, [m, n]
        scales: dict[str, float] = {}
        for layer, V in gradients.items():
            norm, dot = norms[layer].where(finite, 0).to(V), dots[layer].where(finite[:, None], 0).to(V)
            damping = self.damping * norm.sum().item() / used / V[0].numel()
            shares[layer] = -(dot / (damping + norm)[:, None]).mT / used if damping else torch.zeros_like(dot.mT)
            scales[layer] = tokens / damping if damping else 0.0

        def add(first: int, layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
            if layer in gradients:
                part = slice(first, first + len(g))
                broken = ~finite[part].to(g.device)[:, None, None]
                a = a.masked_fill(broken, 0) if a.is_floating_point() else a
                with on(sums[layer], g.device) as to:
                    gradients_of(a, g.masked_fill(broken, 0)).add_weighted(shares[layer][:, part], to)

        ranks = self.capture.ranks
        sums = {layer: self.capture.stored(layer, len(V)) for layer, V in gradients.items()}
        if ranks.rank == 0:
            for layer, V in gradients.items():
                sums[layer].copy_(V)
        turns = Turns(ranks, self.capture.rerun)
        for turn in turns(self.batches):
            if turn.mine:
                self.capture.run(turn.batch, partial(add, turn.first))
        turns.gathered("DataInf's second pass", [])
        for layer, total in ranks.sum("DataInf's sums", sums, self.capture.device).items():
            gradients[layer] = total.mul_(scales[layer])

    def _met(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Of all sequences, on the CPU: |G_i|^2 [n] and <G_i, V> [n, m] by layer, and the scored tokens [n]."""

        def run(batch: Batch) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
            seen = {}

            def meet(layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
                if layer in gradients:
                    G = gradients_of(a, g)
                    seen[layer] = G.squared_norms(), G.products(gradients[layer].to(g.device))
                    let_go(gradients[layer])

            _, counts = self.capture.run(batch, meet)
            return {layer: (norm.cpu(), dot.cpu()) for layer, (norm, dot) in seen.items()}, counts

        turns = Turns(self.capture.ranks, self.capture.rerun)
        own = {turn.number: run(turn.batch) for turn in turns(self.batches) if turn.mine}
        [found] = turns.gathered("DataInf's first pass", [own])
        norms, dots = {}, {}
        for layer, V in gradients.items():
            parts = [
                seen.get(layer) or (torch.zeros(len(c), dtype=V.dtype), torch.zeros(len(c), len(V), dtype=V.dtype))
                for seen, c in found.values()
            ]
            norms[layer], dots[layer] = (torch.cat(some) for some in zip(*parts, strict=True))
        return norms, dots, torch.cat([counts for _, counts in found.values()])
