"""One domain or task in a measurement: what is read of its sequences, and what that says about their spread.

A mean over a few sequences has noise in it. How far a product with it varies for that is seen from a *draw of the
noise*: the sequences' deviations from the mean sum to zero, but with alternating signs to something that is as large as
the noise and independent of it. Where draws are asked for, each stands behind its mean, in a stack of gradients as in
the products with it: these are its `MEANS` and `DRAWS`.

Knows batches and arrays; nothing of what the other side is, nor of the curvature.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynmix.influence.batch import Batch, Batches, token_mask
from dynmix.influence.capture import Capture
from dynmix.influence.dealing import Turn, Turns
from dynmix.influence.gradients import gradients_of
from dynmix.influence.low_rank import Held
from dynmix.influence.probes import picked, spread_rows
from dynmix.influence.storage import let_go, on
from dynmix.influence.sums import Sums
from dynmix.observation import Array

logger = logging.getLogger(__name__)

MEANS, DRAWS = slice(0, None, 2), slice(1, None, 2)  # rows of a stack that has both, or columns of products with it


class Found(NamedTuple):
    """Of one batch's sequences: losses and scored tokens, float64[B], and products, float64[B, n_towards]."""

    losses: Array
    tokens: Array
    products: Array | None = None


class ProbeSet:
    """The sequences of one domain or task, and what is known of them.

    Attributes:
        losses, tokens: float64[n_sequences], nats and scored tokens.
        products: float64[n, n_towards] of some of the sequences, with `product_tokens` float64[n].
    """

    def __init__(self, kind: str, name: str, batches: Batches, stratum: int | None = None) -> None:
        self.kind, self.name, self.batches, self.stratum = kind, name, batches, stratum
        self.losses = self.tokens = self.product_tokens = np.zeros(0)
        self.products = np.zeros((0, 0))
        self.sizes: list[int] = []

    def take(self, found: Mapping[int, Found]) -> None:
        """End a pass: what was found in it, by the number of the batch, in order."""
        if not found:
            raise ValueError(
                f"{self.kind} {self.name!r} has no batches in this pass: give some, the same ones every time"
            )
        products = [(own.products, own.tokens) for own in found.values() if own.products is not None]
        if products:
            self.products, self.product_tokens = (np.concatenate(part) for part in zip(*products, strict=True))
        if not self.sizes:  # the first pass is over all of them
            self.sizes = [len(own.losses) for own in found.values()]
            self.losses = np.concatenate([own.losses for own in found.values()])
            self.tokens = np.concatenate([own.tokens for own in found.values()])

    def normalise(self, stacks: Sequence[Tensor]) -> None:
        """Make each sum a mean over the tokens, and of the one with alternating signs a draw of the noise in it."""
        scored = self.tokens.sum()
        if scored == 0:
            raise ValueError(f"{self.kind} {self.name!r} has no scored token: every label is -100 or masked")
        signed = float(_signs(0, len(self.tokens)) @ self.tokens)
        finite = bool(np.isfinite(self.losses).all())
        for stack in stacks:
            stack[0] /= scored
            if len(stack) > 1:
                stack[1].sub_(stack[0] * signed).div_(scored)
            finite = finite and bool(stack[0].isfinite().all())
            let_go(stack)
        if not finite:
            logger.warning("%s %r: a loss or gradient is not finite, its influence is NaN", self.kind, self.name)

    def variance(self) -> Array:
        """Of the products' sum a token, over all sequences of the set, as those with products say; [n_towards]."""
        stratum = self.stratum
        if stratum is not None:
            stratum = stratum * len(self.products) // len(self.tokens)
        _, variance = ratio_of_sums(self.products, self.product_tokens, stratum)
        share = self.product_tokens.sum() / self.tokens.sum()
        number = np.count_nonzero(self.tokens) / max(1, int(np.count_nonzero(self.product_tokens)))
        scaled: Array = variance * share**2 * number
        return scaled


def mean_gradients(
    sets: Sequence[ProbeSet],
    capture: Capture,
    *,
    draws: bool = False,
    sums: Sums | None = None,
    towards: Mapping[str, Held] | None = None,
    varied: int | None = None,
) -> dict[str, Tensor]:
    """Read all sets, or what `sums` has not met of them: each one's gradient of its mean loss, layer -> [n, out, in].

    With `draws` these are `MEANS` of what is returned, and draws of the noise in them its `DRAWS`. Sequences' gradients
    meet `towards` [n, out, in] in passing, those of batches enough for `varied` sequences of each set, None: all.
    """
    turns, each = Turns(capture.ranks, capture.rerun), 2 if draws else 1
    sums = Sums([()] * len(sets), capture.stored) if sums is None else sums
    rows = [slice(each * index, each * (index + 1)) for index in range(len(sets))]
    found: list[dict[int, Found]] = []
    for own, at, met in zip(sets, rows, sums.met, strict=True):
        seen = {number: Found(loss.numpy(), count.numpy()) for number, (loss, count) in met.items()}
        found.append(seen)
        chosen = None if varied is None else _spread_batches(own.batches, met, varied)
        for turn in turns(own.batches, but=met):
            if turn.mine:
                meeting = towards if chosen is None or turn.number in chosen else None
                seen[turn.number] = _added(sums.gradients, each * len(sets), at, capture, turn, meeting)
    _end(sets, turns, found)
    gradients = capture.ranks.sum("gradients", sums.gradients, capture.device)
    for own, at in zip(sets, rows, strict=True):
        own.normalise([stack[at] for stack in gradients.values()])
    return gradients


