"""The tasks' preconditioned gradients, R = H^-1 g, as directions in parameter space that outlive their measurement.

A gradient of whatever data meets them in one product per parameter. Each task's is held in a few parts, by folds of its
sequences, whose spread says how much the choice of sequences matters. This module knows layers, curvatures and
safetensors; it knows no domain and no trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynmix.influence.base import Curvature
from dynmix.influence.batch import Batch, Batches, Sets, token_mask
from dynmix.influence.capture import Capture
from dynmix.influence.dealing import Turn, Turns
from dynmix.influence.gradients import gradients_of
from dynmix.influence.isolation import isolated, unwrap
from dynmix.influence.layers import Layer, LayerFilter, Layers, measurable_layers
from dynmix.influence.sets import mean_and_error
from dynmix.influence.tensor_file import read_tensors, write_tensors
from dynmix.observation import Array
from dynmix.ranks import Ranks

logger = logging.getLogger(__name__)

_WHAT = "gradients of tasks"
_ARRAYS = ("tokens", "loss", "loss_standard_error")


@dataclass(frozen=True)
class TaskGradients:
    """R of each task, the sum of its folds' rows.

    Attributes:
        tasks: names.
        folds: rows of each task, in their order.
        tokens: float64[n_rows], scored tokens of each fold.
        loss, loss_standard_error: float64[n_tasks], nats per token.
        layers: names of the measured layers.
        parameters: name -> [n_rows, *shape of the parameter], float32 at least: H^-1 of the summed gradient of the
            fold's sequences, over the scored tokens of the whole task.
    """

    tasks: tuple[str, ...]
    folds: tuple[int, ...]
    tokens: Array
    loss: Array
    loss_standard_error: Array
    layers: tuple[str, ...]
    parameters: dict[str, Tensor]

    @property
    def rows(self) -> list[slice]:
        """Rows of each task."""
        ends = np.cumsum(self.folds).tolist()
        return [slice(end - k, end) for end, k in zip(ends, self.folds, strict=True)]

    def matrix(self, layer: Layer, name_of: Mapping[int, str]) -> Tensor:
        """The layer's part as `Capture` sees it, [n_rows, out, in (+1)]; `name_of` the parameters by their id."""
        return layer.matrix(lambda parameter: self.parameters[name_of[id(parameter)]])

    def on(self, model: nn.Module) -> TaskGradients:
        """The same, where the model's parameters are. Raises ValueError if it has not all of them in these shapes."""
        known = dict(unwrap(model).named_parameters())
        for name, stack in self.parameters.items():
            if name not in known or known[name].shape != stack.shape[1:]:
                found = "none" if name not in known else list(known[name].shape)
                raise ValueError(f"parameter {name!r} was {list(stack.shape[1:])}, and the model has {found}")
        return replace(self, parameters={k: stack.to(known[k].device) for k, stack in self.parameters.items()})

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        facts = {name: getattr(self, name) for name in ("tasks", "folds", "layers")}
        facts |= {name: getattr(self, name).tolist() for name in _ARRAYS}
        write_tensors(path, _WHAT, self.parameters, facts)

    @classmethod
    def load(cls, path: Path) -> TaskGradients:
        """Read such a file. Raises ValueError if it is missing or another."""
        parameters, facts = read_tensors(path, _WHAT)
        fields: dict[str, Any] = {k: np.array(x) if k in _ARRAYS else tuple(x) for k, x in facts.items()}
        return cls(**fields, parameters=parameters)


