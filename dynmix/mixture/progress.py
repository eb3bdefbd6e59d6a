"""What readers of a schedule and its publisher tell each other, across processes.

Knows positions and the schedule's end; nothing of samples.
"""

import logging
import multiprocessing
import os
import time

import torch
from torch.utils.data import get_worker_info

from dynmix.mixture.schedule import MixtureSchedule, Undecided
from dynmix.mixture.shared import SharedArray

logger = logging.getLogger("dynmix.mixture")

_POLL_SECONDS = 0.005
_WARN_SECONDS, _GIVE_UP_SECONDS = 30.0, 1800.0  # without a sign of life from the main process
_SLOTS = 1024  # of the reading counters, one per worker
# Cells; the last two, and those that follow, are ends of reading.
_PULSE, _SIZE, _SPAN, _STEP, _BEGUN, _MAIN, _WORKERS = range(7)


class Progress:
    """How far each process has read, and a pulse of the main one; shared with the workers that are started."""

    def __init__(self) -> None:
        self._cells = SharedArray((_WORKERS + _SLOTS,))
        self._maker = os.getpid()

    @property
    def made_here(self) -> bool:
        """Whether it was made in this process, and did not come with it from the one that started it."""
        return self._maker == os.getpid()

    @property
    def read_until(self) -> int:
        """One past the highest position that was read here or in a worker; 0 before."""
        return int(self._cells.array[_MAIN:].max())

    @property
    def by_workers(self) -> bool:
        """Whether a worker has read."""
        return bool(self._cells.array[_WORKERS:].any())

    @property
    def read_size(self) -> int:
        """Positions in the last request; 0 before."""
        return int(self._cells.array[_SIZE])

    @property
    def read_span(self) -> int:
        """Consecutive positions that the last request covered, including those that other ranks took in turn."""
        return int(self._cells.array[_SPAN])

    @property
    def step_size(self) -> int:
        """Samples an optimizer step takes, as `plan_steps` was told; 0 before."""
        return int(self._cells.array[_STEP])

    def plan_steps(self, samples: int) -> None:
        """Say how many samples an optimizer step takes."""
        self._cells.array[_STEP] = samples

    def note_begin(self, end: int) -> None:
        """Note that a reader begins at position 0, and warn, once, if the stream of `end` samples was read before.

        What is read without gradients is an evaluation, which is to read the same again. (A worker cannot tell.)
        """
        if get_worker_info() is None and not torch.is_grad_enabled():
            return
        begun = int(self._cells.array[_BEGUN])
        if again := begun == 1 and self.read_until > end - self.read_span:
            logger.warning(
                "position 0 is read again, after all of the %d samples: right for an evaluation, but to train on them a"
                " second time is to take the same ones in the same order, whatever max_epochs says; to train for longer"
                " raise num_samples: each domain is reshuffled",
                end,
            )
        self._cells.array[_BEGUN] = max(1, begun, 2 * again)

    def note(self, size: int, stop: int, stride: int = 1) -> None:
        """Say that a request of so many positions, each `stride`-th, was read, and so all positions before `stop`."""
        self.note_until(stop)
        cells = self._cells.array
        cells[_SIZE], cells[_SPAN] = size, size * stride

    def note_until(self, stop: int) -> None:
        """Say that all positions before `stop` were read, by requests of a size that is not known."""
        worker, cells = get_worker_info(), self._cells.array
        # A cell for each writer, because taking the maximum is not atomic between processes.
        cell = _MAIN if worker is None else _WORKERS + worker.id % _SLOTS
        cells[cell] = max(int(cells[cell]), stop)

    def forget(self) -> None:
        """Start again from zero, but keep what a step takes."""
        self._cells.array[[_PULSE, _SIZE, _SPAN, _BEGUN]], self._cells.array[_MAIN:] = 0, 0

    def pulse(self) -> None:
        """Say that the main process is alive, so that workers that wait for a stage go on waiting."""
        self._cells.array[_PULSE] += 1

    def wait(self, schedule: MixtureSchedule, stop: int, causes: str) -> None:
        """Return when positions before `stop` are decided or the stream is exhausted; in the main process at once.

        Raises:
            Undecided: in a worker, after half an hour without a sign of life, with the `causes` there may be.
            RuntimeError: the parent process ended.
        """
        parent = multiprocessing.parent_process()
        pulse, waited, patience, clock = -1, 0.0, _WARN_SECONDS, time.monotonic()
        while get_worker_info() is not None and (end := schedule.end) is not None and end < stop:
            if schedule.exhausted_at is not None:
                return
            if parent is not None and not parent.is_alive():
                raise RuntimeError(f"the parent process ended before it published the stage of position {end}")
            if pulse != (pulse := int(self._cells.array[_PULSE])):
                waited, patience = 0.0, _WARN_SECONDS
            now = time.monotonic()
            waited += min(now - clock, 1.0)  # a longer pause is of a suspended job, main process and all
            clock = now
            if waited > _GIVE_UP_SECONDS:
                raise Undecided(f"position {end} was not decided within {waited:.0f} s.{causes}")
            if waited > patience:
                logger.warning("waiting for the stage of position %d for %.0f s.%s", end, waited, causes)
                patience *= 4
            time.sleep(_POLL_SECONDS)
