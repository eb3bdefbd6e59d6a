"""Processes that train runs, one after the other each, so that several train at a time and none ends the others.

A worker reads runs from its standard input, a line of JSON each, and answers with a line: null, or what went wrong. Its
input ends when its parent does, however that was, and then it ends at once; the run it was at goes on next time.
Knows processes; what training is only once it is asked for.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any


class Workers:
    """Up to `jobs` processes, started when they are needed; `train` is for as many threads.

    Args:
        out: folder of the runs, with a plan in it.
        jobs: processes at a time.
        threads: of the processor that each may use.
        devices: numbers of the GPUs, of which each process gets one in turn; none: as it is.
        held: a file descriptor that they hold open as long as they live.
    """

    def __init__(self, out: Path, jobs: int, threads: int, devices: Sequence[str] = (), held: int | None = None):
        self.out, self.threads, self.devices, self.held = out.absolute(), threads, devices, held
        self._workers: dict[int, subprocess.Popen[str]] = {}
        self._slots: SimpleQueue[int] = SimpleQueue()
        self._lock, self._closed = Lock(), False
        for slot in range(jobs):
            self._slots.put(slot)

    def train(self, run: str, weights: Mapping[str, float]) -> str | None:
        """Train a run; return what went wrong, or None. Its log is `runs/<run>/log.txt`."""
        slot = self._slots.get()
        try:
            return self._ask(slot, run, weights)
        finally:
            self._slots.put(slot)

    def close(self) -> None:
        """End all processes, whatever they are at."""
        with self._lock:
            self._closed = True
        for worker in self._workers.values():
            worker.kill()
            worker.wait()

    def _ask(self, slot: int, run: str, weights: Mapping[str, float]) -> str | None:
        log = self.out / "runs" / run / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        worker = self._workers.get(slot)
        if worker is None or worker.poll() is not None:
            worker = self._workers[slot] = self._start(slot, log)
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            print(json.dumps({"run": run, "weights": weights}), file=worker.stdin, flush=True)
            answer = worker.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            problem: str | None = json.loads(answer)
            return problem
        code = worker.wait()
        return f"its process ended by {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"

    def _start(self, slot: int, log: Path) -> subprocess.Popen[str]:
        own = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        if self.devices:
            own["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        with self._lock, open(log, "ab") as errors:
            if self._closed:
                raise RuntimeError("the workers are closed")
            return subprocess.Popen(
                [sys.executable, "-u", "-m", "dynmix.proxies.workers", str(self.out)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | own,
                pass_fds=() if self.held is None else (self.held,),
                process_group=0,  # Ctrl-C is the parent's
            )


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
    Thread(target=_listen, args=(requests,), daemon=True).start()
    from transformers.utils.logging import disable_progress_bar

    from dynmix.proxies.train import train_run

    disable_progress_bar()  # type: ignore[no-untyped-call] # a log has no use for it
    gc.freeze()  # what is imported is no garbage, and takes half a second to look through
    out = Path(sys.argv[1])
    while True:
        request = requests.get()
        problem = None
        with open(out / "runs" / request["run"] / "log.txt", "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            train_run(out, request["run"], request["weights"])
        except Exception as failure:
            traceback.print_exc()
            problem = f"{type(failure).__name__}: {failure}"
        gc.collect()  # a Trainer is a cycle, and holds the model
        print(json.dumps(problem), file=answers, flush=True)


def _listen(requests: SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    _main()