def task_gradients(
    model: nn.Module,
    tasks: Sets,
    curvature: Curvature,
    curvature_batches: Batches,
    *,
    folds: int = 4,
    layers: LayerFilter = None,
    strata: Mapping[str, int] | None = None,
    tick: Callable[[], object] | None = None,
    over_ranks: bool = False,
) -> TaskGradients:
    """Fit the curvature, and read each task once; leaves no trace in the model.

    Where the model ties its head to its embedding and the head is measured, so is the embedding: the two have one
    gradient. Memory: `folds` * n_tasks gradients of the measured layers in float32, beside the curvature's factors.

    Args:
        model, layers, strata, tick, over_ranks: as in `group_influence`.
        tasks: batches by name.
        curvature: what preconditions.
        curvature_batches: what it is fitted on.
        folds: parts of each task; of one with fewer sequences (of a kind, with strata) so many.

    Raises:
        ValueError: a task without batches or scored tokens, no layer to measure, two that share a weight.
        ArithmeticError: a loss or gradient of a task is not finite.
    """
    ranks, strata = Ranks(over_ranks), strata or {}
    with ranks.together():
        capture = Capture(model, layers=with_tied_table(unwrap(model), layers), ranks=ranks, tick=tick)
        folds_of = [_folds_of(name, batches, folds, strata.get(name)) for name, batches in tasks.items()]
        with isolated(model):
            inverse = curvature.fit(capture, curvature_batches)
            towards, numbers = _summed(capture, tasks, folds_of, strata)
            inverse.precondition_all(towards)
        finite = torch.stack([stack.isfinite().flatten(1).all(1).cpu() for stack in towards.values()]).all(0)
        if bad := [name for name, some in zip(tasks, torch.split(finite, folds_of), strict=True) if not some.all()]:
            raise ArithmeticError(f"the gradient of {', '.join(bad)} is not finite")
    return TaskGradients(
        tasks=tuple(tasks),
        folds=tuple(folds_of),
        tokens=np.concatenate([tokens for tokens, *_ in numbers]),
        loss=np.array([loss for _, loss, _ in numbers]),
        loss_standard_error=np.array([error for *_, error in numbers]),
        layers=tuple(towards),  # before they are taken apart
        parameters=_by_parameter(capture, towards),
    )


