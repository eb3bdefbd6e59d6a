"""What is finished of a preparation that is not: its plan, shards and the facts of its stores, in one hidden folder.

Every file in it is whole or absent, so a process may be killed at any moment; the next call goes on with what is there.
The plan says of which inputs and options it is, and nothing of other ones is ever taken for it. The folder is gone
when the preparation is finished.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynmix.alone import locked
from dynmix.mixture.prepare.pieces import PrepareError
from dynmix.whole_file import write_json

FOLDER = ".prepare"
_PATIENCE = 10.0  # seconds: processes of a run that was killed take a moment to notice

# "options" by name; "inputs": stamps by name, None for one that has to change; "order": [domain, input] of each
Plan = dict[str, Any]


class Work:
    """The work folder in a folder of stores."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output / FOLDER
        self.existing: list[str] = []  # stores that were there when the work began and are not to be overwritten
        self.piece = 0  # bytes of a piece, as when the work began: shards are numbered by it

    @contextmanager
    def alone(self) -> Iterator[int]:
        """Hold the output folder, made if it is not there; yield the descriptor that holds it.

        Workers hold it as well, so that those of a run that was killed are gone before others begin.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.output, os.O_RDONLY)
        try:
            if not locked(handle, self.output, _PATIENCE):
                raise PrepareError(f"{self.output}: another process prepares in it; wait until it is done")
            yield handle
        finally:
            os.close(handle)

    def begin(self, plan: Plan, stores: Iterable[str], piece: int, overwrite: bool) -> bool:
        """Take up unfinished work of the same plan, or begin, in pieces of `piece` bytes; return whether there was any.

        Raises:
            PrepareError: there is work of another plan, or one of the `stores` to write, and not `overwrite`.
        """
        plan = json.loads(json.dumps(plan))
        known = self._read("plan.json")
        if known is not None:
            differences = _differences(known, plan)
            if not differences:
                self.existing, self.piece = [] if overwrite else known["existing"], known["piece"]
                self._write_plan(plan)
                return True
            if not overwrite:
                raise PrepareError(
                    f"{self.folder} holds what is finished of another preparation: {'; '.join(differences)}. Call it "
                    "as before to finish it, or pass overwrite (--overwrite) to discard that and start over"
                )
        there = [f for name in stores for end in (".bin", ".idx") if (f := self.output / f"{name}{end}").exists()]
        if there and not overwrite:
            raise PrepareError(
                f"{', '.join(map(str, there))}: there already; remove them or pass overwrite (--overwrite)"
            )
        self.discard()
        (self.folder / "shards").mkdir(parents=True)
        self.existing = [] if overwrite else sorted(file.name[:-4] for file in self.output.glob("*.idx"))
        self.piece = piece
        self._write_plan(plan)
        return False

    def shard(self, file: int, piece: int) -> Path:
        """Where the shard of a piece of an input is, or will be."""
        return self.folder / "shards" / f"{file:06d}-{piece:08d}.arrow"

    def finished(self, group: int) -> dict[str, Any] | None:
        """Facts of the stores of a group of inputs, if they are finished."""
        return self._read(f"stores/{group:06d}.json")

    def finish(self, group: int, shards: Iterable[Path], facts: Mapping[str, Any]) -> None:
        """Note that the stores of a group of inputs are finished; their shards go."""
        write_json(self.folder / f"stores/{group:06d}.json", facts)
        for shard in shards:
            shard.unlink(missing_ok=True)

    def scratch(self, group: int) -> Path:
        """An empty folder for the stores in the making of a group."""
        folder = self.folder / "scratch" / f"{group:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def forget(self, inputs: Mapping[int, str]) -> None:
        """Drop what was made of inputs, names by number, that are bad and will have to change.

        If nothing else is finished, the whole folder goes.
        """
        for file in inputs:
            for shard in self.folder.glob(f"shards/{file:06d}-*"):
                shard.unlink()
        # Only now may they change: what a kill leaves of the shards would be taken for those of the corrected input.
        plan = self._read("plan.json")
        assert plan is not None
        plan["inputs"] |= dict.fromkeys(inputs.values())
        write_json(self.folder / "plan.json", plan)
        if not any(self.folder.glob("stores/*.json")) and not any(self.folder.glob("shards/*.arrow")):
            self.discard()

    def discard(self) -> None:
        """Remove the folder, the plan last: what is left without one is never taken for anything."""
        if self.folder.exists():
            gone = self.folder.with_name(f"{FOLDER}-{secrets.token_hex(4)}.tmp")
            os.replace(self.folder, gone)
            shutil.rmtree(gone)
        for left in self.output.glob(f"{FOLDER}-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def _write_plan(self, plan: Plan) -> None:
        write_json(self.folder / "plan.json", {**plan, "existing": self.existing, "piece": self.piece})


def _differences(known: Plan, now: Plan) -> list[str]:
    found = []
    for name in known["options"] | now["options"]:
        old, new = known["options"].get(name), now["options"].get(name)
        if old != new and name == "tokenizer":
            found.append("it was by another tokenizer")
        elif old != new:
            found.append(f"its {name} was {old!r} and is now {new!r}")
    for name in known["inputs"] | now["inputs"]:
        if name not in now["inputs"]:
            found.append(f"{name} is missing now")
        elif name not in known["inputs"]:
            found.append(f"{name} was not there")
        elif known["inputs"][name] not in (None, now["inputs"][name]):
            found.append(f"{name} has changed since")
    if not found and known.get("order") != now["order"]:
        found.append("its inputs were in another order, or of other domains")
    return found if len(found) < 5 else [*found[:3], f"and {len(found) - 3} more"]
