"""JSON files that are there whole or not at all. Knows nothing of what is in them."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write a file beside, sync it and rename it; `options` are those of `json.dump`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(value, file, **{"indent": 1, "ensure_ascii": False, **options})
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
