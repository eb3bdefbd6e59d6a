"""What a scoring costs: floating-point operations from the model's layers, time from what was measured.

Knows models' layers and numbers; reads and scores nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from torch import nn

from dynmix.influence.isolation import unwrap
from dynmix.influence.layers import Layer, measurable_layers


def flops_per_token(model: nn.Module, layers: Collection[str], tasks: int, sequence_length: int) -> float:
    """Floating-point operations that a scored token takes, 2 (W + B + M + n M / L).

    W: weights of all linear layers (forward); B: of those behind the lowest measured layer, in the model's order
    (gradients of their inputs); M: of the measured ones (a sequence's gradient, and its products with n tasks, which
    the L tokens of the sequence share). Attention's own products, and the fitting of the curvature, come on top; of a
    mixture of experts all are counted, of which a token meets some.

    Args:
        model: the model.
        layers: names of the measured layers; a table of embeddings costs a backward pass through the whole model, and
            next to nothing itself.
        tasks: how many the scores are for.
        sequence_length: tokens of a sequence.
    """
    model = unwrap(model)
    linear = {name: _weights(layer) for name, layer in measurable_layers(model).items()}
    order = list(measurable_layers(model, embeddings=True))
    lowest = min(order.index(name) for name in layers)
    behind = sum(linear.get(name, 0) for name in order[lowest + 1 :])
    measured = sum(linear.get(name, 0) for name in layers)
    return 2.0 * (sum(linear.values()) + behind + measured * (1 + tasks / sequence_length))


def describe(tokens: int, flops_per_token: float, speed: float) -> str:
    """A line for people: what is to be done, and about how long it takes at `speed` tokens a second."""
    return (
        f"{tokens:,} tokens to score, about {flops_per_token * tokens:.2g} FLOPs; at {speed:,.0f} tokens/s "
        f"{timedelta(seconds=round(tokens / max(speed, 1e-9)))} h"
    )


def _weights(layer: Layer) -> int:
    rows, columns = layer.shape
    return rows * (columns - (layer.bias is not None))
