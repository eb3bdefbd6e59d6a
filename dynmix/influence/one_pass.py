"""One forward and one backward pass of a model, in which the measured layers' inputs and output gradients are caught.

Forward hooks note a layer's input and have the gradient of its output come in. When those of all uses of a layer are
there, it is handed over. Knows layers and hooks; nothing of which layers are wanted, nor of what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynmix.influence.isolation import replaced
from dynmix.influence.kinds import by_sequence, experts_forward, norm_gradients, odd_linear, odd_router, one_hot
from dynmix.influence.layers import Layer

Consume = Callable[[str, Tensor, Tensor, Tensor], None]
"""(layer, inputs a [B, T, in (+1)], output gradients g [B, T, out], mask of real tokens, bool [B, T]).

Of an embedding a is int64[B, T], the rows that it looked up. Of an expert T is the most tokens that any sequence routed
to it, with zeros behind those of the others. Layers with the same input get the same object as a.
"""


@dataclass
class _Uses:
    """One layer within the batch: its inputs in the order of the calls, and the gradients that have arrived."""

    layer: Layer
    inputs: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)  # of an expert, which of the batch's tokens the rows are
    gradients: dict[int, Tensor] = field(default_factory=dict)


class OnePass:
    """What is caught of one batch: `forward()`, then `keep`, then the backward pass, then `finish`.

    A layer goes through these steps:

        _called    it is used in the forward pass, itself or as what is tied to it: can that be measured? (Experts come
                   by _expert_called.)
        _follow    the use's input is noted, and its output's gradient will come in
        keep       the forward pass is over: is the layer measured, and which others have its input?
        _arrived   the gradient of a use's output is there, and both are made what they would be of a linear layer
        _deliver   those of all uses are there, or no more will come (`finish`): they are joined and handed over

    Args:
        layers: those to be measured, by name.
        tied: modules by name whose uses are uses of one of them, with what they are and its name.
        mask: of the batch's real tokens, bool [B, T].
        consume: called once per layer that has a gradient.
        check: whether it is yet to be seen that what looks like a linear layer is one.

    Attributes:
        lost: layers that cannot be measured in this batch, and why.
        blind: layers that were called where no gradient is taken.
        sharing: after `keep`, which layers have the input of each, itself included.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        tied: Mapping[str, tuple[Layer, str]],
        mask: Tensor,
        consume: Consume,
        *,
        check: bool,
    ) -> None:
        self._tied, self._mask, self._consume, self._check = tied, mask, consume, check
        self._uses = {name: _Uses(layer) for name, layer in layers.items()}
        self._sources: dict[str, Tensor] = {}  # inputs as the model has them, kept while a second layer may get one
        self._ready: dict[tuple[str, ...], tuple[Tensor, set[str]]] = {}  # inputs of a group, and who still needs them
        self.lost: dict[str, str] = {}
        self.blind: set[str] = set()
        self.sharing: dict[str, tuple[str, ...]] = {}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, uses of the layers are noted; not in the backward pass, which may run forwards again."""
        modules = {name: use.layer for name, use in self._uses.items() if use.layer.kind != "expert"}
        modules |= {name: layer for name, (layer, _) in self._tied.items()}
        experts = {n.rsplit(".", 2)[0]: use.layer.module for n, use in self._uses.items() if use.layer.kind == "expert"}
        with ExitStack() as hooks:
            for name, layer in modules.items():
                hooks.enter_context(layer.module.register_forward_hook(partial(self._called, name), with_kwargs=True))
            for name, module in experts.items():
                watched = experts_forward(module, partial(self._expert_called, name))
                hooks.enter_context(replaced(module, "forward", watched))
            yield

    @property
    def called(self) -> set[str]:
        """Layers that were used, themselves or as what is tied to them."""
        return {name for name, use in self._uses.items() if use.inputs}

    def keep(self, layers: Mapping[str, Layer]) -> None:
        """The forward pass is over, and these of the layers are measured."""
        self._uses = {name: use for name, use in self._uses.items() if name in layers}
        groups: dict[Any, list[str]] = {}
        for name, use in self._uses.items():
            shared = use.layer.kind == "linear" and len(use.inputs) == 1 and name in self._sources
            key = (id(self._sources[name]), use.layer.bias is None) if shared else name
            groups.setdefault(key, []).append(name)
        self.sharing = {name: tuple(group) for group in groups.values() for name in group}
        self._sources.clear()

    def finish(self) -> None:
        """The backward pass is over: hand over the layers of whose uses some had no part in the loss."""
        for name in [name for name, use in self._uses.items() if use.gradients]:
            self._deliver(name)

    def _owner(self, name: str) -> tuple[Layer, str]:
        """What a module is on its own, and the name of the layer whose uses its uses are."""
        return self._tied.get(name) or (self._uses[name].layer, name)

    def _called(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook: what the model is to go on with in place of the output; None: the output."""
        a: Tensor = args[0] if args else next(iter(kwargs.values()))
        layer, owner = self._owner(name)
        if not torch.is_grad_enabled():  # the model itself has no gradient through this use
            self.blind.add(name)
            return None
        if layer.kind == "embedding" and len(a) == 1 < len(self._mask) and a.shape[1:] == self._mask.shape[1:]:
            # Positions, the same in every sequence, looked up once for all of them.
            a, output = a.expand(self._mask.shape), output.expand(*self._mask.shape, -1)
        if reason := self._why_not(layer, a, len(args) + len(kwargs), output):
            self.lost[name if layer.kind == "embedding" else owner] = reason
            return None
        if layer.kind == "router":
            self._follow(name, a, output if isinstance(output, Tensor) else output[0])
            return None  # the output's other parts were made from it: it cannot be replaced
        self._sources[name] = a
        return self._follow(name, a[..., None] if layer.kind == "embedding" else a, output)

    def _expert_called(self, module: str, stack: str, expert: int, a: Tensor, output: Tensor, tokens: Tensor) -> Tensor:
        name = f"{module}.{stack}.{expert}"
        return self._follow(name, a, output, tokens) if name in self._uses else output

    def _why_not(self, layer: Layer, a: Tensor, inputs: int, output: Any) -> str | None:
        """Why this use of a layer cannot be measured: it does something else, or the sequences are not kept apart."""
        if layer.kind == "router":
            return odd_router(layer, a, output, self._mask)
        if layer.kind == "linear" and self._check and (reason := odd_linear(layer, a, output)):
            return reason
        if layer.kind == "norm" and inputs > 1:
            return "it takes more than one input"
        sequences, length = self._mask.shape
        tokens: tuple[int, ...] = a.shape if layer.kind == "embedding" else a.shape[:-1]
        if len(tokens) == 3 and tokens[1] == 1:  # one latent head for all of them, as in DeepSeek's attention
            tokens = tokens[::2]
        if tokens in ((sequences, length), (sequences * length,)):
            return None
        if layer.kind == "norm" and a.shape[:2] == self._mask.shape:  # of single heads
            return None
        return f"input of shape {list(a.shape)} for {sequences} sequences of {length} tokens"

    def _follow(self, name: str, a: Tensor, output: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Note a use's input, and have its output's gradient come in; return the output that it will come in for."""
        layer, owner = self._owner(name)
        use, output = self._uses[owner], _hookable(output)
        arrived = partial(self._arrived, owner, layer, len(use.inputs), a._version)
        output.register_hook(arrived)  # type: ignore[no-untyped-call]
        use.inputs.append(a.detach())
        if tokens is not None:
            use.tokens.append(tokens)
        return output

    def _arrived(self, owner: str, layer: Layer, index: int, version: int, gradient: Tensor) -> None:
        """The gradient of a use's output is there; `version` was its input's when it was used."""
        if (use := self._uses.get(owner)) is None:  # left out since, for another of its uses
            return
        a = use.inputs[index]
        if a._version != version:
            raise ValueError(f"layer {owner!r}: its input is changed in place after it; leave it out with `layers=`")
        if layer.kind == "embedding" and use.layer is not layer:  # the table is a head's weight, and is seen as that
            a, gradient = gradient, one_hot(layer.module, a.squeeze(-1)).to(gradient)
        elif layer.kind == "norm":
            a, gradient = norm_gradients(layer, a, gradient, self._mask)
        use.inputs[index], use.gradients[index] = a, gradient
        if len(use.gradients) == len(use.inputs):
            self._deliver(owner)

    @torch.no_grad()
    def _deliver(self, name: str) -> None:
        """Join the uses that have a gradient, in the order of the calls, and hand the layer over."""
        use = self._uses.pop(name)
        order = sorted(use.gradients)
        inputs, gradients = [use.inputs[i] for i in order], [use.gradients[i] for i in order]
        mask = self._mask.to(gradients[0].device)
        reals = [mask] * len(order)
        if use.layer.kind == "expert":
            tokens = [use.tokens[i] for i in order]
            inputs, gradients, reals = (
                [by_sequence(x, at, *mask.shape) for x, at in zip(rows, tokens, strict=True)]
                for rows in (inputs, gradients, [mask.flatten()[at] for at in tokens])
            )
        a, g = self._inputs(name, use.layer, inputs, reals), _joined(gradients, reals)
        if a.is_floating_point():  # a router may compute in another type than the model's
            g = g.to(a.dtype)
        if isinstance(use.layer.module, nn.Embedding):
            a = a.squeeze(-1)
            if (padding := use.layer.module.padding_idx) is not None:  # a row that never trains
                g = g.masked_fill((a == padding)[..., None], 0)
        with torch.autocast(a.device.type, enabled=False):
            self._consume(name, a, g, torch.cat(reals, dim=1))

    def _inputs(self, name: str, layer: Layer, inputs: list[Tensor], reals: list[Tensor]) -> Tensor:
        """All uses' inputs, [B, k * T, in (+1)]; made by the first of the layers that share them, for all of them."""
        group = self.sharing[name]
        if group not in self._ready:
            a = _joined(inputs, reals)
            if layer.bias is not None and layer.kind != "norm":
                a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
            self._ready[group] = a, set(group)
        a, waiting = self._ready[group]
        waiting.remove(name)
        if not waiting:
            del self._ready[group]
        return a


def _hookable(output: Tensor) -> Tensor:
    """The output of a layer, or another with the same values, so that its gradient comes to a hook whatever follows."""
    if not output.requires_grad:
        # Nothing before this layer is measured. A zero that requires a gradient starts the graph here, so the backward
        # pass stops here; the output itself as a leaf would forbid the model to change it in place.
        return output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
    # A change in place rewrites a view's history, and would lose its hooks.
    return output.clone() if output._is_view() else output


def _joined(parts: list[Tensor], masks: list[Tensor]) -> Tensor:
    """Rows of several uses as [B, k * T, ...], in float32 at least (of ids as they are)."""
    shaped = [part.reshape(*mask.shape, part.shape[-1]) for part, mask in zip(parts, masks, strict=True)]
    joined = shaped[0] if len(shaped) == 1 else torch.cat(shaped, dim=1)
    if not joined.is_floating_point():
        return joined
    return joined.to(torch.promote_types(joined.dtype, torch.float32))
