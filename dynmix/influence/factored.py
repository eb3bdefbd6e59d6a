"""What EK-FAC and K-FAC have in common: their settings, and how they are fitted, carried on and averaged.

Knows factors and batches; the eigenvalues are the subclasses' own.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from dynmix.influence.batch import Batch, Batches, next_token_labels, next_token_logits, next_token_loss, on_device
from dynmix.influence.capture import Capture
from dynmix.influence.dealing import Turns
from dynmix.influence.factors import Factors, FittedFactors, Moments, eigenbases
from dynmix.influence.gradients import SequenceGradients
from dynmix.influence.probes import spread_rows
from dynmix.influence.sums import Sums

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FactoredCurvature(ABC):
    """A Kronecker-factored curvature and its settings.

    Args:
        damping: added to every eigenvalue of a layer, as a multiple of that layer's mean eigenvalue.
        labels: "empirical" uses the data's labels, "sampled" draws them from the model (the true Fisher; needs one more
            forward pass per batch, and the next-token loss).
        seed: of the sampled labels.
        largest_basis: a side of a layer that has more dimensions than this, and that is a head's vocabulary or more
            than four times the other side, keeps the identity as its basis: finding its eigenvectors and rotating into
            them would cost many times the layer itself. The eigenvalues are exact second moments in that basis, so the
            trace stays that of the Fisher. The tokens of an embedding, and norms, always keep the identity.
        factor_tokens: the factors' own budget: use at most so many tokens of the given batches, evenly spread over
            them; None: all.
        ema: weight of the earlier factors, if there are any (from stage to stage of a run): 0 forgets them. The bases
            are those of the averaged covariances, and the earlier eigenvalues are expressed in them.
        refresh_every: a run fits anew at every so many boundaries, and keeps the factors in between.
        eigh_dtype: precision of the eigen-decomposition; "float64" is also tried if "float32" fails. In float32 the
            eigenvectors of nearly equal eigenvalues are arbitrary, and scores differ by 1e-3 between solvers; in
            float64 by 1e-5.

    Factors are at least float32, and float64 for a float64 model. Sequences with a loss or gradient that is not finite
    are left out, with a warning.

    Raises:
        ValueError: a setting out of range; from `fit`, sampled labels with another loss than the next token's.
    """

    passes: ClassVar[int]
    damping: float = 0.1
    labels: Literal["empirical", "sampled"] = "empirical"
    seed: int = 0
    largest_basis: int = 1024
    factor_tokens: int | None = None
    ema: float = 0.0
    refresh_every: int = 1
    eigh_dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must be finite and >= 0, got {self.damping}")
        if self.labels not in ("empirical", "sampled"):
            raise ValueError(f'labels must be "empirical" or "sampled", got {self.labels!r}')
        if not (isinstance(self.largest_basis, SupportsFloat) and self.largest_basis >= 0):
            raise ValueError(f"largest_basis must be a number of at least 0, got {self.largest_basis!r}")
        if self.factor_tokens is not None and self.factor_tokens < 1:
            raise ValueError(f"factor_tokens must be at least 1, or None for all, got {self.factor_tokens}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {self.ema}")
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, got {self.refresh_every}")
        if self.eigh_dtype not in ("float32", "float64"):
            raise ValueError(f'eigh_dtype must be "float32" or "float64", got {self.eigh_dtype!r}')

    @torch.no_grad()
    def fit(
        self, capture: Capture, batches: Batches, sums: Sums | None = None, previous: FittedFactors | None = None
    ) -> FittedFactors:
        """Factors of these batches, averaged with earlier ones; `sums` gets those gradients of theirs that it wants."""
        if self.labels == "sampled" and capture.loss is not next_token_loss:
            raise ValueError('labels="sampled" draws next tokens: it needs the default loss')
        if sums is None or self.labels == "sampled":  # whose gradients are not the data's
            sums = Sums([], capture.stored)
        fitted = self._fit(capture, within_budget(batches, self.factor_tokens), sums, previous)
        _add_idle_experts(capture, fitted.factors)
        if previous is None or not self.ema:
            return fitted
        factors = dict(fitted.factors)
        for layer, f in factors.items():
            if layer in previous.factors:
                before = previous.factors[layer].seen_from(f)
                factors[layer] = replace(f, Lambda=before.lerp(f.Lambda, 1 - self.ema))
        length = self.ema * previous.tokens_per_sequence + (1 - self.ema) * fitted.tokens_per_sequence
        return FittedFactors(factors, self.damping, length)

    @abstractmethod
    def _fit(self, capture: Capture, batches: Batches, sums: Sums, previous: FittedFactors | None) -> FittedFactors:
        """Factors with averaged covariances and bases, and the batches' own eigenvalues in them."""

    def _read(
        self,
        capture: Capture,
        batches: Batches,
        consume: Callable[[Batch, str, Tensor, Tensor, Tensor], None],
        sums: Sums | None = None,
    ) -> tuple[int, float]:
        """One pass, with the batch in front of what `Consume` is given.

        Returns the number of sequences, and the scored tokens of a finite one.
        """

        def labelled(batch: Batch, number: int) -> Batch:
            return batch if self.labels == "empirical" else sampled_labels(capture, batch, self.seed, number)

        turns = Turns(capture.ranks, lambda batch: capture.rerun(labelled(batch, 0)))
        own: dict[int, tuple[Tensor, Tensor]] = {}
        for turn in turns(batches):
            if turn.mine:
                batch = labelled(turn.batch, turn.number)
                own[turn.number] = capture.run(batch, partial(consume, batch))
            if sums is not None:
                sums.added(turn.batch, turn.number)
        [found] = turns.gathered("the curvature's pass", [own])
        if sums is not None:
            sums.ended(found)
        total, scored, finite = 0, 0.0, 0
        for losses, counts in found.values():
            total, finite = total + len(losses), finite + int(losses.isfinite().sum())
            scored += counts[losses.isfinite()].sum().item()
        return total, scored / finite if finite else math.nan

    def _bases(self, capture: Capture, moments: Moments, previous: FittedFactors | None) -> dict[str, Factors]:
        """Averaged covariances, and their eigenvectors; eigenvalues of the curvature are yet to come."""
        before = {} if previous is None or not self.ema else previous.factors
        averaged: dict[tuple[int, int], tuple[str, Tensor]] = {}  # each once, with the first of its layers and the side

        def side(name: str, new: Tensor, old: Tensor | None) -> tuple[str, Tensor]:
            key = id(new), id(old)
            if key not in averaged:
                averaged[key] = name, new if old is None or old.shape != new.shape else old.lerp(new, 1 - self.ema)
            return averaged[key]

        sides = {}
        for layer, (A, S) in moments.sides().items():
            old = before.get(layer)
            sides[layer] = (
                side(f"inputs of {layer!r}", A, None if old is None else old.A),
                side(f"outputs of {layer!r}", S, None if old is None else old.S),
            )
        matrices = {name: matrix for name, matrix in averaged.values() if matrix.ndim == 2}
        bases = eigenbases(capture.ranks, matrices, getattr(torch, self.eigh_dtype))
        return {
            layer: Factors(A, S, A.new_zeros(S.shape[0], A.shape[0]), bases.get(inputs), bases.get(outputs))
            for layer, ((inputs, A), (outputs, S)) in sides.items()
        }

    def _report(self, factors: dict[str, Factors], moments: Moments, total: int) -> None:
        if broken := max((moments.broken(layer) for layer in factors), default=0):
            logger.warning("curvature: %d of %d sequences are not finite and were left out", broken, total)
        wide = [layer for layer, f in factors.items() if f.QA is None or f.QS is None]
        if wide:
            logger.info("curvature: identity basis on the wide side of %s", ", ".join(wide))


