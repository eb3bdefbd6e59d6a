"""What is measured at a boundary: on which sequences of the domains, for which tasks, with which curvature.

Knows the dataset and the model; not what is decided from the measurement, nor when.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec

import numpy as np
from torch import nn

from dynmix.batches import Batch, as_batches, collate, scored_sequence, split
from dynmix.drawn import DrawnMixtures
from dynmix.influence.base import check_curvature
from dynmix.influence.batch import check_fits
from dynmix.influence.carried import Carried
from dynmix.influence.curvature import AdamDiagonal, Curvature, Identity
from dynmix.influence.factored import FactoredCurvature
from dynmix.influence.group import group_influence, scored_groups
from dynmix.influence.isolation import random_state_kept, unwrap
from dynmix.influence.layers import LayerFilter, Layers
from dynmix.influence.losses import task_losses
from dynmix.influence.memory import PeakMemory, peak_memory
from dynmix.influence.storage import Offload, check_offload
from dynmix.influence.task_gradients import TaskGradients, sequence_products, task_gradients
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.options import whole
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.probe import probe_rows, repeated
from dynmix.mixture.schedule import Ints
from dynmix.mixture.store import TokenStore
from dynmix.mixture.stream import Mixture, MixtureStream
from dynmix.observation import Array, Influence, Weights
from dynmix.ranks import Ranks, on_every_rank
from dynmix.retry import T, within_memory
from dynmix.shown import Bar

logger = logging.getLogger("dynmix")

P = ParamSpec("P")
Sets = Mapping[str, list[Batch]]

# Sequences that are searched for tokens outside the model's vocabulary: of each domain, and of all together.
_LOOKED_AT, _LOOKED_AT_IN_ALL = 32, 4096

HELD_OUT = "held-out"
"""Name of the default guard: the mean over the domains of their own text that the coming stage does not train on."""


@dataclass(frozen=True)
class Probes:
    """Rows of each domain that the coming stage does not train on, int64[sequences].

    The domains are measured on `domains`, and `held_out` is the default guard. `seed` is for samples drawn from them.
    """

    domains: dict[str, Ints]
    held_out: dict[str, Ints]
    seed: int


def _within_memory(method: Callable[Concatenate["Measurement", P], T]) -> Callable[Concatenate["Measurement", P], T]:
    """Where memory runs out, start again with smaller batches and the factors of before; random states are kept."""

    @wraps(method)
    @random_state_kept()
    def measured(self: "Measurement", /, *args: P.args, **options: P.kwargs) -> T:
        carried = self.carried
        before = None if carried is None else (carried.fitted, carried.used)

        def from_the_start() -> T:
            if carried is not None and before is not None:
                carried.fitted, carried.used = before
            return method(self, *args, **options)

        return within_memory(from_the_start, self._halve)

    return measured


class Measurement:
    """Measures the influence of every domain on every task, and the tasks' losses.

    If memory runs out on any rank, the measurement starts again with batches of half as many sequences, down to one;
    they stay that small for the rest of the run.

    Args: as in `dynmix.controller.MixtureController`; `needs` is what the mixer asks for, and nothing else is measured.

    Raises:
        ValueError: no tasks, one that is empty or of another form, a name that is a task and a guard, a number below 1.
    """

    def __init__(
        self,
        dataset: Mixture,
        tasks: Mapping[str, Any],
        curvature: Curvature,
        needs: frozenset[str],
        *,
        guards: Mapping[str, Any] | Literal["domains"] | None,
        probe_sequences: int,
        curvature_sequences: int,
        task_sequences: int | None,
        sample_sequences: int,
        micro_batch: int,
        layers: LayerFilter,
        offload: Offload = None,
        layer_groups: int = 1,
        rank: int | None = None,
    ):
        counts = {"probe_sequences": probe_sequences, "curvature_sequences": curvature_sequences}
        counts |= {"sample_sequences": sample_sequences, "micro_batch": micro_batch, "layer_groups": layer_groups}
        optional = {"task_sequences": task_sequences, "rank": rank}
        for argument, value in (counts | {name: n for name, n in optional.items() if n is not None}).items():
            if whole(argument, value) < 1:
                raise ValueError(f"{argument}={value}: at least 1")
        if not isinstance(tasks, Mapping) or not tasks:
            what = "empty" if isinstance(tasks, Mapping) else f"a {type(tasks).__name__}"
            raise ValueError(f"tasks is {what}: give at least one validation set, as {{name: batches}}")
        if not (guards is None or isinstance(guards, Mapping) or guards == "domains"):
            raise ValueError(f"guards={guards!r}: {{name: batches}}, 'domains' or None")
        self.dataset, self.layers, self.micro_batch = dataset, layers, micro_batch
        check_offload(offload)
        check_curvature(curvature, "passes")
        Layers.of(layers)  # raises if it is not a regular expression
        self.memory_options: dict[str, Any] = {"offload": offload, "layer_groups": layer_groups, "rank": rank}
        self.shrunk_to: int | None = None  # sequences per batch at most, once memory has run out
        self.curvature: Curvature = curvature
        self.carried: Carried | None = None  # what a curvature keeps from stage to stage
        if isinstance(curvature, FactoredCurvature):
            if curvature.ema or curvature.refresh_every > 1:
                if layer_groups > 1:
                    raise ValueError(
                        f"layer_groups={layer_groups}: factors that are carried from stage to stage are of all layers "
                        "at once; leave ema and refresh_every as they are, or layer_groups at 1"
                    )
                self.curvature = self.carried = Carried(curvature)
            if curvature.factor_tokens is not None:
                curvature_sequences = max(1, curvature.factor_tokens // dataset.sequence_length)
        self.needs, self.sample_sequences = needs, sample_sequences
        self.probe_sequences, self.curvature_sequences = probe_sequences, curvature_sequences
        given: Mapping[str, Any] = guards if isinstance(guards, Mapping) else {}
        held_out = guards == "domains" and "guards" in needs
        self.guards = (HELD_OUT,) if held_out else tuple(given)
        if both := [name for name in self.guards if name in tasks]:
            raise ValueError(f"{both} are tasks and guards: a set is optimised for or guarded; rename or drop one")
        self._held_out = (task_sequences or 128) if held_out else 0  # sequences of all domains together
        with random_state_kept():
            self.sets: dict[str, list[Batch]] = {
                name: as_batches(
                    source,
                    name=f"{kind}[{name!r}]",
                    sequence_length=dataset.sequence_length,
                    micro_batch=micro_batch,
                    sequences=task_sequences,
                )
                for kind, sources in (("tasks", tasks), ("guards", given))
                for name, source in sources.items()
            }
        _warn_of_trained_on(dataset, {**tasks, **given})

    def describe(self) -> dict[str, Any]:
        """Return the configuration, JSON-able."""
        return {
            "curvature": repr(self.curvature),
            "layers": self.layers if isinstance(self.layers, str) else repr(self.layers),
            "probe_sequences": self.probe_sequences,
            "curvature_sequences": self.curvature_sequences,
            "micro_batch": self.micro_batch,
            **self.memory_options,
            "sets": {name: sum(len(b["input_ids"]) for b in batches) for name, batches in self.sets.items()},
            "guards": list(self.guards),
        }

    @property
    def here(self) -> list[str]:
        """The domains that can be measured: all but those of a resumed state that this run does not list."""
        gone = self.dataset.gone
        return [name for name in self.dataset.domains if name not in gone]

    @property
    def held_out_sequences(self) -> int:
        """Sequences of each domain in the default guard; 0 without it."""
        if not self._held_out:
            return 0
        # An even number, and two at least, so that there is a spread within every one of them.
        of_each = -(-self._held_out // len(self.here))
        return max(2, of_each + of_each % 2)

    def shrink(self, sequences: int) -> None:
        """Take at most so many sequences per batch from now on."""
        self.shrunk_to, self.micro_batch = sequences, min(self.micro_batch, sequences)
        self.sets = {name: split(batches, sequences) for name, batches in self.sets.items()}

    # -- when a run begins ---------------------------------------------------------------------------------------------

    @random_state_kept()  # a domain's items may draw from it, here as in what follows
    def check(self, model: nn.Module) -> None:
        """Raise ValueError for a task or guard without a token to score, or for what the model cannot read.

        Of a domain only a few sequences are read, evenly spread: with the wrong tokenizer, most have a token that the
        model's vocabulary has not.
        """
        for name, own in self.sets.items():
            scored_sequence(own, self._called(name))
        if not hasattr(unwrap(model), "config"):
            return
        for name, own in self.sets.items():
            check_fits(model, own, self._called(name))
        for name, rows in self._some_of_each().items():
            check_fits(model, self._batches(name, rows), f"domains[{name!r}]")

    @random_state_kept()
    def rehearse(self, model: nn.Module) -> tuple[Influence, DrawnMixtures | None]:
        """Measure on one sequence of each domain and set, so that whatever would fail raises now."""
        domains, sets = on_every_rank(self._one_of_each)
        return self._measured(model, domains, sets, Identity(), 0, layers=self.layers, over_ranks=True)

    @random_state_kept()
    def peak_memory(self, model: nn.Module) -> PeakMemory:
        """Return the memory that an influence takes besides the model; runs the longest kind of sequence through it."""
        first = [self._batches(self.here[0], np.zeros(1, dtype=np.int64)), *self._rows({}).values()]
        longest = max((batches[0] for batches in first), key=lambda batch: batch["input_ids"].shape[1])
        return peak_memory(
            model,
            split([longest], 1)[0],
            domains=len(self.here),
            tasks=len(self._rows({})) + bool(self.held_out_sequences),
            micro_batch=self._largest_batch,
            curvature=self.curvature,
            layers=self.layers,
            **self.memory_options,
        )

    def _one_of_each(self) -> tuple[Sets, Sets]:
        if isinstance(self.curvature, AdamDiagonal):
            self.curvature.check()  # before the first step the optimizer has no moments to try it with
        domains = {name: [batch] for name, batch in self.scored_of_each().items()}
        sets = {name: [scored_sequence(batches, self._called(name))] for name, batches in self._rows({}).items()}
        if self.held_out_sequences:
            sets[HELD_OUT] = next(iter(domains.values()))
        return domains, sets

    def _called(self, name: str) -> str:
        return f"{'guards' if name in self.guards else 'tasks'}[{name!r}]"

    def _some_of_each(self) -> dict[str, Ints]:
        """A few rows of each domain, evenly spread over those that a measurement may use."""
        if isinstance(self.dataset, MixtureStream):
            sizes = {name: self.dataset.probes(name) for name in self.dataset.domains}
        else:
            sizes = {name: self.dataset.sizes[name] for name in self.here}
        few = max(1, min(_LOOKED_AT, _LOOKED_AT_IN_ALL // len(sizes)))
        return {name: np.linspace(0, size - 1, min(size, few)).astype(np.int64) for name, size in sizes.items()}

    @random_state_kept()
    def scored_of_each(self) -> dict[str, Batch]:
        """Of each domain the first sequence with a token to score, among a few that are evenly spread over it."""
        return {
            name: scored_sequence(
                (self._batches(name, row[None])[0] for row in rows),
                f"domains[{name!r}], of which {len(rows)} sequences were looked at",
            )
            for name, rows in self._some_of_each().items()
        }

    # -- at a boundary -------------------------------------------------------------------------------------------------

    def probes(self, start: int, window: int, prior: Weights) -> Probes:
        """Return rows of each domain that the `window` samples from `start` on do not train on, if it has any."""
        shares = self._curvature_shares(prior)
        domains, held_out = {}, {}
        for name in self.here:
            count, more = max(self.probe_sequences, shares[name]), self.held_out_sequences
            domains[name] = self._probe_rows(name, count, start, window)
            rows = self._probe_rows(name, count + more, start, window)
            others = rows[~np.isin(rows, domains[name])]
            # Probes have priority: a domain too small for both is guarded by some of its probes, repeated if need be.
            held_out[name] = np.resize(others if len(others) >= more else rows, more)
        return Probes(domains, held_out, seed=start)

    @_within_memory
    def influence(self, model: nn.Module, probes: Probes, prior: Weights) -> tuple[Influence, DrawnMixtures | None]:
        """Return the group influence on these probes, and a sampler of mixtures of them if the mixer needs `measure`.

        The curvature is fitted in the proportions of `prior`.
        """
        sets, (domains, pooled) = on_every_rank(lambda: (self._rows(probes.held_out), self._batches_of(probes, prior)))
        options = self._options | self.memory_options | {"curvature_batches": pooled}
        passes = self.curvature.passes * len(pooled)
        with self._progress(passes, domains, sets, self.memory_options["layer_groups"]) as tick:
            return self._measured(model, domains, sets, self.curvature, probes.seed, tick=tick, **options)

    @_within_memory
    def gradient(self, model: nn.Module, probes: Probes) -> Influence:
        """Return the products of the domains' gradients with those of the sets: an influence without a curvature."""
        sets, domains = on_every_rank(
            lambda: (self._rows(probes.held_out), self._probe_batches(probes, probes.domains))
        )
        options = self._options | self.memory_options
        with self._progress(0, domains, sets, self.memory_options["layer_groups"]) as tick:
            return self.completed(group_influence(model, domains, sets, Identity(), tick=tick, **options))

    @_within_memory
    def losses(self, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        """Return task or guard -> loss in nats per token, and -> its standard error."""
        return task_losses(model, self.sets, over_ranks=True)

    def warn_of_repeated(self, probes: Probes, start: int, stop: int) -> None:
        """Log which domains were too small to keep their probes out of the stage [start, stop), now published."""
        if isinstance(self.dataset, MixtureStream):
            return  # it kept its probes aside, or said that it could not
        for name, rows in probes.domains.items():
            if n := repeated(self.dataset.schedule, self.dataset.domains.index(name), rows, start, stop):
                logger.warning(
                    "%d of the %d probe sequences of domain %r are trained on within the next stage: it has only %d "
                    "sequences; shorten the stage or bound the domain with max_epochs",
                    n, len(rows), name, self.dataset.sizes[name],
                )  # fmt: skip

    # -- for an in-run influence ---------------------------------------------------------------------------------------

    @_within_memory
    def task_gradients(self, model: nn.Module, probes: Probes, prior: Weights, folds: int) -> TaskGradients:
        """Return the preconditioned gradient of each row of the influence, with the curvature as in `influence`."""
        sets, (_, pooled) = on_every_rank(lambda: (self._rows(probes.held_out), self._batches_of(probes, prior)))
        with self._progress(self.curvature.passes * len(pooled), {}, sets) as tick:
            return task_gradients(model, sets, self.curvature, pooled, folds=folds, tick=tick, **self._options)

    @_within_memory
    def products(
        self, model: nn.Module, gradients: TaskGradients, probes: Probes, domains: Collection[str]
    ) -> dict[str, tuple[Array, Array]]:
        """Return the products of these domains' probes with the tasks' gradients, as `sequence_products`."""
        sets = on_every_rank(lambda: self._probe_batches(probes, domains))
        with self._progress(0, sets, {}) as tick:
            return sequence_products(model, gradients, sets, tick=tick, over_ranks=True)

    def completed(self, influence: Influence) -> Influence:
        """Return the influence with its guards named and a column for every domain of the dataset.

        The column of a domain that is not here is 0: it cannot be drawn, and its weight is bounded by 0.
        """
        guards = tuple(name for name in influence.tasks if name in self.guards)
        influence = replace(influence, guards=guards) if guards else influence
        if len(here := self.here) == len(self.dataset.domains):
            return influence
        measured = [influence.domains.index(name) for name in here]
        columns = [self.dataset.domains.index(name) for name in here]
        by_domain: dict[str, Any] = {}
        for key in ("scores", "standard_error", "left_out_bound"):
            if (values := getattr(influence, key)) is not None:
                by_domain[key] = np.zeros((len(values), len(self.dataset.domains)))
                by_domain[key][:, columns] = values[:, measured]
        if (scored := influence.scored_tokens) is not None:
            by_domain["scored_tokens"] = np.full(len(self.dataset.domains), scored[measured].mean())
            by_domain["scored_tokens"][columns] = scored[measured]
        return replace(influence, domains=self.dataset.domains, **by_domain)

    # -- what they share -----------------------------------------------------------------------------------------------

    def _rows(self, held_out: Mapping[str, Ints]) -> dict[str, list[Batch]]:
        """Return the rows of the influence: tasks, and guards if the mixer needs them."""
        sets = {k: v for k, v in self.sets.items() if k not in self.guards or "guards" in self.needs}
        if held_out and self.held_out_sequences:
            items = [self.dataset.sequence(name, int(row)) for name, rows in held_out.items() for row in rows]
            sets[HELD_OUT] = self._collated(items)
        return sets

    def _measured(
        self, model: nn.Module, domains: Sets, sets: Sets, curvature: Curvature, seed: int, **options: Any
    ) -> tuple[Influence, DrawnMixtures | None]:
        if "measure" not in self.needs:
            return self.completed(group_influence(model, domains, sets, curvature, **options)), None
        found = scored_groups(model, domains, sets, curvature, **options)
        # A domain that is not here is never drawn, but has a weight, 0.
        nothing, names = np.zeros((1, len(found.influence.tasks))), self.dataset.domains
        scores = {name: found.scores.get(name, nothing) for name in names}
        tokens = {name: found.tokens.get(name, np.zeros(1)) for name in names}
        return self.completed(found.influence), DrawnMixtures(scores, tokens, self.sample_sequences, seed)

    @property
    def _options(self) -> dict[str, Any]:
        strata = {HELD_OUT: self.held_out_sequences} if self.held_out_sequences else {}
        return {"layers": self.layers, "strata": strata, "over_ranks": True}

    def _batches_of(self, probes: Probes, prior: Weights) -> tuple[dict[str, list[Batch]], list[Batch]]:
        """Each domain's batches, and those of all of them that the curvature is fitted on."""
        shares, domains, pooled = self._curvature_shares(prior), dict[str, list[Batch]](), list[Batch]()
        for name, rows in probes.domains.items():
            own = domains[name] = self._batches(name, rows[: self.probe_sequences])
            # Whole batches that both use are the same objects, so that they are read once.
            count = len(own) if shares[name] >= self.probe_sequences else shares[name] // self.micro_batch
            read = sum(len(batch["input_ids"]) for batch in own[:count])
            pooled += own[:count] + self._batches(name, rows[read : shares[name]])
        return domains, pooled

    def _curvature_shares(self, prior: Weights) -> dict[str, int]:
        """Return domain -> sequences the curvature is fitted on; they sum to `curvature_sequences`."""
        ends = np.rint(np.cumsum(list(prior.values())) * self.curvature_sequences).astype(int)
        return dict(zip(prior, np.diff(ends, prepend=0).tolist(), strict=True))

    def _probe_rows(self, domain: str, count: int, start: int, window: int) -> Ints:
        if isinstance(self.dataset, MixtureStream):
            return np.arange(min(count, self.dataset.probes(domain)))
        return probe_rows(self.dataset.schedule, self.dataset.domains.index(domain), count, start, window)

    def _probe_batches(self, probes: Probes, domains: Iterable[str]) -> dict[str, list[Batch]]:
        return {name: self._batches(name, probes.domains[name][: self.probe_sequences]) for name in domains}

    def _batches(self, domain: str, rows: Ints) -> list[Batch]:
        return self._collated([self.dataset.sequence(domain, int(row)) for row in rows])

    def _collated(self, items: list[dict[str, Any]]) -> list[Batch]:
        return [collate(items[i : i + self.micro_batch]) for i in range(0, len(items), self.micro_batch)]

    @contextmanager
    def _progress(self, passes: int, domains: Sets, sets: Sets, times: int = 1) -> Iterator[Callable[[], None]]:
        batches = times * (passes + sum(map(len, domains.values())) + 2 * sum(map(len, sets.values())))
        ranks = Ranks(shared=True)
        share, hidden = -(-batches // ranks.size), ranks.rank > 0
        with Bar(total=share, desc="measuring", unit="batch", disable=hidden) as bar:

            def tick() -> None:
                self.dataset.pulse()
                bar.update()

            yield tick

    def _halve(self) -> int | None:
        if (largest := self._largest_batch) == 1:
            return None
        self.shrink(largest // 2)
        return largest // 2

    @property
    def _largest_batch(self) -> int:
        sizes = [len(batch["input_ids"]) for batches in self.sets.values() for batch in batches]
        return max(self.micro_batch, *sizes)  # sets that were given as batches may have larger ones


def _warn_of_trained_on(dataset: Mixture, sets: Mapping[str, Any]) -> None:
    """Warn of tasks and guards that are a domain's own store: the run gets better at these texts by reading them."""
    domains = dataset.sequences if isinstance(dataset, MixtureDataset) else {}
    packed = {name: rows.store for name, rows in domains.items() if isinstance(rows, PackedSequences)}
    for name, source in sets.items():
        store = TokenStore.open(source) if isinstance(source, str | os.PathLike) else source
        for domain, own in packed.items() if isinstance(store, TokenStore) else ():
            if own.num_tokens == store.num_tokens and own.fingerprint == store.fingerprint:
                logger.warning(
                    "%r is the text that domain %r trains on: what is measured on it says how well that text is known "
                    "by heart; hold documents out for it (dynmix prepare --held-out)",
                    name, domain,
                )  # fmt: skip
