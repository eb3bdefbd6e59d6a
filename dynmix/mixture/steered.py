"""The part of a mixture that a controller steers, however its sequences are read: its stages and how far it was read.

Knows the schedule and the progress of those who read; nothing of sources or samples.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch.utils.data import get_worker_info

from dynmix.mixture.progress import Progress
from dynmix.mixture.schedule import MixtureSchedule
from dynmix.mixture.weights import Weights


class Steered:
    """What `MixtureDataset` and `MixtureStream` have in common.

    Attributes:
        schedule: the `MixtureSchedule` of this stream.
        sequence_length: tokens of a sequence.
    """

    schedule: MixtureSchedule
    sequence_length: int
    _progress: Progress

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in order; an item's `domain` is an index into them."""
        return self.schedule.names

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> sequences of one pass over the domain; for a stream, as they were given."""
        return self.schedule.sizes

    def detach(self) -> None:
        """Make the stages this process's own, if they came with it: ranks that one process started shared them all.

        Call it before the loader reads: its workers share what the process has that starts them.
        """
        if not self._progress.made_here:
            self.schedule, self._progress = copy.deepcopy(self.schedule), Progress()

    def begin(self, weights: Weights) -> None:
        """`schedule.begin`, refused once the loader has read. Raises ValueError."""
        if read := self.read_until:
            raise ValueError(f"the loader has read {read} samples: the weights of the first stage stay")
        self.schedule.begin(weights)

    def publish(self, weights: Weights, start: int, end: int | None = None) -> None:
        """`schedule.publish`, refused (ValueError) for a `start` below `read_until`: that is of the stage before."""
        if start < (read := self.read_until):
            raise ValueError(
                f"start={start}: position already read by the loader, which is at {read}; declare where a stage ends"
                f" before it is read (schedule.hold(end)), or publish from {read} on"
            )
        self.schedule.publish(weights, start, end)

    @property
    def read_until(self) -> int:
        """One more than the highest position that a loader read here or in a worker; 0 before, and after loading."""
        return self._progress.read_until

    def pulse(self) -> None:
        """Say that the main process is alive, so that workers that wait for a stage go on waiting."""
        self._progress.pulse()

    def _other_length(self, state: Mapping[str, Any]) -> list[str]:
        """In words, that sequences of a state have another length; nothing if they have this one."""
        then, now = state["sequence_length"], self.sequence_length
        return [f"sequence_length was {then} and is {now}"] if then != now else []

    def _is_of_worker(self, schedule: Mapping[str, Any]) -> bool:
        """Whether a state of this `schedule` is being loaded in a worker, which must not change the stages.

        A loader that keeps states of its workers loads them there. The table of stages is shared with the main process,
        which may have published more since the worker's state was taken. Raises ValueError in a worker for stages that
        the main process does not have.
        """
        if get_worker_info() is None:
            return False
        if not self.schedule.continues(schedule):
            raise ValueError(
                "this state has stages that the main process has not: load them there before the loader starts,"
                " load_state_dict(state) of what the loader reads, with the state that its state_dict() gave in the"
                " main process"
            )
        return True
