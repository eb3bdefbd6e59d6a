"""What a scoring costs: floating-point operations from the model's layers, time from what was measured.

Knows models' layers and numbers; reads and scores nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from torch import nn
from transformers import PretrainedConfig

from dynmix.influence.isolation import unwrap
from dynmix.influence.layers import Layer, measurable_layers


def flops_per_token(model: nn.Module, layers: Collection[str], tasks: int, sequence_length: int) -> float:
    """Floating-point operations that a scored token takes, 2 (W + B + M + n M' / L).

    W: weights of all linear layers (forward); B: of those behind the lowest measured layer, in the model's order
    (gradients of their inputs); M: of the measured ones (a sequence's gradient). Of a mixture of experts these are the
    weights that a token meets; M' is all of M, for a sequence's products with n tasks, which its L tokens share.
    Attention's own products, and the fitting of the curvature, come on top.

    Args:
        model: the model.
        layers: names of the measured layers; a table of embeddings costs a backward pass through the whole model, and
            next to nothing itself.
        tasks: how many the scores are for.
        sequence_length: tokens of a sequence.
    """
    model = unwrap(model)
    linear = measurable_layers(model)
    met = {name: _weights(layer) * _share_met(model, layer) for name, layer in linear.items()}
    order = list(measurable_layers(model, embeddings=True))
    lowest = min(order.index(name) for name in layers)
    behind = sum(met.get(name, 0) for name in order[lowest + 1 :])
    measured = sum(met.get(name, 0) for name in layers)
    products = sum(_weights(linear[name]) for name in layers if name in linear) * tasks / sequence_length
    return 2.0 * (sum(met.values()) + behind + measured + products)


def parameters_met(model: nn.Module) -> float:
    """Parameters that a token is multiplied with: all but those of the experts that it does not come to, and of tables.

    A table of embeddings that is the head as well is multiplied with; of another one a row is read.
    """
    model = unwrap(model)
    layers = measurable_layers(model).values()
    multiplied = {id(layer.weight) for layer in layers}
    tables = (m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    read = {table for table in tables if id(table) not in multiplied}
    passed_by = sum(_weights(layer) * (1 - _share_met(model, layer)) for layer in layers)
    return sum(p.numel() for p in model.parameters() if p not in read) - passed_by


def describe(tokens: int, flops_per_token: float, speed: float) -> str:
    """A line for people: what is to be done, and about how long it takes at `speed` tokens a second."""
    return (
        f"{tokens:,} tokens to score, about {flops_per_token * tokens:.2g} FLOPs; at {speed:,.0f} tokens/s "
        f"{timedelta(seconds=round(tokens / max(speed, 1e-9)))} h"
    )


def _share_met(model: nn.Module, layer: Layer) -> float:
    """Share of the tokens that come to a layer: of E experts to each k / E, where the configuration says k."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if isinstance(config, PretrainedConfig) else config
    per_token = getattr(config, "num_experts_per_tok", None)
    return 1.0 if layer.kind != "expert" or per_token is None else min(1.0, per_token / len(layer.weight))


def _weights(layer: Layer) -> int:
    rows, columns = layer.shape
    return rows * (columns - (layer.bias is not None))
