"""The layers of a model in parts, each to be measured by itself, so that no more than one is held at a time.

Knows layers; nothing of what is measured.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from torch import nn

from dynmix.influence.capture import Capture
from dynmix.influence.layers import LayerFilter, Layers


def layer_parts(model: nn.Module, layers: LayerFilter, count: int) -> list[LayerFilter]:
    """`count` filters (or as many as there are layers), that together let through what `layers` does, once.

    Each has layers that are neighbours in the model, and about as many parameters. Raises ValueError for a count below
    1, or as `Capture` does.
    """
    if count < 1:
        raise ValueError(f"layer_groups={count}: at least 1")
    if count == 1:
        return [layers]
    wanted = Layers.of(layers)
    capture = Capture(model, layers=layers)
    sizes = np.cumsum([np.prod(layer.shape) for layer in capture.layers.values()])
    count = min(count, len(sizes))
    ends = [int(np.searchsorted(sizes, sizes[-1] * k / count)) + 1 for k in range(1, count)]
    edges = [0, *ends, len(sizes)]
    names = list(capture.layers)
    part_of = {name: k for k, (start, stop) in enumerate(pairwise(edges)) for name in names[start:stop]}
    part_of |= {table: part_of[head] for table, (_, head) in capture.tied.items()}

    def part(k: int) -> Layers:
        # What is no measurable layer belongs to the first part, which then warns of it.
        return replace(wanted, include=lambda name: part_of.get(name, 0) == k and wanted(name), exclude=None)

    return [part(k) for k in range(count) if k in part_of.values()]
