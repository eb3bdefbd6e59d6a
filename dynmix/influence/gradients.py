"""Gradients of whole sequences with respect to one layer, kept as what they are sums of: g_t a_t^T over the tokens.

What measurements need of them (their products with a few matrices, their norms, weighted sums) takes no more than a
weight gradient's own work. Knows the arrays of one layer; no model, no curvature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of gradients that are held at once: on a CPU what its caches hold, and elsewhere what keeps a GPU busy. (The
# head of a language model has vocabulary x width of them a sequence.)
_ENTRIES = {"cpu": 2**20}
_ENTRIES_ELSEWHERE = 2**26


@dataclass(frozen=True)
class LinearGradients:
    """G_b = left^T (sum_t g_bt a_bt^T) right, for inputs a [B, T, in] and output gradients g [B, T, out].

    `left` and `right` are bases to see G in, None for its own.
    """

    a: Tensor
    g: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def products(self, towards: Tensor) -> Tensor:
        """<G_b, towards_i>, [B, n], for towards [n, out, in].

        Towards a single matrix, token by token: sum_t g_t^T R a_t. Towards more of them that would be one product as
        large as the layer's weight gradient for each; a sequence's G, formed once and in passing, serves them all.
        """
        if len(towards) == 1 and self.left is None and self.right is None:
            return ((self.g @ towards[0]) * self.a).sum((1, 2))[:, None]
        found = self.g.new_zeros(len(self.g), len(towards))
        for part, rows, G in self._parts():
            found[part].addmm_(G.flatten(1), towards[:, rows].flatten(1).mT)
        return found

    def token_products(self, towards: Tensor) -> Tensor:
        """<left^T g_bt a_bt^T right, towards_i>, [B, T, n], whose sum over the tokens is `products`."""
        g, a = (x if basis is None else x @ basis for x, basis in ((self.g, self.left), (self.a, self.right)))
        return torch.stack([((g @ matrix) * a).sum(2) for matrix in towards], dim=2)

    def squared_norms(self) -> Tensor:
        """|G_b|^2, [B]."""
        found = self.g.new_zeros(len(self.g))
        for part, _, G in self._parts():
            found[part] += torch.linalg.vector_norm(G, dim=(1, 2)).square()
        return found

    def add_sum(self, to: Tensor) -> None:
        """to += sum_b G_b, by one product over all tokens."""
        x = self.g.flatten(0, 1).mT @ self.a.flatten(0, 1)
        x = x if self.left is None else self.left.mT @ x
        to += x if self.right is None else x @ self.right

    def add_weighted(self, weights: Tensor, to: Tensor, towards: Tensor | None = None) -> Tensor | None:
        """to_i += sum_b weights_ib G_b, for weights [n, B]; and the products towards [m, out, in], [B, m]."""
        found = None if towards is None else self.g.new_zeros(len(self.g), len(towards))
        for part, rows, G in self._parts():
            to[:, rows] += (weights[:, part].to(G) @ G.flatten(1)).view(len(to), *G.shape[1:])
            if found is not None and towards is not None:
                found[part].addmm_(G.flatten(1), towards[:, rows].flatten(1).mT)
        return found

    def add_squares(self, to: Tensor, total: Tensor | None = None) -> None:
        """to += sum_b G_b^2, entry by entry; and total += sum_b G_b."""
        for _, rows, G in self._parts():
            if total is not None:
                total[rows] += G.sum(0)
            to[rows] += G.square_().sum(0)

    def _parts(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Some sequences, some rows, and that much of their gradients: all sequences, unless whole rows are mixed."""
        (B, _, columns), rows = self.a.shape, self.g.shape[-1]
        limit = _ENTRIES.get(self.g.device.type, _ENTRIES_ELSEWHERE)
        if self.left is None:
            step = max(1, min(rows, 64), limit // (B * columns))
            for start in range(0, rows, step):
                some = slice(start, start + step)
                G = self.g[..., some].mT @ self.a
                yield slice(0, B), some, (G if self.right is None else G @ self.right)
            return
        step = max(1, limit // (rows * columns))
        for start in range(0, B, step):
            part = slice(start, start + step)
            G = self.left.mT @ (self.g[part].mT @ self.a[part])
            yield part, slice(0, rows), (G if self.right is None else G @ self.right)


@dataclass(frozen=True)
class EmbeddingGradients:
    """G_b = sum_t onehot(ids_bt) g_bt^T, [rows, width], for ids int64[B, T] and output gradients g [B, T, width]."""

    ids: Tensor
    g: Tensor

    def products(self, towards: Tensor) -> Tensor:
        """<G_b, towards_i>, [B, n], for towards [n, rows, width]: a look-up a token."""
        return torch.stack([(table[self.ids] * self.g).sum((1, 2)) for table in towards], dim=1)

    def token_products(self, towards: Tensor) -> Tensor:
        """<onehot(ids_bt) g_bt^T, towards_i>, [B, T, n]."""
        return torch.stack([(table[self.ids] * self.g).sum(2) for table in towards], dim=2)

    def squared_norms(self) -> Tensor:
        """|G_b|^2, [B]: tokens of one id add up before they are squared."""
        sequences, _, rows = self._rows()
        return rows.new_zeros(len(self.ids)).index_add_(0, sequences, rows.square_().sum(1))

    def add_sum(self, to: Tensor) -> None:
        """to += sum_b G_b."""
        to.index_add_(0, self.ids.flatten(), self.g.flatten(0, 1))

    def add_weighted(self, weights: Tensor, to: Tensor, towards: Tensor | None = None) -> Tensor | None:
        """to_i += sum_b weights_ib G_b, for weights [n, B]; and the products towards [m, rows, width], [B, m]."""
        for table, weight in zip(to, weights.to(self.g), strict=True):
            table.index_add_(0, self.ids.flatten(), (weight[:, None, None] * self.g).flatten(0, 1))
        return None if towards is None else self.products(towards)

    def add_squares(self, to: Tensor, total: Tensor | None = None) -> None:
        """to += sum_b G_b^2, entry by entry; and total += sum_b G_b."""
        _, ids, rows = self._rows()
        if total is not None:
            total.index_add_(0, ids, rows)
        to.index_add_(0, ids, rows.square_())

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of G that are not zero: their sequences, their numbers, and what is in them [n, width]."""
        width = int(self.ids.max()) + 1
        keys = self.ids + torch.arange(len(self.ids), device=self.ids.device)[:, None] * width
        rows, number = torch.unique(keys, return_inverse=True)
        found = self.g.new_zeros(len(rows), self.g.shape[-1]).index_add_(0, number.flatten(), self.g.flatten(0, 1))
        return rows // width, rows % width, found


SequenceGradients = LinearGradients | EmbeddingGradients
"""Gradients G of B sequences' summed losses with respect to one layer's matrix, [out, in] or [rows, width]."""


def gradients_of(a: Tensor, g: Tensor) -> SequenceGradients:
    """From a layer's inputs and output gradients, as `Capture` hands them over."""
    return LinearGradients(a, g) if a.is_floating_point() else EmbeddingGradients(a, g)
