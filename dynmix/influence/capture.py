"""Layer inputs and output gradients of one batch, by hooks, without leaving a trace in the model.

The gradient of a linear layer is the sum over tokens of g a^T, where a is the layer's input and g the gradient of the
loss with respect to its output. Both are caught on their way through a forward and a backward pass in which no
parameter requires a gradient. So no gradient reaches a parameter: `.grad` stays as it was and the gradient hooks of
DDP, FSDP2 and ZeRO never fire. This module knows torch and the models; it knows no curvature, no domain and no trainer.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from dynmix.influence import storage
from dynmix.influence.batch import Batch, Loss, checked, checked_loss, next_token_loss, on_device, token_mask
from dynmix.influence.isolation import isolated as isolated  # part of this module's names
from dynmix.influence.isolation import unwrap
from dynmix.influence.layers import Layer, LayerFilter, Layers, measurable_layers, output_layer, unmeasurable
from dynmix.influence.one_pass import Consume, OnePass
from dynmix.influence.storage import Offload
from dynmix.ranks import Ranks

logger = logging.getLogger(__name__)

_named: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()  # in a warning, once a model


class NothingMeasuredError(ValueError):
    """None of the layers that were asked for took part in a forward pass in a way that can be measured."""


class Capture:
    """Runs batches through a model and hands over each linear layer's inputs and output gradients.

    Measured is what `layers.measurable_layers` lists, and of that what `layers` says. Frozen layers are left out unless
    all of the model is frozen. A tied head is measured as the linear layer that it is used as, and where the embedding
    is measured too, its uses as such are uses of the same layer (g the one-hot tokens, a the gradients of what was
    looked up). A layer used several times in a forward counts with the sum of its uses, also where they are those of
    several linear modules with one weight.

    The first batch settles which layers are measured: an input must keep the sequences apart, as [B, T, in],
    [B, 1, T, in] or [B * T, in], unless it is an expert's. Others (tokens gathered by code that is not transformers', a
    layer that is never called) are left out. They and modules with trainable parameters of no known kind are named in a
    warning, once a model. Afterwards `layers` holds the measured ones by name and `coverage` their share of the model's
    parameters.

    `head` is the name of the layer that predicts tokens, where the model says so. While `run` delivers, `sharing` says
    of each layer of the batch which ones have its input, itself included. `tied` are modules by name whose weight is
    that of a measured layer, with what they would be on their own and the name of that layer. `offload` says where what
    is `stored` lives. `ranks` are the processes that share the measurement, for those who run batches here; it runs
    what it is given.

    Create it before `isolated(model)`, which hides what is frozen, and run it inside.

    Raises ValueError if no layer is left, if a process has but a piece of one, if a measured layer loses its sequences
    in a later batch, or if a layer's input is changed in place after it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerFilter = None,
        loss: Loss = next_token_loss,
        tick: Callable[[], object] | None = None,
        ranks: Ranks | None = None,
        offload: Offload = None,
    ) -> None:
        self.model = unwrap(model)
        self.offload: Offload = offload
        self.ranks = Ranks() if ranks is None else ranks
        self.loss = loss
        self.tick = tick or (lambda: None)
        self.coverage = 0.0
        self.sharing: dict[str, tuple[str, ...]] = {}
        self._settled = False
        wanted = Layers.of(layers)
        known = measurable_layers(self.model, embeddings=wanted.embeddings, norms=wanted.norms, head=wanted.head)
        frozen = not any(p.requires_grad for p in self.model.parameters())
        self.layers: dict[str, Layer] = {
            name: layer for name, layer in known.items() if wanted(name) and (frozen or layer.weight.requires_grad)
        }
        if flat := [name for name, layer in self.layers.items() if layer.kind != "norm" and layer.weight.ndim < 2]:
            raise ValueError(
                f"layer {flat[0]!r} has no matrix but a flat piece of one, as FSDP1 and ZeRO-3 cut them: shard the "
                "model with FSDP2 (accelerate's fsdp_version 2), or leave it whole"
            )
        self._unknown = [name for name in unmeasurable(self.model) if wanted(name)]
        heads = {
            id(layer.weight): name
            for name, layer in reversed(self.layers.items())  # the first of several has the others' uses
            if layer.kind == "linear" and layer.bias is None
        }
        self.tied = {
            name: (layer, heads[id(layer.weight)])
            for name, layer in self.layers.items()
            if layer.kind == "embedding" and id(layer.weight) in heads
        } | _same_linear(self.layers)
        self.layers = {name: layer for name, layer in self.layers.items() if name not in self.tied}
        owners = [(layer.module, name) for name, layer in self.layers.items()]
        owners += [(layer.module, owner) for layer, owner in self.tied.values()]
        output = output_layer(self.model)
        self.head = next((name for module, name in owners if module is output), None)
        self._apart = _sharing(self.layers)
        if not self.layers:
            asked = wanted if wanted.exclude else wanted.include
            raise ValueError(f"layers={asked!r} selects no trainable linear layer; the model has {_some(known)}")

    def run(self, batch: Batch, consume: Consume) -> tuple[Tensor, Tensor]:
        """One forward and one backward pass of the summed loss; `consume` is called once per layer that has a gradient.

        a and g arrive in float32 at least (an embedding's a as the integers it is). A layer with a bias has a last
        input column of ones, so that g^T a is the gradient [out, in + 1] with the bias last. Of a layer used k times
        they are [B, k * T, ...].

        Returns loss and number of scored tokens of each sequence, float64[B] on the CPU.
        """
        batch = on_device(checked(batch), next(self.model.parameters()).device)
        mask = token_mask(batch)
        caught = OnePass(self.layers, self.tied, mask, consume, check=not self._settled)
        with torch.enable_grad():
            with caught.forward():
                losses, tokens = checked_loss(self.loss(self.model, batch), len(mask))
            self._settle(caught)
            caught.keep(self.layers)
            self.sharing = caught.sharing
            losses.sum().backward()  # type: ignore[no-untyped-call]
        caught.finish()
        self.tick()
        return losses.detach().cpu().double(), tokens.cpu().double()

    def rerun(self, batch: Batch) -> None:
        """`run`, and nothing comes of it."""
        self.run(batch, lambda *_: None)

    def device(self, layer: str) -> torch.device:
        """Where the layer's gradient is."""
        return self.layers[layer].weight.device

    def dtype(self, layer: str) -> torch.dtype:
        """Of the layer's gradient; float32 at least."""
        return torch.promote_types(self.layers[layer].weight.dtype, torch.float32)

    def zeros(self, layer: str, n: int, offload: Offload = None) -> Tensor:
        """n matrices of the layer's gradient, [n, out, in (+1)]."""
        return storage.zeros(offload, (n, *self.layers[layer].shape), self.dtype(layer), self.device(layer))

    def stored(self, layer: str, n: int) -> Tensor:
        """The same, to be kept where `offload` says."""
        return self.zeros(layer, n, self.offload)

    def _settle(self, caught: OnePass) -> None:
        """After a forward pass: which layers are measured, by the first batch."""
        lost, called = caught.lost, caught.called
        if self._settled:
            if lost:
                name, reason = next(iter(lost.items()))
                raise ValueError(f"layer {name!r} cannot be measured: {reason}; leave it out with `layers=`")
            return
        left_out = lost | {
            name: "called without gradients" if name in caught.blind else "never called"
            for name, layer in self.layers.items()
            # An expert that no token came to may see some in the next batch.
            if name not in called and name not in lost and layer.kind != "expert"
        }
        left_out |= {name: f"{owner} is not" for name, (_, owner) in self.tied.items() if owner in left_out}
        self.layers = {name: layer for name, layer in self.layers.items() if name not in left_out}
        self.tied = {name: tied for name, tied in self.tied.items() if name not in left_out}
        if not self.layers:
            raise NothingMeasuredError(f"no linear layer can be measured: {_with_reasons(left_out)}")
        self._settled = True
        measured = sum(math.prod(layer.shape) for layer in self.layers.values())
        self.coverage = measured / sum(p.numel() for p in self.model.parameters())
        logger.info("measuring %d layers, %.1f%% of the parameters", len(self.layers), 100 * self.coverage)
        self._tell(left_out)

    def _tell(self, left_out: dict[str, str]) -> None:
        """Name what is not measured in warnings, once a model."""
        told = _named.setdefault(self.model, set())
        if new := {name: reason for name, reason in left_out.items() if name not in told}:
            logger.warning("%d linear layers are not measured: %s", len(new), _with_reasons(new))
        if unknown := [name for name in self._unknown if name not in told]:
            logger.warning(
                "%d modules have parameters of no known kind, not measured: %s", len(unknown), _some(unknown)
            )
        if apart := [group for group in self._apart if not told.issuperset(group)]:
            logger.warning(
                "%s have a parameter in common but are measured apart, without the products between their uses: leave "
                "all but one out with `layers=`",
                "; ".join(" and ".join(group) for group in apart),
            )
        told.update(left_out, self._unknown, *self._apart)


