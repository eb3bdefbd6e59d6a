"""Gradients of whole sequences with respect to one layer, kept as what they are sums of: g_t a_t^T over the tokens.

What measurements need of them (their products with a few matrices, their norms, weighted sums) takes no more than a
weight gradient's own work. Knows the arrays of one layer; no model, no curvature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_ENTRIES = 2**26  # of gradients that are held at once: the head of a language model has vocabulary x width a sequence


class SequenceGradients(Protocol):
    """Gradients G of B sequences' summed losses with respect to one layer's matrix, [out, in] or [rows, width]."""

    def products(self, towards: Tensor) -> Tensor:
        """<G_b, towards_i>, [B, n], for matrices [n, ...] of the layer's shape."""
        ...

    def squared_norms(self) -> Tensor:
        """|G_b|^2, [B]."""
        ...

    def add_weighted(self, weights: Tensor, to: Tensor) -> None:
        """to_i += sum_b weights_ib G_b, for weights [n, B]."""
        ...


def gradients_of(a: Tensor, g: Tensor) -> SequenceGradients:
    """From a layer's inputs and output gradients, as `Capture` hands them over."""
    return LinearGradients(a, g) if a.is_floating_point() else EmbeddingGradients(a, g)


@dataclass(frozen=True)
class LinearGradients:
    """G_b = sum_t g_bt a_bt^T, [out, in], for inputs a [B, T, in] and output gradients g [B, T, out]."""

    a: Tensor
    g: Tensor

    def products(self, towards: Tensor) -> Tensor:
        """<G_b, towards_i>, [B, n], for towards [n, out, in].

        Towards a single matrix, token by token: sum_t g_t^T R a_t. Towards more of them that would be one product as
        large as the layer's weight gradient for each; a sequence's G, formed once and in passing, serves them all.
        """
        if len(towards) == 1:
            return ((self.g @ towards[0]) * self.a).sum((1, 2))[:, None]
        flat = towards.flatten(1).mT
        return torch.cat([G.flatten(1) @ flat for _, G in sequence_gradients(self.a, self.g)])

    def squared_norms(self) -> Tensor:
        """|G_b|^2, [B]."""
        return torch.cat([G.square_().sum((1, 2)) for _, G in sequence_gradients(self.a, self.g)])

    def add_weighted(self, weights: Tensor, to: Tensor) -> None:
        """to_i += sum_b weights_ib G_b, for weights [n, B]."""
        for part, G in sequence_gradients(self.a, self.g):
            to += torch.tensordot(weights[:, part].to(G), G, 1)


@dataclass(frozen=True)
class EmbeddingGradients:
    """G_b = sum_t onehot(ids_bt) g_bt^T, [rows, width], for ids int64[B, T] and output gradients g [B, T, width]."""

    ids: Tensor
    g: Tensor

    def products(self, towards: Tensor) -> Tensor:
        """<G_b, towards_i>, [B, n], for towards [n, rows, width]: a look-up a token."""
        return torch.stack([(table[self.ids] * self.g).sum((1, 2)) for table in towards], dim=1)

    def squared_norms(self) -> Tensor:
        """|G_b|^2, [B]: tokens of one id add up before they are squared."""
        norms = []
        for ids, g in zip(self.ids, self.g, strict=True):
            rows, number = ids.unique(return_inverse=True)
            norms.append(g.new_zeros(len(rows), g.shape[-1]).index_add_(0, number, g).square_().sum())
        return torch.stack(norms)

    def add_weighted(self, weights: Tensor, to: Tensor) -> None:
        """to_i += sum_b weights_ib G_b, for weights [n, B]."""
        for table, weight in zip(to, weights.to(self.g), strict=True):
            table.index_add_(0, self.ids.flatten(), (weight[:, None, None] * self.g).flatten(0, 1))


def sequence_gradients(a: Tensor, g: Tensor, limit: int = _ENTRIES) -> Iterator[tuple[slice, Tensor]]:
    """Gradients [b, out, in] of a few sequences at a time, with at most `limit` entries (or one sequence) at once."""
    step = max(1, limit // (a.shape[-1] * g.shape[-1]))
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        yield part, g[part].mT @ a[part]
