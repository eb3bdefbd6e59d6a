"""Whether a loader asks for positions in order: what is shuffled would mix the stages.

Knows positions and the length of the stream; nothing of samples or stages.
"""

import operator
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

_REMEDY = (
    " A shuffled loader mixes the stages; use shuffle=False (DataLoader, DistributedSampler) or"
    ' train_sampling_strategy="sequential" (Trainer)'
)


class InOrder:
    """Checks the requests of one process against each other."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._lowest, self._last = num_samples, -1
        self._steps_back: deque[bool] = deque(maxlen=8)

    def runs(self, request: Sequence[int], length_of: Callable[[], int]) -> list[range]:
        """The request, not empty, as one ascending range, or two where it wraps from the stream's end to its start.

        Only where it may have wrapped is the stream asked for its length.

        Raises:
            IndexError: a position outside the stream.
            ValueError: they are not equally spaced and ascending, or requests go back and forth.
        """
        runs = self._ranges(request, length_of)
        self._check_passes(runs[0].start, runs[0].step)
        return runs

    def _ranges(self, request: Sequence[int], length_of: Callable[[], int]) -> list[range]:
        first, last = operator.index(request[0]), operator.index(request[-1])
        step = request[1] - first if len(request) > 1 else 1
        if 0 <= first <= last < self._num_samples and step > 0:
            whole = range(first, last + 1, step)
            if len(whole) == len(request) and isinstance(request, list) and list(whole) == request:
                return [whole]
        positions = np.asarray(request, np.int64)
        if (outside := positions[(positions < 0) | (positions >= self._num_samples)]).size:
            raise IndexError(f"position {outside[0]} is not in [0, {self._num_samples})")
        steps, length = np.diff(positions), length_of()
        stride = int(steps[0]) % length if steps.size else 1
        wraps = np.flatnonzero(steps < 0)
        # Samplers that pad to equal shards go on from the start; more than half the stream is no stride, but a shuffle.
        wrapped = len(wraps) == 1 and 2 * stride <= length
        if stride == 0 or ((steps - stride) % length).any() or (len(wraps) and not wrapped):
            raise ValueError(f"positions are not read in order: {positions[:8].tolist()}...{_REMEDY}")
        parts = np.split(positions, wraps + 1)
        return [range(int(part[0]), int(part[-1]) + 1, stride) for part in parts]

    def _check_passes(self, first: int, stride: int) -> None:
        # A request may hold a single position, so a shuffle may show between requests only. One step back may be a new
        # pass (which starts where the earliest did, or beside it as another rank does) or a second loader; many are a
        # shuffle.
        self._lowest = min(self._lowest, first)
        back = self._lowest + stride <= first < self._last
        self._steps_back.append(back)
        self._last = first
        if back and sum(self._steps_back) >= 3:
            raise ValueError(f"positions are not read in order: requests go back and forth, now to {first}.{_REMEDY}")
