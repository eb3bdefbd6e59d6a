"""Where bars, tables and the log are shown, which may go away: a terminal that is closed, a pipe whose reader ends.

Knows rich and tqdm alone.
"""

import codecs
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console
from tqdm import tqdm

UNENCODABLE = "dynmix.unencodable"


def _written(problem: UnicodeError) -> tuple[str | bytes, int]:
    """What is written for what an encoding lacks: the bytes of a path that is no text, else escapes, as on stderr."""
    try:
        return codecs.lookup_error("surrogateescape")(problem)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(problem)


codecs.register_error(UNENCODABLE, _written)


class Bar(tqdm):  # type: ignore[misc]
    """A bar of tqdm on stderr, while something takes longer than two seconds; what cannot be written is left out."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"leave": False, "delay": 2, **options})

    def display(self, *args: Any, **options: Any) -> None:
        """Draw it."""
        with suppress(OSError):
            super().display(*args, **options)

    def close(self) -> None:
        """Take it away."""
        with suppress(OSError):
            super().close()

    @classmethod
    def write(cls, line: str) -> None:
        """Write a line above the bars."""
        with suppress(OSError):
            super().write(line, file=sys.stderr)


def stderr_console() -> Console:
    """A rich console on stderr; what cannot be written there is left out."""
    return Console(stderr=True, file=None if sys.stderr is None else Forgiving(sys.stderr))  # type: ignore[arg-type]


class Forgiving:
    """A file that may be gone: hours of work are not lost by what is only shown."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write it, if that is possible."""
        with suppress(OSError, ValueError):  # a ValueError: it is closed
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Empty its buffer, if that is possible."""
        with suppress(OSError, ValueError):
            self._file.flush()
