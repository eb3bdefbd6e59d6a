"""Ctrl-C in one of several processes of a run: it ends at once, wherever it is, without waiting for the others.

Knows signals; imports nothing that takes time, so that it holds from the beginning on.
"""

import os
import signal
import sys
from collections.abc import Callable
from threading import Thread

INTERRUPTED = 130


def end_at_once(words: Callable[[], str]) -> None:
    """Have SIGINT write `words()` to stderr, if there are any, and end this process with status 130.

    A handler in Python runs only once the main thread is back in the interpreter, which in a collective may be when
    another process that has ended times out. So it is a thread that listens, to what the interpreter's handler in C
    writes into a pipe.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def listen() -> None:
        while os.read(heard, 1) != bytes([signal.SIGINT]):
            pass
        if said := words():
            sys.stderr.write(f"\n{said}\n")
            sys.stderr.flush()
        os._exit(INTERRUPTED)

    Thread(target=listen, daemon=True).start()
