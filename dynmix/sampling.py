"""What mixers that regroup the corpus need measured: the checkpoints in which tasks peak, and their scores of all data.

Between boundaries it evaluates the tasks and keeps snapshots; at a boundary it has each of them score every sequence
of the dataset. Knows the dataset, the tasks and the model that trains; nothing of what is decided from the scores.
"""

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from dynmix.batches import Batch, scored_sequence
from dynmix.checkpoints import Checkpoint, evenly_spaced, metric_of
from dynmix.influence.curvature import Curvature
from dynmix.influence.isolation import random_state_kept
from dynmix.influence.layers import LayerFilter
from dynmix.influence.losses import task_losses
from dynmix.influence.sample import sample_influence
from dynmix.mixture.dataset import MixtureDataset
from dynmix.observation import Array
from dynmix.peaks import PeakSnapshots, evaluated
from dynmix.ranks import Ranks, from_rank_0, gathered, is_rank_0, on_every_rank
from dynmix.retry import within_memory
from dynmix.run_folder import delete, numbered
from dynmix.scores import Column, SamplePlan, SampleScores
from dynmix.scoring import Source, all_sources, peak_sources, read_scores, score_corpus
from dynmix.scoring.folder import OtherConfiguration, ScoreFolder, discard
from dynmix.snapshot import check_like, load_like, write_snapshot
from dynmix.tasks import Task

logger = logging.getLogger("dynmix")

_PATIENCE = 120.0  # seconds; NFS looks after one what is new in a folder