def layer_parts(model: nn.Module, layers: LayerFilter, count: int) -> list[LayerFilter]:
    """`count` filters at most, that together let through what `layers` does, once.

    Each has layers that are neighbours in the model, and about as many parameters: a layer belongs to the part in which
    its middle lies, so that a head that is most of the model has one of its own. Raises ValueError for a count below
    1, or as `Capture` does.
    """
    if count < 1:
        raise ValueError(f"layer_groups={count}: at least 1")
    if count == 1:
        return [layers]
    wanted = Layers.of(layers)
    capture = Capture(model, layers=layers)
    sizes = np.array([np.prod(layer.shape) for layer in capture.layers.values()])
    middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
    _, numbers = np.unique((middles * min(count, len(sizes))).astype(int), return_inverse=True)
    part_of = dict(zip(capture.layers, numbers.tolist(), strict=True))
    part_of |= {table: part_of[head] for table, (_, head) in capture.tied.items()}

    def part(k: int) -> Layers:
        # What is no measurable layer belongs to the first part, which then warns of it.
        return replace(wanted, include=lambda name: part_of.get(name, 0) == k and wanted(name), exclude=None)

    return [part(k) for k in range(max(numbers) + 1)]


def _same_linear(layers: dict[str, Layer]) -> dict[str, tuple[Layer, str]]:
    """Linear modules with the parameters of one before them, with the name of that."""
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for name, layer in layers.items():
        key = (layer.transposed, *map(id, layer.parameters))
        if layer.kind == "linear" and (owner := first.setdefault(key, name)) != name:
            found[name] = layer, owner
    return found


def _sharing(layers: dict[str, Layer]) -> list[list[str]]:
    """Names of layers of different modules that hold the same parameter."""
    groups: dict[tuple[int, int | None], list[str]] = {}
    for name, layer in layers.items():
        for parameter in layer.parameters:
            groups.setdefault((id(parameter), layer.expert), []).append(name)
    return [list(group) for group in dict.fromkeys(map(tuple, groups.values())) if len(group) > 1]


def _with_reasons(left_out: dict[str, str]) -> str:
    return f"{_some(left_out)} ({dict(Counter(left_out.values()))})"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
