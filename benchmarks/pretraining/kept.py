"""Results that are made once: a file is there whole or not at all, so that whatever is interrupted goes on.

Knows files and JSON; nothing of what is kept.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dynmix.whole_file import write_whole


def write(file: Path, content: Any) -> None:
    """Write JSON."""
    write_whole(file, json.dumps(content, indent=1))


def read_json(file: Path) -> Any:
    """Return what the file holds. Exits where that is no JSON, as after a crash of the machine or a full disk."""
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise SystemExit(f"{file} is damaged: delete it, and the command that made it makes it again") from None


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """Return what the file holds; made and written first if it is not there."""
    if not file.exists():
        write(file, make())
    return read_json(file)


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write down what the folder's results were made with, or see that it is the same. Exits where it is not."""
    file, own = folder / "settings.json", json.loads(json.dumps(settings))
    if file.exists() and read_json(file) != own and not any(path != file for path in folder.iterdir()):
        file.unlink(missing_ok=True)  # of a call that failed before it began with a result
    if changed := differences(kept(file, lambda: own), own):
        raise SystemExit(f"{folder} has results of other settings ({changed}): choose another folder, or delete it")


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, which settings changed; empty if none did."""
    changed = [key for key in now if then.get(key) != now[key]]
    return "; ".join(f"{key} was {then.get(key)!r} and is {now[key]!r}" for key in changed)
