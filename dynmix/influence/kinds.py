"""How layers that are no plain linear ones are seen as such: tied embeddings, norms, routers and stacked experts.

Knows modules and their inputs and gradients; no hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynmix.influence.layers import Layer, first_stack


def one_hot(table: nn.Module, ids: Tensor) -> Tensor:
    """The rows that were looked up, [..., rows]; none where it is the padding, which never trains."""
    assert isinstance(table, nn.Embedding)
    found = F.one_hot(ids, table.num_embeddings)
    return found if table.padding_idx is None else found.masked_fill((ids == table.padding_idx)[..., None], 0)


def norm_gradients(layer: Layer, x: Tensor, gradient: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A norm as a linear layer of one input that is 1: its gradients by weight and bias, token by token."""
    scaled = []
    for value in (1.0, 0.0):  # the output is affine in the weight, whatever else the norm does
        twin = copy.copy(layer.module)
        twin._parameters = {
            name: None if p is None else nn.Parameter(x.new_full(p.shape, value if name == "weight" else 0.0))
            for name, p in layer.module._parameters.items()
        }
        scaled.append(twin.forward(x))
    products = [gradient * (scaled[0] - scaled[1])] + ([gradient] if layer.bias is not None else [])
    # Norms of single heads have the heads between the tokens and the width.
    rows = torch.cat([part.reshape(mask.numel(), -1, x.shape[-1]).sum(1) for part in products], dim=-1)
    return rows.new_ones(mask.numel(), 1), rows


def odd_router(layer: Layer, x: Tensor, output: Any, mask: Tensor) -> str | None:
    """Why it cannot be measured: the first thing that it returns must be the product with its weight."""
    logits = output if isinstance(output, Tensor) else output[0]
    if not isinstance(logits, Tensor) or logits.shape != (mask.numel(), len(layer.weight)) or not logits.requires_grad:
        return "its first output is no [tokens, experts] on the way to the loss"
    return None if _is_linear_map(layer, x.reshape(mask.numel(), -1), logits) else "its first output is no linear map"


def odd_linear(layer: Layer, x: Tensor, output: Any) -> str | None:
    """Why a layer cannot be measured whose class has a forward of its own: it must return what a linear layer does."""
    if not isinstance(output, Tensor):
        return "its output is no tensor"
    if type(layer.module).forward in (nn.Linear.forward, Conv1D.forward) or _is_linear_map(layer, x, output):
        return None
    return "its output is no linear map of its input"


def _is_linear_map(layer: Layer, x: Tensor, output: Tensor) -> bool:
    """Whether it is, to the precision of a coarse type: what routers cast, and quantised layers round, is one still."""
    own = layer.module._parameters  # as they are in this forward pass: a sharded model has others outside of it
    weight, bias = cast(Tensor, own["weight"]), own.get("bias")
    if layer.transposed:
        weight = weight.mT
    if weight.ndim != 2 or (*x.shape[:-1], len(weight)) != output.shape or x.shape[-1] != weight.shape[1]:
        return False  # packed weights, for one
    with torch.no_grad():
        expected = F.linear(x.to(output), weight.to(output), None if bias is None else bias.to(output))
        # Of a router a gradient of probabilities would be taken for one of logits.
        return bool((output - expected).abs().max() <= 0.01 * expected.abs().max() + 1e-6)


Watch = Callable[[str, int, Tensor, Tensor, Tensor], Tensor]
"""(stack of parameters, expert, inputs [n, in], outputs [n, out], numbers of the tokens [n]) -> the outputs."""


def experts_forward(module: Any, watch: Watch) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The forward of a module for which `layers.is_stacked_experts` holds, with each of its matrices shown to `watch`.

    transformers runs all experts by fused kernels, which no hook can look into; this is the same function, written out.
    Tokens are in order within each expert. The sum over a token's experts is taken in the order of the experts, so the
    result equals that of other implementations to rounding.
    """

    def linear(stack: str, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        weight, biases = getattr(module, stack)[expert], getattr(module, f"{stack}_bias", None)
        y = F.linear(x, weight.mT if module.is_transposed else weight, None if biases is None else biases[expert])
        return watch(stack, expert, x, y, tokens)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for expert in range(len(module.down_proj)):
            tokens, choice = (top_k_index == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            x = linear(first_stack(module), expert, hidden_states[tokens], tokens)
            x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
            x = linear("down_proj", expert, x, tokens)
            if getattr(module, "has_post_expert_norm", False):
                x = module.post_expert_norm(x)
            x = x * top_k_weights[tokens, choice, None]
            result = result.index_add(0, tokens, x.to(result.dtype))
        return result

    return forward


def by_sequence(x: Tensor, tokens: Tensor, sequences: int, length: int) -> Tensor:
    """Rows [n, ...] of tokens numbered through a batch, as [sequences, most tokens of one, ...] with zeros behind."""
    of = tokens // length
    counts = torch.bincount(of, minlength=sequences)
    starts = counts.cumsum(0) - counts
    laid = x.new_zeros(sequences, int(counts.max()), *x.shape[1:])
    laid[of, torch.arange(len(x), device=x.device) - starts[of]] = x
    return laid
