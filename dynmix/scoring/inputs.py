"""What a scoring is made of, by path: token stores, tasks' files and checkpoints.

Knows the command's options, which its errors name; scores nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from dynmix.checkpoints import Checkpoint, evenly_spaced, list_checkpoints, select_checkpoints
from dynmix.influence.probes import spread_rows
from dynmix.mixture.store import TokenStore
from dynmix.peaks import PeakSnapshots
from dynmix.scores import METRICS, Metric
from dynmix.scoring.job import Examples
from dynmix.scoring.sources import Source, all_sources, peak_sources
from dynmix.tasks import Task


def find_stores(paths: Sequence[Path]) -> dict[str, TokenStore]:
    """The token stores by name, of paths of stores and folders of them, in that order and within a folder by name.

    In a folder, `x.valid` beside `x` is what was held out of it, and passed over.

    Raises:
        ValueError: a path that is neither, a folder without stores, two stores of one name, a damaged one.
    """
    files: list[Path] = []
    for path in paths:
        found = _domains(path) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"--data {path}: no token store (.idx) in this folder; `dynmix prepare` makes them")
        files += found
    return {name: TokenStore.open(file) for name, file in by_name("--data", files, (".idx", ".bin")).items()}


def _domains(folder: Path) -> list[Path]:
    found = {file.name.removesuffix(".idx"): file for file in sorted(folder.glob("*.idx"))}
    return [file for name, file in found.items() if not name.endswith(".valid") or name[:-6] not in found]


def find_tasks(paths: Sequence[Path], tokenizer: str, max_length: int) -> dict[str, Task]:
    """The tasks by name, of `.jsonl` and `.jsonl.gz` files and folders of them, as `Task.from_jsonl` reads these.

    Raises:
        ValueError: a path that is neither, a folder without such files, two of one name, a bad record or tokenizer.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")]) if path.is_dir() else [path]
        if not found or not all(file.is_file() for file in found):
            raise ValueError(f"--tasks {path}: no such file, or no .jsonl or .jsonl.gz file in this folder")
        files += found
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as problem:
        raise ValueError(f"--tokenizer {tokenizer}: no folder or name of a tokenizer: {problem}") from problem
    named = by_name("--tasks", files, (".jsonl.gz", ".jsonl"))
    tasks = {name: Task.from_jsonl(file, loaded, max_length=max_length) for name, file in named.items()}
    if "rest" in tasks:
        raise ValueError("--tasks: 'rest' is the group of what helps no task; rename the file")
    return tasks


def some_examples(task: Examples, limit: int) -> Examples:
    """At most `limit` examples, evenly spread. Raises ValueError for a limit below 1."""
    if limit < 1:
        raise ValueError(f"--task-limit {limit}: at least 1 example")
    return [task[i] for i in spread_rows(len(task), limit)]


def find_sources(
    paths: Sequence[Path], tasks: Mapping[str, Task], select: str = "peak", metric: str | None = None
) -> list[Source]:
    """Which checkpoint scores for which tasks.

    Args:
        paths: folders of checkpoints, as `list_checkpoints` takes them, and single checkpoints named as there. A folder
            that is both, as a Trainer's that saved its model at the end, is a folder of checkpoints.
        tasks: by name; "peak" evaluates the checkpoints on them, unless a `peaks.json` says where they peak.
        select: "peak", each task by the checkpoint where it is best; every task by the "last" checkpoint, by "all", or
            by a number of them, evenly spaced.
        metric: of the peaks; None: what `peaks.json` says, or else the loss.

    Raises:
        ValueError: no checkpoint, or an argument that does not fit; the message says which.
    """
    if metric is not None and metric not in METRICS:
        raise ValueError(f"--metric {metric}: one of {', '.join(METRICS)}")
    if select not in ("peak", "last", "all") and not (select.isdecimal() and int(select)):
        raise ValueError(f"--select {select}: peak, last, all, or a number of checkpoints from 1")
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"--checkpoints {path}: no such folder")
    if select == "peak" and len(paths) == 1 and (paths[0] / "peaks.json").exists():
        return peak_sources(_recorded(paths[0], tasks, metric))
    found = sorted((each for path in paths for each in _checkpoints(path)), key=lambda each: each.step)
    if select == "peak" and len(found) > 1:
        folders = sorted({each.path.parent for each in found})
        if len(folders) > 1:
            raise ValueError(f"--select peak takes the checkpoints of one folder, not of {folders[0]} and {folders[1]}")
        return peak_sources(select_checkpoints(folders[0], tasks, checkpoints=found, metric=metric or "loss"))
    number = {"peak": 1, "last": 1, "all": len(found)}.get(select) or int(select)
    if number > len(found):
        raise ValueError(f"--select {select}: there are {len(found)} checkpoints; give a number up to that, or all")
    return all_sources(evenly_spaced(found, number), tasks)


def _recorded(folder: Path, tasks: Mapping[str, Task], metric: Metric | None) -> dict[str, Checkpoint]:
    """Where each task peaks according to `peaks.json`."""
    file = folder / "peaks.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        metrics: dict[str, Metric] = {task: metric or entry["metric"] for task, entry in entries["tasks"].items()}
        peaks = PeakSnapshots(folder, metric=metrics, min_delta=entries["min_delta"]).selected
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as problem:
        raise ValueError(f"{file}: damaged ({problem!r}); give another folder, or --select all") from problem
    if missing := [task for task in tasks if task not in peaks]:
        raise ValueError(
            f"--tasks: {file} has no peak of {missing[0]!r}, it has {list(peaks)}; leave it out, or give --select all"
        )
    if gone := [peak.path for task, peak in peaks.items() if task in tasks and not _is_checkpoint(peak.path)]:
        raise ValueError(f"--checkpoints {folder}: {file.name} names {gone[0]}, which is no checkpoint (any more)")
    return {task: peaks[task] for task in tasks}


def _is_checkpoint(path: Path) -> bool:
    return (path / "config.json").is_file()


def _checkpoints(path: Path) -> list[Checkpoint]:
    numbered = (each for each in path.iterdir() if each.name[-1].isdecimal() and not each.name.startswith("."))
    if not _is_checkpoint(path) or any(_is_checkpoint(each) for each in numbered):
        return list_checkpoints(path)
    path = path.absolute()
    try:
        own = [each for each in list_checkpoints(path.parent) if each.path == path]
    except ValueError:  # of the folder above, which nobody gave: there is none in it
        own = []
    if not own:
        raise ValueError(f"--checkpoints {path}: no whole checkpoint whose name ends in its step, like step-500")
    return own


def by_name(option: str, files: Sequence[Path], suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files by their names without these suffixes. Raises ValueError, beginning with `option`, for two of one name."""
    found: dict[str, Path] = {}
    for file in files:
        name = next((file.name.removesuffix(end) for end in suffixes if file.name.endswith(end)), file.name)
        if name in found:
            raise ValueError(f"{option}: {found[name]} and {file} have the same name {name!r}: rename one")
        found[name] = file
    return found
