"""Products of the training's own gradients with the tasks', seen in passing, with no pass of their own.

Hooks look at what a training step computes in any case and hand it on as it is, so the model trains on bit for bit as
without them. What is differentiated in a step is some multiple s of the tokens' summed losses (accumulation, loss
scaling and the averaging over processes are in it); s is read off the gradient of the logits and taken out again.

Two forms. Where a micro-batch holds one domain, its gradient as it reaches each parameter, before it is accumulated or
averaged over processes, meets the tasks' in one product (`ParameterProducts`). Where micro-batches are mixed, each
sequence's does, put together from a layer's inputs and output gradients (`TokenProducts`). This module knows torch and
models; it knows no domain and no trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dynmix.influence.batch import logits_of, token_mask
from dynmix.influence.gradients import gradients_of
from dynmix.influence.isolation import unwrap
from dynmix.influence.kinds import norm_gradients
from dynmix.influence.scale import Scale
from dynmix.influence.task_gradients import TaskGradients, names_of, uses_of
from dynmix.observation import Array

_TOGETHER = 4  # gradients of a parameter that meet the tasks' at once


@dataclass(eq=False)
class _Forward:
    """One forward pass in training mode, and what its backward pass has brought."""

    input_ids: Tensor
    scale: Scale
    products: list[Tensor] = field(default_factory=list)  # [n_rows] or [B, n_rows] each, of one layer or parameter
    reached: bool = False  # whether its backward pass has come to a measured parameter
    mask: Tensor | None = None  # of its real tokens


@dataclass
class _Held:
    """A parameter's gradients whose products are still to be made."""

    forwards: list[_Forward]  # whose they are
    gradients: Tensor  # [_TOGETHER, numel], copied: the training may go on to use their memory


@dataclass(frozen=True)
class Seen:
    """One micro-batch.

    Attributes:
        input_ids: int64[B, T], on the CPU.
        products: float64[n, n_rows], of the summed loss of the micro-batch (n = 1) or of each sequence (n = B).
        tokens: float64[n], scored tokens.
    """

    input_ids: Tensor
    products: Array
    tokens: Array


