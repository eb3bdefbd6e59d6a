"""What dynmix warns of while something is done, kept beside what goes to the log.

Knows Python's logging alone.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_heard(into: list[str]) -> Iterator[None]:
    """Add every warning or error that dynmix logs meanwhile to `into`, each text once. The log gets them as ever."""
    log = logging.getLogger("dynmix")
    handlers: list[logging.Handler] = [_Listener(into)]
    if not log.hasHandlers() and logging.lastResort is not None:
        handlers.append(logging.lastResort)  # which Python leaves out where there is any handler, as the listener is
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)


class _Listener(logging.Handler):
    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        try:
            words = record.getMessage()
        except Exception:
            self.handleError(record)  # arguments that do not fit the text: the caller must not suffer
            return
        if words not in self._into:
            self._into.append(words)
