"""The record of where tasks peak in a run: their curves, and snapshots of the model at the peaks.

Knows models, files and what a peak is; not who trains, nor what becomes of the snapshots.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from torch import nn

from dynmix import run_folder
from dynmix.checkpoints import Checkpoint, improvements, metric_of
from dynmix.checkpoints import list_checkpoints as list_checkpoints  # part of this module's names
from dynmix.checkpoints import select_checkpoints as select_checkpoints
from dynmix.ranks import from_rank_0, is_rank_0, on_every_rank
from dynmix.scores import METRICS, Metric
from dynmix.snapshot import write_snapshot
from dynmix.tasks import Task
from dynmix.whole_file import write_json

logger = logging.getLogger("dynmix")

Curve = list[tuple[int, float]]
"""(step, value) with rising steps; values may be NaN or infinite."""


def set_aside(folder: str | os.PathLike[str]) -> None:
    """Move what an earlier run left in a `PeakSnapshots` folder to `previous-N` in it; every rank calls this."""
    on_every_rank(lambda: run_folder.set_aside(Path(folder), ("peaks.json", "step-*")))


def evaluated(
    model: nn.Module, tasks: Mapping[str, Task], metric: Metric | Mapping[str, Metric], batch_tokens: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Evaluate tasks; return what each has by its metric, and what a tracker should log."""
    values: dict[str, float] = {}
    logs: dict[str, float] = {}
    for name, task in tasks.items():
        score = task.evaluate(model, batch_tokens=batch_tokens)
        values[name] = score.metric(metric_of(metric, name))
        logs[f"dynmix/task_loss/{name}"] = score.loss
        if score.accuracy is not None:
            logs[f"dynmix/task_accuracy/{name}"] = score.accuracy
    return values, logs


