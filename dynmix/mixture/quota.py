"""Which domain each draw of a stage is of.

Time runs in moments. A domain is drawn once in every stretch of 1 / weight moments, at a random one near its middle
(stratified, or jittered, sampling of time). So by any moment a domain has had its share, mostly rounded to the nearest
number, however long the stream and however small the weight, and how often it was drawn has a closed form. Draws are
numbered in the order of their moments, those of one moment by domain. What rounding owes a domain at the end of one
quota the next one pays.

The error of a low-discrepancy sequence would grow with the logarithm of its length. A moment from anywhere in the
stretch would round up or down at random, a third further off; always half-way would be one pattern for ever. Knows
nothing of names, stages, blocks or rows.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dynmix.mixture.permutation import mix

Ints = npt.NDArray[np.int64]
UInts = npt.NDArray[np.uint64]

TOTAL = 1 << 32


class Quota(NamedTuple):
    """Draws of domains by weight.

    At moment t a domain has come `units` * t + `owed` along. Its draw j is of the first moment, from 0 on, at which it
    has come to j * 2**32 + a random place in that stretch.

    It is owed draws that it should have had before the first one, below 0 if it had too many; without units it waits.
    """

    units: Ints  # weights in units of 2**-32, int64[n_domains] >= 0 with a sum of 2**32
    keys: UInts  # what is random, uint64[n_domains]
    owed: Ints  # in parts of 2**-32, int64[n_domains]

    def before(self, number: int) -> Ints:
        """How many of the first `number` draws are of each domain, int64[n_domains]; exact for any below 2**62."""
        counts = self._near(number, -1)
        return self.domains(int(counts.sum()), number, counts)[1]

    def domains(self, start: int, stop: int, before: Ints) -> tuple[Ints, Ints]:
        """Domain of each draw from `start` to `stop - 1`, at most 2**19 of them, and `self.before(stop)`.

        `before` is `self.before(start)`.
        """
        times = self._near(stop, 1) - before  # those wanted, and some behind them
        domain, index = np.repeat(np.arange(len(times)), times), np.arange(int(times.sum()))
        first = before - np.cumsum(times) + times  # index + first is the number among its domain's draws
        place = _place(np.repeat(self.keys + first.view(np.uint64), times), index)
        # Counted from the moment `start` all of it is below 2**53, and no quotient is nearer to the next whole number
        # than 2**-32: floats are exact.
        stretch, passed = self._stretch(start)
        late = np.repeat((first - stretch) * TOTAL - passed, times) + index * TOTAL + place
        moment = np.maximum(np.ceil(late / np.repeat(self.units.astype(np.float64), times)), -start)
        moment -= moment.min(initial=0)
        order = np.argsort(moment.astype(np.min_scalar_type(int(moment.max(initial=0)))), kind="stable")  # small: radix
        found = domain[order[: stop - start]]
        return found, before + np.bincount(found, minlength=len(before))

    def _near(self, number: int, side: int) -> Ints:
        """Draws of each domain up to a moment near draw `number`: not more than `number` for side -1, not less for 1.

        One draw a moment, give or take one a domain and what is owed. Where many domains have one weight their draws
        come in bursts, and what is in excess says little of where the moment is: then by doubling.
        """
        moment, step = number, 0
        while side * (excess := int((counts := self._by(moment)).sum()) - number) < 0:
            step = max(abs(excess), 2 * step)
            moment += side * step
        return counts

    def _by(self, moment: int) -> Ints:
        """Draws of each domain up to a moment."""
        if moment < 0:
            return np.zeros_like(self.units)
        stretch, passed = self._stretch(moment)
        return np.maximum(0, stretch + (passed >= _place(self.keys, stretch)))  # of whole stretches, and of this one

    def _stretch(self, moment: int) -> tuple[Ints, Ints]:
        """Number of the stretch each domain is in at a moment, and how much has passed of it, in parts of 2**-32."""
        periods, rest = divmod(moment, TOTAL)
        parts = self.units.view(np.uint64) * np.uint64(rest)  # below 2**64
        whole = self.units * periods + (parts >> np.uint64(32)).view(np.int64)
        passed = (parts & np.uint64(TOTAL - 1)).view(np.int64) + np.where(self.units, self.owed, 0)
        return whole + (passed >> 32), passed & (TOTAL - 1)


def _place(keys: UInts, draw: Ints) -> Ints:
    """Where in its stretch a draw is: in the middle quarter of its 2**32 parts."""
    return (mix(keys + draw.view(np.uint64)) >> np.uint64(34)).view(np.int64) + (3 * TOTAL // 8 + 1)
