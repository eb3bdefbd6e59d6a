"""Which matrices of a model can be measured, and how a module's parameters lie in them.

Everything that is measured is treated as a matrix [out, in] whose gradient is a sum over tokens of g a^T. This module
knows modules and parameters; it runs nothing, and knows no hook, no batch and no curvature.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Kind = Literal["linear", "router", "expert", "embedding", "norm"]


@dataclass(frozen=True)
class Layers:
    """Which layers to measure; without arguments all linear ones, those of experts and the head included.

    Args:
        include: regular expression or predicate on names; None: all.
        exclude: regular expression; what it finds is left out.
        embeddings: the tables of embeddings too. A table that is tied to the head is one matrix with it.
        norms: the weights and biases of RMSNorm, LayerNorm and their kin too.
        head: the linear layer that predicts tokens, where the model says which (`get_output_embeddings`).

    Raises:
        ValueError: an `include` or `exclude` that is no regular expression.
    """

    include: str | Callable[[str], bool] | None = None
    exclude: str | None = None
    embeddings: bool = False
    norms: bool = False
    head: bool = True

    def __post_init__(self) -> None:
        for pattern in (None if callable(self.include) else self.include, self.exclude):
            try:
                re.compile("" if pattern is None else pattern)
            except (re.error, TypeError) as problem:
                raise ValueError(
                    f"layers={pattern!r} is no regular expression: {problem}; give one that is found in the names of "
                    r"layers, as r'\.(10|11)\.' or 'q_proj|k_proj', or a function of a name"
                ) from problem

    @staticmethod
    def of(layers: LayerFilter) -> Layers:
        """The same as `Layers`."""
        return layers if isinstance(layers, Layers) else Layers(layers)

    def __call__(self, name: str) -> bool:
        """Whether a layer of this name is wanted."""
        if self.exclude is not None and re.search(self.exclude, name):
            return False
        if callable(self.include):
            return self.include(name)
        return self.include is None or re.search(self.include, name) is not None


LayerFilter = str | Callable[[str], bool] | Layers | None
"""Which layers to measure: a regular expression to be found in the name, a predicate on it, `Layers`, or None for all
linear ones."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One matrix [out, in] of a model, the bias as its last column.

    Of an embedding it is the table [rows, width]. Of a norm with n weights it is a column [n, 1], with biases
    [2 * n, 1], the weights first.
    """

    module: nn.Module
    kind: Kind
    weight: nn.Parameter
    bias: nn.Parameter | None = None
    transposed: bool = False  # the parameter is [in, out]
    expert: int | None = None  # the parameters have an expert in front

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        if self.kind == "norm":
            return len(self.weight) * (2 if self.bias is not None else 1), 1
        rows, columns = self.weight.shape[-2:]
        if self.transposed:
            rows, columns = columns, rows
        return rows, columns + (self.bias is not None)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight, and bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def matrix(self, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """The layer's matrix, [..., out, in], of whatever `of` gives for each parameter, [..., *shape of it]."""
        parts = [of(p) if self.expert is None else of(p).select(-p.ndim, self.expert) for p in self.parameters]
        if self.kind == "norm":
            return torch.cat(parts, dim=-1)[..., None]
        weight = parts[0].mT if self.transposed else parts[0]
        return weight if self.bias is None else torch.cat([weight, parts[1][..., None]], dim=-1)

    def split(self, matrix: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """The inverse: each parameter with its part of a matrix, in the parameter's shape (of an expert, its slice)."""
        if self.kind == "norm":
            return list(zip(self.parameters, torch.tensor_split(matrix[:, 0], len(self.parameters)), strict=True))
        weight, *bias = (matrix,) if self.bias is None else (matrix[:, :-1], matrix[:, -1])
        return list(zip(self.parameters, [weight.mT if self.transposed else weight, *bias], strict=True))


def measurable_layers(
    model: nn.Module, *, embeddings: bool = False, norms: bool = False, head: bool = True
) -> dict[str, Layer]:
    """The linear layers of a model by name, in its order, and what else is asked for.

    Linear layers are `nn.Linear` and GPT-2's `Conv1D`, subclasses included, and of the mixtures of experts that
    transformers keeps as stacked parameters the routers, and each matrix of each expert ("experts.gate_up_proj.3").
    A frozen bias of a weight that trains is no part of its layer. Without the head, one that is tied to a table that is
    asked for is there still.
    """
    output = output_layer(model)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and embeddings}
    left_out = None if head or id(getattr(output, "weight", None)) in tables else output
    unasked = {kind for kind, asked in (("embedding", embeddings), ("norm", norms)) if not asked}
    return {
        name: layer
        for path, module in model.named_modules()
        for name, layer in _layers_of(plain_name(path), module)
        if module is not left_out and layer.kind not in unasked
    }


