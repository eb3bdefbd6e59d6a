"""Group influence: how one more unit of each domain moves each task's loss (TiKMiX, arXiv 2508.17677, Section 3.1).

One gradient a domain, one preconditioned gradient a task, and their products. This module knows batches with names; it
knows no mixture, no weights and no trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from dynmix.influence.capture import Batch, Batches, Capture, LayerFilter, Loss, isolated, next_token_loss
from dynmix.influence.curvature import EKFAC, Curvature
from dynmix.influence.gradients import sequence_gradients
from dynmix.observation import Array, Influence

logger = logging.getLogger(__name__)


def group_influence(
    model: nn.Module,
    domains: Mapping[str, Batches],
    tasks: Mapping[str, Batches],
    curvature: Curvature | None = None,
    *,
    layers: LayerFilter = None,
    curvature_batches: Batches | None = None,
    strata: Mapping[str, int] | None = None,
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
        domains: batches of probe sequences by name, read once, and twice more by the default curvature.
        tasks: batches by name, read twice. Both need more than one pass: lists or DataLoaders, no generators.
        curvature: `EKFAC()` if not given, or `DataInf()`, `Identity()`.
        layers: regular expression or predicate on names of linear layers; None measures all of them.
        curvature_batches: what the curvature is fitted on; by default all domains' sequences, each counted once.
        strata: task -> sequences in a row that are of one kind, for a task that is an average over kinds with as many
            sequences of each: its standard error then leaves out what the kinds differ by.
        loss: what is differentiated, if not the next-token cross entropy.
        tick: called after each batch, for a progress bar.

    Memory: (2 * n_tasks + n_domains) gradients of the measured layers in float32, beside the curvature's factors.

    Raises:
        ValueError: no domain or no task, one without batches or scored tokens, no layer to measure.
        TypeError: batches that can be read only once.

    Loss or gradients that are not finite raise nothing: the scores they reach are NaN, and a warning names the set.
    """
    return scored_groups(
        model,
        domains,
        tasks,
        curvature,
        layers=layers,
        curvature_batches=curvature_batches,
        strata=strata,
        loss=loss,
        tick=tick,
    ).influence


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
    loss: Loss = next_token_loss,
    tick: Callable[[], object] | None = None,
) -> ScoredGroups:
    """`group_influence` with the scores of each domain sequence, which come at no further cost."""
    for kind, sets in (("domains", domains), ("tasks", tasks)):
        if not sets:
            raise ValueError(f"{kind} is empty: give at least one, by name")
        for name, batches in sets.items():
            _check_batches(f"{kind}[{name!r}]", batches)
    if curvature_batches is not None:
        _check_batches("curvature_batches", curvature_batches)
    capture = Capture(model, layers=layers, loss=loss, tick=tick)
    with isolated(model):
        fit_on = _Pool(domains) if curvature_batches is None else curvature_batches
        inverse = (EKFAC() if curvature is None else curvature).fit(capture, fit_on)
        task = _sweep(capture, "task", tasks, contrasts=True)
        inverse.precondition_all(task.gradients)
        domain = _sweep(capture, "domain", domains, task.gradients)
        task.gradients.clear()
        inverse.precondition_all(domain.gradients)
        again = _sweep(capture, "task", tasks, domain.gradients, keep_gradients=False)

    kinds = [(strata or {}).get(name) for name in tasks]
    means, domain_variance = (np.stack(part, axis=1) for part in zip(*_ratios(domain), strict=True))
    _, task_variance = (np.stack(part) for part in zip(*_ratios(again, kinds), strict=True))
    losses = [ratio_of_sums(x[:, None], n, k) for x, n, k in zip(task.losses, task.tokens, kinds, strict=True)]
    influence = Influence(
        scores=means[: len(tasks)],
        tasks=list(tasks),
        domains=list(domains),
        standard_error=np.sqrt(_variance(domain_variance, task_variance, task.tokens)),
        task_loss=np.concatenate([value for value, _ in losses]),
        task_loss_standard_error=np.sqrt(np.concatenate([variance for _, variance in losses])),
    )
    scores = {name: products[:, : len(tasks)] for name, products in zip(domains, domain.products, strict=True)}
    return ScoredGroups(influence, scores, dict(zip(domains, domain.tokens, strict=True)))


@dataclass
class _Swept:
    """Per layer the sets' gradients of the mean loss per token [n_sets, out, in]; the lists have an array a set.

    With contrasts, [2 * n_sets, out, in]: then the same sums with the signs of the sequences' gradients alternating and
    the mean taken out, which is one draw of the noise in the gradients before.
    """

    gradients: dict[str, Tensor]
    losses: list[Array]  # [n_sequences], nats
    tokens: list[Array]  # [n_sequences], scored
    products: list[Array]  # [n_sequences, n_towards]


