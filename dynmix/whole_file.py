"""Files that are there whole or not at all, whatever ends the process. Knows nothing of what is in them."""

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a path beside `path`, whose folders are made; what is written there takes its place once it is on the disk.

    Where the block raises `path` stays as it was, and nothing is left. What a kill leaves is a hidden file in the same
    folder, which the next who writes `path` overwrites if it is not `shared`.

    Args:
        path: of the file.
        shared: other processes may write it at the same time: each has a path of its own, and the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f"{os.getpid()}-{secrets.token_hex(4)}." if shared else ""
    beside = path.with_name(f".{path.name}.{own}tmp")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all; text as UTF-8. Raises OSError."""
    with whole_file(path) as beside:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write a JSON file whole or not at all; `options` are those of `json.dump`. Raises OSError."""
    # A path that is no text is half surrogates in Python: written as JSON's own escapes, it is read back as it was.
    with whole_file(path) as beside, open(beside, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, **{"indent": 1, "ensure_ascii": False, **options})
        file.write("\n")


def finite(value: Any) -> Any:
    """The same dicts and lists with None in place of NaN and infinity, which JSON has no number for.

    Of numpy's arrays and numbers it makes lists and numbers.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value
