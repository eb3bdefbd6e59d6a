"""The files of one run: `config.json`, `journal.jsonl`, `snapshots/`, and what mixers that regroup the corpus add.

Every rank holds one, and rank 0 writes. Knows files and what is in them; not when they are written, nor why. What
cannot be written is logged and does not end a run.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dynmix.influence.carried import Carried
from dynmix.journal import Journal, Row
from dynmix.ranks import is_rank_0
from dynmix.snapshot import save_snapshot

logger = logging.getLogger("dynmix")

_FILES = ("journal.jsonl", "config.json", "snapshots", "factors", "peaks", "checkpoints", "scores", "groups")


class RunFolder:
    """The folder of a run.

    Attributes:
        path: the folder.
        groups: where the index files of domains that enter the run are kept.
        factors: where the curvature's factors are kept, if they are carried from stage to stage.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.groups, self.factors = path, path / "groups", path / "factors"
        self._journal = Journal(path / "journal.jsonl")

    def set_aside(self) -> None:
        """Move what an earlier run left to a folder of its own, so that a fresh run does not mix with it."""
        left = [file for name in _FILES if (file := self.path / name).exists()]
        if not left or not is_rank_0():
            return
        number = 1
        while (aside := self.path / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        for file in left:
            file.rename(aside / file.name)
        logger.info("an earlier run's files in %s were moved to %s", self.path, aside)

    def write_config(self, facts: Mapping[str, Any]) -> None:
        """Write `config.json`."""
        if is_rank_0():
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")

    def append(self, row: Row) -> None:
        """Add a row to the journal."""
        if is_rank_0():
            try:
                self._journal.append(row)
            except OSError as failure:
                logger.error("a row of %s was not written, training goes on: %s", self._journal.path, failure)

    def rewind(self, stages: int) -> None:
        """Drop the journal's rows from stage number `stages` on, and their factors: they will be written again."""
        if is_rank_0():
            self._journal.truncate(stages)
            for file in self.factors.glob("stage-*.safetensors"):
                if int(file.stem[6:]) >= stages:
                    file.unlink()

    def save_factors(self, carried: Carried, stage: int, keep: int) -> str | None:
        """Save the curvature's factors as those of a stage, and keep the newest few; return the file's name, if any."""
        if carried.fitted is None:
            return None
        name = f"stage-{stage:04d}.safetensors"
        if is_rank_0():
            try:
                carried.save(self.factors / name)
            except OSError as failure:
                logger.error("the factors of stage %d were not saved, training goes on: %s", stage, failure)
            for old in sorted(self.factors.glob("stage-*.safetensors"))[: -max(2, keep)]:
                old.unlink()
        return name

    def save_snapshot(self, model: nn.Module, stage: int, facts: dict[str, Any], keep: int) -> None:
        """Save the model as that of a stage, and keep the newest few; every rank calls it."""
        try:
            save_snapshot(model, self.path / "snapshots", stage, facts, keep)
        except OSError as failure:
            logger.error("the snapshot of stage %d was not saved, training goes on: %s", stage, failure)