def _sweep(
    capture: Capture,
    kind: str,
    sets: Mapping[str, Batches],
    towards: Mapping[str, Tensor] | None = None,
    *,
    keep_gradients: bool = True,
    contrasts: bool = False,
) -> _Swept:
    """One pass over the batches of every set; each sequence's gradient meets `towards` [n, out, in] in passing."""
    swept = _Swept({}, [], [], [])
    width = len(next(iter(towards.values()))) if towards else 0
    for index, (name, batches) in enumerate(sets.items()):
        losses: list[Array] = []
        tokens: list[Array] = []
        products: list[Array] = []
        for batch in batches:
            product: list[Tensor] = []
            done = sum(map(len, losses))

            def consume(
                layer: str,
                a: Tensor,
                g: Tensor,
                mask: Tensor,
                index: int = index,
                product: list[Tensor] = product,
                done: int = done,
            ) -> None:
                if keep_gradients and layer not in swept.gradients:
                    swept.gradients[layer] = a.new_zeros(len(sets) * (1 + contrasts), g.shape[-1], a.shape[-1])
                other = None if towards is None else towards.get(layer)
                parts = []
                for part, gradients in sequence_gradients(a, g):
                    if keep_gradients:
                        swept.gradients[layer][index] += gradients.sum(0)
                    if contrasts:
                        signs = torch.as_tensor(_signs(done + part.start, len(gradients))).to(gradients)
                        swept.gradients[layer][len(sets) + index] += torch.tensordot(signs, gradients, 1)
                    if other is not None:
                        parts.append(gradients.flatten(1) @ other.flatten(1).mT)
                if parts:
                    product.append(torch.cat(parts))

            loss, count = capture.run(batch, consume)
            losses.append(loss.numpy())
            tokens.append(count.numpy())
            # Layers may be on different devices, and some devices have no float64.
            products.append(sum((p.cpu().double().numpy() for p in product), np.zeros((len(loss), width))))
        if not losses:
            raise ValueError(f"{kind} {name!r} has no batches in this pass: it must give the same ones every time")
        swept.losses.append(np.concatenate(losses))
        swept.tokens.append(np.concatenate(tokens))
        swept.products.append(np.concatenate(products))
        scored = swept.tokens[-1].sum()
        if scored == 0:
            raise ValueError(f"{kind} {name!r} has no scored token: every label is -100 or masked")
        finite = bool(np.isfinite(swept.losses[-1]).all())
        signed = float(_signs(0, len(swept.tokens[-1])) @ swept.tokens[-1])
        for gradient in swept.gradients.values():
            gradient[index] /= scored
            if contrasts:
                gradient[len(sets) + index] -= gradient[index] * signed
                gradient[len(sets) + index] /= scored
            finite = finite and bool(gradient[index].isfinite().all())
        if keep_gradients and not finite:
            logger.warning("%s %r: a loss or gradient is not finite, its influence is NaN", kind, name)
    return swept


def ratio_of_sums(values: Array, tokens: Array, stratum: int | None = None) -> tuple[Array, Array]:
    """Sum of values [n, k] a token, and its variance over the sequences (delta method for a ratio of means).

    With `stratum`, each so many sequences in a row are a sample of their own, and the variance is that within them.
    """
    total, n = tokens.sum(), int(np.count_nonzero(tokens))
    ratio = values.sum(axis=0) / total
    residuals = values - ratio * tokens[:, None]
    if stratum is not None:
        n = stratum
        of_kinds = residuals.reshape(-1, stratum, values.shape[1])
        residuals = (of_kinds - of_kinds.mean(axis=1, keepdims=True)).reshape(values.shape)
    if n < 2:
        return ratio, np.where(np.isnan(ratio), np.nan, np.inf)
    return ratio, n / (n - 1) * (residuals**2).sum(axis=0) / total**2


def _ratios(swept: _Swept, strata: Sequence[int | None] | None = None) -> list[tuple[Array, Array]]:
    kinds = strata or [None] * len(swept.tokens)
    return [ratio_of_sums(v, tokens, k) for v, tokens, k in zip(swept.products, swept.tokens, kinds, strict=True)]


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


def _signs(start: int, count: int) -> Array:
    """+1 for sequences with an even number, -1 for odd ones."""
    return np.where(np.arange(start, start + count) % 2 == 0, 1.0, -1.0)


class _Pool:
    """Batches of all sets one after the other, as often as asked."""

    def __init__(self, sets: Mapping[str, Batches]) -> None:
        self._sets = sets

    def __iter__(self) -> Iterator[Batch]:
        return chain.from_iterable(self._sets.values())


def _check_batches(what: str, batches: Batches) -> None:
    if isinstance(batches, Iterator):
        raise TypeError(f"{what} can be read only once, but several passes are needed: give a list or a DataLoader")
    if isinstance(batches, Mapping | str) or not hasattr(batches, "__iter__"):
        raise TypeError(f"{what} must be a list or DataLoader of batches (dicts), got {type(batches).__name__}")
    if isinstance(batches, Sized) and len(batches) == 0:
        raise ValueError(f"{what} is empty: it needs at least one batch")
