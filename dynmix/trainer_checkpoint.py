"""Which checkpoint of a Trainer a run can go on from: the newest that is whole.

Knows the files of a checkpoint and the key of the mixture's state; nothing else of what is in them.
"""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dynmix.ranks import from_rank_0, is_rank_0, on_every_rank

logger = logging.getLogger("dynmix")

STATE = "dynmix"  # key of the mixture's state among the callbacks' in `trainer_state.json`


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in a Trainer's folder; every rank calls it, and where one fails all raise.

    What a kill or a full disk left half-written is renamed to `broken-checkpoint-N`, with a warning: the Trainer would
    write into it, and count it among those that it keeps.
    """
    return from_rank_0(on_every_rank(lambda: _newest(folder) if is_rank_0() else None))


def _newest(folder: Path) -> Path | None:
    found: Path | None = None
    numbered = {int(n): path for path in folder.glob("checkpoint-*") if (n := path.name[11:]).isdecimal()}
    for _, path in sorted(numbered.items()):
        if (why := broken(path)) is None:
            found = path
            continue
        aside = path.with_name(f"broken-{path.name}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}x")
        path.rename(aside)
        logger.warning("%s is half-written (%s): it is skipped, and moved to %s", path, why, aside.name)
    return found


def broken(checkpoint: Path) -> str | None:
    """In words, what is missing or cut short in a checkpoint; None: it is whole."""
    state = checkpoint / "trainer_state.json"  # the Trainer writes this file last
    try:
        if not isinstance(json.loads(state.read_text(encoding="utf-8"))["global_step"], int):
            return f"{state.name} has no step"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{state.name} is missing or cut short"
    for file in sorted(checkpoint.glob("*")):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="np"):
                    pass
            except (SafetensorError, OSError):
                return f"{file.name} is cut short"
        elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
            return f"{file.name} is cut short"
    return None
