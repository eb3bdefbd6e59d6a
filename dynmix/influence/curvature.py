"""Products with the inverse curvature of the mean loss per token, layer by layer.

A curvature is a choice with its settings (`EKFAC()`, `Identity()`); its `fit` reads batches through a `Capture` and
returns the fitted operator, so that the factors live exactly as long as somebody holds them. This module knows layers
and gradients; it knows no domains, no tasks and no scores.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from dynmix.influence.capture import (
    Batch,
    Batches,
    Capture,
    next_token_labels,
    next_token_logits,
    next_token_loss,
)
from dynmix.influence.gradients import sequence_gradients

logger = logging.getLogger(__name__)

_WIDE = 4  # times the other side: rotating into the basis of such a side costs as many times the layer's own product


class InverseCurvature(Protocol):
    """A fitted, symmetric approximation of H^-1, block by block, a block a layer."""

    def precondition_all(self, gradients: dict[str, Tensor]) -> None:
        """Put H^-1 of each layer times its gradients [n, out, in] (in includes the bias column) in their place.

        To be called inside `isolated(model)`: some approximations read batches here.
        """
        ...


class LayerByLayer(ABC):
    """An inverse curvature that needs nothing but a layer's matrix."""

    @abstractmethod
    def precondition(self, layer: str, matrix: Tensor) -> Tensor:
        """H^-1 of that layer applied to gradients [..., out, in]; same shape."""

    def precondition_all(self, gradients: dict[str, Tensor]) -> None:
        """In place, a layer at a time, so that both sides of it are never held for the whole model."""
        for layer, stack in gradients.items():
            gradients[layer] = self.precondition(layer, stack)


class Curvature(Protocol):
    """Which curvature to use."""

    @property
    def passes(self) -> int:
        """How often a group influence reads the curvature's batches."""
        ...

    def fit(self, capture: Capture, batches: Batches) -> InverseCurvature:
        """Read the batches as often as it takes, inside `isolated(capture.model)`."""
        ...


@dataclass(frozen=True)
class Identity(LayerByLayer):
    """H = 1: influence is the plain product of gradients."""

    passes: ClassVar[int] = 0

    def fit(self, capture: Capture, batches: Batches) -> Identity:
        """Nothing to read."""
        return self

    def precondition(self, layer: str, matrix: Tensor) -> Tensor:
        """The gradients as they are."""
        return matrix


