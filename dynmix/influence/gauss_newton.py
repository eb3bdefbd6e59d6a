"""The exact Gauss-Newton matrix, inverted by conjugate gradients: the slow reference for everything cheaper.

No block structure, no factorisation, no sampled label. Knows models and batches; no domains, no tasks and no scores.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynmix.influence.batch import Batches, next_token_labels, next_token_logits, next_token_loss, on_device
from dynmix.influence.capture import Capture
from dynmix.influence.layers import plain_name

logger = logging.getLogger(__name__)

Vectors = dict[str, Tensor]  # layer -> [n, out, in]: n vectors over all layers


@dataclass(frozen=True)
class GaussNewton:
    """H = J^T (diag(p) - p p^T) J, meaned over the scored tokens, plus damping; J is of the logits, p their softmax.

    For the cross entropy it is the Fisher information with the model's own labels in full expectation, over all
    measured layers together. For tests and small models: each iteration of each product is two backward passes through
    a backward pass, over all batches. Needs the next-token loss and a model in one piece (no FSDP).

    Args:
        damping: added to the diagonal, as a multiple of the mean eigenvalue. (The trace is estimated by `probes`
            products with random signs; the fitted object says the `damping` that came out.)
        tolerance: of the residual, relative to the right-hand side.
        iterations: at most; a solve that stops there says so in a warning.
        probes: products that the trace is estimated from.
        seed: of the signs.

    Raises:
        ValueError: a setting out of range; from `fit`, another loss, a sharded model, or layers that share a weight.
    """

    damping: float = 0.1
    tolerance: float = 1e-6
    iterations: int = 500
    probes: int = 8
    seed: int = 0
    passes: ClassVar[int] = 1  # and as many more as the products take

    def __post_init__(self) -> None:
        if not (self.damping > 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must be finite and > 0, got {self.damping}")
        for name in ("iterations", "probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1, got {self.tolerance}")

    def fit(self, capture: Capture, batches: Batches) -> FittedGaussNewton:
        """Estimate the trace, for the damping."""
        if capture.loss is not next_token_loss:
            raise ValueError("GaussNewton is that of the next-token loss: it needs the default loss")
        if any(hasattr(p, "full_tensor") for p in capture.model.parameters()):
            raise ValueError("GaussNewton needs a model in one piece, not a sharded one")
        if capture.tied:
            raise ValueError(f"GaussNewton sees no layers with one weight: leave out {', '.join(capture.tied)}")
        for batch in islice(batches, 1):  # settles which layers are measured
            capture.rerun(batch)
        bare = FittedGaussNewton(capture, batches, 0.0, self.tolerance, self.iterations)
        generator = torch.Generator().manual_seed(self.seed)
        signs = {
            layer: (torch.randint(0, 2, zeros.shape, generator=generator) * 2 - 1).to(zeros)
            for layer in capture.layers
            for zeros in [capture.zeros(layer, self.probes)]
        }
        n = sum(x[0].numel() for x in signs.values())
        mean = _dots(signs, bare.times(signs)).mean().item() / n
        return FittedGaussNewton(capture, batches, self.damping * mean, self.tolerance, self.iterations)


@dataclass(frozen=True)
class FittedGaussNewton:
    """The operator over `batches`, with the absolute damping."""

    capture: Capture
    batches: Batches
    damping: float
    tolerance: float
    iterations: int

    def precondition_all(self, gradients: Vectors) -> None:
        """(H + damping)^-1 times the vectors, in place, each by conjugate gradients, side by side."""
        x = {layer: torch.zeros_like(b) for layer, b in gradients.items()}
        r = {layer: b.clone() for layer, b in gradients.items()}
        p = {layer: b.clone() for layer, b in gradients.items()}
        squares = _dots(r, r)
        goal = squares * self.tolerance**2
        for _ in range(self.iterations):
            # What is not finite never ends, and must not hold up the others.
            if not bool((squares > goal).any()):
                break
            Hp = self.times(p)
            step = _ratio(squares, _dots(p, Hp))
            for layer in x:
                x[layer] += _each(step, p[layer])
                r[layer] -= _each(step, Hp[layer])
            before, squares = squares, _dots(r, r)
            for layer in p:
                p[layer] = r[layer] + _each(_ratio(squares, before), p[layer])
        else:
            worst = (squares / goal.clamp_min(torch.finfo(goal.dtype).tiny)).max().sqrt().item() * self.tolerance
            logger.warning("Gauss-Newton: after %d iterations the residual is still %.1e", self.iterations, worst)
        gradients.update(x)

    def times(self, vectors: Vectors) -> Vectors:
        """(H + damping) times n vectors."""
        total = {layer: torch.zeros_like(x) for layer, x in vectors.items()}
        tokens = 0
        for logits, scored, parameters in self._logits():
            tokens += int(scored.sum())
            p = logits.detach().softmax(-1)
            leaves = list(parameters.values())
            signal = torch.zeros_like(logits, requires_grad=True)
            pulled = torch.autograd.grad(logits, leaves, signal, create_graph=True)
            for number in range(len(next(iter(vectors.values())))):
                tangents = self._tangents({layer: x[number] for layer, x in vectors.items()})
                pushed = torch.autograd.grad(
                    pulled, signal, [tangents[name].to(t) for name, t in parameters.items()], retain_graph=True
                )[0]
                bent = (p * (pushed - (p * pushed).sum(-1, keepdim=True))) * scored[..., None]
                back = torch.autograd.grad(logits, leaves, bent, retain_graph=True)
                found = dict(zip(parameters, back, strict=True))
                for layer, x in total.items():
                    x[number] += self._matrix(layer, found)
        return {layer: x / tokens + self.damping * vectors[layer] for layer, x in total.items()}

    def _logits(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Of each batch the logits that predict something [B, T-1, V], which ones count, and the leaves they are of."""
        model = self.capture.model
        device = next(model.parameters()).device
        for given in self.batches:
            batch = on_device(given, device)
            leaves = {
                name: parameter.detach().requires_grad_()
                for layer in self.capture.layers
                for name, parameter in self._names(layer)
            }
            # Fused attention has no second derivative. What is tied is measured as the layer that it is used as.
            with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]):
                logits = next_token_logits(_With(model, leaves), batch)[:, :-1]
                yield logits, next_token_labels(batch) != -100, leaves

    def _names(self, layer: str) -> list[tuple[str, nn.Parameter]]:
        """The layer's parameters with their names in the model."""
        own = self.capture.layers[layer]
        prefix = layer if own.expert is None else layer.rsplit(".", 2)[0]
        keys = {id(p): key for key, p in own.module.named_parameters(recurse=False)}
        names = {plain_name(name): name for name, _ in self.capture.model.named_parameters(remove_duplicate=False)}
        return [(names[f"{prefix}.{keys[id(p)]}"], p) for p in own.parameters]

    def _tangents(self, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        """A vector over the layers as directions of the parameters; none where no gradient reached."""
        found = {name: torch.zeros_like(p) for layer in self.capture.layers for name, p in self._names(layer)}
        for layer, matrix in vector.items():
            own = self.capture.layers[layer]
            for (name, _), (_, part) in zip(self._names(layer), own.split(matrix), strict=True):
                if own.expert is None:
                    found[name] = part
                else:
                    found[name][own.expert] = part
        return found

    def _matrix(self, layer: str, found: dict[str, Tensor]) -> Tensor:
        by_id = {id(parameter): found[name] for name, parameter in self._names(layer)}
        return self.capture.layers[layer].matrix(lambda parameter: by_id[id(parameter)])


class _With(nn.Module):
    """A model with some of its parameters replaced; its own are not touched."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self._held = [model]  # not a submodule
        self._parameters_in_place = parameters
        self.forward = model.forward  # whose signature says what it takes

    def __call__(self, **inputs: object) -> object:
        return functional_call(self._held[0], self._parameters_in_place, (), inputs, tie_weights=False)


def _dots(a: Vectors, b: Vectors) -> Tensor:
    """Inner products of n vectors each, [n]."""
    return sum(((a[layer] * b[layer]).flatten(1).sum(1) for layer in a), torch.zeros(()))


def _each(factors: Tensor, vectors: Tensor) -> Tensor:
    return factors.to(vectors)[:, None, None] * vectors


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / b)
