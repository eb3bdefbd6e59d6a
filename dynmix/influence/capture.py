"""Layer inputs and output gradients of one batch, by hooks, without leaving a trace in the model.

The gradient of a linear layer is the sum over tokens of g a^T, where a is the layer's input and g the gradient of the
loss with respect to its output. Both are caught on their way through a forward and a backward pass in which no
parameter requires a gradient. So no gradient reaches a parameter: `.grad` stays as it was and the gradient hooks of
DDP, FSDP2 and ZeRO never fire. This module knows torch and the models; it knows no curvature, no domain and no trainer.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynmix.influence import storage
from dynmix.influence.batch import (
    Batch,
    Batches,
    Loss,
    checked,
    next_token_labels,
    next_token_logits,
    next_token_loss,
    token_mask,
)
from dynmix.influence.experts import Replaced, by_sequence, experts_forward
from dynmix.influence.isolation import isolated, random_state_kept, unwrap
from dynmix.influence.kinds import norm_gradients, odd_linear, odd_router, one_hot
from dynmix.influence.layers import Layer, LayerFilter, Layers, measurable_layers, output_layer, unmeasurable
from dynmix.influence.storage import Offload
from dynmix.ranks import Ranks

__all__ = [
    "Batch",
    "Batches",
    "Capture",
    "Consume",
    "LayerFilter",
    "Layers",
    "Loss",
    "NothingMeasuredError",
    "isolated",
    "measurable_layers",
    "next_token_labels",
    "next_token_logits",
    "next_token_loss",
    "random_state_kept",
    "token_mask",
    "unwrap",
]

logger = logging.getLogger(__name__)

Consume = Callable[[str, Tensor, Tensor, Tensor], None]
"""(layer, inputs a [B, T, in (+1)], output gradients g [B, T, out], mask of real tokens, bool [B, T]).

