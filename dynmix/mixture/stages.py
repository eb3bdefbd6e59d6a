"""The stages of a schedule as a table in shared memory: one process writes it, those it started read it.

A stage keeps the domains there were when it was written. Domains that joined since have no part in it, which reads as
a cumulative weight of 2**32 (never drawn) and no draws. Knows nothing of names, sizes or how positions are assigned.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dynmix.mixture.quota import TOTAL, Ints
from dynmix.mixture.shared import SharedArray

MAX_STAGES = 4096
_OPEN = -1  # the end of a stage that has none


class StageRow(NamedTuple):
    """One row of the table."""

    number: int
    start: int
    end: int | None
    cdf: Ints  # as `integer_cdf` gives, int64[n_domains], as the two that follow
    base: Ints  # draws of each domain before the stage
    owed: Ints  # what the weights of the stages before gave a domain beyond `base`, as in `Quota`

    @property
    def units(self) -> Ints:
        """Weights in units of 2**-32."""
        return np.diff(self.cdf, prepend=0)

    def widened(self, width: int) -> "StageRow":
        """The same stage with `width` domains, at least as many as it has."""
        more = width - len(self.cdf)
        cdf, base, owed = (np.concatenate([x, np.full(more, y)]) for x, y in zip(self[3:], (TOTAL, 0, 0), strict=True))
        return self._replace(cdf=cdf, base=base, owed=owed)


class StageTable:
    """Room for `MAX_STAGES` stages of up to `capacity` domains; pages that nothing was written to take no memory."""

    def __init__(self, capacity: int) -> None:
        # Row 0: generation, number of stages, number of the first of them that is known. Row 1 + s: start, end and
        # number of domains of stage s, its cdf, base and owed.
        self._shared = SharedArray((1 + MAX_STAGES, 3 + 3 * capacity))

    def __len__(self) -> int:
        return int(self._shared.array[0, 1])

    @property
    def first(self) -> int:
        """Number of the first stage that is known; a state may have left out those before."""
        return int(self._shared.array[0, 2])

    def __getitem__(self, number: int) -> StageRow:
        row = self._shared.array[1 + number]
        width = int(row[2])
        return StageRow(number, int(row[0]), _end(row[1]), *row[3 : 3 + 3 * width].reshape(3, width))

    @property
    def starts(self) -> Ints:
        """First position of every stage that is known, int64[n_stages - first]."""
        return self._shared.array[1 + self.first : 1 + len(self), 0]

    @property
    def end(self) -> int | None:
        """Declared end of the last stage; None while it is open."""
        return _end(self._shared.array[len(self), 1])

    @property
    def generation(self) -> int:
        """Grows with every change but that of an end."""
        return int(self._shared.array[0, 0])

    def hold(self, end: int) -> None:
        """Declare the end of the last stage."""
        self._shared.array[len(self), 1] = end

    def outdate(self) -> None:
        """Say that what was read before may be outdated."""
        self._shared.array[0, 0] += 1

    def replace(self, stages: Sequence[StageRow]) -> None:
        """Put `stages` in place of all that are there; the number of the first becomes that of the first known."""
        self._shared.array[0, 1:3] = stages[0].number
        self.write(*stages)

    def write(self, *stages: StageRow) -> None:
        """Put consecutive stages into the table under their numbers; what follows them is dropped."""
        table = self._shared.array
        table[0, 1] = stages[0].number
        for stage in stages:
            head = [stage.start, _OPEN if stage.end is None else stage.end, len(stage.cdf)]
            row = np.concatenate([head, stage.cdf, stage.base, stage.owed])
            table[1 + stage.number, : len(row)] = row
        # Readers in other processes look at the count only: a row they can see is whole. The generation comes last, so
        # that what is computed from the old rows is never taken for new.
        table[0, 1] = stages[-1].number + 1
        self.outdate()


def _end(value: np.int64) -> int | None:
    return None if value == _OPEN else int(value)
