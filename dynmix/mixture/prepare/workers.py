"""Processes that do the work, one task at a time each; they do not outlive their parent, however it ends.

A process gets its tasks through its standard input and answers through its standard output. It is a fresh interpreter
and not a fork, so that threads of the parent (of torch, of tokenizers, of a notebook) do no harm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import LifoQueue, SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar, TypeVarTuple

from dynmix.mixture.prepare.tokenise import Job

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Workers:
    """Up to `count` processes, started when they are needed; with 1, all is done in this process.

    Every task is given `job` first. The processes hold the file descriptor `held` open as long as they live.
    """

    def __init__(self, count: int, job: Job, held: int) -> None:
        self.count, self.job, self.held = count, job, held
        self._threads = ThreadPoolExecutor(count)
        self._processes: dict[int, _Process] = {}
        self._slots: LifoQueue[int] = LifoQueue()  # the one that was used last first: others may not be needed
        self._lock, self._closed = Lock(), False
        for slot in reversed(range(count)):
            self._slots.put(slot)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes.values():
                process.popen.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes.values():
            process.popen.wait()
            process.tasks.close()
            process.answers.close()

    def submit(self, what: str, function: Callable[[Job, *Ts], T], *args: *Ts) -> Future[T]:
        """Have `function(job, ...)` called; `function` is found by name, so it stands in a module.

        `what` is done says the error of a process that was killed, a ChildProcessError.
        """
        if self.count > 1:
            return self._threads.submit(self._ask, what, function, args)
        done: Future[T] = Future()
        try:
            done.set_result(function(self.job, *args))
        except Exception as problem:
            done.set_exception(problem)
        return done

    def _ask(self, what: str, function: Callable[..., T], args: Any) -> T:
        slot = self._slots.get()
        try:
            process = self._processes.get(slot)
            fresh = process is None or process.popen.poll() is not None
            if process is None or fresh:
                process = self._start(slot)
            try:
                if fresh:
                    process.tasks.send(self.job)
                process.tasks.send((function, args))
                problem, answer = process.answers.recv()
            except (EOFError, OSError):  # of the pipes: those of the task come as an answer
                code = process.popen.wait()
                end = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
                raise ChildProcessError(
                    f"a worker ended {end} while {what}. What is finished is kept, the same call goes on there; if "
                    "memory ran out, with fewer workers"
                ) from None
        finally:
            self._slots.put(slot)
        if problem is not None:
            raise problem
        result: T = answer
        return result

    def _start(self, slot: int) -> _Process:
        with self._lock:
            if self._closed:
                raise RuntimeError("the workers are closed")
            process = self._processes[slot] = _Process(self.held)
        return process


class _Process:
    def __init__(self, held: int) -> None:
        # One thread each: the processes are the parallelism.
        own = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | own | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=(held,),
            process_group=0,  # Ctrl-C is the parent's
        )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.tasks = Connection(os.dup(self.popen.stdin.fileno()), readable=False)
        self.answers = Connection(os.dup(self.popen.stdout.fileno()), writable=False)
        self.popen.stdin.close()
        self.popen.stdout.close()


def serve() -> None:
    """Work until the parent's end."""
    answers = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # what anything prints is no answer
    tasks: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_listen, args=(tasks,), daemon=True).start()
    job = tasks.get()
    while True:
        function, args = tasks.get()
        problem: Exception | None = None
        answer = None
        try:
            answer = function(job, *args)
        except (ValueError, OSError) as known:
            problem = known
        except Exception:
            problem = RuntimeError(f"in a worker: {traceback.format_exc()}")
        answers.send((problem, answer))


def _listen(tasks: SimpleQueue[Any]) -> None:
    parent = Connection(os.dup(0), writable=False)
    try:
        while True:
            tasks.put(parent.recv())
    finally:  # also in the middle of a message
        os._exit(0)
