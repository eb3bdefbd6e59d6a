"""Kronecker factors of layers: covariances of inputs and output gradients, their eigenbases, and the operator of both.

What K-FAC and EK-FAC have in common, in the conventions of Grosse et al. 2023 (arXiv 2308.03296). Knows layers and
gradients; nothing of which curvature they become.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynmix.influence.base import LayerByLayer
from dynmix.influence.capture import Capture
from dynmix.influence.dealing import dealt_by_cost
from dynmix.influence.gradients import EmbeddingGradients, LinearGradients, SequenceGradients
from dynmix.influence.layers import Layer
from dynmix.influence.storage import Offload, moved
from dynmix.ranks import Ranks

logger = logging.getLogger(__name__)

WIDE = 4  # times the other side: rotating into the basis of such a side costs as many times the layer's own product


@dataclass
class Factors:
    """Of one layer. A belongs to its inputs, S to its outputs.

    A [in, in] and S [out, out] are means over tokens of a a^T and g g^T; QA and QS their eigenvectors, in columns. A
    side that keeps the identity as its basis (Q is None) has second moments instead, [in] or [out]. Lambda [out, in]
    are the eigenvalues of the curvature of a whole sequence's summed loss, in these bases. Of an embedding S are the
    frequencies of the tokens, and A the covariance of the gradients of what is looked up.
    """

    A: Tensor
    S: Tensor
    Lambda: Tensor
    QA: Tensor | None = None
    QS: Tensor | None = None

    def rotated(self, matrix: Tensor) -> Tensor:
        """Matrices [..., out, in] in the eigenbases."""
        x = matrix if self.QS is None else self.QS.mT @ matrix
        return x if self.QA is None else x @ self.QA

    def restored(self, matrix: Tensor) -> Tensor:
        """The inverse of `rotated`."""
        x = matrix if self.QA is None else matrix @ self.QA.mT
        return x if self.QS is None else self.QS @ x

    def on(self, device: torch.device) -> Factors:
        """The same there."""
        return Factors(**{part: None if x is None else x.to(device) for part, x in vars(self).items()})  # type: ignore[arg-type]

    def seen_from(self, other: Factors) -> Tensor:
        """The diagonal, in the bases of `other`, of the matrix that has these eigenvalues in these bases."""
        x = self.Lambda if (u := _squared_cosines(other.QS, self.QS)) is None else u @ self.Lambda
        return x if (u := _squared_cosines(other.QA, self.QA)) is None else x @ u.mT


@dataclass(frozen=True)
class FittedFactors(LayerByLayer):
    """Factors by layer, and what turns them into the curvature of the mean loss per token.

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
        f = self.factors[layer].on(matrix.device)
        eigenvalues = (f.Lambda + self.damping * f.Lambda.mean()) / self.tokens_per_sequence
        # Below the smallest normal number the reciprocal overflows. NaN compares false and stays NaN.
        inverse = torch.where(eigenvalues < torch.finfo(eigenvalues.dtype).tiny, 0.0, 1 / eigenvalues)
        return f.restored(f.rotated(matrix) * inverse)

    def to(self, device: torch.device) -> FittedFactors:
        """The same there."""
        return self._moved(lambda tensor: tensor.to(device))

    def kept(self, offload: Offload) -> FittedFactors:
        """The same where they are to live, and without what only a later fit would need."""
        factors = {k: replace(f, A=f.Lambda.new_zeros(0), S=f.Lambda.new_zeros(0)) for k, f in self.factors.items()}
        return replace(self, factors=factors)._moved(lambda tensor: moved(offload, tensor))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> FittedFactors:
        """With every tensor moved once: what layers share stays shared."""
        tensors = {id(tensor): tensor for f in self.factors.values() for tensor in vars(f).values()}
        there = {key: None if tensor is None else move(tensor) for key, tensor in tensors.items()}
        factors = {
            layer: Factors(**{part: there[id(tensor)] for part, tensor in vars(f).items()})  # type: ignore[arg-type]
            for layer, f in self.factors.items()
        }
        return replace(self, factors=factors)

    @property
    def finite(self) -> bool:
        """Whether every eigenvalue is a finite number."""
        return math.isfinite(self.tokens_per_sequence) and all(
            bool(f.Lambda.isfinite().all()) for f in self.factors.values()
        )


