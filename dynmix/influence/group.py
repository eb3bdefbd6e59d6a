"""Group influence: how one more unit of each domain moves each task's loss (TiKMiX, arXiv 2508.17677, Section 3.1).

One gradient per domain, one preconditioned gradient per task, and their products. This module knows batches with
names; it knows no mixture, no weights and no trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynmix.influence.base import Curvature, InverseCurvature, LayerByLayer, check_curvature
from dynmix.influence.batch import Batch, Batches, Loss, Sets, next_token_loss
from dynmix.influence.capture import Capture, NothingMeasuredError, layer_parts
from dynmix.influence.carried import Carried
from dynmix.influence.datainf import FittedDataInf
from dynmix.influence.ekfac import EKFAC
from dynmix.influence.factored import FactoredCurvature
from dynmix.influence.factors import FittedFactors
from dynmix.influence.gauss_newton import GaussNewton
from dynmix.influence.isolation import isolated
from dynmix.influence.layers import LayerFilter
from dynmix.influence.low_rank import Held, LeftOut, joined, truncated
from dynmix.influence.probes import spread_rows
from dynmix.influence.sets import DRAWS, MEANS, ProbeSet, mean_and_error, mean_gradients, products_of
from dynmix.influence.storage import Offload, check_offload, let_go, on
from dynmix.influence.sums import Sums
from dynmix.observation import Array, Influence
from dynmix.ranks import Ranks

logger = logging.getLogger(__name__)

_ERROR_SEQUENCES = 8


def group_influence(
    model: nn.Module,
    domains: Sets,
    tasks: Sets,
    curvature: Curvature | None = None,
    *,
    layers: LayerFilter = None,
    curvature_batches: Batches | None = None,
    strata: Mapping[str, int] | None = None,
    error_sequences: int | None = _ERROR_SEQUENCES,
    loss: Loss = next_token_loss,
    tick: Callable[[], object] | None = None,
    over_ranks: bool = False,
    offload: Offload = None,
    layer_groups: int = 1,
    rank: int | None = None,
) -> Influence:
    """Influence of every domain on every task, with standard errors. Leaves no trace in the model.

    With g the gradient of the mean loss per token over a set of probe sequences, and H the curvature of the mean loss
    per token, `scores[i, j] = g_task^T H^-1 g_domain`, summed over the model's linear layers: the predicted decrease of
    the task's loss in nats per token, per unit of extra weight on the domain. Positive helps.

    (To convert scores of summed losses, means over pairs of sequences of G^T F^-1 G with F the second moment of G,
    multiply by n / (n_task * n_domain): the mean numbers of scored tokens per sequence of curvature, task and domain.)

    The standard error covers the choice of both the domain's and the task's sequences, each a ratio of sums by the
    delta method, and counts the product of their noises once. The two are taken as independent, and H as given. It is
    infinite if one of them has a single scored sequence.

    Args:
        model: a causal LM of transformers, or any module whose forward returns logits [B, T, V]; also inside DDP, FSDP2
            or torch.compile.
        domains: batches of probe sequences by name. All sets are read more than once, so they must be lists or
            DataLoaders, not generators. Batches in lists that the curvature was fitted on are not read again.
        tasks: batches by name.
        curvature: `EKFAC()` if not given, or any other of `dynmix.influence.curvature`.
        layers: regular expression or predicate on names of linear layers, or `Layers`; None measures all linear ones.
        curvature_batches: what the curvature is fitted on; by default all domains' sequences, each counted once.
        strata: task -> number of consecutive sequences that are of one kind, for a task that averages over kinds with
            equally many sequences of each: its standard error then leaves out how much the kinds differ.
        error_sequences: how many sequences of each set, evenly spread over it (of a domain, in whole batches), the
            standard errors are estimated from. A task's are read once more for that, a domain's only if fewer were left
            to read after the curvature. None: all. (An error from n sequences is itself known to 1 / sqrt(2 n).)
        loss: what is differentiated, if not the next-token cross entropy.
        tick: called after each batch, for a progress bar.
        over_ranks: share the work over the processes of torch.distributed, if there are several. All of them must call
            this with the same arguments and the same batches in the same order, and all get the same influence, which
            differs from a single process's by rounding only. Each must hold the whole model or an FSDP2 shard of it.
            Without it a process measures alone; for a sharded model all of them must then do so at once.
        offload: where gradients, and factors once fitted, are kept while their layer is not being worked on: None, on
            the layer's device; "cpu"; "disk", in memory-mapped files that vanish with the process.
        layer_groups: measure the layers in so many parts, one after the other, each with all passes, and add up.
        rank: keep only so many singular vectors of each task's preconditioned gradient, layer by layer. The influence
            says what that leaves out. The tasks are preconditioned one by one (for which DataInf reads its batches).

    Memory: (2 * n_tasks + n_domains) gradients of the measured layers in float32, beside the curvature's factors; see
    `dynmix.influence.memory.peak_memory`. With `rank`, 2 + n_domains and the singular vectors.

    Raises:
        ValueError: no domain or no task, one without batches or scored tokens, no layer to measure; a curvature that
            `offload` or `layer_groups` do not go with.
        TypeError: batches that can be read only once.
        RuntimeError: another rank failed, with its message. (If a rank fails inside a sharded model's forward or
            backward pass, the others wait in it until the process group's timeout.)

    Losses or gradients that are not finite raise nothing: scores that depend on them are NaN, and a warning names the
    set.
    """
    how = _How(layers, curvature_batches, strata, error_sequences, loss, tick, offload, layer_groups, rank)
    ranks = Ranks(over_ranks)
    with ranks.together():
        return _measured(model, domains, tasks, curvature, how, ranks).influence()


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
    domains: Sets,
    tasks: Sets,
    curvature: Curvature | None = None,
    *,
    over_ranks: bool = False,
    **arguments: Any,
) -> ScoredGroups:
    """`group_influence`, with its arguments, and the scores of every domain sequence, all read after the curvature."""
    how = _How(**arguments, keep_scores=True)
    ranks = Ranks(over_ranks)
    with ranks.together():
        measured = _measured(model, domains, tasks, curvature, how, ranks)
        scores = {domain.name: domain.products[:, MEANS] for domain in measured.domains}
        return ScoredGroups(measured.influence(), scores, {domain.name: domain.tokens for domain in measured.domains})


@dataclass(frozen=True)
class _How:
    """The arguments of a measurement, but for what is measured."""

    layers: LayerFilter = None
    curvature_batches: Batches | None = None
    strata: Mapping[str, int] | None = None
    error_sequences: int | None = _ERROR_SEQUENCES
    loss: Loss = next_token_loss
    tick: Callable[[], object] | None = None
    offload: Offload = None
    layer_groups: int = 1
    rank: int | None = None
    keep_scores: bool = False  # of every domain sequence


def _measured(
    model: nn.Module, domains: Sets, tasks: Sets, curvature: Curvature | None, how: _How, ranks: Ranks
) -> _Measured:
    """Measure part after part of the layers, and add up."""
    curvature = EKFAC() if curvature is None else curvature
    check_curvature(curvature)
    _check(domains, tasks, how)
    if how.layer_groups > 1 and isinstance(curvature, Carried):
        raise ValueError(
            "layer_groups: factors that are carried on are of all layers at once: set ema=0, refresh_every=1"
        )
    if how.layer_groups > 1 and isinstance(curvature, GaussNewton):
        raise ValueError("layer_groups: GaussNewton is one matrix over all layers: leave layer_groups at 1")
    whole: _Measured | None = None
    idle: list[NothingMeasuredError] = []
    for layers in layer_parts(model, how.layers, how.layer_groups):
        capture = Capture(model, layers=layers, loss=how.loss, tick=how.tick, ranks=ranks, offload=how.offload)
        part = _Measured(capture, domains, tasks, how)
        try:
            with isolated(model):
                part.run(curvature)
        except NothingMeasuredError as why:  # a tower, say, that these batches do not reach
            if ranks.size > 1:
                raise  # the others may have found something
            idle.append(why)
            logger.warning("a part of the layers is left out: %s", why)
            continue
        if whole is not None:
            part.add(whole)
        whole = part
    if whole is None:
        raise idle[-1]
    return whole


class _Measured:
    """One measurement, step by step."""

    def __init__(self, capture: Capture, domains: Sets, tasks: Sets, how: _How) -> None:
        self.capture, self.how, strata = capture, how, how.strata or {}
        self.tasks = [ProbeSet("task", name, batches, strata.get(name)) for name, batches in tasks.items()]
        self.domains = [ProbeSet("domain", name, batches) for name, batches in domains.items()]
        self.scores = np.zeros((len(tasks), len(domains)))
        self.left_out = LeftOut(len(tasks), len(domains))

    def run(self, curvature: Curvature) -> None:
        """Fit the curvature; tasks' gradients, preconditioned; domains' gradients; both sides' standard errors."""
        capture, how = self.capture, self.how
        lists = [side.batches for side in self.domains]
        sums = Sums([()] * len(lists) if how.keep_scores else lists, capture.stored)
        fit_on = how.curvature_batches
        if fit_on is None:
            fit_on = _Pool(lists)
            if all(isinstance(batches, list | tuple) for batches in lists):
                fit_on = list(fit_on)
        inverse: InverseCurvature
        if isinstance(curvature, FactoredCurvature | Carried):
            inverse = curvature.fit(capture, fit_on, sums)
        else:
            inverse = curvature.fit(capture, fit_on)
        if isinstance(inverse, FittedFactors) and not isinstance(curvature, Carried):
            inverse = inverse.kept(capture.offload)

        towards = self._towards(inverse)
        wanted = how.error_sequences
        varied = None if how.keep_scores else wanted
        gradients = mean_gradients(self.domains, capture, sums=sums, towards=towards, varied=varied)
        self.left_out.meet(gradients)
        self.scores = _products(towards, gradients, capture)

        spread = [(domain, spread_rows(len(domain.tokens), wanted)) for domain in self.domains]
        products_of([(domain, rows) for domain, rows in spread if len(domain.products) < len(rows)], capture, towards)
        towards.clear()
        self._precondition(inverse, gradients)
        products_of([(t, spread_rows(len(t.tokens), wanted, t.stratum)) for t in self.tasks], capture, gradients)

    def add(self, other: _Measured) -> None:
        """Take in the measurement of other layers."""
        self.scores = other.scores + self.scores
        self.left_out.add(other.left_out)
        for own, theirs in zip([*self.tasks, *self.domains], [*other.tasks, *other.domains], strict=True):
            own.products = theirs.products + own.products

    def _towards(self, inverse: InverseCurvature) -> dict[str, Held]:
        """The tasks' preconditioned gradients by layer, [2 * n_tasks, ...]: `MEANS` and `DRAWS`."""
        if self.how.rank is None:
            return dict(self._preconditioned(self.tasks, inverse))
        found = []
        for index, task in enumerate(self.tasks):
            stacks, thin = self._preconditioned([task], inverse), dict[str, Held]()
            for layer in list(stacks):
                stack = stacks.pop(layer).to(self.capture.device(layer))
                thin[layer], left_out = truncated(stack, self.how.rank, self.how.offload)
                self.left_out.note(index, layer, stack[0], left_out[0])
            found.append(thin)
        return joined(found, self.how.offload)

    def _preconditioned(self, tasks: list[ProbeSet], inverse: InverseCurvature) -> dict[str, Tensor]:
        towards = mean_gradients(tasks, self.capture, draws=True)
        self._precondition(inverse, towards)
        return towards

    def _precondition(self, inverse: InverseCurvature, stacks: dict[str, Tensor]) -> None:
        if not isinstance(inverse, LayerByLayer):
            if self.how.offload == "cpu" and not isinstance(inverse, FittedDataInf):
                raise ValueError(f"offload='cpu': {type(inverse).__name__} does not work layer by layer; leave it out")
            inverse.precondition_all(stacks)
            return
        for layer, stack in stacks.items():
            with on(stack, self.capture.device(layer)) as there:
                there.copy_(inverse.precondition(layer, there))

    def influence(self) -> Influence:
        """Scores, errors and losses as arrays."""
        over_domain = np.stack([domain.variance() for domain in self.domains], axis=1)  # [2 * n_tasks, n_domains]
        over_task = np.stack([task.variance() for task in self.tasks])  # [n_tasks, n_domains]
        error = np.sqrt(_variance(over_domain, over_task, [task.tokens for task in self.tasks]))
        losses = [mean_and_error(task.losses, task.tokens, task.stratum) for task in self.tasks]
        influence = Influence(
            scores=self.scores,
            tasks=[task.name for task in self.tasks],
            domains=[domain.name for domain in self.domains],
            standard_error=np.where(np.isnan(self.scores), np.nan, error),
            task_loss=[loss for loss, _ in losses],
            task_loss_standard_error=[error for _, error in losses],
            left_out=None if self.how.rank is None else self.left_out.relative,
            left_out_bound=None if self.how.rank is None else self.left_out.bound,
            scored_tokens=[domain.tokens.mean() for domain in self.domains],
        )
        return self.capture.ranks.exchange("the influence", influence)[0]  # machines may round in their own ways


def _products(towards: Mapping[str, Held], gradients: Mapping[str, Tensor], capture: Capture) -> Array:
    """<`MEANS` of towards, gradients> summed over the layers, float64[n_tasks, n_domains]."""
    n_tasks, n_domains = len(next(iter(towards.values()))) // 2, len(next(iter(gradients.values())))
    total = np.zeros((n_tasks, n_domains))
    for layer, gradient in gradients.items():
        if layer in towards:
            device = capture.device(layer)
            # Row by row of the matrices, and the rows in float64: a single sum in float32 is that of a million terms.
            rows = torch.einsum("toi,doi->otd", towards[layer].to(device)[MEANS], gradient.to(device))
            total += rows.cpu().double().sum(0).numpy()
            let_go(towards[layer])
            let_go(gradient)
    return total


def _variance(over_domain: Array, over_task: Array, task_tokens: list[Array]) -> Array:
    """Variance of the scores [n_tasks, n_domains] over the sequences of both sides.

    With independent noises x of a task and y of a domain, (G + x)(g + y) varies by Gy, xg and xy. The variance over one
    side's sequences is seen with the other side's noise in it, so xy is in both, and is to count once. How much it is
    says the variance over a domain's sequences of their products with a draw of x, in which there is no G.
    """
    n = np.array([[np.count_nonzero(tokens)] for tokens in task_tokens], dtype=np.float64)
    # What n sequences deviate by from their own mean varies by (n - 1) / n of the noise.
    over_domain, both = over_domain[MEANS], over_domain[DRAWS] * n / np.maximum(n - 1, 1)
    both = np.where(np.isfinite(both), both, 0.0)
    return over_domain + over_task - np.minimum(both, np.minimum(over_domain, over_task))


class _Pool:
    """Batches of all sets one after the other, as often as asked."""

    def __init__(self, sets: list[Batches]) -> None:
        self._sets = sets

    def __iter__(self) -> Iterator[Batch]:
        return chain.from_iterable(self._sets)


def _check(domains: Sets, tasks: Sets, how: _How) -> None:
    for kind, sets in (("domains", domains), ("tasks", tasks)):
        if not sets:
            raise ValueError(f"{kind} is empty: give at least one, by name")
        for name, batches in sets.items():
            _check_batches(f"{kind}[{name!r}]", batches)
    if how.curvature_batches is not None:
        _check_batches("curvature_batches", how.curvature_batches)
    if how.error_sequences is not None and how.error_sequences < 2:
        raise ValueError(f"error_sequences={how.error_sequences}: at least 2, or None for all")
    if how.rank is not None and how.rank < 1:
        raise ValueError(f"rank={how.rank}: at least 1, or None to hold the tasks' gradients whole")
    check_offload(how.offload)


def _check_batches(what: str, batches: Batches) -> None:
    if isinstance(batches, Iterator):
        raise TypeError(f"{what} can be read only once, but several passes are needed: give a list or a DataLoader")
    if isinstance(batches, Mapping | str) or not hasattr(batches, "__iter__"):
        raise TypeError(f"{what} must be a list or DataLoader of batches (dicts), got {type(batches).__name__}")
    if isinstance(batches, Sized) and len(batches) == 0:
        raise ValueError(f"{what} is empty: it needs at least one batch")
