"""The loop of a semi-dynamic run: at each stage boundary measure, propose, publish, snapshot, write it down.

It owns the order of these steps and what happens when one of them fails (the previous weights stay, and the journal
says why). It must not know the framework that trains: an adapter tells it when a step ended. The boundary's work is
done one optimizer step before the boundary, because loaders fetch a batch ahead in the main process; which samples a
stage gets does not depend on when the work is done, since a stage starts at a declared position.
"""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynmix.batches import Batch, as_batches, collate
from dynmix.influence.capture import LayerFilter, random_state_kept
from dynmix.influence.curvature import EKFAC, Curvature, Identity
from dynmix.influence.group import group_influence
from dynmix.influence.losses import task_losses
from dynmix.journal import Journal, Row
from dynmix.mixers.base import Mixer, Proposal
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.probe import probe_rows, repeated
from dynmix.mixture.schedule import integer_cdf
from dynmix.observation import Influence
from dynmix.snapshot import save_snapshot

logger = logging.getLogger("dynmix")


class MixtureController:
    """Measures, proposes, publishes and journals at each stage boundary of one run.

    Args:
        dataset: the mixture that is trained on, with a single stage: its weights are the prior of the first decision.
        tasks: name -> batches, examples or a token store (see `dynmix.batches.as_batches`).
        mixer: decides the weights; see `dynmix.mixers.Mixer`.
        stage_steps: optimizer steps a stage, at least 2.
        curvature: the curvature of the influence; fitted anew at each boundary; None: `EKFAC()`.
        probe_sequences: sequences of each domain that the influence is measured on, at each boundary.
        curvature_sequences: sequences that the curvature is fitted on, split over the domains as the weights are.
        micro_batch: sequences a forward pass of a measurement.
        max_epochs: how often a domain's sequences may be seen over the whole run, for all domains or by name; gives
            the mixer its upper bounds. None: no bound.
        output: folder for `config.json`, `journal.jsonl` and `snapshots/`; None writes nothing.
        keep: newest snapshots that are kept; 0 saves none.
        layers: which linear layers are measured, as `group_influence` takes it; None: all.

    Raises:
        ValueError: what the arguments say is impossible, with the argument's name, before anything is trained.
    """

    def __init__(
        self,
        dataset: MixtureDataset,
        tasks: Mapping[str, Any],
        mixer: Mixer,
        *,
        stage_steps: int,
        curvature: Curvature | None = None,
        probe_sequences: int = 64,
        curvature_sequences: int = 128,
        micro_batch: int = 8,
        max_epochs: float | Mapping[str, float] | None = None,
        output: str | Path | None = None,
        keep: int = 2,
        layers: LayerFilter = None,
    ):
        for argument, value, least in (
            ("stage_steps", stage_steps, 2),  # a stage is decided one step before it starts
            ("probe_sequences", probe_sequences, 1),
            ("curvature_sequences", curvature_sequences, 1),
            ("micro_batch", micro_batch, 1),
            ("keep", keep, 0),
        ):
            if value < least:
                raise ValueError(f"{argument}={value}: at least {least}")
        if not isinstance(mixer, Mixer):
            raise ValueError(f"mixer={mixer!r} has no `needs` and `propose`; pass an instance, e.g. TiKMiXD()")
        if not tasks:
            raise ValueError("tasks is empty: give at least one validation set, as {name: batches}")
        with random_state_kept():
            self.tasks: dict[str, list[Batch]] = {
                name: as_batches(
                    task, name=f"tasks[{name!r}]", sequence_length=dataset.sequence_length, micro_batch=micro_batch
                )
                for name, task in tasks.items()
            }
        self.dataset, self.mixer, self.stage_steps = dataset, mixer, stage_steps
        self.curvature, self.layers = curvature or EKFAC(), layers
        self.probe_sequences, self.curvature_sequences = probe_sequences, curvature_sequences
        self.micro_batch, self.keep = micro_batch, keep
        self.max_epochs = self._epoch_limits(max_epochs)
        self.output: Path | None = None
        self.journal: Journal | None = None
        if output is not None:
            self.write_to(output)
        self.batch_size = 0  # samples an optimizer step, over all ranks; known when the run is planned
        self.total = 0  # samples of the whole run
        self.resumed = False

    def write_to(self, output: str | Path) -> None:
        """Set the folder of journal, config and snapshots."""
        self.output = Path(output)
        self.journal = Journal(self.output / "journal.jsonl")

    # -- the calls of an adapter, in order ---------------------------------------------------------------------------

    def plan(self, *, batch_size: int, max_steps: int | None = None) -> None:
        """Say what a step is; call before the loader reads, so that it cannot read past the first boundary.

        Args:
            batch_size: samples an optimizer step takes, over all ranks and accumulation steps.
            max_steps: optimizer steps of the whole run; None: as many as the dataset has samples for.

        Raises:
            ValueError: a run that cannot be carried out as described, or that differs from the one being resumed.
        """
        schedule = self.dataset.schedule
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least 1 sample an optimizer step")
        self._check_same_batch(batch_size)
        self.batch_size = batch_size
        self.total = len(self.dataset) if max_steps is None else min(len(self.dataset), max_steps * batch_size)
        if len(schedule.stages) > 1 and not self.resumed:
            raise ValueError(f"the dataset has {len(schedule.stages)} stages: pass one with a single, undecided stage")
        if self._boundary() < self.total and schedule.end is None:
            if self.dataset.read_until > self._boundary():
                raise ValueError(
                    f"the loader has read {self.dataset.read_until} samples ahead, past the end of the first stage at "
                    f"{self._boundary()}: pass batch_size, so that the boundary is known before it reads, or raise "
                    "stage_steps"
                )
            schedule.hold(self._boundary())
        self._check_epochs()

    def begin(self, model: nn.Module, step: int = 0) -> dict[str, float] | None:
        """Rehearse the measurement and, in a fresh run, open the journal; return what a tracker should log.

        The rehearsal takes one sequence of each domain and task through the model, so that a task that does not fit
        the model raises now, whatever it raises, and not at the first boundary.

        Args:
            model: the model that trains, unwrapped or wrapped.
            step: optimizer steps already done.
        """
        if "influence" in self.mixer.needs:
            one = {name: self._batches(name, np.zeros(1, dtype=np.int64)) for name in self.dataset.domains}
            first = {name: [{key: x[:1] for key, x in batches[0].items()}] for name, batches in self.tasks.items()}
            group_influence(model, one, first, Identity(), layers=self.layers)
        if self.resumed:
            return None
        if self.output is not None and _is_rank_0():
            _set_aside(self.output)
            self._write_config(model)
        row = self._row("stage", step=step, loss=task_losses(model, self.tasks))
        self._append(row)
        return _logs(row)

    def step_ended(self, model: nn.Module, step: int) -> dict[str, float] | None:
        """Tell that optimizer step `step` (counted from 1) ended; at a boundary, return what a tracker should log."""
        if (step + 1) * self.batch_size != self._boundary() or self._boundary() >= self.total:
            return None
        return self._decide(model, step)

    def finish(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure the task losses once more and close the journal; return what a tracker should log."""
        loss, error = None, None
        try:
            loss = task_losses(model, self.tasks)
        except Exception as failure:  # the trained model is about to be saved: nothing here is worth losing it
            error = f"{type(failure).__name__}: {failure}"
            logger.warning("the final task losses could not be measured: %s", error)
        row = self._row("final", step=step, loss=loss, error=error)
        self._append(row)
        return _logs(row)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able: the stages and fingerprints of the dataset, and what a step is."""
        return {"batch_size": self.batch_size, "stage_steps": self.stage_steps, "dataset": self.dataset.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; rows of the journal that were written after it are dropped, and will be written again.

        Raises:
            ValueError: the state is of other data or of other stages, with what changed.
        """
        if state["stage_steps"] != self.stage_steps:
            raise ValueError(
                f"the checkpoint's stages are {state['stage_steps']} steps, stage_steps={self.stage_steps}"
            )
        self._check_same_batch(int(state["batch_size"]))
        self.dataset.load_state_dict(state["dataset"])
        self.batch_size = int(state["batch_size"])
        self.resumed = True
        if self.journal is not None and _is_rank_0():
            self.journal.truncate(len(self.dataset.schedule.stages))

    # -- a boundary --------------------------------------------------------------------------------------------------

    def _boundary(self) -> int:
        """Position at which the stage after the last published one starts."""
        return len(self.dataset.schedule.stages) * self.stage_steps * self.batch_size

    def _decide(self, model: nn.Module, step: int) -> dict[str, float]:
        start = self._boundary()
        prior = self.dataset.schedule.weights_at(start - 1)
        seconds = {"measure": 0.0, "propose": 0.0, "snapshot": 0.0}
        influence, error, clock = None, None, time.perf_counter()
        probes: dict[str, np.ndarray] = {}
        loss: tuple[dict[str, float], dict[str, float]] | None = None
        try:
            if "influence" in self.mixer.needs:
                probes = self._probes(start, prior)
                influence = self._measure(model, probes, prior)
                loss = _losses(influence)
            else:
                loss = task_losses(model, self.tasks)
            seconds["measure"] = time.perf_counter() - clock
            proposal = self.mixer.propose(influence, prior, self._upper(start))
            seconds["propose"] = time.perf_counter() - clock - seconds["measure"]
            if influence is not None and not influence.finite:
                error = proposal.message
        except Exception as failure:  # a run of weeks must not end because one measurement did
            error = f"{type(failure).__name__}: {failure}"
            proposal = Proposal(dict(prior), solver="prior", message=f"measurement failed, weights kept: {error}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if error:
            logger.warning("stage %d keeps its weights: %s", len(self.dataset.schedule.stages), error)

        cdf, proposal = _from_rank_0(
            (integer_cdf(np.array([proposal.weights[d] for d in self.dataset.domains])), proposal)
        )
        following = start + self.stage_steps * self.batch_size
        self.dataset.publish(cdf, start, following if following < self.total else None)
        logger.info("stage %d starts at sample %d: %s", len(self.dataset.schedule.stages) - 1, start, proposal.weights)
        self._warn_of_repeated_probes(probes, start, following)

        row = self._row("stage", step=step, loss=loss, influence=influence, proposal=proposal, prior=prior, error=error)
        if self.output is not None and self.keep:
            clock = time.perf_counter()
            facts = {"stage": row["stage"], "step": step, "samples": step * self.batch_size}
            save_snapshot(model, self.output / "snapshots", row["stage"], facts, self.keep)
            seconds["snapshot"] = time.perf_counter() - clock
        row["seconds"].update(seconds)  # type: ignore[typeddict-item]
        self._append(row)
        return _logs(row)

    def _measure(self, model: nn.Module, probes: Mapping[str, np.ndarray], prior: Mapping[str, float]) -> Influence:
        domains = {name: self._batches(name, rows[: self.probe_sequences]) for name, rows in probes.items()}
        pooled = [b for name, rows in probes.items() for b in self._batches(name, rows[: self._share(prior[name])])]
        return group_influence(model, domains, self.tasks, self.curvature, layers=self.layers, curvature_batches=pooled)

    def _share(self, weight: float) -> int:
        return round(weight * self.curvature_sequences)

    def _probes(self, start: int, prior: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Return domain -> rows that the coming stage will not train on, int64[sequences]."""
        window = self.stage_steps * self.batch_size
        return {
            name: probe_rows(
                self.dataset.schedule, i, max(self.probe_sequences, self._share(prior[name])), start, window
            )
            for i, name in enumerate(self.dataset.domains)
        }

    def _batches(self, domain: str, rows: np.ndarray) -> list[Batch]:
        items = [self.dataset.sequence(domain, int(row)) for row in rows]
        return [collate(items[i : i + self.micro_batch]) for i in range(0, len(items), self.micro_batch)]

    def _warn_of_repeated_probes(self, probes: Mapping[str, np.ndarray], start: int, stop: int) -> None:
        for i, name in enumerate(self.dataset.domains):
            if name in probes and (n := repeated(self.dataset.schedule, i, probes[name], start, min(stop, self.total))):
                logger.warning(
                    "%d of the %d probe sequences of domain %r are trained on within the next stage: it has only %d "
                    "sequences; shorten the stage or bound the domain with max_epochs",
                    n, len(probes[name]), name, self.dataset.sizes[name],
                )  # fmt: skip

    # -- bounds ------------------------------------------------------------------------------------------------------

    def _epoch_limits(self, limits: float | Mapping[str, float] | None) -> dict[str, float]:
        if limits is None:
            return {}
        named = dict(limits) if isinstance(limits, Mapping) else dict.fromkeys(self.dataset.domains, float(limits))
        for name, limit in named.items():
            if name not in self.dataset.domains:
                raise ValueError(f"max_epochs: no domain {name!r}; the domains are {list(self.dataset.domains)}")
            if not limit >= 0:
                raise ValueError(f"max_epochs[{name!r}]={limit}: at least 0")
        return named

    def _upper(self, start: int) -> dict[str, float]:
        """Return domain -> the largest weight of the stage from `start` on that keeps it within its epochs."""
        drawn = dict(zip(self.dataset.domains, self.dataset.schedule.counts(start).tolist(), strict=True))
        stage = min(self.stage_steps * self.batch_size, self.total - start)
        return {
            name: max(0.0, limit * self.dataset.sizes[name] - drawn[name]) / stage
            for name, limit in self.max_epochs.items()
        }

    def _check_epochs(self) -> None:
        if len(self.max_epochs) == len(self.dataset.domains):
            room = sum(limit * self.dataset.sizes[name] for name, limit in self.max_epochs.items())
            if room < self.total:
                raise ValueError(
                    f"max_epochs leaves {room:.0f} samples over all domains and the run takes {self.total}: raise it "
                    "or train for fewer steps"
                )
        end = min(self._boundary(), self.total)
        drawn = dict(zip(self.dataset.domains, self.dataset.schedule.counts(end).tolist(), strict=True))
        over = {
            n: drawn[n] / self.dataset.sizes[n]
            for n, m in self.max_epochs.items()
            if drawn[n] > m * self.dataset.sizes[n]
        }
        if over:
            raise ValueError(f"the first stage alone exceeds max_epochs, it takes {over} epochs: lower those weights")

    def _check_same_batch(self, batch_size: int) -> None:
        if self.batch_size not in (0, batch_size):
            raise ValueError(
                f"the checkpoint and this run take {sorted((self.batch_size, batch_size))} samples a step: keep "
                "per-device batch x gradient accumulation x processes the same, so that steps stay positions"
            )

    # -- writing down -------------------------------------------------------------------------------------------

    def _write_config(self, model: nn.Module) -> None:
        assert self.output is not None
        self.output.mkdir(parents=True, exist_ok=True)
        facts = {
            "mixer": _describe(self.mixer),
            "curvature": repr(self.curvature),
            "stage_steps": self.stage_steps,
            "batch_size": self.batch_size,
            "samples": self.total,
            "probe_sequences": self.probe_sequences,
            "curvature_sequences": self.curvature_sequences,
            "max_epochs": self.max_epochs,
            "tasks": {name: sum(len(b["input_ids"]) for b in batches) for name, batches in self.tasks.items()},
            "model": type(model).__name__,
            "dataset": self.dataset.state_dict(),
        }
        (self.output / "config.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")

    def _row(
        self,
        kind: Any,
        *,
        step: int,
        loss: tuple[dict[str, float], dict[str, float]] | None,
        influence: Influence | None = None,
        proposal: Proposal | None = None,
        prior: Mapping[str, float] | None = None,
        error: str | None = None,
    ) -> Row:
        schedule, domains = self.dataset.schedule, self.dataset.domains
        final = kind == "final"
        start = step * self.batch_size if final else schedule.stages[-1].start
        drawn = dict(zip(domains, schedule.counts(start).tolist(), strict=True))
        return Row(
            kind=kind,
            stage=len(schedule.stages) - 1,
            step=step,
            start=start,
            end=None if final else schedule.end,
            weights_before=None if prior is None else dict(prior),
            weights=None if final else dict(schedule.stages[-1].weights),
            tasks=list(self.tasks),
            domains=list(domains),
            influence=None if influence is None else influence.scores.tolist(),
            standard_error=None
            if influence is None or influence.standard_error is None
            else influence.standard_error.tolist(),
            task_loss=None if loss is None else dict(loss[0]),
            task_loss_standard_error=None if loss is None else dict(loss[1]),
            tokens={name: n * self.dataset.sequence_length for name, n in drawn.items()},
            epochs={name: n / self.dataset.sizes[name] for name, n in drawn.items()},
            predicted_gain=dict(proposal.predicted_gain) if proposal else None,
            predicted_gain_standard_error=dict(proposal.predicted_gain_standard_error) if proposal else None,
            mixer=type(self.mixer).__name__,
            solver=proposal.solver if proposal else None,
            message=proposal.message if proposal else "",
            error=error,
            seconds={"measure": 0.0, "propose": 0.0, "snapshot": 0.0},
        )

    def _append(self, row: Row) -> None:
        if self.journal is not None and _is_rank_0():
            self.journal.append(row)


def _logs(row: Row) -> dict[str, float]:
    """Return a row under the log keys of trackers."""
    logs: dict[str, float] = {"dynmix/stage": row["stage"], "dynmix/seconds/measure": row["seconds"]["measure"]}
    logs |= {f"dynmix/weight/{name}": weight for name, weight in (row["weights"] or {}).items()}
    logs |= {f"dynmix/tokens/{name}": tokens for name, tokens in row["tokens"].items()}
    logs |= {f"dynmix/task_loss/{name}": loss for name, loss in (row["task_loss"] or {}).items() if loss is not None}
    for task, scores in zip(row["tasks"], row["influence"] or [], strict=False):
        for domain, score in zip(row["domains"], scores, strict=True):
            if score is not None:
                logs[f"dynmix/influence/{task}/{domain}"] = score
    return logs


def _losses(influence: Influence) -> tuple[dict[str, float], dict[str, float]] | None:
    if influence.task_loss is None or influence.task_loss_standard_error is None:
        return None
    return (
        dict(zip(influence.tasks, influence.task_loss.tolist(), strict=True)),
        dict(zip(influence.tasks, influence.task_loss_standard_error.tolist(), strict=True)),
    )


def _describe(mixer: Mixer) -> Any:
    return mixer.describe() if hasattr(mixer, "describe") else repr(mixer)


def _set_aside(output: Path) -> None:
    """Move what an earlier run left in `output` to a folder of its own, so that a fresh run does not mix with it."""
    left = [path for name in ("journal.jsonl", "config.json", "snapshots") if (path := output / name).exists()]
    if not left:
        return
    number = 1
    while (folder := output / f"previous-{number}").exists():
        number += 1
    folder.mkdir()
    for path in left:
        path.rename(folder / path.name)
    logger.info("an earlier run's files in %s were moved to %s", output, folder)


def _is_rank_0() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _from_rank_0(decision: Any) -> Any:
    """Return rank 0's decision on every rank: float sums may differ between machines, a mixture must not."""
    if not torch.distributed.is_initialized():
        return decision
    box = [decision]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