class PeakSnapshots:
    """The tasks' curves over a run, and snapshots of the model where each task peaks, in a folder.

    The folder has `step-NNNNNNN/` as `dynmix.snapshot` writes them, and `peaks.json` with the curves. Its content is a
    function of the curves and of the steps at which `prune` was called: a run that was killed and resumed ends with the
    same folder as one that was not.

    Args:
        folder: where they are kept; what an earlier process of the run recorded there is loaded.
        metric: what a task's values are, for all tasks or by name; says whether lower or higher is better.
        min_delta: a later step is a peak only if it is better than the previous peak by more than this.
        keep: how many of the newest snapshots are kept, whether they are still peaks or not.

    Raises:
        ValueError: impossible arguments, others than those that `folder` was recorded with, or a damaged `peaks.json`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        metric: Metric | Mapping[str, Metric] = "loss",
        min_delta: float = 0.0,
        keep: int = 0,
    ):
        if not 0 <= min_delta < math.inf or keep < 0:
            raise ValueError(f"min_delta={min_delta}, keep={keep}: at least 0")
        if unknown := {metric} - {*METRICS} if isinstance(metric, str) else {*metric.values()} - {*METRICS}:
            raise ValueError(f"metric={unknown.pop()!r}: one of {', '.join(map(repr, METRICS))}")
        self.folder, self.min_delta, self.keep = Path(folder), float(min_delta), keep
        self.metric_of, self._file = partial(metric_of, metric), self.folder / "peaks.json"
        self.curves: dict[str, Curve] = {}
        self._lost: set[int] = set()  # steps that were peaks and have no snapshot (any more)
        self._load()

    @property
    def selected(self) -> dict[str, Checkpoint]:
        """The snapshot in which each task peaks; tasks that had no finite value yet are left out."""
        return {
            task: Checkpoint(self._path(steps[-1]), steps[-1], dict(curve)[steps[-1]])
            for task, curve in self.curves.items()
            if (steps := self._improvements(task))
        }

    def record(self, model: nn.Module, step: int, values: Mapping[str, float]) -> list[str]:
        """Record the tasks' values at a step, and save the model if any of them is the best so far; return which are.

        Every rank calls it (sharded parameters are gathered); the values of rank 0 count, and it writes. If a snapshot
        cannot be written, an error is logged and the step is not a peak.

        Raises:
            ValueError: `step` is not after the last one recorded, a task has no metric.
        """
        values = from_rank_0({task: float(value) for task, value in values.items()})
        for task in values:
            self.metric_of(task)
        if (last := self.last_step) is not None and step <= last:
            raise ValueError(f"step {step} comes after step {last} is recorded: call rewind({step - 1}) to go on there")
        for task, value in values.items():
            if not math.isfinite(value):
                logger.warning("step %d: the value of task %r is %s, which is no peak", step, task, value)
            self.curves.setdefault(task, []).append((step, value))
        best = [task for task in values if step in self._improvements(task)]
        if best and not from_rank_0(self._saved(model, step, {task: values[task] for task in best})):
            self._lost.add(step)
            best = []
        try:
            self._write()
        except OSError as failure:  # they are in memory, and written with the next ones; the other ranks go on
            logger.error("%s was not written: %s", self._file, failure)
        return best

    def prune(self, durable_step: int) -> None:
        """Delete the snapshots that no task needs any more.

        A run may be killed and resume from its last durable step, that of its newest training checkpoint. So the
        snapshots stay that the curves need now, and those that they needed at that step.
        """
        if is_rank_0():
            needed = self._needed() | self._needed(durable_step)
            self._delete(path for step, path in run_folder.numbered(self.folder, "step-") if step not in needed)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step`, from which the run resumes, and delete those snapshots.

        If the snapshot of a task's peak is gone, because the run goes back further than the last durable step, its peak
        becomes the best recorded step whose snapshot still exists, with a warning. A fresh run goes back to step 0, so
        that of one that goes on the folder has a record, and a warning says if not. Every rank calls it; where it fails
        on one, all raise.
        """
        on_every_rank(lambda: self._rewind(step) if is_rank_0() else None)
        self.curves, self._lost = from_rank_0((self.curves, self._lost))

    def _rewind(self, step: int) -> None:
        if step and not self._file.exists():
            logger.warning(
                "%s is not there: how the tasks did up to step %d is not known, and peaks are those from there on; "
                "a run that goes on in another folder needs what it recorded in the one before",
                self._file, step,
            )  # fmt: skip
        self.curves = {task: [p for p in curve if p[0] <= step] for task, curve in self.curves.items()}
        self.curves = {task: curve for task, curve in self.curves.items() if curve}
        self._lost = {lost for lost in self._lost if lost <= step}
        there = {there for there, _ in run_folder.numbered(self.folder, "step-") if there <= step}
        before = self.selected
        while gone := {peak.step for peak in self.selected.values()} - there:
            self._lost |= gone
        for task, peak in before.items():
            if (now := self.selected.get(task)) != peak:
                logger.warning(
                    "%s: the snapshot of task %r at its peak, step %d, is gone; its peak is now %s",
                    self.folder, task, peak.step, f"step {now.step}" if now else "still to come",
                )  # fmt: skip
        self._write()
        self.prune(step)

    @property
    def last_step(self) -> int | None:
        """The last step that was recorded."""
        return max((curve[-1][0] for curve in self.curves.values()), default=None)

    def _improvements(self, task: str, until: float = math.inf) -> list[int]:
        """Steps up to `until` at which this task was best so far and a snapshot was made; the last is its peak."""
        points = (point for point in self.curves[task] if point[0] <= until and point[0] not in self._lost)
        return list(improvements(points, self.metric_of(task), self.min_delta))

    def _needed(self, until: float = math.inf) -> set[int]:
        """Steps whose snapshots the curves need as they were at step `until`."""
        found = [self._improvements(task, until) for task in self.curves]
        newest = sorted({step for steps in found for step in steps}, reverse=True)
        return {steps[-1] for steps in found if steps} | set(newest[: self.keep])

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def _saved(self, model: nn.Module, step: int, peaks: dict[str, float]) -> bool:
        try:
            write_snapshot(model, self._path(step), {"step": step, "peaks": peaks})
        except Exception as failure:  # a full disk must not end a run of weeks, and the other ranks wait for an answer
            logger.error("%s was not saved and is no peak of %s: %s", self._path(step), list(peaks), failure)
            return False
        return True

    def _delete(self, paths: Iterable[Path]) -> None:
        """Delete snapshots so that a kill never leaves a partial one under its name."""
        for path in paths:
            gone = path.with_name(f".{path.name}.deleted")
            if gone.exists():  # a kill left it, and a run that began afresh did not clear it away
                run_folder.delete([gone])
            try:
                path.rename(gone)
            except OSError as failure:
                logger.warning("%s was not deleted, training goes on: %s", path, failure)
        run_folder.delete(self.folder.glob(".step-*"))  # what a kill left half written is among them

    def _write(self) -> None:
        if not is_rank_0():
            return
        selected = self.selected
        tasks = {
            task: {
                "metric": self.metric_of(task),
                "peak": None if (peak := selected.get(task)) is None else {"step": peak.step, "value": peak.value},
                "curve": [[step, value if math.isfinite(value) else None] for step, value in curve],
            }
            for task, curve in self.curves.items()
        }
        found = {"min_delta": self.min_delta, "lost": sorted(self._lost), "tasks": tasks}
        write_json(self._file, found, allow_nan=False)

    def _load(self) -> None:
        if not self._file.exists():
            return
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            metrics = {task: entry["metric"] for task, entry in found["tasks"].items()}
            self.curves = {
                task: [(int(step), math.nan if value is None else float(value)) for step, value in entry["curve"]]
                for task, entry in found["tasks"].items()
            }
            self._lost, min_delta = {int(step) for step in found["lost"]}, float(found["min_delta"])
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"{self._file}: damaged, {type(problem).__name__}: {problem}; remove it") from problem
        own = {task: self.metric_of(task) for task in metrics}
        if own != metrics or min_delta != self.min_delta:
            raise ValueError(
                f"{self._file} was recorded with metric={metrics} and min_delta={min_delta}, not with metric={own} and "
                f"min_delta={self.min_delta}: pass the same, or another folder"
            )