@torch.no_grad()
def sampled_labels(capture: Capture, batch: Batch, seed: int, number: int) -> Batch:
    """The batch with every scored label replaced by a draw from the model's own prediction.

    Those of batch `number` are the same in every pass, whoever reads the batches before it.
    """
    device = next(capture.model.parameters()).device
    own = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
    batch = on_device(batch, device)
    logits, labels = next_token_logits(capture.model, batch)[:, :-1], next_token_labels(batch)
    predicted = logits.flatten(0, 1).softmax(-1).nan_to_num(1.0)
    draws = torch.multinomial(predicted, 1, generator=torch.Generator(device).manual_seed(own))
    drawn = torch.where(labels == -100, labels, draws.view(labels.shape))
    first = torch.full_like(drawn[:, :1], -100)  # nothing predicts the first token
    return {**batch, "labels": torch.cat([first, drawn], dim=1)}


def add_squares(gradients: SequenceGradients, to: Tensor, finite: Tensor, sums: Sums, layer: str, batch: Batch) -> None:
    """Add the squares of the gradients of a batch's sequences; and their sum to `sums`, if it waits for the batch."""
    if not sums.waits_for(batch):
        gradients.add_squares(to)
        return
    total = torch.zeros_like(to)
    gradients.add_squares(to, total)
    sums.add(layer, batch, total if bool(finite.all()) else total.fill_(torch.nan))


def _add_idle_experts(capture: Capture, factors: dict[str, Factors]) -> None:
    """Experts that saw no token have no curvature, and gradients of theirs elsewhere count as nothing."""
    idle = [name for name, layer in capture.layers.items() if layer.kind == "expert" and name not in factors]
    for name in idle:
        zeros = capture.zeros(name, 1)[0]
        factors[name] = Factors(A=zeros.new_zeros(zeros.shape[1]), S=zeros.new_zeros(zeros.shape[0]), Lambda=zeros)
    if idle:
        logger.warning("curvature: %d experts saw no token of its batches and are left out", len(idle))


def within_budget(batches: Batches, tokens: int | None) -> Batches:
    """Some of the batches, with so many tokens at most (or one batch): of a list evenly spread, else the first."""
    if tokens is None:
        return batches
    if isinstance(batches, list | tuple):
        sizes = [_tokens(batch) for batch in batches]
        if sum(sizes) <= tokens:
            return batches
        for count in range(max(1, len(batches) * tokens // sum(sizes)), 0, -1):  # fewer, where large ones are met
            chosen = spread_rows(len(batches), count)
            if sum(sizes[i] for i in chosen) <= tokens:
                break
        return [batches[i] for i in chosen]
    taken: list[Batch] = []
    for batch in batches:
        tokens -= _tokens(batch)
        if taken and tokens < 0:
            break
        taken.append(batch)
    return taken


def _tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(torch.count_nonzero(mask))
    found = batch.get("input_ids")
    if found is None:
        found = next(value for value in batch.values() if isinstance(value, Tensor))[:, :1]
    return found.numel()