class Moments:
    """Accumulates the covariances of every layer, in at least float32; a consumer of `Capture.run`.

    Layers with the same input share one covariance. Sequences that are not finite are left out.
    """

    def __init__(self, capture: Capture, largest_basis: int) -> None:
        self._capture, self._largest = capture, largest_basis
        self._inputs: dict[tuple[str, ...], _Moment] = {}
        self._outputs: dict[str, _Moment] = {}
        self._met: dict[tuple[str, ...], weakref.ref[Tensor]] = {}
        self._broken: dict[str, Tensor] = {}

    def add(self, layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
        """Take in one layer of one batch."""
        group = self._capture.sharing[layer]
        known = len(group) > 1 and (met := self._met.get(group)) is not None and met() is a
        self._met[group] = weakref.ref(a)
        a, g, finite = finite_sequences(a, g)
        real = mask & finite[:, None]
        if layer not in self._outputs:
            self._outputs[layer] = self._moment(layer, g, outputs=True)
            self._broken[layer] = torch.zeros((), dtype=torch.long, device=g.device)
        if _is_embedding(a):
            self._outputs[layer].count(a, real)
        else:
            self._outputs[layer].add(_only(real, g), real)
        self._broken[layer] += len(finite) - finite.sum()
        if group not in self._inputs:
            self._inputs[group] = self._moment(layer, g, outputs=False)
        if not known:
            self._inputs[group].add(_only(real, g if _is_embedding(a) else a), real)

    def sides(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Add up what all ranks have taken in, and give up the sums: layer -> (A, S).

        Those of layers that always shared their input are the same object.
        """
        ranks, capture = self._capture.ranks, self._capture

        def device(key: str | tuple[str, ...]) -> torch.device:
            return capture.device(key if isinstance(key, str) else key[0])

        def summed(what: str, moments: dict[Any, _Moment]) -> dict[Any, _Moment]:
            totals = ranks.sum(what, {key: moment.total for key, moment in moments.items()}, device)
            tokens = ranks.sum(f"tokens of {what}", {key: moment.tokens for key, moment in moments.items()}, device)
            return {key: _Moment(total, tokens[key]) for key, total in totals.items()}

        inputs, self._inputs = summed("covariances of inputs", self._inputs), {}
        outputs, self._outputs = summed("covariances of outputs", self._outputs), {}
        self._broken = ranks.sum("sequences left out", self._broken, capture.device)
        means: dict[tuple[tuple[str, ...], ...], Tensor] = {}
        found = {}
        for layer, own in outputs.items():
            groups = tuple(group for group in inputs if layer in group)
            if groups not in means:
                means[groups] = _mean([inputs[group] for group in groups])
            found[layer] = means[groups], _mean([own])
        return found

    def broken(self, layer: str) -> int:
        """How many sequences were left out of this layer, on all ranks, once there are `sides`."""
        return int(self._broken[layer])

    def _moment(self, layer: str, g: Tensor, *, outputs: bool) -> _Moment:
        head = layer == self._capture.head
        return _Moment(g.new_zeros(side_shape(self._capture.layers[layer], self._largest, outputs=outputs, head=head)))


def side_shape(layer: Layer, largest_basis: int, *, outputs: bool, head: bool) -> tuple[int, ...]:
    """Of one side's covariance, [n, n], or its second moments, [n], if it keeps the identity as its basis."""
    rows, columns = layer.shape
    n, other = (rows, columns) if outputs else (columns, rows)
    if layer.kind == "embedding":
        return (n,) if outputs else (n, n)
    largest = largest_basis if head else max(largest_basis, WIDE * other)
    return (n,) if n > largest or (outputs and layer.kind == "norm") else (n, n)


class _Moment:
    """A covariance [n, n], or second moments [n], summed; or how often each of n tokens occurs."""

    def __init__(self, total: Tensor, tokens: Tensor | None = None) -> None:
        self.total = total
        self.tokens = torch.zeros((), dtype=torch.long, device=total.device) if tokens is None else tokens

    def add(self, x: Tensor, real: Tensor) -> None:
        self.tokens += real.sum()
        if self.total.ndim == 1:
            self.total += torch.linalg.vector_norm(x, dim=(0, 1)).square()
        else:
            add_gram(self.total, x.flatten(0, 1))

    def count(self, ids: Tensor, real: Tensor) -> None:
        self.tokens += real.sum()
        self.total.index_add_(0, ids[real], self.total.new_ones(int(real.sum())))


def _mean(moments: list[_Moment]) -> Tensor:
    """The mean over all of their tokens, of a covariance with its lower half made whole."""
    total = torch.stack([moment.total for moment in moments]).sum(0) if len(moments) > 1 else moments[0].total
    tokens = torch.stack([moment.tokens for moment in moments]).sum()
    total = total / tokens
    return total if total.ndim == 1 else total.tril() + total.tril(-1).mT


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += x^T x, of which the blocks above the diagonal are left out, as they are known from those below."""
    n = len(total)
    step = -(-n // (4 if n >= 512 else 2 if n >= 128 else 1))
    for start in range(0, n, step):
        total[start:, start : start + step].addmm_(x[:, start:].mT, x[:, start : start + step])


def finite_sequences(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero out sequences with an entry that is not finite; also which ones are left, bool [B]."""
    total = g.sum((1, 2))
    if a.is_floating_point():
        total = total + a.sum((1, 2))
    finite = total.isfinite()
    if bool(finite.all()):
        return a, g, finite
    broken = ~finite[:, None, None]
    return (a.masked_fill(broken, 0) if a.is_floating_point() else a), g.masked_fill(broken, 0), finite


class Rotation:
    """Sequences' gradients in the eigenbases, by the cheapest way for the shape.

    Each side is turned where it costs less: of T tokens before they are summed into a gradient [out, in], or of the
    gradient. For the inputs that is T in^2 (once for all layers that share them) against out in^2; for the outputs
    T out^2 against in out^2.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, layer: str, a: Tensor, g: Tensor, f: Factors) -> SequenceGradients:
        """The gradients of a batch's sequences in the bases of `f`."""
        if _is_embedding(a):
            return EmbeddingGradients(a, g if f.QA is None else g @ f.QA)
        length, (rows, columns) = a.shape[1], f.Lambda.shape
        left, right = f.QS, f.QA
        if left is not None and length <= columns:
            g, left = g @ left, None
        if right is not None and length <= rows * len(self._capture.sharing[layer]):
            a, right = self._inputs(a, right), None
        return LinearGradients(a, g, left, right)

    def _inputs(self, a: Tensor, QA: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not a or self._last[1] is not QA:
            self._last = a, QA, a @ QA
        return self._last[2]


def eigenbases(ranks: Ranks, matrices: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Eigenvectors of each matrix, in columns, on all ranks: each of them has found some, and sent them round.

    They are sought in `dtype` at least, and are of the matrix's own.
    """
    owners = dealt_by_cost({name: len(matrix) ** 3 for name, matrix in matrices.items()}, ranks.size)
    found = {
        name: _eigenbasis(name, matrix, dtype) if owners[name] == ranks.rank else matrix.new_empty(matrix.shape)
        for name, matrix in matrices.items()
    }
    ranks.broadcast("eigenvectors", found, owners)
    return found


def _eigenbasis(name: str, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvectors in columns; the identity if no solver succeeds, NaN throughout if the matrix is not finite."""
    if not matrix.isfinite().all():
        return torch.full_like(matrix, math.nan)  # no sequence was finite: said once, for all layers
    first = matrix.device, torch.promote_types(matrix.dtype, dtype)
    for device, precision in (first, (torch.device("cpu"), torch.float64)):
        try:
            Q: Tensor = torch.linalg.eigh(matrix.to(device, precision)).eigenvectors
        except (RuntimeError, TypeError):  # no convergence, or the device has no solver or no float64
            continue
        if Q.isfinite().all():
            return Q.to(matrix).contiguous()  # as it comes back from a file, whose products are to be the same bits
    logger.warning("curvature: no eigenvectors found for the %s, it is seen in its own basis", name)
    return torch.eye(len(matrix)).to(matrix)


def _only(real: Tensor, x: Tensor) -> Tensor:
    return x if bool(real.all()) else x.masked_fill(~real[..., None], 0)


def _is_embedding(a: Tensor) -> bool:
    return not a.is_floating_point()


def _squared_cosines(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    if new is None:
        return None if old is None else old.square()
    return (new.mT if old is None else new.mT @ old).square()