@dataclass
class Factors:
    """EK-FAC's factors of one layer, in the conventions of Grosse et al. 2023 (arXiv 2308.03296).

    A [in, in] and S [out, out] are means over tokens of a a^T and g g^T; QA and QS their eigenvectors, in columns;
    Lambda [out, in] the mean over sequences of (QS^T G QA)^2, where G is the gradient of a sequence's summed loss.
    A side without A (or S) keeps the identity as its basis.
    """

    A: Tensor | None
    S: Tensor | None
    Lambda: Tensor
    QA: Tensor | None = None
    QS: Tensor | None = None

    def rotated(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [..., in] and output gradients [..., out] in the eigenbases."""
        return (a if self.QA is None else a @ self.QA), (g if self.QS is None else g @ self.QS)


@dataclass(frozen=True)
class FittedEKFAC(LayerByLayer):
    """EK-FAC of a model: factors by layer, and what turns them into the curvature of the mean loss per token.

    H = Q diag(Lambda + damping * mean(Lambda)) Q^T / tokens_per_sequence: Lambda is the second moment of gradients
    of whole sequences, that is the curvature of a loss `tokens_per_sequence` times the mean loss per token.
    """

    factors: dict[str, Factors]
    damping: float
    tokens_per_sequence: float

    def precondition(self, layer: str, matrix: Tensor) -> Tensor:
        """H^-1 applied to gradients [..., out, in]. Directions without curvature or damping give 0 (pseudo-inverse)."""
        if layer not in self.factors:
            raise ValueError(f"layer {layer!r} had no gradient in the curvature batches: leave it out with `layers=`")
        f = self.factors[layer]
        eigenvalues = (f.Lambda + self.damping * f.Lambda.mean()) / self.tokens_per_sequence
        # Below the smallest normal number the reciprocal overflows. NaN compares false and stays NaN.
        inverse = torch.where(eigenvalues < torch.finfo(eigenvalues.dtype).tiny, 0.0, 1 / eigenvalues)
        x = matrix if f.QS is None else f.QS.mT @ matrix
        x = (x if f.QA is None else x @ f.QA) * inverse
        x = x if f.QA is None else x @ f.QA.mT
        return x if f.QS is None else f.QS @ x


@dataclass(frozen=True)
class EKFAC:
    """Eigenvalue-corrected Kronecker-factored curvature (George et al. 2018; Grosse et al. 2023).

    Args:
        damping: added to every eigenvalue of a layer, as a multiple of that layer's mean eigenvalue.
        labels: "empirical" uses the data's labels, "sampled" draws them from the model (the true Fisher; needs one
            forward more a batch, and the next-token loss).
        seed: of the sampled labels.
        largest_basis: a side of a layer with more dimensions than this, and more than four times as many as the other
            side (a head over a vocabulary), keeps the identity as its basis: to find its eigenvectors and to rotate
            into them would cost many times the layer itself. The eigenvalues are the exact second moments in that
            basis, so the trace stays that of the Fisher.

    Factors are float32 at least, float64 for a float64 model. Two passes over the batches. Sequences with a loss or
    gradient that is not finite are left out, with a warning.
    """

    damping: float = 0.1
    labels: Literal["empirical", "sampled"] = "empirical"
    seed: int = 0
    largest_basis: int = 1024
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must be finite and >= 0, got {self.damping}")
        if self.labels not in ("empirical", "sampled"):
            raise ValueError(f'labels must be "empirical" or "sampled", got {self.labels!r}')

    def fit(self, capture: Capture, batches: Batches) -> FittedEKFAC:
        """Covariances and their eigenbases in a first pass over the batches, eigenvalues in a second."""
        if self.labels == "sampled" and capture.loss is not next_token_loss:
            raise ValueError('labels="sampled" draws next tokens: it needs the default loss')
        factors: dict[str, Factors] = {}
        tokens: dict[str, Tensor] = {}
        sequences: dict[str, Tensor] = {}

        def covariances(layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
            a, g, finite = _finite(a, g)
            real = mask & finite[:, None]
            if layer not in factors:
                factors[layer] = Factors(
                    A=_square(a, max(self.largest_basis, _WIDE * g.shape[-1])),
                    S=_square(g, max(self.largest_basis, _WIDE * a.shape[-1])),
                    Lambda=a.new_zeros(g.shape[-1], a.shape[-1]),
                )
                tokens[layer], sequences[layer] = a.new_zeros(()), a.new_zeros(())
            f = factors[layer]
            if f.A is not None:
                inputs = a.masked_fill(~real[..., None], 0).flatten(0, 1)
                f.A += inputs.mT @ inputs
            if f.S is not None:
                f.S += g.flatten(0, 1).mT @ g.flatten(0, 1)
            tokens[layer] += real.sum()
            sequences[layer] += finite.sum()

        def eigenvalues(layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
            a, g, _ = _finite(a, g)
            for _, gradients in sequence_gradients(*factors[layer].rotated(a, g)):
                factors[layer].Lambda += gradients.square_().sum(0)

        scored, read = 0.0, 0
        for batch in self._labelled(capture, batches):
            losses, counts = capture.run(batch, covariances)
            scored, read = scored + counts[losses.isfinite()].sum().item(), read + int(losses.isfinite().sum())
        for layer, f in factors.items():
            if f.A is not None:
                f.A /= tokens[layer]
                f.QA = _eigenbasis(layer, f.A)
            if f.S is not None:
                f.S /= tokens[layer]
                f.QS = _eigenbasis(layer, f.S)
        total = 0
        for batch in self._labelled(capture, batches):
            total += len(capture.run(batch, eigenvalues)[0])
        for layer, f in factors.items():
            f.Lambda /= sequences[layer]
        self._report(factors, int(min((n.item() for n in sequences.values()), default=total)), total)
        return FittedEKFAC(factors, self.damping, scored / read if read else math.nan)

    def _labelled(self, capture: Capture, batches: Batches) -> Batches:
        if self.labels == "empirical":
            return batches
        generator = torch.Generator(next(capture.model.parameters()).device).manual_seed(self.seed)
        return (sampled_labels(capture, batch, generator) for batch in batches)

    def _report(self, factors: dict[str, Factors], used: int, total: int) -> None:
        if used < total:
            logger.warning("curvature: %d of %d sequences are not finite and were left out", total - used, total)
        wide = [layer for layer, f in factors.items() if f.A is None or f.S is None]
        if wide:
            logger.info("curvature: identity basis on the wide side of %s", ", ".join(wide))


@torch.no_grad()
def sampled_labels(capture: Capture, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with every scored label replaced by a draw from the model's own prediction."""
    batch = {key: v.to(generator.device) if isinstance(v, Tensor) else v for key, v in batch.items()}
    logits, labels = next_token_logits(capture.model, batch)[:, :-1], next_token_labels(batch)
    draws = torch.multinomial(logits.flatten(0, 1).softmax(-1).nan_to_num(1.0), 1, generator=generator)
    drawn = torch.where(labels == -100, labels, draws.view(labels.shape))
    first = torch.full_like(drawn[:, :1], -100)  # nothing predicts the first token
    return {**batch, "labels": torch.cat([first, drawn], dim=1)}


def _finite(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero out sequences with an entry that is not finite; also which ones are left, bool [B]."""
    finite = (a.sum((1, 2)) + g.sum((1, 2))).isfinite()
    broken = ~finite[:, None, None]
    return a.masked_fill(broken, 0), g.masked_fill(broken, 0), finite


def _square(x: Tensor, largest: int) -> Tensor | None:
    n = x.shape[-1]
    return x.new_zeros(n, n) if n <= largest else None


def _eigenbasis(layer: str, matrix: Tensor) -> Tensor:
    """Eigenvectors in columns; NaN throughout if the matrix is not finite or no solver succeeds."""
    nothing = torch.full_like(matrix, math.nan)
    if not matrix.isfinite().all():
        return nothing  # no sequence was finite: said once, for all layers
    for candidate in (matrix, matrix.cpu().double()):
        try:
            Q: Tensor = torch.linalg.eigh(candidate).eigenvectors
        except RuntimeError:  # no convergence, or the device has no solver
            continue
        if Q.isfinite().all():
            return Q.to(matrix)
    logger.warning("curvature: no eigenbasis for layer %r, every score will be NaN", layer)
    return nothing
