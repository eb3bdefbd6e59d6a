"""Sample influence: how one more unit of weight on each single sequence would move each task's loss.

The tasks' gradients are preconditioned once; a sequence's score is the product of its own gradient with them, computed
layer by layer while its tokens go through the model. Only the scores of a sequence are kept. This module knows batches
with names; it knows no mixture, no files and no trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from dynmix.influence.base import Curvature, check_curvature
from dynmix.influence.batch import Batch, Batches, Loss, Sets, next_token_loss
from dynmix.influence.capture import Capture
from dynmix.influence.datainf import DataInf
from dynmix.influence.gradients import gradients_of
from dynmix.influence.isolation import isolated, unwrap
from dynmix.influence.layers import LayerFilter, Layers, measurable_layers, output_layer, plain_name
from dynmix.influence.probes import spread_rows
from dynmix.influence.sets import ProbeSet, Products, mean_gradients
from dynmix.observation import Array

_CURVATURE_BATCHES = 32


@dataclass(frozen=True)
class SampleInfluence:
    """Influence of every sequence on every task.

    Attributes:
        scores: float64[n_sequences, n_tasks]; `scores[x, i]` is the predicted decrease of task i's loss (nats per
            token) per unit of extra weight on sequence x alone, so positive helps. A set's group influence is the mean
            of its sequences' scores, weighted by their scored tokens. NaN where a gradient was not finite.
        tasks: names of the columns.
        loss: float64[n_sequences], mean over the scored tokens, nats per token; NaN without any.
        tokens: int64[n_sequences], scored tokens.
    """

    scores: Array
    tasks: tuple[str, ...]
    loss: Array
    tokens: np.ndarray


def sample_influence(
    model: nn.Module,
    samples: Batches,
    tasks: Sets,
    curvature: Curvature | None = None,
    *,
    layers: LayerFilter = None,
    curvature_batches: Batches | None = None,
    loss: Loss = next_token_loss,
    tick: Callable[[], object] | None = None,
) -> SampleInfluence:
    """Influence of every sequence of `samples` on every task. Leaves no trace in the model.

    With g the gradient of a mean loss per token and H its curvature, `scores[x, i] = g_task^T H^-1 g_x`, summed over
    the chosen layers: DataInf's influence (Kwon et al. 2024, arXiv 2310.00902) as AutoMixer uses it, with the sign
    turned so that positive helps.

    Args:
        model: as in `group_influence`.
        samples: batches of sequences, read once, in order; may be a generator if `curvature_batches` are given.
        tasks: batches by name, read once.
        curvature: `DataInf()` if not given, or any other of this package.
        layers: regular expression or predicate on names of linear layers and embeddings; None: `last_layers(model)`.
            `r"^(?!.*embed)"` takes all linear layers of most models; the backward pass ends where the chosen layers do.
        curvature_batches: what the curvature is fitted on; by default up to 32 of the samples' batches, evenly spread.
        loss: what is differentiated, if not the next-token cross entropy.
        tick: called after each batch, for a progress bar.

    Memory: one gradient per task, three while they are preconditioned, of the chosen layers in float32.

    Raises:
        ValueError: no task, one without batches or scored tokens, no layer to measure, no samples.
    """
    if curvature_batches is None:
        if not isinstance(samples, Sequence):
            raise ValueError("samples can be read only once: give a list, or curvature_batches beside")
        curvature_batches = [samples[i] for i in spread_rows(len(samples), _CURVATURE_BATCHES)]
    scorer = SampleScorer(model, tasks, curvature_batches, curvature=curvature, layers=layers, loss=loss, tick=tick)
    parts = [scorer(batch) for batch in samples]
    if not parts:
        raise ValueError("samples is empty: give at least one batch")
    return SampleInfluence(
        np.concatenate([part.scores for part in parts]),
        scorer.tasks,
        np.concatenate([part.loss for part in parts]),
        np.concatenate([part.tokens for part in parts]),
    )


class SampleScorer:
    """Holds the tasks' preconditioned gradients for one state of a model, and scores batches of sequences with them.

    The model must stay as it is while the scorer is in use.

    Args: as in `sample_influence`, but `curvature_batches` is required.

    Attributes:
        tasks: names of the scores' columns.
        layers: names of the layers that are measured.

    Raises:
        ValueError: no task, one without batches or scored tokens, no layer to measure.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sets,
        curvature_batches: Batches,
        *,
        curvature: Curvature | None = None,
        layers: LayerFilter = None,
        loss: Loss = next_token_loss,
        tick: Callable[[], object] | None = None,
    ) -> None:
        if not tasks:
            raise ValueError("tasks is empty: give at least one, by name")
        curvature = DataInf() if curvature is None else curvature
        check_curvature(curvature)
        self.tasks = tuple(tasks)
        chosen = last_layers(model) if layers is None else layers
        self._capture = Capture(model, layers=replace(Layers.of(chosen), embeddings=True), loss=loss, tick=tick)
        with isolated(self._capture.model):
            inverse = curvature.fit(self._capture, curvature_batches)
            self._towards = mean_gradients([ProbeSet("task", *task) for task in tasks.items()], self._capture)
            inverse.precondition_all(self._towards)

    @property
    def layers(self) -> list[str]:
        """Names of the measured layers."""
        return list(self._towards)

    def __call__(self, batch: Batch) -> SampleInfluence:
        """Score the sequences of one batch: one forward pass, and a backward pass down to the lowest chosen layer."""
        products = Products(self._towards)
        with isolated(self._capture.model):
            losses, tokens = (x.numpy() for x in self._capture.run(batch, products.meet))
        total = products.total(len(losses))
        with np.errstate(invalid="ignore", divide="ignore"):
            return SampleInfluence(total / tokens[:, None], self.tasks, losses / tokens, tokens.astype(np.int64))

    def by_token(self, batch: Batch) -> Array:
        """Score every token of one batch: float64[B, T, n_tasks], whose sum over a sequence's tokens is its score.

        A token's part is what of the sequence's gradient goes through its position: the products of its inputs and
        output gradients, which have in them what later tokens' losses say of it.

        Raises:
            ValueError: stacked experts are measured, which see tokens without their positions.
        """
        if experts := [name for name, layer in self._capture.layers.items() if layer.kind == "expert"]:
            raise ValueError(f"no scores by token through stacked experts: leave out {experts[0]!r} and its like")
        B, T = batch["input_ids"].shape
        products: list[Tensor] = []

        def meet(layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
            found = gradients_of(a, g).token_products(self._towards[layer])
            products.append(found.view(B, -1, T, len(self.tasks)).sum(1))  # of a layer that is used several times

        with isolated(self._capture.model):
            _, tokens = self._capture.run(batch, meet)
        total = sum((p.cpu().double().numpy() for p in products), np.zeros((B, T, len(self.tasks))))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(total / tokens.numpy()[:, None, None])


def last_layers(model: nn.Module, blocks: int = 1) -> Callable[[str], bool]:
    """The vocabulary's matrix where it predicts, and the linear layers of the last `blocks` transformer blocks.

    AutoMixer takes "the embedding and the last layers", of models where both uses of the vocabulary's matrix are one
    parameter. Where it embeds is at the very bottom: its gradient there takes a backward pass through the whole model,
    twice the cost of all the rest. A pattern that names the embedding (`layers="embed_tokens|..."`) pays it.

    The blocks are the longest `nn.ModuleList` or `nn.Sequential` that holds linear layers and is in no other one; what
    predicts is what the model says, or else any linear layer that is in none.

    Raises:
        ValueError: the model has no such list: name the layers; all of these are frozen, and other parameters are not.
    """
    model = unwrap(model)
    linear = measurable_layers(model)
    lists = {
        plain_name(name): len(module)
        for name, module in model.named_modules()
        if name and isinstance(module, nn.ModuleList | nn.Sequential) and any(_inside(layer, name) for layer in linear)
    }
    if not lists:
        raise ValueError("no list of transformer blocks was found in the model: name the layers with layers=")
    outer = [name for name in lists if not any(_inside(name, other) for other in lists if other != name)]
    stack = max(outer, key=lambda name: lists[name])
    numbers = range(lists[stack] - min(blocks, lists[stack]), lists[stack])
    last = tuple(f"{stack}.{number}" for number in numbers)
    output = output_layer(model)
    head = [plain_name(name) for name, module in model.named_modules() if module is output]
    if not head:  # others may have linear layers at the bottom, too, as a factor of OPT's embedding
        head = [layer for layer in linear if not any(_inside(layer, name) for name in lists)]
    chosen = {layer for layer in linear if any(_inside(layer, name) for name in (*last, *head))}
    trained = {name for name, layer in linear.items() if layer.weight.requires_grad}
    if not trained & chosen and any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"the layers that are measured by default, the head and those of {' and '.join(last)}, are frozen: "
            + (f"name others with layers=, as of {sorted(trained)[-1]!r}" if trained else "no linear layer trains")
        )
    return chosen.__contains__


def _inside(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")
