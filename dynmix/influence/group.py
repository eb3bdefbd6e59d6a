"""Group influence: how one more unit of each domain moves each task's loss (TiKMiX, arXiv 2508.17677, Section 3.1).

One gradient a domain, one preconditioned gradient a task, and their products. This module knows batches with names; it
knows no mixture, no weights and no trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from dynmix.influence.base import Curvature, SummingCurvature
from dynmix.influence.capture import (
    Batch,
    Batches,
    Capture,
    LayerFilter,
    Loss,
    isolated,
    next_token_loss,
)
from dynmix.influence.ekfac import EKFAC
from dynmix.influence.probes import spread_rows
from dynmix.influence.sets import ProbeSet
from dynmix.influence.sets import ratio_of_sums as ratio_of_sums  # part of this module's names
from dynmix.influence.sums import Sums
from dynmix.observation import Array, Influence

_ERROR_SEQUENCES = 8


def group_influence(
    model: nn.Module,
    domains: Mapping[str, Batches],
    tasks: Mapping[str, Batches],
    curvature: Curvature | None = None,
    *,
    layers: LayerFilter = None,
    curvature_batches: Batches | None = None,
    strata: Mapping[str, int] | None = None,
    error_sequences: int | None = _ERROR_SEQUENCES,
    loss: Loss = next_token_loss,
    tick: Callable[[], object] | None = None,
) -> Influence:
    """Influence of every domain on every task, with standard errors; leaves no trace in the model.

    With g the gradient of the mean loss per token over a set of probe sequences, and H the curvature of the mean loss
    per token, `scores[i, j] = g_task^T H^-1 g_domain`, summed over the model's linear layers: the predicted decrease of
    the task's loss in nats per token, per unit of extra weight on the domain. Positive helps.

    (From scores of summed losses, mean over pairs of sequences of G^T F^-1 G with F the second moment of G: multiply by
    n / (n_task * n_domain), the mean numbers of scored tokens in the sequences of curvature, task and domain.)

    The standard error covers the choice of both the domain's and the task's sequences, each a ratio of sums by the
    delta method, and counts the product of their noises once; the two are taken as independent and H as given. It is
    infinite where one of them has a single scored sequence.

    Args:
        model: a causal LM of transformers, or any module whose forward returns logits [B, T, V]; also inside DDP, FSDP2
            or torch.compile. In a sharded run every process must be given the same batches.
        domains: batches of probe sequences by name. All sets are read more than once, so that they must be lists or
            DataLoaders, no generators. Batches of lists that the curvature is fitted on are not read again here.
        tasks: batches by name.
        curvature: `EKFAC()` if not given, or any other of `dynmix.influence.curvature`.
        layers: regular expression or predicate on names of linear layers, or `Layers`; None measures all linear ones.
        curvature_batches: what the curvature is fitted on; by default all domains' sequences, each counted once.
        strata: task -> sequences in a row that are of one kind, for a task that is an average over kinds with as many
            sequences of each: its standard error then leaves out what the kinds differ by.
        error_sequences: so many sequences of each set, evenly spread over it (of a domain, in whole batches), say how
            much its sequences vary, for the standard errors. A task's are read once more for that, a domain's only
            where not so many were left to be read after the curvature. None: all. (An error from n sequences is itself
            known to 1 / sqrt(2 n).)
        loss: what is differentiated, if not the next-token cross entropy.
        tick: called after each batch, for a progress bar.

    Memory: (2 * n_tasks + n_domains) gradients of the measured layers in float32, beside the curvature's factors.

    Raises:
        ValueError: no domain or no task, one without batches or scored tokens, no layer to measure.
        TypeError: batches that can be read only once.

    Loss or gradients that are not finite raise nothing: the scores they reach are NaN, and a warning names the set.
    """
    _check(domains, tasks, curvature_batches, error_sequences)
    capture = Capture(model, layers=layers, loss=loss, tick=tick)
    measured = _Measured(capture, domains, tasks, strata or {}, error_sequences)
    with isolated(model):
        measured.run(EKFAC() if curvature is None else curvature, curvature_batches, keep_scores=False)
    return measured.influence()


@dataclass(frozen=True)
class ScoredGroups:
    """A group influence and what it is made of: a set's influence is its sum of `scores` over its sum of `tokens`.

    Attributes:
        influence: of every domain on every task.
        scores: domain -> float64[n_sequences, n_tasks], of each sequence's summed loss.
        tokens: domain -> float64[n_sequences], scored tokens.
    """

    influence: Influence
    scores: dict[str, Array]
    tokens: dict[str, Array]


def scored_groups(
    model: nn.Module,
    domains: Mapping[str, Batches],
    tasks: Mapping[str, Batches],
    curvature: Curvature | None = None,
    *,
    layers: LayerFilter = None,
    curvature_batches: Batches | None = None,
    strata: Mapping[str, int] | None = None,
    error_sequences: int | None = _ERROR_SEQUENCES,
    loss: Loss = next_token_loss,
    tick: Callable[[], object] | None = None,
) -> ScoredGroups:
    """`group_influence` with the scores of every domain sequence, all of which are read after the curvature."""
    _check(domains, tasks, curvature_batches, error_sequences)
    capture = Capture(model, layers=layers, loss=loss, tick=tick)
    measured = _Measured(capture, domains, tasks, strata or {}, error_sequences)
    with isolated(model):
        measured.run(EKFAC() if curvature is None else curvature, curvature_batches, keep_scores=True)
    scores = {domain.name: domain.products[:, : len(tasks)] for domain in measured.domains}
    return ScoredGroups(measured.influence(), scores, {domain.name: domain.tokens for domain in measured.domains})


class _Measured:
    """One measurement, step by step."""

    def __init__(
        self,
        capture: Capture,
        domains: Mapping[str, Batches],
        tasks: Mapping[str, Batches],
        strata: Mapping[str, int],
        error_sequences: int | None,
    ) -> None:
        self.capture, self.error_sequences = capture, error_sequences
        self.tasks = [ProbeSet("task", name, batches, strata.get(name)) for name, batches in tasks.items()]
        self.domains = [ProbeSet("domain", name, batches) for name, batches in domains.items()]
        self.scores = np.zeros((len(tasks), len(domains)))

    def run(self, curvature: Curvature, fit_on: Batches | None, *, keep_scores: bool) -> None:
        """Fit the curvature; tasks' gradients, preconditioned; domains' gradients; both sides' standard errors."""
        capture, n_tasks = self.capture, len(self.tasks)
        lists = [side.batches for side in self.domains]
        sums = Sums([()] * len(lists) if keep_scores else lists)
        if fit_on is None:
            fit_on = _Pool(lists)
            if all(isinstance(batches, list | tuple) for batches in lists):
                fit_on = list(fit_on)
        if isinstance(curvature, SummingCurvature):
            inverse = curvature.fit_and_sum(capture, fit_on, sums)
        else:
            inverse = curvature.fit(capture, fit_on)

        towards: dict[str, Tensor] = {}
        for index, task in enumerate(self.tasks):
            task.sum_up(capture, towards, slice(2 * index, 2 * index + 2), 2 * n_tasks)
        # Gradients first, contrasts after them.
        order = [*range(0, 2 * n_tasks, 2), *range(1, 2 * n_tasks, 2)]
        for layer, stack in towards.items():  # a layer at a time, so that none is there twice but one
            towards[layer] = stack[order]
        inverse.precondition_all(towards)

        gradients = sums.gradients
        for index, domain in enumerate(self.domains):
            met = {k: (loss, sums.tokens[index][k]) for k, loss in sums.losses[index].items()}
            some = None if keep_scores else self.error_sequences
            domain.sum_up(capture, gradients, slice(index, index + 1), len(self.domains), towards, met, some)
        self.scores = _products(towards, gradients, n_tasks)
        for domain in self.domains:
            wanted = spread_rows(len(domain.tokens), self.error_sequences)
            if len(domain.products) < len(wanted):
                domain.products_of(capture, wanted, towards)
        towards.clear()
        inverse.precondition_all(gradients)
        for task in self.tasks:
            task.products_of(capture, spread_rows(len(task.tokens), self.error_sequences, task.stratum), gradients)

    def influence(self) -> Influence:
        """Scores, errors and losses as arrays."""
        over_domain = np.stack([domain.variance() for domain in self.domains], axis=1)
        over_task = np.stack([task.variance() for task in self.tasks])
        error = np.sqrt(_variance(over_domain, over_task, [task.tokens for task in self.tasks]))
        losses = [ratio_of_sums(task.losses[:, None], task.tokens, task.stratum) for task in self.tasks]
        return Influence(
            scores=self.scores,
            tasks=[task.name for task in self.tasks],
            domains=[domain.name for domain in self.domains],
            standard_error=np.where(np.isnan(self.scores), np.nan, error),
            task_loss=np.concatenate([value for value, _ in losses]),
            task_loss_standard_error=np.sqrt(np.concatenate([variance for _, variance in losses])),
        )


