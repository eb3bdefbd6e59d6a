"""What is measured at a boundary: on which sequences of the domains, on which tasks, with which curvature.

Knows the dataset and the model; nothing of what is decided from it or of when.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dynmix.batches import Batch, as_batches, collate, scored_sequence
from dynmix.influence.capture import LayerFilter, random_state_kept
from dynmix.influence.curvature import Curvature, Identity
from dynmix.influence.group import group_influence
from dynmix.influence.losses import task_losses
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.probe import probe_rows, repeated
from dynmix.mixture.schedule import Ints
from dynmix.observation import Influence

logger = logging.getLogger("dynmix")

Probes = dict[str, Ints]
"""Domain -> rows that are measured, int64[sequences]."""


class Measurement:
    """Measures the influence of every domain on every task, and the tasks' losses.

    Args: as in `dynmix.controller.MixtureController`.

    Raises:
        ValueError: no tasks, one that is empty or of another form, a number below 1.
    """

    def __init__(
        self,
        dataset: MixtureDataset,
        tasks: Mapping[str, Any],
        curvature: Curvature,
        *,
        probe_sequences: int,
        curvature_sequences: int,
        task_sequences: int | None,
        micro_batch: int,
        layers: LayerFilter,
    ):
        for argument, value in {
            "probe_sequences": probe_sequences,
            "curvature_sequences": curvature_sequences,
            "task_sequences": task_sequences,
            "micro_batch": micro_batch,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"{argument}={value}: at least 1")
        if not tasks:
            raise ValueError("tasks is empty: give at least one validation set, as {name: batches}")
        self.dataset, self.curvature, self.layers, self.micro_batch = dataset, curvature, layers, micro_batch
        self.probe_sequences, self.curvature_sequences = probe_sequences, curvature_sequences
        with random_state_kept():
            self.tasks: dict[str, list[Batch]] = {
                name: as_batches(
                    task,
                    name=f"tasks[{name!r}]",
                    sequence_length=dataset.sequence_length,
                    micro_batch=micro_batch,
                    sequences=task_sequences,
                )
                for name, task in tasks.items()
            }

    def describe(self) -> dict[str, Any]:
        """Return the configuration, JSON-able."""
        return {
            "curvature": repr(self.curvature),
            "layers": self.layers if isinstance(self.layers, str) else repr(self.layers),
            "probe_sequences": self.probe_sequences,
            "curvature_sequences": self.curvature_sequences,
            "micro_batch": self.micro_batch,
            "tasks": {name: sum(len(b["input_ids"]) for b in batches) for name, batches in self.tasks.items()},
        }

    def rehearse(self, model: nn.Module) -> Influence:
        """Measure on one sequence of each domain and task, to find what would fail; raises whatever does."""
        domains = {name: self._batches(name, np.zeros(1, dtype=np.int64)) for name in self.dataset.domains}
        tasks = {name: [scored_sequence(batches, f"tasks[{name!r}]")] for name, batches in self.tasks.items()}
        return group_influence(model, domains, tasks, Identity(), layers=self.layers)

    def losses(self, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        """Return task -> loss in nats per token, and task -> its standard error."""
        return task_losses(model, self.tasks)

    def probes(self, start: int, window: int, prior: Mapping[str, float]) -> Probes:
        """Return rows of each domain that the `window` samples from `start` on will not train on, if it has so many."""
        shares = self._curvature_shares(prior)
        return {
            name: probe_rows(self.dataset.schedule, i, max(self.probe_sequences, shares[name]), start, window)
            for i, name in enumerate(self.dataset.domains)
        }

    def influence(self, model: nn.Module, probes: Probes, prior: Mapping[str, float]) -> Influence:
        """Return the group influence on these probes; the curvature is fitted in the proportions of `prior`."""
        shares = self._curvature_shares(prior)
        domains = {name: self._batches(name, rows[: self.probe_sequences]) for name, rows in probes.items()}
        pooled = [batch for name, rows in probes.items() for batch in self._batches(name, rows[: shares[name]])]
        total = self.curvature.passes * len(pooled) + sum(map(len, domains.values()))
        total += 2 * sum(map(len, self.tasks.values()))
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        with tqdm(total=total, desc="measuring", unit="batch", leave=False, delay=2, disable=not first) as bar:

            def tick() -> None:
                self.dataset.pulse()
                bar.update()

            return group_influence(
                model, domains, self.tasks, self.curvature, layers=self.layers, curvature_batches=pooled, tick=tick
            )

    def warn_of_repeated(self, probes: Probes, start: int, stop: int) -> None:
        """Log which domains were too small to keep their probes out of the stage [start, stop), now published."""
        for i, name in enumerate(self.dataset.domains):
            if name in probes and (n := repeated(self.dataset.schedule, i, probes[name], start, stop)):
                logger.warning(
                    "%d of the %d probe sequences of domain %r are trained on within the next stage: it has only %d "
                    "sequences; shorten the stage or bound the domain with max_epochs",
                    n, len(probes[name]), name, self.dataset.sizes[name],
                )  # fmt: skip

    def _curvature_shares(self, prior: Mapping[str, float]) -> dict[str, int]:
        """Return domain -> sequences the curvature is fitted on; they sum to `curvature_sequences`."""
        ends = np.rint(np.cumsum(list(prior.values())) * self.curvature_sequences).astype(int)
        return dict(zip(prior, np.diff(ends, prepend=0).tolist(), strict=True))

    def _batches(self, domain: str, rows: Ints) -> list[Batch]:
        items = [self.dataset.sequence(domain, int(row)) for row in rows]
        return [collate(items[i : i + self.micro_batch]) for i in range(0, len(items), self.micro_batch)]