def sequence_products(
    model: nn.Module,
    gradients: TaskGradients,
    sets: Sets,
    *,
    tick: Callable[[], object] | None = None,
    over_ranks: bool = False,
) -> dict[str, tuple[Array, Array]]:
    """Products of each sequence's gradient of its summed loss with R, by a pass of its own that leaves no trace.

    Returns, by set, products float64[n, n_rows] and scored tokens float64[n]; a sequence that is not finite has none.
    """
    ranks, names = Ranks(over_ranks), names_of(unwrap(model))
    with ranks.together():
        uses = uses_of(unwrap(model), gradients)
        capture = Capture(model, layers=Layers(uses.__contains__, None, True, True), ranks=ranks, tick=tick)

        def run(batch: Batch) -> tuple[Array, Array]:
            parts: list[Tensor] = []

            def consume(layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
                towards = gradients.matrix(capture.layers[layer], names)
                parts.append(gradients_of(a, g).products(towards).cpu().double())

            _, tokens = capture.run(batch, consume)
            return torch.stack(parts).sum(0).numpy(), tokens.numpy()

        with isolated(model):
            turns = Turns(ranks, capture.rerun)
            own = [{turn.number: run(turn.batch) for turn in turns(batches) if turn.mine} for batches in sets.values()]
            found = turns.gathered("the sequences' products with the tasks' gradients", own)
    result = {}
    for name, of_batches in zip(sets, found, strict=True):
        products, scored = (np.concatenate(parts) for parts in zip(*of_batches.values(), strict=True))
        finite = np.isfinite(products).all(axis=1)
        if broken := np.count_nonzero(~finite):
            logger.warning("%r: %d of %d sequences are not finite and left out", name, broken, len(products))
        result[name] = products[finite], scored[finite]
    return result


def uses_of(model: nn.Module, gradients: TaskGradients) -> dict[str, Layer]:
    """The measured layers by name, and the embeddings and linear layers whose weight is that of one of them."""
    known = measurable_layers(model, embeddings=True, norms=True)
    weights = {id(known[name].weight) for name in gradients.layers}
    return {
        name: layer
        for name, layer in known.items()
        if name in gradients.layers or (layer.kind in ("embedding", "linear") and id(layer.weight) in weights)
    }


def _summed(
    capture: Capture, tasks: Sets, folds_of: Sequence[int], strata: Mapping[str, int]
) -> tuple[dict[str, Tensor], list[tuple[Array, float, float]]]:
    """Each fold's gradient over its task's scored tokens, by layer; and each task's `_numbers`."""
    towards: dict[str, Tensor] = {}

    def run(turn: Turn, first: int, k: int, stratum: int | None) -> tuple[Array, Array]:
        number = np.arange(turn.first, turn.first + len(token_mask(turn.batch)))
        weights = torch.as_tensor(np.equal.outer(np.arange(k), number % (stratum or k) % k))

        def consume(layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
            if layer not in towards:
                towards[layer] = capture.zeros(layer, sum(folds_of))
            gradients_of(a, g).add_weighted(weights.to(g), towards[layer][first : first + k])

        losses, counts = capture.run(turn.batch, consume)
        return losses.numpy(), counts.numpy()

    own, turns, first = [], Turns(capture.ranks, capture.rerun), 0
    for (name, batches), k in zip(tasks.items(), folds_of, strict=True):
        own.append({turn.number: run(turn, first, k, strata.get(name)) for turn in turns(batches) if turn.mine})
        first += k
    found = turns.gathered("the tasks' gradients", own)
    towards = capture.ranks.sum("sums of the tasks' gradients", towards, capture.device)
    each = zip(tasks, found, folds_of, strict=True)
    numbers = [_numbers(name, of_task, k, strata.get(name)) for name, of_task, k in each]
    scored = np.repeat([tokens.sum() for tokens, *_ in numbers], folds_of)
    for stack in towards.values():
        stack /= torch.as_tensor(scored).to(stack)[:, None, None]
    return towards, numbers


def with_tied_table(model: nn.Module, layers: LayerFilter) -> Layers:
    """The same layers, and the embedding whose table is the weight of one of them."""
    wanted = Layers.of(layers)
    if wanted.embeddings:
        return wanted
    linear = measurable_layers(model, head=wanted.head)
    heads = {id(layer.weight) for name, layer in linear.items() if layer.kind == "linear" and wanted(name)}
    every = measurable_layers(model, embeddings=True)
    tables = {name: layer for name, layer in every.items() if layer.kind == "embedding"}
    tied = {name for name, layer in tables.items() if id(layer.weight) in heads}
    if not tied:
        return wanted
    both = replace(wanted, exclude=None, embeddings=True)
    return replace(both, include=lambda name: name in tied or (name not in tables and wanted(name)))


def names_of(model: nn.Module) -> dict[int, str]:
    """Id of each parameter -> its name."""
    return {id(p): name for name, p in model.named_parameters()}


def _folds_of(name: str, batches: Batches, folds: int, stratum: int | None) -> int:
    sequences = sum(len(token_mask(batch)) for batch in batches)
    if not sequences:
        raise ValueError(f"task {name!r} has no batches")
    return min(folds, sequences, stratum or folds)


def _numbers(
    name: str, own: Mapping[int, tuple[Array, Array]], k: int, stratum: int | None
) -> tuple[Array, float, float]:
    """Scored tokens of each fold, loss and its standard error."""
    losses, tokens = (np.concatenate(parts) for parts in zip(*own.values(), strict=True))
    if not tokens.sum():
        raise ValueError(f"task {name!r} has no scored token: every label is -100 or masked")
    number = np.arange(len(tokens)) % (stratum or k) % k
    return np.bincount(number, tokens, minlength=k).astype(np.float64), *mean_and_error(losses, tokens, stratum)


def _by_parameter(capture: Capture, towards: dict[str, Tensor]) -> dict[str, Tensor]:
    name_of, found = names_of(capture.model), dict[str, Tensor]()
    owners: dict[int, str] = {}
    for name in list(towards):
        layer, stack = capture.layers[name], towards.pop(name)
        for parameter in layer.parameters if layer.expert is None else []:
            if (other := owners.setdefault(id(parameter), name)) != name:
                shared = name_of[id(parameter)]
                raise ValueError(f"layers {other!r} and {name!r} share {shared!r}: leave one of them out with layers=")
        if layer.kind in ("linear", "router", "embedding") and layer.bias is None and not layer.transposed:
            found[name_of[id(layer.weight)]] = stack
            continue
        for row, matrix in enumerate(stack):
            for parameter, part in layer.split(matrix):
                key = name_of[id(parameter)]
                if key not in found:
                    found[key] = stack.new_zeros(len(stack), *parameter.shape)
                into = found[key][row] if layer.expert is None else found[key][row, layer.expert]
                into.copy_(part)
    return found
