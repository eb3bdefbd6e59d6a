"""Layer inputs and output gradients of one batch, by hooks, without leaving a trace in the model.

The gradient of a linear layer is the sum over tokens of g a^T, where a is the layer's input and g the gradient of the
loss with respect to its output. Both are caught on their way through a forward and a backward pass in which no
parameter requires a gradient. So no gradient reaches a parameter: `.grad` stays as it was and the gradient hooks of
DDP, FSDP2 and ZeRO never fire. This module knows torch and the models; it knows no curvature, no domain and no trainer.
"""

from __future__ import annotations

import inspect
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
"""What the model takes: `input_ids` [B, T], and `labels`, `attention_mask` [B, T] if there are any; on any device."""

Batches = Iterable[Batch]
"""A list or a DataLoader: something that can be read more than once and gives the same sequences each time."""

Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
"""(model, batch) -> (loss of each sequence, summed over its tokens in nats [B]; scored tokens of each [B])."""

Consume = Callable[[str, Tensor, Tensor, Tensor], None]
"""(layer, inputs a [B, T, in (+1)], output gradients g [B, T, out], mask of real tokens, bool [B, T]).

Of an embedding a is int64[B, T], the rows that it looked up.
"""

LayerFilter = str | Callable[[str], bool] | None
"""Which layers to measure, by name: a regular expression to be found in it, a predicate, or None for all."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Everything inside happens to a model in eval mode without trainable parameters, and leaves no trace.

    On exit, also after an exception, these are as they were: train/eval flag of every submodule, `requires_grad` and
    `.grad` of every parameter, every buffer, the random states of python, numpy and torch (CPU, CUDA, MPS). Inside,
    dropout and gradient checkpointing are off (both follow eval mode) and compiled modules run eagerly, because a
    compiled graph does not see the hooks of this module.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [dict(module._buffers) for module in modules]
    contents = [(b, b.clone()) for own in buffers for b in own.values() if b is not None]
    try:
        for module in modules:
            module.training = False  # not .eval(): adapters override it to merge weights
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
        with random_state_kept(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, flag, own in zip(modules, training, buffers, strict=True):
            module.training = flag
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, content in contents:
                if not torch.equal(buffer, content):  # copying bumps the version that autograd checks
                    buffer.copy_(content)
        for parameter, flag, grad in parameters:
            parameter.requires_grad_(flag)
            if parameter.grad is not grad:
                parameter.grad = grad


@contextmanager
def random_state_kept() -> Iterator[None]:
    """On exit the random states of python, numpy and torch (CPU, CUDA, MPS) are as they were."""
    python, legacy_numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy_numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def next_token_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, T, V] in float32 at least. Keys that the model's forward does not name ("domain") are left out."""
    accepted = inspect.signature(unwrap(model).forward).parameters
    inputs = {key: value for key, value in batch.items() if key in accepted and key != "labels"}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    output = model(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def next_token_labels(batch: Batch) -> Tensor:
    """Label of each position that has one, already shifted, [B, T-1]; -100 is ignored.

    Without `labels` every token is the label of the position before it, except where `attention_mask` is 0.
    """
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        if "input_ids" not in batch:
            raise ValueError(f"a batch needs `input_ids` or `labels` for the next-token loss, got keys {sorted(batch)}")
        labels = batch["input_ids"]
        if (mask := batch.get("attention_mask")) is not None:
            labels = labels.masked_fill(mask == 0, -100)
    return labels[:, 1:]


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of a causal LM: per sequence its sum over the scored tokens in nats [B], and their number [B]."""
    logits, labels = next_token_logits(model, batch)[:, :-1], next_token_labels(batch)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape).sum(1), (labels != -100).sum(1)


@dataclass
class _Uses:
    """One layer within one batch: its inputs in the order of the calls, and the gradients that have arrived."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)


class Capture:
    """Runs batches through a model and hands over each linear layer's inputs and output gradients.

    Linear layers are `nn.Linear` and GPT-2's `Conv1D`, subclasses included; with `embeddings` also `nn.Embedding`, but
    for subclasses that change what they looked up. Frozen ones are left out unless the whole model is frozen. A tied
    head is measured as the linear layer that it is used as, and where the embedding is measured too, its uses as such
    are uses of the same layer (g the one-hot tokens, a the gradients of what was looked up). A layer used several times
    in a forward counts with the sum of its uses. The first batch settles which layers are measured: an
    input must keep the sequences apart, as [B, T, in] or [B * T, in]. Others (an expert that sees the tokens routed to
    it, a layer that is never called) are left out and named in a warning. Afterwards `layers` holds the measured ones
    by name and `coverage` their share of the model's parameters.

    Create it before `isolated(model)`, which hides what is frozen, and run it inside.

    Raises ValueError if no layer is left, or if a measured layer loses its sequences in a later batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerFilter = None,
        embeddings: bool = False,
        loss: Loss = next_token_loss,
        tick: Callable[[], object] | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.loss = loss
        self.tick = tick or (lambda: None)
        self.coverage = 0.0
        self._settled = False
        wanted = layers if callable(layers) else re.compile(layers or "").search
        known = measurable_layers(self.model, embeddings=embeddings)
        frozen = not any(p.requires_grad for p in self.model.parameters())
        self.layers: dict[str, nn.Module] = {
            name: module for name, module in known.items() if wanted(name) and (frozen or module.weight.requires_grad)
        }
        heads = {id(m.weight): name for name, m in self.layers.items() if isinstance(m, nn.Linear) and m.bias is None}
        self._tied = {
            name: (module, heads[id(module.weight)])
            for name, module in self.layers.items()
            if isinstance(module, nn.Embedding) and id(module.weight) in heads
        }
        self.layers = {name: module for name, module in self.layers.items() if name not in self._tied}
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
        batch = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in _checked(batch).items()}
        mask = token_mask(batch)
        uses: dict[str, _Uses] = {name: _Uses() for name in self.layers}
        lost: dict[str, str] = {}

        @torch.no_grad()
        def deliver(name: str) -> None:
            use = uses.pop(name)
            order = sorted(use.gradients)
            module = self.layers[name]
            a = _joined([use.inputs[i] for i in order], mask)
            g = _joined([use.gradients[i] for i in order], mask)
            if isinstance(module, nn.Embedding):
                a = a.squeeze(-1)
                if module.padding_idx is not None:  # a row that never trains
                    g = g.masked_fill((a == module.padding_idx)[..., None], 0)
            elif getattr(module, "bias", None) is not None:
                a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
            with torch.autocast(a.device.type, enabled=False):
                consume(name, a, g, mask.to(a.device).repeat(1, len(order)))

        def catch(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            a: Tensor = args[0] if args else next(iter(kwargs.values()))
            if name in self._tied or isinstance(self.layers[name], nn.Embedding):
                a = a[..., None]
            if a.shape[:-1] not in (mask.shape, (mask.numel(),)):
                lost[name] = f"input of shape {list(a.shape)} for {mask.shape[0]} sequences of {mask.shape[1]} tokens"
                return output
            if not output.requires_grad:
                # Nothing before this layer is measured. A zero that requires a gradient starts the graph here, so the
                # backward pass stops here; the output itself as a leaf would forbid the model to change it in place.
                output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            elif output._is_view():
                output = output.clone()  # a change in place rewrites a view's history and would lose the hook below
            layer = self._tied[name][1] if name in self._tied else name
            use = uses[layer]
            index = len(use.inputs)
            use.inputs.append(a.detach())

            def arrived(gradient: Tensor) -> None:
                if name in self._tied:
                    use.inputs[index], gradient = gradient, _one_hot(self._tied[name][0], a.squeeze(-1)).to(gradient)
                use.gradients[index] = gradient
                if len(use.gradients) == len(use.inputs):
                    deliver(layer)

            output.register_hook(arrived)  # type: ignore[no-untyped-call]
            return output

        with torch.enable_grad():
            with ExitStack() as hooks:  # gone before the backward pass, which may run forwards again
                tied = {name: module for name, (module, _) in self._tied.items()}
                for name, module in (self.layers | tied).items():
                    handle = module.register_forward_hook(
                        lambda _, args, kwargs, output, name=name: catch(name, args, kwargs, output), with_kwargs=True
                    )
                    hooks.callback(handle.remove)
                losses, tokens = self.loss(self.model, batch)
            self._settle(lost, called={name for name, use in uses.items() if use.inputs})
            for name in lost:
                uses.pop(name, None)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        for name in [name for name, use in uses.items() if use.gradients]:
            deliver(name)  # some of its uses had no part in the loss
        self.tick()
        return losses.detach().cpu().double(), tokens.cpu().double()

    def zeros(self, layer: str, n: int) -> Tensor:
        """n matrices of the layer's gradient: [n, out, in (+1)], of an embedding [n, rows, width]; float32 at least."""
        module = self.layers[layer]
        weight: Tensor = module.weight  # type: ignore[assignment]
        rows, columns = weight.shape
        if not isinstance(module, nn.Embedding):
            rows, columns = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
            columns += getattr(module, "bias", None) is not None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros(n, rows, columns, dtype=dtype, device=weight.device)

    def _settle(self, lost: dict[str, str], called: set[str]) -> None:
        if self._settled:
            if lost:
                name, reason = next(iter(lost.items()))
                raise ValueError(f"layer {name!r} cannot be measured: {reason}; leave it out with `layers=`")
            return
        silent = {name: "never called" for name in self.layers if name not in called and name not in lost}
        left_out = lost | silent
        self.layers = {name: module for name, module in self.layers.items() if name not in left_out}
        if not self.layers:
            raise ValueError(f"no linear layer can be measured: {left_out}")
        self._settled = True
        everything = {id(p): p.numel() for p in self.model.parameters()}
        measured = {id(p): p.numel() for module in self.layers.values() for p in module.parameters(recurse=False)}
        self.coverage = sum(measured.values()) / sum(everything.values())
        logger.info("measuring %d linear layers, %.1f%% of the parameters", len(self.layers), 100 * self.coverage)
        if left_out:
            reasons = Counter(left_out.values())
            logger.warning("%d linear layers are not measured: %s (%s)", len(left_out), _some(left_out), dict(reasons))


def measurable_layers(model: nn.Module, *, embeddings: bool = False) -> dict[str, nn.Module]:
    """The linear layers of a model by name, in its order; with `embeddings`, the tables of embeddings too."""
    return {
        name.replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        or (embeddings and isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward)
    }


def token_mask(batch: Batch) -> Tensor:
    """Which tokens are real, bool [B, T]: `attention_mask`, else all of `input_ids`, else one token a sequence."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return torch.as_tensor(mask != 0)
    if (ids := batch.get("input_ids")) is not None:
        return torch.ones_like(ids, dtype=torch.bool)
    first = next(value for value in batch.values() if isinstance(value, Tensor))
    return torch.ones(len(first), 1, dtype=torch.bool, device=first.device)


def _one_hot(table: nn.Embedding, ids: Tensor) -> Tensor:
    """The rows that were looked up, [..., rows]; none where it is the padding, which never trains."""
    found = F.one_hot(ids, table.num_embeddings)
    return found if table.padding_idx is None else found.masked_fill((ids == table.padding_idx)[..., None], 0)


def _joined(parts: list[Tensor], mask: Tensor) -> Tensor:
    joined = torch.cat([part.reshape(*mask.shape, part.shape[-1]) for part in parts], dim=1)
    if not joined.is_floating_point():
        return joined
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def _checked(batch: Batch) -> Batch:
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch is a dict with `input_ids` of shape [B, T], got {type(batch).__name__}")
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim != 2:
        raise ValueError(f"`input_ids` must have shape [B, T], got {list(ids.shape)}: collate the samples into batches")
    if not any(isinstance(value, Tensor) for value in batch.values()):
        raise TypeError(f"a batch must hold tensors, got keys {sorted(batch)} without any")
    return batch


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
