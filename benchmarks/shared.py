"""Where the corpus and the reference numbers are that benchmarks read."""

import os
from pathlib import Path


def shared(path: str) -> Path:
    """Return a path in `$DYNMIX_SHARED`, or in ../shared. Exits where it is not there."""
    folder = Path(os.environ.get("DYNMIX_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / path).exists():
        raise SystemExit(f"{folder} has no {path}: set $DYNMIX_SHARED to the folder that has it")
    return folder / path