def output_layer(model: nn.Module) -> nn.Module | None:
    """The module that predicts tokens, if the model says so."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


def plain_name(path: str) -> str:
    """A module's name without what torch.compile and activation checkpointing wrap around modules inside the model."""
    return path.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def unmeasurable(model: nn.Module) -> list[str]:
    """Modules with trainable parameters that are of no kind known here, by name; a bias alone is of none."""
    found = []
    for path, module in model.named_modules():
        layers = [layer for _, layer in _layers_of(path, module) if layer.weight.requires_grad]
        known = {id(p) for layer in layers for p in layer.parameters}
        if any(p.requires_grad and id(p) not in known for p in module.parameters(recurse=False)):
            found.append(plain_name(path))
    return found


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether it holds experts as transformers' experts interface describes them, with all of them on this device."""
    stacks = [getattr(module, name, None) for name in (first_stack(module), "down_proj")]
    return (
        all(isinstance(stack, nn.Parameter) and stack.ndim == 3 for stack in stacks)
        and hasattr(module, "is_transposed")
        and hasattr(module, "_apply_gate")
        and not getattr(module, "_is_expert_parallel", False)
    )


def _trained(bias: nn.Parameter | None, weight: nn.Parameter | None) -> nn.Parameter | None:
    """The bias, unless it is frozen beside a weight that trains."""
    frozen = isinstance(bias, nn.Parameter) and not bias.requires_grad
    return None if frozen and isinstance(weight, nn.Parameter) and weight.requires_grad else bias


def first_stack(module: nn.Module) -> str:
    """Name of the parameters that the experts' inputs meet; "down_proj" gives their outputs."""
    return "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj"


def _layers_of(name: str, module: nn.Module) -> Iterator[tuple[str, Layer]]:
    weight: nn.Parameter | None = getattr(module, "weight", None)
    bias: nn.Parameter | None = _trained(getattr(module, "bias", None), weight)
    if isinstance(module, nn.Linear | Conv1D):
        if not isinstance(weight, nn.Parameter):
            return  # computed of others, as by torch's parametrizations
        yield name, Layer(module, "linear", weight, bias, transposed=isinstance(module, Conv1D))
    elif isinstance(module, nn.Embedding):
        if type(module).forward is nn.Embedding.forward:  # others change what they looked up
            yield name, Layer(module, "embedding", cast(nn.Parameter, weight))
    elif is_stacked_experts(module):
        for stack in (first_stack(module), "down_proj"):
            weights: nn.Parameter = getattr(module, stack)
            biases: nn.Parameter | None = _trained(getattr(module, f"{stack}_bias", None), weights)
            for expert in range(len(weights)):
                transposed = bool(module.is_transposed)
                yield f"{name}.{stack}.{expert}", Layer(module, "expert", weights, biases, transposed, expert)
    elif type(module).__name__.endswith("Router") and isinstance(weight, nn.Parameter) and weight.ndim == 2:
        yield name, Layer(module, "router", weight, bias)
    elif (
        "Norm" in type(module).__name__
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 1
        and {id(p) for p in module.parameters()} <= {id(weight), id(bias)}
        and not list(module.buffers())
    ):
        yield name, Layer(module, "norm", weight, bias)
