"""The files of one run: `config.json`, `journal.jsonl`, `snapshots/`, and what mixers that regroup the corpus add.

Every rank has a `RunFolder`, and rank 0 writes. Knows files and their content; not when they are written, nor why. A
failure to write is logged and does not end a run.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dynmix.influence.carried import Carried
from dynmix.influence.task_gradients import TaskGradients
from dynmix.journal import Journal, Row
from dynmix.ranks import from_rank_0, is_rank_0
from dynmix.snapshot import write_snapshot
from dynmix.whole_file import write_json

logger = logging.getLogger("dynmix")

_FILES = ("journal.jsonl", "config.json", "snapshots", "factors", "peaks", "checkpoints", "scores", "groups", "in_run")


def set_aside(folder: Path, patterns: Iterable[str]) -> None:
    """Move what an earlier run left in a folder to `previous-N` in it, on rank 0."""
    if is_rank_0() and (left := [path for pattern in patterns for path in folder.glob(pattern)]):
        number = 1
        while (aside := folder / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
        logger.info("an earlier run's files in %s were moved to %s", folder, aside)


class RunFolder:
    """The folder of a run.

    Attributes:
        path: the folder.
        groups: where the index files of domains that enter the run are kept.
        factors: where the curvature's factors are kept, if they are carried from stage to stage.
        in_run: where the tasks' gradients are kept that an in-run influence meets.
        needed: names of files in these two that the newest checkpoint goes on with, however many stages ago it was.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.groups, self.factors, self.in_run = path, path / "groups", path / "factors", path / "in_run"
        self.needed: set[str] = set()
        self._journal = Journal(path / "journal.jsonl")

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write `config.json`, after what an earlier run left is moved away: a fresh run must not mix with it."""
        set_aside(self.path, _FILES)
        if is_rank_0():
            write_json(self.path / "config.json", facts, default=str)

    def append(self, row: Row) -> None:
        """Add a row to the journal."""
        if is_rank_0():
            try:
                self._journal.append(row)
            except Exception as failure:
                logger.error("a row of %s was not written, training goes on: %s", self._journal.path, failure)

    def rewind(self, stages: int) -> None:
        """Drop the journal's rows, the snapshots and what is not `needed` of measurements, from stage `stages` on.

        What cannot be deleted of these files, as one that somebody reads over NFS, is warned of, and stays until its
        stage is saved anew.
        """
        if is_rank_0():
            self._journal.truncate(stages)
            if missing := sorted(set(range(stages)) - {row["stage"] for row in self._journal.rows()}):
                logger.warning(
                    "%s has no row of %d of the %d stages that this run goes on from, the first of them stage %d: its "
                    "report lacks them; a run that goes on in another folder needs what is in the one before",
                    self._journal.path, len(missing), stages, missing[0],
                )  # fmt: skip
            delete(path for stage, path in numbered(self.path / "snapshots", "stage-") if stage >= stages)
            for folder in (self.factors, self.in_run):
                undone = (file for stage, file in numbered(folder, "stage-", ".safetensors") if stage >= stages)
                delete(file for file in undone if file.name not in self.needed)

    def save_factors(self, carried: Carried, stage: int, keep: int) -> str | None:
        """Save the curvature's factors under a stage's number and keep the newest few.

        Returns the file's name; None if there are no factors, or if they could not be written: a run that goes on from
        there fits them anew. Every rank calls it.
        """
        return None if carried.fitted is None else from_rank_0(self._save(carried.save, self.factors, stage, keep))

    def save_task_gradients(self, gradients: TaskGradients, stage: int, keep: int) -> str:
        """Save the tasks' gradients of an in-run influence and keep the newest few; return the file's name."""
        self._save(gradients.save, self.in_run, stage, keep)
        return _name(stage)

    def _save(self, save: Callable[[Path], None], folder: Path, stage: int, keep: int) -> str | None:
        """The name of what was written; on rank 0, which writes."""
        if not is_rank_0():
            return None
        file = folder / _name(stage)
        try:
            save(file)
        except Exception as failure:  # of a full disk safetensors raises what is no OSError
            logger.error("%s was not saved, training goes on: %s", file, failure)
            return None
        delete(old for old in _up_to(stage, folder, ".safetensors")[: -max(2, keep)] if old.name not in self.needed)
        return file.name

    def save_snapshot(self, model: nn.Module, stage: int, facts: dict[str, Any], keep: int) -> None:
        """Save the model under a stage's number and keep the newest few; every rank calls it."""
        path = self.path / "snapshots" / f"stage-{stage:04d}"
        try:
            write_snapshot(model, path, facts)
        except Exception as failure:  # of a full disk safetensors raises what is no OSError
            logger.error("the snapshot of stage %d was not saved, training goes on: %s", stage, failure)
            return
        if is_rank_0():
            delete(_up_to(stage, path.parent)[:-keep])


def delete(old: Iterable[Path]) -> None:
    """Delete files and folders that nobody needs; what stays costs room and nothing else."""
    for path in old:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as failure:
            logger.warning("%s was not deleted, training goes on: %s", path, failure)


def numbered(folder: Path, prefix: str, suffix: str = "") -> list[tuple[int, Path]]:
    """What a number between these names, by number; `stage-0003-best` is a copy that somebody made, and theirs."""
    found = ((path.name.removeprefix(prefix).removesuffix(suffix), path) for path in folder.glob(f"{prefix}*{suffix}"))
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def _name(stage: int) -> str:
    return f"stage-{stage:04d}.safetensors"


def _up_to(stage: int, folder: Path, suffix: str = "") -> list[Path]:
    """What was saved of this stage and those before it; a later one is of what is undone, and could not be deleted."""
    return [path for at, path in numbered(folder, "stage-", suffix) if at <= stage]