Of an embedding a is int64[B, T], the rows that it looked up. Of an expert T is the most tokens that any sequence routed
to it, with zeros behind those of the others. Layers with the same input get the same object as a.
"""

_named: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()  # in a warning, once a model


@dataclass
class _Uses:
    """One layer within one batch: its inputs in the order of the calls, and the gradients that have arrived."""

    inputs: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)  # of an expert, which of the batch's tokens the rows are
    gradients: dict[int, Tensor] = field(default_factory=dict)


class NothingMeasuredError(ValueError):
    """None of the layers that were asked for took part in a forward pass in a way that can be measured."""


class Capture:
    """Runs batches through a model and hands over each linear layer's inputs and output gradients.

    Measured is what `layers.measurable_layers` lists; with `embeddings` also their tables, and with
    `layers=Layers(...)` what that says. Frozen layers are left out unless the whole model is frozen. A tied head is
    measured as the linear layer that it is used as, and where the embedding is measured too, its uses as such are uses
    of the same layer (g the one-hot tokens, a the gradients of what was looked up). A layer used several times in a
    forward counts with the sum of its uses, also where they are those of several linear modules with one weight.

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

    Raises ValueError if no layer is left, if a measured layer loses its sequences in a later batch, or if a layer's
    input is changed in place after it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerFilter = None,
        embeddings: bool = False,
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
        wanted = layers if isinstance(layers, Layers) else Layers(layers)
        wanted = replace(wanted, embeddings=embeddings or wanted.embeddings)
        known = measurable_layers(self.model, embeddings=wanted.embeddings, norms=wanted.norms, head=wanted.head)
        frozen = not any(p.requires_grad for p in self.model.parameters())
        self.layers: dict[str, Layer] = {
            name: layer for name, layer in known.items() if wanted(name) and (frozen or layer.weight.requires_grad)
        }
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
            raise ValueError(f"layers={layers!r} selects no trainable linear layer; the model has {_some(known)}")

    def run(self, batch: Batch, consume: Consume) -> tuple[Tensor, Tensor]:
        """One forward and one backward pass of the summed loss; `consume` is called once a layer that has a gradient.

        a and g arrive in float32 at least (an embedding's a as the integers it is). A layer with a bias has a last
        input column of ones, so that g^T a is the gradient [out, in + 1] with the bias last. Of a layer used k times
        they are [B, k * T, ...].

        Returns loss and number of scored tokens of each sequence, float64[B] on the CPU.
        """
        device = next(self.model.parameters()).device
        batch = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in checked(batch).items()}
        mask = token_mask(batch)
        uses: dict[str, _Uses] = {name: _Uses() for name in self.layers}
        lost: dict[str, str] = {}
        blind: set[str] = set()  # called where no gradient is taken
        versions: dict[str, int] = {}
        sources: dict[str, Tensor] = {}  # inputs as the model has them, kept while a second layer may get one
        ready: dict[tuple[str, ...], tuple[Tensor, set[str]]] = {}  # shared inputs, and who still needs them

        @torch.no_grad()
        def deliver(name: str) -> None:
            use, layer = uses.pop(name), self.layers[name]
            order = sorted(use.gradients)
            inputs, gradients = [use.inputs[i] for i in order], [use.gradients[i] for i in order]
            real = mask.to(gradients[0].device)
            reals = [real] * len(order)
            if layer.kind == "expert":
                tokens = [use.tokens[i] for i in order]
                inputs, gradients, reals = (
                    [by_sequence(x, at, *mask.shape) for x, at in zip(some, tokens, strict=True)]
                    for some in (inputs, gradients, [real.flatten()[at, None] for at in tokens])
                )
                reals = [each.squeeze(-1) for each in reals]
            if len(order) == 1 and use.inputs[0]._version != versions.get(name, use.inputs[0]._version):
                raise ValueError(f"layer {name!r}: its input is changed in place after it; leave it out with `layers=`")
            group = self.sharing[name]
            if group in ready:
                a, waiting = ready.pop(group)
                waiting = waiting - {name}
            else:
                a, waiting = _joined(inputs, reals), set(group) - {name}
                if layer.bias is not None and layer.kind != "norm":
                    a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
            if waiting:
                ready[group] = a, waiting
            g = _joined(gradients, reals)
            if a.is_floating_point():  # a router may compute in another type than the model's
                g = g.to(a.dtype)
            if isinstance(layer.module, nn.Embedding):
                a = a.squeeze(-1)
                if layer.module.padding_idx is not None:  # a row that never trains
                    g = g.masked_fill((a == layer.module.padding_idx)[..., None], 0)
            with torch.autocast(a.device.type, enabled=False):
                consume(name, a, g, torch.cat(reals, dim=1))

        def follow(name: str, a: Tensor, output: Tensor, tokens: Tensor | None = None) -> Tensor:
            """Note the layer's input, and have its output's gradient come in."""
            if not output.requires_grad:
                # Nothing before this layer is measured. A zero that requires a gradient starts the graph here, so the
                # backward pass stops here; the output itself as a leaf would forbid the model to change it in place.
                output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            elif output._is_view():
                output = output.clone()  # a change in place rewrites a view's history and would lose the hook below
            own, owner = self.tied.get(name, (None, name))
            use = uses[owner]
            index = len(use.inputs)
            use.inputs.append(a.detach())
            if tokens is not None:
                use.tokens.append(tokens)

            def arrived(gradient: Tensor) -> None:
                if owner not in uses:  # left out since, for another of its uses
                    return
                if own is not None and own.kind == "embedding":
                    use.inputs[index], gradient = gradient, one_hot(own.module, a.squeeze(-1)).to(gradient)
                elif self.layers[owner].kind == "norm":
                    use.inputs[index], gradient = norm_gradients(self.layers[owner], a.detach(), gradient, mask)
                use.gradients[index] = gradient
                if len(use.gradients) == len(use.inputs):
                    deliver(owner)

            output.register_hook(arrived)  # type: ignore[no-untyped-call]
            return output

        def catch(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            a: Tensor = args[0] if args else next(iter(kwargs.values()))
            layer, owner = self.tied.get(name) or (self.layers[name], name)
            kind = layer.kind
            if not torch.is_grad_enabled():  # the model itself has no gradient through this use
                blind.add(name)
                return output
            if kind == "router":
                if reason := odd_router(layer, a, output, mask):
                    lost[name] = reason
                else:
                    follow(name, a, output if isinstance(output, Tensor) else output[0])
                return None  # the output's other parts were made from it: it cannot be replaced
            if kind == "linear" and not self._settled and (reason := odd_linear(layer, a, output)):
                lost[owner] = reason
                return output
            if kind == "norm" and len(args) + len(kwargs) > 1:
                lost[name] = "it takes more than one input"
                return output
            if kind == "embedding" and len(a) == 1 < len(mask) and a.shape[1:] == mask.shape[1:]:
                # Positions, the same in every sequence, looked up once for all of them.
                a, output = a.expand(mask.shape), output.expand(*mask.shape, -1)
            x = a[..., None] if kind == "embedding" else a
            shapes = [tuple(mask.shape), (mask.numel(),)]
            tokens: tuple[int, ...] = x.shape[:-1]
            if len(tokens) == 3 and tokens[1] == 1:  # one latent head for all of them, as in DeepSeek's attention
                tokens = tokens[::2]
            if tokens not in shapes and not (kind == "norm" and x.shape[:2] == mask.shape):
                lost[name if kind == "embedding" else owner] = (
                    f"input of shape {list(x.shape)} for {mask.shape[0]} sequences of {mask.shape[1]} tokens"
                )
                return output
            sources[name] = a
            versions[name] = a._version
            return follow(name, x, output)

        def watch(module: str, stack: str, expert: int, a: Tensor, output: Tensor, tokens: Tensor) -> Tensor:
            name = f"{module}.{stack}.{expert}"
            return follow(name, a, output, tokens) if name in uses else output

        with torch.enable_grad():
            with ExitStack() as hooks:  # gone before the backward pass, which may run forwards again
                tied = {name: layer for name, (layer, _) in self.tied.items()}
                modules = {n: layer.module for n, layer in (self.layers | tied).items() if layer.kind != "expert"}
                for name, module in modules.items():
                    handle = module.register_forward_hook(
                        lambda _, args, kwargs, output, name=name: catch(name, args, kwargs, output), with_kwargs=True
                    )
                    hooks.callback(handle.remove)
                experts = {
                    name.rsplit(".", 2)[0]: layer.module
                    for name, layer in self.layers.items()
                    if layer.kind == "expert"
                }
                for name, module in experts.items():
                    hooks.enter_context(Replaced(module, experts_forward(module, partial(watch, name))))
                losses, tokens = self.loss(self.model, batch)
            self._settle(lost, blind, called={name for name, use in uses.items() if use.inputs})
            uses = {name: use for name, use in uses.items() if name in self.layers}
            self.sharing = self._shared(uses, sources)
            sources.clear()
            losses.sum().backward()  # type: ignore[no-untyped-call]
        for name in [name for name, use in uses.items() if use.gradients]:
            deliver(name)  # some of its uses had no part in the loss
        self.tick()
        return losses.detach().cpu().double(), tokens.cpu().double()

    def rerun(self, batch: Batch) -> None:
        """`run`, and nothing comes of it."""
        self.run(batch, lambda *_: None)

    def device(self, layer: str) -> torch.device:
        """Where the layer's gradient is."""
        return self.layers[layer].weight.device

    def zeros(self, layer: str, n: int) -> Tensor:
        """n matrices of the layer's gradient, [n, out, in (+1)]; float32 at least."""
        return self._zeros(layer, n, None)

    def stored(self, layer: str, n: int) -> Tensor:
        """The same, to be kept where `offload` says."""
        return self._zeros(layer, n, self.offload)

    def _zeros(self, layer: str, n: int, offload: Offload) -> Tensor:
        weight = self.layers[layer].weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return storage.zeros(offload, (n, *self.layers[layer].shape), dtype, weight.device)

    def _shared(self, uses: dict[str, _Uses], sources: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
        groups: dict[Any, list[str]] = {}
        for name, use in uses.items():
            linear = self.layers[name].kind == "linear" and len(use.inputs) == 1 and name in sources
            key = (id(sources[name]), self.layers[name].bias is None) if linear else name
            groups.setdefault(key, []).append(name)
        return {name: tuple(group) for group in groups.values() for name in group}

    def _settle(self, lost: dict[str, str], blind: set[str], called: set[str]) -> None:
        if self._settled:
            if lost:
                name, reason = next(iter(lost.items()))
                raise ValueError(f"layer {name!r} cannot be measured: {reason}; leave it out with `layers=`")
            return
        # An expert that no token came to may see some in the next batch.
        kept = {name for name in self.layers if name in called or self.layers[name].kind == "expert"}
        silent = {
            name: "called without gradients" if name in blind else "never called"
            for name in self.layers
            if name not in kept and name not in lost
        }
        left_out = lost | silent
        left_out |= {name: f"{owner} is not" for name, (_, owner) in self.tied.items() if owner in left_out}
        self.layers = {name: layer for name, layer in self.layers.items() if name not in left_out}
        self.tied = {name: tied for name, tied in self.tied.items() if tied[1] in self.layers}
        if not self.layers:
            raise NothingMeasuredError(f"no linear layer can be measured: {left_out}")
        self._settled = True
        everything = {id(p): p.numel() for p in self.model.parameters()}
        measured = sum(rows * columns for rows, columns in (layer.shape for layer in self.layers.values()))
        self.coverage = measured / sum(everything.values())
        logger.info("measuring %d layers, %.1f%% of the parameters", len(self.layers), 100 * self.coverage)
        told = _named.setdefault(self.model, set())
        if new := {name: reason for name, reason in left_out.items() if name not in told}:
            logger.warning(
                "%d linear layers are not measured: %s (%s)", len(new), _some(new), dict(Counter(new.values()))
            )
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


def _joined(parts: list[Tensor], masks: list[Tensor]) -> Tensor:
    shaped = [part.reshape(*mask.shape, part.shape[-1]) for part, mask in zip(parts, masks, strict=True)]
    joined = shaped[0] if len(shaped) == 1 else torch.cat(shaped, dim=1)
    if not joined.is_floating_point():
        return joined
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
