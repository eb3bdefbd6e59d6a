"""Checkpoints in folders, and in which of them a task peaks.

Knows files, models and the curve of a metric over steps; not who trains. A peak is the best value of a task over all
steps, and the earliest of equals, because that is where the skill was acquired.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dynmix.scores import METRICS, Metric
from dynmix.shown import Bar
from dynmix.snapshot import load_model
from dynmix.tasks import Task
from dynmix.whole_file import write_json

logger = logging.getLogger("dynmix")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model's weights, the optimizer step they are of, and what a task's metric was there."""

    path: Path
    step: int
    value: float | None = None


def improvements(curve: Iterable[tuple[int, float]], metric: Metric, min_delta: float = 0.0) -> Iterator[int]:
    """Yield the steps at which the metric beat all earlier values by more than `min_delta`; the last is the peak.

    Loss and bits per byte are better when lower. NaN and infinity are never best.
    """
    best = None
    for step, value in curve:
        gain = math.inf if best is None else value - best if metric == "accuracy" else best - value
        if math.isfinite(value) and gain > min_delta:
            best = value
            yield step


def metric_of(metric: Metric | Mapping[str, Metric], task: str) -> Metric:
    """Return the metric of a task; raise ValueError if there is none."""
    found = metric if isinstance(metric, str) else metric.get(task)
    if found not in METRICS:
        raise ValueError(f"metric of task {task!r} is {found!r}: one of {', '.join(map(repr, METRICS))}")
    return found


def check_tasks(tasks: Mapping[str, Task], metric: Metric | Mapping[str, Metric], min_delta: float) -> None:
    """Raise ValueError if there are no tasks, a task does not have its metric, or `min_delta` is not from 0 on."""
    if not tasks:
        raise ValueError("tasks is empty: give at least one, by name")
    for name, task in tasks.items():
        if metric_of(metric, name) == "accuracy" and not task.has_choices:
            raise ValueError(f"metric='accuracy': no example of task {name!r} has choices")
    if not 0 <= min_delta < math.inf:
        raise ValueError(f"min_delta={min_delta}: at least 0")


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Checkpoint]:
    """Return the checkpoints in a folder by rising step: sub-folders whose names end in a number, with whole weights.

    Those are the Trainer's `checkpoint-<step>`, `step-<step>`, and any others with `config.json` and safetensors; if
    there is a `snapshot.json`, as in `stage-<stage>`, it says the step. A folder that is not a checkpoint, or is broken
    as a kill leaves them, is skipped with a warning.

    Raises:
        ValueError: there is no checkpoint.
    """
    found = []
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith(".") or not path.is_dir() or not (number := re.search(r"\d+$", path.name)):
            continue
        try:
            facts = json.loads(file.read_text(encoding="utf-8")) if (file := path / "snapshot.json").exists() else {}
            _check_whole(path)
            found.append(Checkpoint(path, int(facts.get("step", number[0]))))
        except (OSError, ValueError, AttributeError, SafetensorError) as problem:
            logger.warning("%s is passed over: no whole checkpoint: %s", path, problem)
    if not found:
        raise ValueError(f"{folder}: no checkpoint in it, as a folder with config.json and safetensors, like step-500")
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def evenly_spaced(checkpoints: Sequence[Checkpoint], n: int) -> list[Checkpoint]:
    """Return the last checkpoint of each of `n` equal parts of the list: with `n=1` the last; all if there are fewer.

    AutoMixer compares its own selection with such checkpoints, chosen by step alone.
    """
    if n < 1:
        raise ValueError(f"n={n}: at least 1 checkpoint")
    n = min(n, len(checkpoints))
    return [checkpoints[(i + 1) * len(checkpoints) // n - 1] for i in range(n)]


def select_checkpoints(
    folder: str | os.PathLike[str],
    tasks: Mapping[str, Task],
    *,
    checkpoints: Sequence[Checkpoint] | None = None,
    metric: Metric | Mapping[str, Metric] = "loss",
    min_delta: float = 0.0,
) -> dict[str, Checkpoint]:
    """Return the checkpoint in `folder` in which each task peaks, by evaluating all of them, one in memory at a time.

    Scores are cached in `folder/evaluations.json`, by the checkpoint's files and the task's content, so a selection
    that was killed resumes and a second one costs nothing. If the folder is not writable, a warning says so. A GPU is
    used if there is one.

    Args:
        folder: as in `list_checkpoints`.
        tasks: by name.
        checkpoints: those of the folder to consider; None: all of them.
        metric: what a task peaks by, for all tasks or by name.
        min_delta: as in `PeakSnapshots`.

    Raises:
        ValueError: no checkpoint can be evaluated, a task has no finite value in any of them or does not fit a model.
    """
    check_tasks(tasks, metric, min_delta)
    cache = Path(folder) / "evaluations.json"
    try:
        scores: dict[str, dict[str, float | None]] = (
            json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
        )
    except ValueError as problem:
        raise ValueError(f"{cache}: damaged ({problem}): remove it, and the tasks are evaluated anew") from problem
    evaluated, kept = [], True
    candidates = list_checkpoints(folder) if checkpoints is None else sorted(checkpoints, key=lambda each: each.step)
    for checkpoint in Bar(candidates, desc="evaluating checkpoints"):
        keys = {name: f"{_identity(checkpoint.path)}/{task.fingerprint}" for name, task in tasks.items()}
        for key, figures in _evaluated(checkpoint.path, {k: tasks[n] for n, k in keys.items() if k not in scores}):
            scores[key] = figures
            try:
                if kept:
                    write_json(cache, scores, allow_nan=False)
            except OSError as failure:  # others' checkpoints can often be read alone
                kept = False
                logger.warning("%s is not written, the next selection evaluates anew: %s", cache, failure)
        if all(key in scores for key in keys.values()):
            evaluated.append((checkpoint, keys))
    selected = {}
    for name in tasks:
        rule = metric_of(metric, name)
        curve = [(i, value) for i, (_, keys) in enumerate(evaluated) if (value := scores[keys[name]][rule]) is not None]
        if not (best := list(improvements(curve, rule, min_delta))):
            raise ValueError(
                f"{folder}: task {name!r} has a finite {rule} in none of the {len(evaluated)} checkpoints that load"
            )
        checkpoint, keys = evaluated[best[-1]]
        selected[name] = Checkpoint(checkpoint.path, checkpoint.step, scores[keys[name]][rule])
    return selected


def _check_whole(path: Path) -> None:
    """Raise an error unless there are a config and whole safetensors files, all that the index names."""
    if not (path / "config.json").is_file():
        raise ValueError("it has no config.json")
    files = sorted(path.glob("*.safetensors"))
    if (index := path / "model.safetensors.index.json").exists():
        files = sorted({path / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    if not files:
        raise ValueError("it has no safetensors; weights in other formats are not read, as loading them can run code")
    for file in files:
        with safe_open(file, framework="pt"):  # maps the file and compares its size with its header
            pass


def _identity(path: Path) -> str:
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{path.name}:{hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()}"


def _evaluated(path: Path, tasks: Mapping[str, Task]) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Yield each task's key and figures, None for what is not finite; nothing for a model that does not load."""
    if not tasks:
        return
    try:
        model = load_model(path)
    except ValueError as problem:
        logger.warning("%s is passed over: %s", path, problem)
        return
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for key, task in tasks.items():
        found = asdict(task.evaluate(model))
        yield key, {name: found[name] if math.isfinite(found[name] or 0.0) else None for name in METRICS}