def _products(towards: Mapping[str, Tensor], gradients: Mapping[str, Tensor], n_tasks: int) -> Array:
    """<towards_i, gradients_j> summed over the layers, float64[n_tasks, n_domains]."""
    total: Array = np.zeros((n_tasks, len(next(iter(gradients.values())))))
    for layer, gradient in gradients.items():
        if layer in towards:
            # Row by row of the matrices, and the rows in float64: a single sum in float32 is that of a million terms.
            rows = torch.einsum("toi,doi->otd", towards[layer][:n_tasks], gradient)
            total += rows.cpu().double().sum(0).numpy()
    return total


def _variance(over_domain: Array, over_task: Array, task_tokens: list[Array]) -> Array:
    """Variance of the scores [n_tasks, n_domains] over the sequences of both sides.

    With independent noises x and y, (G + x)(g + y) varies by Gy, xg and xy. The variance over one side's sequences is
    seen with the other side's noise in it, so xy is in both: the contrasts' part of `over_domain` says how much.
    """
    n_tasks = len(task_tokens)
    n = np.array([[np.count_nonzero(tokens)] for tokens in task_tokens], dtype=np.float64)
    over_domain, both = over_domain[:n_tasks], over_domain[n_tasks:] * n / np.maximum(n - 1, 1)
    both = np.where(np.isfinite(both), both, 0.0)
    return over_domain + over_task - np.minimum(both, np.minimum(over_domain, over_task))


