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
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    file.seek(0)
                    raise ValueError(
                        f"{folder}: another process ({file.read() or 'of another machine'}) {doing}; wait until it is "
                        "done, or end it"
                    ) from None
                time.sleep(0.1)
            except OSError as problem:
                logger.info("%s: its file system has no locks, and nothing keeps others out (%s)", folder, problem)
                break
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()
