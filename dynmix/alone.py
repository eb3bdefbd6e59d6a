"""One process at a time in a folder. Knows a lock and nothing of what is done under it."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("dynmix")

PATIENCE = 30.0  # seconds that processes of a killed parent may take to end


def locked(descriptor: int, folder: Path, patience: float) -> bool:
    """Lock an open file or folder; return whether no other process held it to the end of so many seconds.

    Where the file system has no locks, nothing keeps others out, and the log says so.
    """
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        except OSError as problem:
            logger.info("%s: its file system has no locks, and nothing keeps others out (%s)", folder, problem)
            return True


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[int]:
    """Hold the folder, made if it is not there; yield the descriptor that holds it.

    Forked processes hold it as well, and others if they are passed the descriptor, so that those of a parent that was
    killed are gone before another begins.

    Args:
        folder: the folder; the lock is its file `.lock`.
        doing: what another process does that holds it, as "trains in it".

    Raises:
        ValueError: another process holds it, and for longer than one that was killed would.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        if not locked(file.fileno(), folder, PATIENCE):
            file.seek(0)
            raise ValueError(
                f"{folder}: another process ({file.read() or 'of another machine'}) {doing}; wait until it is done, or "
                "end it"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()