class _Pool:
    """Batches of all sets one after the other, as often as asked."""

    def __init__(self, sets: list[Batches]) -> None:
        self._sets = sets

    def __iter__(self) -> Iterator[Batch]:
        return chain.from_iterable(self._sets)


def _check(
    domains: Mapping[str, Batches],
    tasks: Mapping[str, Batches],
    curvature_batches: Batches | None,
    error_sequences: int | None,
) -> None:
    for kind, sets in (("domains", domains), ("tasks", tasks)):
        if not sets:
            raise ValueError(f"{kind} is empty: give at least one, by name")
        for name, batches in sets.items():
            _check_batches(f"{kind}[{name!r}]", batches)
    if curvature_batches is not None:
        _check_batches("curvature_batches", curvature_batches)
    if error_sequences is not None and error_sequences < 2:
        raise ValueError(f"error_sequences={error_sequences}: at least 2, or None for all")


def _check_batches(what: str, batches: Batches) -> None:
    if isinstance(batches, Iterator):
        raise TypeError(f"{what} can be read only once, but several passes are needed: give a list or a DataLoader")
    if isinstance(batches, Mapping | str) or not hasattr(batches, "__iter__"):
        raise TypeError(f"{what} must be a list or DataLoader of batches (dicts), got {type(batches).__name__}")
    if isinstance(batches, Sized) and len(batches) == 0:
        raise ValueError(f"{what} is empty: it needs at least one batch")
