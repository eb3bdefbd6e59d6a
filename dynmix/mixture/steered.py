"""What a controller steers of a mixture, however its sequences are read: its stages, and how far they have been read.

Knows the schedule and the progress of those who read; nothing of sources or samples.
"""

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
    """

    schedule: MixtureSchedule
    _progress: Progress

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in order; `domain` of an item is an index into it."""
        return self.schedule.names

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> sequences of one pass over the domain; of a stream as far as they were told."""
        return self.schedule.sizes

    def begin(self, weights: Weights) -> None:
        """`schedule.begin`, refused where the loader has read already. Raises ValueError."""
        self._progress.check_begin()
        self.schedule.begin(weights)

    def publish(self, weights: Weights, start: int, end: int | None = None) -> None:
        """`schedule.publish`, refused where the loader has read already: those samples were of the stage before.

        Raises:
            ValueError: also when `start` is below `read_until`.
        """
        self._progress.check_publish(start)
        self.schedule.publish(weights, start, end)

    @property
    def read_until(self) -> int:
        """One more than the highest position that a loader read here or in a worker; 0 before, and after loading."""
        return self._progress.read_until

    def pulse(self) -> None:
        """Say that the main process is at work: a worker that waits for a stage is then patient with it."""
        self._progress.pulse()

    def _is_of_worker(self, schedule: Mapping[str, Any]) -> bool:
        """Whether a state of this `schedule` is loaded in a worker, whose stages are the main process's.

        A loader that keeps states of its workers does so. Theirs may be older than what the main process has published
        since they read ahead, and what they would write is shared with it.

        Raises:
            ValueError: in a worker, stages that the main process does not have.
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
