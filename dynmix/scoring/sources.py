"""Which checkpoint scores for which tasks.

Knows folders of checkpoints by name, step and content; loads none.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynmix.checkpoints import Checkpoint

_BLOCKS, _BLOCK = 64, 1 << 16


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the tasks that it scores for.

    Attributes:
        name: as it appears in the scores' columns.
        step: optimizer steps done.
        path: what `load` takes.
        tasks: by name.
    """

    name: str
    step: int
    path: Path
    tasks: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of the configuration and the weights, or of all files where no weights are in safetensors.

        Of each file that is its size, and 4 MiB spread over it: an optimizer step changes nearly every byte of the
        weights, so reading them all would tell no more.

        Raises:
            ValueError: there is no such file or folder, or nothing in it.
        """
        path = Path(self.path)
        if path.is_file():
            files = [path]
        elif weights := list(path.glob("*.safetensors")):
            files = sorted([*path.glob("config.json"), *weights])
        else:
            files = sorted(filter(Path.is_file, path.rglob("*")))
        if not files:
            raise ValueError(f"checkpoint {self.name!r}: {path} is no file, and no folder with a file in it")
        digest = hashlib.blake2b(digest_size=16)
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            blocks = min(_BLOCKS, -(-size // _BLOCK))
            with open(file, "rb") as stream:
                for block in range(blocks):
                    stream.seek(block * max(0, size - _BLOCK) // max(1, blocks - 1))
                    digest.update(stream.read(_BLOCK))
        return digest.hexdigest()


def peak_sources(selected: Mapping[str, Checkpoint]) -> list[Source]:
    """Each task by the checkpoint where it peaks, as AutoMixer does; by rising step.

    Args:
        selected: task -> checkpoint, as `dynmix.peaks.select_checkpoints` and `PeakSnapshots.selected` give them.
    """
    tasks: dict[tuple[Path, int], list[str]] = {}
    for task, checkpoint in selected.items():
        tasks.setdefault((checkpoint.path, checkpoint.step), []).append(task)
    found = sorted(tasks, key=lambda pair: pair[1])
    return _named([(path, step, tuple(tasks[path, step])) for path, step in found])


def all_sources(checkpoints: Sequence[Checkpoint], tasks: Iterable[str]) -> list[Source]:
    """Every task by each of the checkpoints: the last alone, or `evenly_spaced` ones, are the paper's ablations."""
    return _named([(checkpoint.path, checkpoint.step, tuple(tasks)) for checkpoint in checkpoints])


def _named(found: list[tuple[Path, int, tuple[str, ...]]]) -> list[Source]:
    """Sources named by their folders, and by the folder above too where two have the same name."""
    taken = Counter(path.name for path, _, _ in found)
    return [
        Source(path.name if taken[path.name] == 1 else f"{path.absolute().parent.name}-{path.name}", step, path, tasks)
        for path, step, tasks in found
    ]


def check_sources(sources: Sequence[Source], tasks: Iterable[str]) -> None:
    """Raise ValueError unless every task has a checkpoint that scores for it, and every checkpoint known tasks."""
    known = list(tasks)
    if not sources:
        raise ValueError("checkpoints is empty: give at least one")
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            raise ValueError(f"checkpoints: {count} have the name {name!r}; give each once, with all its tasks")
    for source in sources:
        if not source.name or source.name.startswith(".") or os.sep in source.name or "/" in source.name:
            raise ValueError(f"checkpoints: {source.name!r} cannot be the name of a folder")
        if not source.tasks or len(set(source.tasks)) < len(source.tasks):
            raise ValueError(f"checkpoint {source.name!r} has tasks={list(source.tasks)}: at least one, each once")
        if unknown := [task for task in source.tasks if task not in known]:
            raise ValueError(f"checkpoint {source.name!r} is to score task {unknown[0]!r}; there are {known}")
    if idle := [task for task in known if not any(task in source.tasks for source in sources)]:
        raise ValueError(f"task {idle[0]!r} is scored by no checkpoint: leave it out, or give it one")