class Sampler:
    """Evaluates the tasks, keeps the checkpoints that will score, and has them score the dataset.

    Args: as in `dynmix.controller.MixtureController`, and
        dataset: its first domains are what is scored.
        sources: the tasks as the user gave them: those that are `Task`s can be evaluated by more than their loss.
        sets: the tasks' batches: what a sequence's influence is on.
        plan: when to evaluate, and which checkpoints score.

    Raises:
        ValueError: a metric that a task does not have, a task of packed documents, layers that are no regular
            expression.
    """

    def __init__(
        self,
        dataset: MixtureDataset,
        sources: Mapping[str, Any],
        sets: Mapping[str, list[Batch]],
        plan: SamplePlan,
        *,
        stage_steps: int,
        layers: LayerFilter,
        curvature: Curvature | None,
        curvature_sequences: int,
        micro_batch: int,
    ):
        if callable(layers):
            raise ValueError("layers: give a regular expression, which can be compared when a killed scoring goes on")
        self.layers: str | None = layers
        self.dataset, self.plan, self.curvature = dataset, plan, curvature
        self.curvature_sequences, self.batch_tokens = curvature_sequences, micro_batch * dataset.sequence_length
        self._tokens = self.batch_tokens  # of an evaluation, until memory runs out
        self.every = plan.every or max(1, stage_steps // 4)
        self.tasks = {name: source for name, source in sources.items() if isinstance(source, Task)}
        self.sets = {name: sets[name] for name in sources}
        for name, batches in self.sets.items():
            if any(map(_packed, batches)):
                raise ValueError(
                    f"tasks[{name!r}] packs several documents into a sequence (position_ids that restart, or a mask of"
                    " its own for each token): scoring the corpus takes each apart, so give its documents unpacked"
                )
        for name in sources:
            metric = metric_of(plan.metric, name)
            if metric != "loss" and name not in self.tasks:
                raise ValueError(f"metric={metric!r} of task {name!r}: only a dynmix.Task has more than a loss")
            if metric == "accuracy" and not self.tasks[name].has_choices:
                raise ValueError(f"metric='accuracy': no example of task {name!r} has choices")
        self.folder: Path  # known when the run begins, as are the peaks
        self.peaks: PeakSnapshots

    def begin(self, folder: Path, step: int, wanted: bool = False) -> None:
        """Take up what was recorded up to `step` in the run's folder, and forget what a killed run recorded after it.

        `peaks/` with the tasks' curves and snapshots, and `scores/`, are kept there. `wanted` as in `evaluate`.
        """
        self.folder = folder
        rule: dict[str, Any] = {"metric": self.plan.metric, "min_delta": self.plan.min_delta}
        self.peaks = on_every_rank(lambda: PeakSnapshots(folder / "peaks", **rule))
        self.peaks.rewind(step)
        on_every_rank(lambda: self._forget_after(step, wanted) if is_rank_0() else None)

    def _forget_after(self, step: int, wanted: bool) -> None:
        for later, path in self._snapshots():
            if later > step:
                shutil.rmtree(path)  # or it would score
        due = range(self.every, step + 1, self.every) if wanted and self.plan.checkpoints != "peak" else range(0)
        there = [at for at, _ in self._snapshots()]
        if lacking := [at for at in (due[-1:] if self.plan.checkpoints == "last" else due) if at not in there]:
            logger.warning(
                "snapshots of %d steps are not there, the first that of step %d (they go when a later checkpoint "
                "is saved than that of step %d, which this run goes on from): others score in their place, and its "
                "groups may be others",
                len(lacking), lacking[0], step,
            )  # fmt: skip

    def rehearse(self, model: nn.Module, domains: Mapping[str, Batch]) -> SampleScores:
        """Score one sequence of each domain with the model as it is; raises whatever fails, then or later."""
        for task in self.tasks.values():
            task.check(model)
        check_like(model)
        tasks = {name: [scored_sequence(some, f"tasks[{name!r}]")] for name, some in self.sets.items()}
        found = sample_influence(model, list(domains.values()), tasks, self.curvature, layers=self.layers)
        return self.of_one_each(tuple(domains), found.scores)

    def of_one_each(self, domains: tuple[str, ...], scores: Array) -> SampleScores:
        """The scores of one sequence of each domain, float64[n_domains, n_tasks], as they come at a boundary."""
        return SampleScores(
            domains, np.arange(len(domains)), np.zeros(len(domains), np.int64),
            np.full(len(domains), self.dataset.sequence_length), tuple(Column(task, "now", 1) for task in self.sets),
            scores,
        )  # fmt: skip

    def evaluate(self, model: nn.Module, step: int, wanted: bool) -> dict[str, float]:
        """Evaluate the tasks, every `every` steps; return what a tracker should log. If that fails the log says so.

        `wanted` is whether a boundary ahead will ask for scores, so that snapshots are needed.
        """
        try:
            return self._evaluate(model, step, wanted)
        except Exception as failure:  # a run must not end because one evaluation did
            logger.warning("the tasks were not evaluated after step %d: %s: %s", step, type(failure).__name__, failure)
            return {}

    def saved(self, step: int, wanted: bool) -> None:
        """Tell that the run can go on from `step`: snapshots that were kept for an earlier one may go."""
        self.peaks.prune(step)
        there = self._snapshots()
        if not is_rank_0() or (wanted and self.plan.checkpoints != "last"):
            return
        # The last of a run that goes on from there, and of this one.
        kept = [*[at for at, _ in there if at <= step][-1:], there[-1][0]] if wanted and there else []
        delete(path for at, path in there if at not in kept)

    def scores(self, model: nn.Module, step: int, tokens_left: int) -> SampleScores:
        """Have the checkpoints score every sequence of the dataset's first domains, for the tasks.

        Every rank calls it and scores a part. What a killed run has scored is not scored again.

        Raises:
            ValueError: no task has a finite value yet, or as `score_corpus` does; on every rank if it does on one.
        """
        # Those with a file are views, as groups are, on what is scored.
        if joined := [domain.name for domain in self.dataset.schedule.joined if "file" not in domain.source]:
            logger.warning(
                "domains %s joined the run and are not scored, so no group has anything of them: list them among the "
                "domains that a run begins with",
                joined,
            )
        if (last := self.peaks.last_step) is None or last < step:
            self._evaluate(model, step, wanted=True)
        # Rank 0's, which has written the last snapshot by then: the others may not see it yet.
        sources = from_rank_0(on_every_rank(lambda: self._sources() if is_rank_0() else []))
        out = self.folder / "scores" / f"step-{step:07d}"
        logger.info("scoring the corpus by %s", ", ".join(f"{s.name} for {'/'.join(s.tasks)}" for s in sources))
        self._score(model, sources, out)
        return replace(on_every_rank(lambda: self._read(out)), tokens_left=tokens_left)

    def _read(self, out: Path) -> SampleScores:
        """Every shard is written by now, but a disk may take a while to show one that another machine has written."""
        end = time.monotonic() + _PATIENCE
        while ScoreFolder(out).missing and time.monotonic() < end:
            self.dataset.pulse()
            time.sleep(0.5)
        found, names = read_scores(out), tuple(self.dataset.sequences)
        numbers = np.array([names.index(name) for name in found.domains])  # some of the dataset may be gone
        return replace(found, domains=names, domain=numbers[found.domain])

    def _score(self, model: nn.Module, sources: list[Source], out: Path) -> None:
        ranks = Ranks(shared=True)
        tasks = {name: _examples(batches) for name, batches in self.sets.items()}
        device = next(model.parameters()).device

        def score() -> None:
            with random_state_kept():  # loading a model draws from it
                score_corpus(
                    self.dataset,
                    {name: tasks[name] for source in sources for name in source.tasks},
                    sources,
                    out,
                    layers=self.layers,
                    curvature=self.curvature,
                    curvature_sequences=self.curvature_sequences,
                    batch_tokens=self.batch_tokens,
                    load=lambda path: load_like(model, path).to(device),
                    part=(ranks.rank, ranks.size),
                    progress=ranks.rank == 0,
                    tick=self.dataset.pulse,
                )

        def others() -> str:
            try:
                score()
            except OtherConfiguration as problem:
                return str(problem)
            return ""

        # All have seen them, before they are gone.
        if problems := [words for words in gathered(on_every_rank(others)) if words]:
            # The run went back, and took another way here.
            logger.warning("scores of another way here are dropped: %s", problems[0])
            on_every_rank(lambda: discard(out) if is_rank_0() else None)
            on_every_rank(score)

    def _evaluate(self, model: nn.Module, step: int, wanted: bool) -> dict[str, float]:
        values, logs = on_every_rank(lambda: within_memory(lambda: self._figures(model), self._halve))
        self.peaks.record(model, step, values)
        if wanted and self.plan.checkpoints != "peak":
            path = self.folder / "checkpoints" / f"step-{step:07d}"
            try:
                write_snapshot(model, path, {"step": step})
            except Exception as failure:  # what fails on the rank that writes must not part it from the others
                logger.error("%s was not saved and will not score: %s", path, failure)
        return logs

    def _figures(self, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        losses, _ = task_losses(model, {name: self.sets[name] for name in self.sets if name not in self.tasks})
        values, logs = evaluated(model, self.tasks, self.plan.metric, self._tokens)
        values |= losses
        logs |= {f"dynmix/task_loss/{name}": loss for name, loss in losses.items()}
        return {name: values[name] for name in self.sets}, logs

    def _halve(self) -> int | None:
        length = self.dataset.sequence_length
        if self._tokens <= length:
            return None
        self._tokens //= 2
        return max(1, self._tokens // length)

    def _sources(self) -> list[Source]:
        if self.plan.checkpoints == "peak":
            # What is on the disk may have tasks that this run was not given any more.
            found = peak_sources({task: at for task, at in self.peaks.selected.items() if task in self.sets})
        else:
            n = 1 if self.plan.checkpoints == "last" else self.plan.checkpoints
            kept = [Checkpoint(path, step) for step, path in self._snapshots()]
            found = all_sources(evenly_spaced(kept, n), self.sets)
        if not found:
            raise ValueError("no task has a finite value at any evaluation: there is no checkpoint to score with")
        return found

    def _snapshots(self) -> list[tuple[int, Path]]:
        return numbered(self.folder / "checkpoints", "step-")


def _packed(batch: Batch) -> bool:
    """Whether something other than the sequence's own end keeps its tokens apart."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and mask.ndim > 2:
        return True
    if positions is None:
        return False
    jumps = positions.diff(dim=-1) != 1
    return bool((jumps if mask is None else jumps & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)).any())


def _examples(batches: list[Batch]) -> list[dict[str, Tensor]]:
    """The sequences of batches, without their padding."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            example = {key: x[row] for key, x in batch.items() if key in ("input_ids", "labels", "attention_mask")}
            mask = example.pop("attention_mask", None)
            found.append(example if mask is None else {key: x[mask != 0] for key, x in example.items()})
    return found
