"""The forward pass of stacked experts, expert by expert, so that each one's inputs and outputs can be seen.

transformers keeps the experts of a layer as parameters [experts, out, in] and runs them by fused kernels, which no
hook can look into. This is the same function, written out. Knows transformers' experts interface alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Watch = Callable[[str, int, Tensor, Tensor, Tensor], Tensor]
"""(stack of parameters, expert, inputs [n, in], outputs [n, out], numbers of the tokens [n]) -> the outputs."""


def experts_forward(module: Any, watch: Watch) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The forward of a module for which `layers.is_stacked_experts` holds, with each of its matrices shown to `watch`.

    Tokens are in order within each expert. The sum over a token's experts is taken in the order of the experts, so the
    result equals that of other implementations to rounding.
    """

    def linear(stack: str, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        weight, biases = getattr(module, stack)[expert], getattr(module, f"{stack}_bias", None)
        y = F.linear(x, weight.mT if module.is_transposed else weight, None if biases is None else biases[expert])
        return watch(stack, expert, x, y, tokens)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        first = "gate_up_proj" if module.has_gate else "up_proj"
        for expert in range(len(module.down_proj)):
            tokens, choice = (top_k_index == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            x = linear(first, expert, hidden_states[tokens], tokens)
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