def _added(
    gradients: dict[str, Tensor],
    n_rows: int,
    rows: slice,
    capture: Capture,
    turn: Turn,
    towards: Mapping[str, Held] | None,
) -> Found:
    """Run a batch, and add its gradient to `gradients`, layer -> [n_rows, out, in], at `rows`.

    The second of these, if there is one, gets the same with alternating signs.
    """
    product = Products(towards)

    def consume(layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
        if layer not in gradients:
            gradients[layer] = capture.stored(layer, n_rows)
        own, held = gradients_of(a, g), None if towards is None else towards.get(layer)
        other = None if held is None else held.to(g.device)
        with on(gradients[layer][rows], g.device) as to:
            if len(to) == 1 and other is None:
                own.add_sum(to[0])
            else:
                weights = np.stack([np.ones(len(g)), _signs(turn.first, len(g))][: len(to)])
                product.add(own.add_weighted(torch.as_tensor(weights).to(g), to, other))
        let_go(held)

    loss, count = capture.run(turn.batch, consume)
    return Found(loss.numpy(), count.numpy(), None if towards is None else product.total(len(loss)))


def products_of(sets: Sequence[tuple[ProbeSet, list[int]]], capture: Capture, towards: Mapping[str, Held]) -> None:
    """Read these of each set's sequences again, for their products with `towards` alone."""
    turns = Turns(capture.ranks, capture.rerun)

    def run(batch: Batch) -> Found:
        product = Products(towards)
        loss, count = capture.run(batch, product.meet)
        return Found(loss.numpy(), count.numpy(), product.total(len(loss)))

    chosen = [picked(own.batches, own.sizes, rows) for own, rows in sets]
    found = [{turn.number: run(turn.batch) for turn in turns(batches) if turn.mine} for batches in chosen]
    _end([own for own, _ in sets], turns, found)


def _end(sets: Sequence[ProbeSet], turns: Turns, found: Sequence[dict[int, Found]]) -> None:
    """End a pass over the sets: each takes what all ranks found in it."""
    what = f"the pass over {', '.join(f'{own.kind} {own.name!r}' for own in sets)}"
    for own, whole in zip(sets, turns.gathered(what, found), strict=True):
        own.take(whole)


def _spread_batches(batches: Batches, but: Mapping[int, object], sequences: int) -> set[int] | None:
    """Numbers of batches, evenly spread over a list without some of them, that hold so many sequences; None: any."""
    if not isinstance(batches, list | tuple):
        return None
    left = [number for number in range(len(batches)) if number not in but]
    for count in range(1, len(left) + 1):
        chosen = {left[i] for i in spread_rows(len(left), count)}
        if sum(len(token_mask(batches[number])) for number in chosen) >= sequences:
            return chosen
    return set(left)


class Products:
    """The products of one batch's sequences with `towards`, added up over the layers in float64 on the CPU."""

    def __init__(self, towards: Mapping[str, Held] | None) -> None:
        self._towards = towards or {}
        self._parts: list[Tensor] = []

    def meet(self, layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
        """Take in a layer's, as a consumer of `Capture.run`."""
        if layer in self._towards:
            self.add(gradients_of(a, g).products(self._towards[layer].to(g.device)))
            let_go(self._towards[layer])

    def add(self, products: Tensor | None) -> None:
        """Take in a layer's, [n, n_towards]."""
        if products is not None:
            self._parts.append(products)

    def total(self, n: int) -> Array:
        """Of `n` sequences, float64[n, n_towards]."""
        # Layers may be on different devices, and some devices have no float64.
        width = len(next(iter(self._towards.values()), ()))
        return sum((part.cpu().double().numpy() for part in self._parts), np.zeros((n, width)))


def ratio_of_sums(values: Array, tokens: Array, stratum: int | None = None) -> tuple[Array, Array]:
    """Sum of values [n, k] a token, and its variance over the sequences (delta method for a ratio of means).

    With `stratum`, each so many sequences in a row are a sample of their own, and the variance is that within them.
    """
    total, n = tokens.sum(), int(np.count_nonzero(tokens))
    ratio = values.sum(axis=0) / total
    residuals = values - ratio * tokens[:, None]
    if stratum is not None:
        n = stratum
        of_kinds = residuals.reshape(-1, stratum, values.shape[1])
        residuals = (of_kinds - of_kinds.mean(axis=1, keepdims=True)).reshape(values.shape)
    if n < 2:
        return ratio, np.where(np.isnan(ratio), np.nan, np.inf)
    return ratio, n / (n - 1) * (residuals**2).sum(axis=0) / total**2


def mean_and_error(values: Array, tokens: Array, stratum: int | None = None) -> tuple[float, float]:
    """Sum of values [n] a token, and its standard error, as `ratio_of_sums` has its variance."""
    mean, variance = ratio_of_sums(values[:, None], tokens, stratum)
    return float(mean[0]), float(np.sqrt(variance[0]))


def _signs(start: int, count: int) -> Array:
    """Of the sequences in a draw of the noise: +1 for those with an even number, -1 for odd ones."""
    return np.where(np.arange(start, start + count) % 2 == 0, 1.0, -1.0)