class _Watch:
    """What both forms share: training's forward passes, and the backward passes that come to their logits.

    A form adds what it does when a forward pass is followed and when its backward pass begins.
    """

    def __init__(self, model: nn.Module, gradients: TaskGradients) -> None:
        self.model, self.gradients = model, gradients
        self.active = True
        self.problem: Exception | None = None
        self.skipped = 0  # micro-batches whose gradient was not finite
        self._seen: list[_Forward] = []  # whose backward passes have begun
        self._hooks: list[Any] = [model.register_forward_hook(self._forward_ended, with_kwargs=True)]

    def detach(self) -> None:
        """Look no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], []

    def take(self) -> list[Seen]:
        """What was seen since the last call.

        Raises:
            ValueError: it cannot be measured, with the reason and what to do.
        """
        seen, self._seen = self._seen, []
        self._try(self._finish)
        if self.problem is not None:
            raise self.problem
        found = []
        for forward in seen:
            tokens = forward.scale.tokens()
            if not tokens.sum():
                continue
            if not forward.products:
                raise ValueError(_COMBINED)
            products = sum((part.cpu().double() for part in _stacked(forward.products)), torch.zeros(()))
            scale = forward.scale.value()
            if scale is None or not products.isfinite().all():
                self.skipped += 1
                continue
            products = products.reshape(-1, products.shape[-1]) / scale
            tokens = tokens if len(products) == len(tokens) else tokens.sum(0, keepdim=True)
            found.append(Seen(forward.input_ids.cpu(), products.numpy(), tokens.numpy()))
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_ended(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._looks(model):
            self._try(lambda: self._follow({"input_ids": args[0]} | kwargs if args else kwargs, output))

    def _looks(self, module: nn.Module) -> bool:
        return self.active and self.problem is None and module.training and torch.is_grad_enabled()

    def _follow(self, batch: dict[str, Any], output: Any) -> None:
        logits = logits_of(output)
        if logits is None or logits.grad_fn is None or not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError(
                "in-run influence needs the logits that the loss is made of, but the model was not called with "
                "input_ids or returned no logits with a gradient (a fused loss, such as Liger's, keeps none): switch "
                "that off, or leave in_run= out"
            )
        forward = _Forward(batch["input_ids"].detach(), Scale(logits.detach(), batch))
        self._followed(forward)
        node, index = logits.grad_fn, logits.output_nr
        while type(node).__name__ == "ToCopyBackward0":  # of mixed precision: the loss may be made of what was copied
            [(before, index)] = node.next_functions
            assert before is not None
            node = before
        node.register_prehook(lambda gradients: self._try(lambda: self._backward_begins(forward, gradients[index])))

    def _followed(self, forward: _Forward) -> None:
        """A forward pass has ended, and its backward pass is waited for."""

    def _backward_begins(self, forward: _Forward, gradient: Tensor | None) -> None:
        """A backward pass has come to the logits of a forward pass, and to nothing before them yet."""
        if gradient is None:
            raise ValueError(_NO_GRADIENT)
        if forward in self._seen:
            raise ValueError(_COMBINED)
        forward.scale.arrived(gradient)
        self._seen.append(forward)

    def _finish(self) -> None:
        """Make the products that are still to be made of what was seen."""

    def _try(self, action: Callable[[], None]) -> None:
        """An exception here would end the training: it is kept for whoever takes what was seen."""
        try:
            with torch.no_grad():
                action()
        except Exception as problem:
            self.problem = problem


class ParameterProducts(_Watch):
    """Micro-batches of one domain each: the gradient that reaches a parameter, in one product with the tasks'.

    Reading the tasks' is what it costs, so a few micro-batches' gradients meet them at once.

    A parameter's gradient does not say which forward pass it is of. The last of these events before it does:

        a training forward pass has ended       nobody's: an error, for gradients come to the logits first
        an evaluation's forward pass has ended  the evaluation's: passed over
        a backward pass is at the logits of F   F's

    If F has none when a backward pass is at the logits of another, the two have one backward pass: an error as well.

    Also where the parameters are sharded by FSDP2: what is looked at is the whole parameter that a forward pass has.
    """

    def __init__(self, model: nn.Module, gradients: TaskGradients) -> None:
        super().__init__(model, gradients)
        self._flat = {name: stack.flatten(1) for name, stack in gradients.parameters.items()}
        self._held: dict[str, _Held] = {}
        self._silent = set(self._flat)
        self._current: _Forward | None = None  # whose the gradients are that reach parameters; None: nobody's
        self._evaluating = False  # whether they are an evaluation's instead
        inner = unwrap(model)
        self._known: dict[str, Tensor] = {}  # parameters that are looked at
        for name, parameter in inner.named_parameters():
            if name not in self._flat:
                continue
            if isinstance(parameter, DTensor):
                owner, _, own = name.rpartition(".")
                module = inner.get_submodule(owner)
                self._hooks.append(module.register_forward_pre_hook(partial(self._unsharded, name, own)))
            else:
                self._look_at(name, parameter)

    @property
    def silent(self) -> list[str]:
        """Parameters that no gradient has reached so far."""
        return sorted(self._silent)

    def _unsharded(self, name: str, own: str, module: nn.Module, args: Any) -> None:
        parameter = module._parameters[own]
        if parameter is not None and self._known.get(name) is not parameter:
            self._look_at(name, parameter)

    def _look_at(self, name: str, parameter: Tensor) -> None:
        self._known[name] = parameter
        hook = partial(self._gradient, name)
        self._hooks.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_ended(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._evaluating = not model.training
        super()._forward_ended(model, args, kwargs, output)

    def _followed(self, forward: _Forward) -> None:
        self._current = None

    def _backward_begins(self, forward: _Forward, gradient: Tensor | None) -> None:
        if self._current is not None and not self._current.reached:
            raise ValueError(_COMBINED)
        super()._backward_begins(forward, gradient)
        self._current, self._evaluating = forward, False

    def _gradient(self, name: str, gradient: Tensor) -> None:
        if self.active and self.problem is None and not self._evaluating:
            self._try(lambda: self._meet(name, gradient))

    def _meet(self, name: str, gradient: Tensor) -> None:
        towards = self._flat[name]
        if isinstance(gradient, DTensor) or gradient.numel() != towards.shape[1]:
            raise ValueError(
                f"parameter {name!r} has a gradient of a part of it alone: in-run influence works where each process "
                "has whole parameters in its forward pass (DDP, FSDP2, ZeRO-1 and 2); leave in_run= out"
            )
        if self._current is None:
            raise ValueError(_NO_GRADIENT)
        self._silent.discard(name)
        self._current.reached = True
        if name not in self._held:
            self._held[name] = _Held([], towards.new_empty(_TOGETHER, towards.shape[1]))
        held = self._held[name]
        held.gradients[len(held.forwards)] = gradient.reshape(-1)
        held.forwards.append(self._current)
        if len(held.forwards) == _TOGETHER:
            self._multiply(name)

    def _multiply(self, name: str) -> None:
        held = self._held[name]
        products = held.gradients[: len(held.forwards)] @ self._flat[name].T
        for forward, of_parameter in zip(held.forwards, products, strict=True):
            forward.products.append(of_parameter)
        held.forwards.clear()

    def _finish(self) -> None:
        for name in self._held:
            self._multiply(name)


class TokenProducts(_Watch):
    """Micro-batches of any sequences: each sequence's gradient, from what a layer was given and what came back.

    It costs about as much as the gradients of the measured weights do, in each step that it looks at.

    A layer's use belongs to the forward pass that began last, or, where checkpointing runs layers again in a backward
    pass, to the one whose backward pass that is.

    Raises ValueError for layers other than linear ones, embeddings and norms, and for a compiled or sharded model.
    """

    def __init__(self, model: nn.Module, gradients: TaskGradients) -> None:
        inner = unwrap(model)
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in (model, *inner.modules())):
            raise ValueError("in-run influence of mixed micro-batches looks into layers, which torch.compile hides")
        if any(isinstance(p, DTensor) for p in inner.parameters()):
            raise ValueError("in-run influence of mixed micro-batches needs whole parameters, and these are sharded")
        self._layers = uses_of(inner, gradients)
        if odd := [name for name, layer in self._layers.items() if layer.kind in ("expert", "router")]:
            raise ValueError(
                f"in-run influence of mixed micro-batches does not see {odd[0]!r}, of a mixture of experts: leave such "
                "layers out with layers=, or let micro-batches hold one domain each"
            )
        super().__init__(model, gradients)
        self._names = names_of(inner)
        # Of the forward pass that layers are used in now: its real tokens, and where its products go.
        self._mask, self._products = torch.empty(0), list[Tensor]()
        for name, layer in self._layers.items():
            hook = partial(self._layer_ended, name)
            self._hooks.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        self._hooks.append(model.register_forward_pre_hook(self._forward_begins, with_kwargs=True))

    def _forward_begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._looks(model):
            self._try(lambda: self._note({"input_ids": args[0]} | kwargs if args else kwargs))

    def _note(self, batch: dict[str, Any]) -> None:
        self._mask, self._products = token_mask(batch), []

    def _followed(self, forward: _Forward) -> None:
        forward.products, forward.mask = self._products, self._mask

    def _backward_begins(self, forward: _Forward, gradient: Tensor | None) -> None:
        super()._backward_begins(forward, gradient)
        if forward.mask is not None:
            self._mask, self._products = forward.mask, forward.products

    def _layer_ended(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if self._looks(module) and output.requires_grad:
            a = args[0] if args else next(iter(kwargs.values()))
            self._try(lambda: self._watch(name, a.detach(), output))

    def _watch(self, name: str, a: Tensor, output: Tensor) -> None:
        node, index, version = output.grad_fn, output.output_nr, a._version
        mask, products = self._mask, self._products
        assert node is not None

        def arrived(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[index]
            if gradient is None or self.problem is not None or not self.active:
                return
            if a._version != version:
                raise ValueError(f"layer {name!r}: its input is changed in place after it; leave it out with layers=")
            products.append(self._met(name, a, gradient, mask))

        node.register_prehook(lambda gradients: self._try(lambda: arrived(gradients)))

    def _met(self, name: str, a: Tensor, g: Tensor, mask: Tensor) -> Tensor:
        """<G_b, R>, [B, n_rows], of one use of the layer."""
        layer = self._layers[name]
        B, T = mask.shape
        if layer.kind == "norm":
            a, g = norm_gradients(layer, a, g, mask)
        if layer.kind == "embedding":
            if len(a) != B:
                raise ValueError(
                    f"layer {name!r} looks up its rows once for all sequences of a micro-batch, whose gradients then "
                    "come as one: leave it out with layers=, or let micro-batches hold one domain each"
                )
            if (padding := getattr(layer.module, "padding_idx", None)) is not None:
                g = g.masked_fill((a == padding)[..., None], 0)
        else:
            a = a.reshape(B, T, a.shape[-1])
            a = a.to(torch.promote_types(a.dtype, torch.float32))
            if layer.bias is not None and layer.kind != "norm":
                a = torch.cat([a, a.new_ones(B, T, 1)], dim=-1)
        g = g.reshape(B, T, g.shape[-1])
        with torch.autocast(g.device.type, enabled=False):
            towards = self.gradients.matrix(layer, self._names)
            return gradients_of(a, g.to(towards.dtype)).products(towards)


def _stacked(parts: list[Tensor]) -> list[Tensor]:
    """The sum of the parts on each device."""
    devices = {part.device for part in parts}
    return [torch.stack([part for part in parts if part.device == device]).double().sum(0) for device in devices]


_COMBINED = (
    "several forward passes had one backward pass, or one of them two, or reached no measured parameter: in-run "
    "influence works where each micro-batch has a forward and a backward pass of its own; leave in_run= out"
)
_NO_GRADIENT = (
    "parameters had a gradient, and the logits that the model returned had none: in-run influence reads the scale of "
    "the loss off them, so the loss has to be made of them where it can be seen (under torch.compile outside of the "
    "model); leave in_run= out"
)
