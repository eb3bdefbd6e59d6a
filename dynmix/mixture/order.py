"""Which domain stands at which position of a stage: the stage's draws, scattered over its positions a few at a time.

Positions of one domain may come in groups, each one draw of the stage: what a micro-batch holds is then of one domain.
Knows rows of the stage table; nothing of names, limits or rows of the domains.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dynmix.mixture.permutation import mix
from dynmix.mixture.quota import Ints, Quota
from dynmix.mixture.stages import StageRow

_CHUNK = 1 << 14  # positions computed at once: a working set that stays in the cache
_PART = 32  # draws scattered together: more would keep a prefix further from its weights than rounding does
_PART_KEY, _DOMAIN_KEY = 1, 2  # keep the hashes of one seed apart


class Order(NamedTuple):
    """The order of a schedule."""

    seed: int  # of all that is random
    block: int  # positions that are never left by what is scattered, a multiple of `group`
    group: int = 1  # positions in a row, counted from the stage's start, that are of one domain

    def counts(self, stage: StageRow, position: int) -> Ints:
        """Draws of each domain before `position`, which lies in `stage` or at its end, int64[n_domains]."""
        return next(self.chunks(stage, position, position + 1))[0]

    def domains(self, stage: StageRow, start: int, stop: int) -> Ints:
        """Domain of each of the positions [start, stop), one at least and all in `stage`."""
        return np.concatenate([domain for _, domain in self.chunks(stage, start, stop)])

    def chunks(self, stage: StageRow, start: int, stop: int) -> Iterator[tuple[Ints, Ints]]:
        """The positions [start, stop), all in `stage`, some at a time.

        Yields draws of each domain before the first of them, int64[n_domains], and the domain of each.
        """
        first, last = start - stage.start, stop - stage.start
        (live, quota), size = self._quota(stage), self.group
        edge = int(self._parts(first // size, first // size + 1)[0])
        drawn = quota.before(edge)
        while first < last:
            edges = self._parts(first // size, min(first // size + max(1, _CHUNK // size), -(-last // size)))
            before = stage.base.copy()
            before[live] += drawn * size
            of_draws, drawn = quota.domains(int(edges[0]), int(edges[-1]), drawn)
            found = self._scattered(stage, edges, live[of_draws])
            skipped = first - int(edges[0]) * size
            before += np.bincount(found[:skipped], minlength=len(before))
            yield before, found[skipped : skipped + last - first]
            first = int(edges[-1]) * size

    def _parts(self, first: int, stop: int) -> Ints:
        """First draw of each part that holds draws `first` to `stop` - 1, and of the part behind them."""
        block = self.block // self.group
        parts = -(-block // _PART)  # of a block, as equal as can be: part n begins at n * block // parts
        part, last = (((draw + 1) * parts - 1) // block for draw in (first, stop - 1))
        number, within = divmod(part, parts)
        return number * block + np.arange(within, within + last - part + 2) * block // parts

    def _quota(self, stage: StageRow) -> tuple[Ints, Quota]:
        """Numbers of the domains that the stage draws, and how it draws them."""
        units = stage.units
        live = np.flatnonzero(units)
        return live, Quota(units[live], mix(self.seed, _DOMAIN_KEY, stage.number, live), stage.owed[live])

    def _scattered(self, stage: StageRow, edges: Ints, drawn: Ints) -> Ints:
        """Domains of draws in the order of their positions: shuffled within each of the parts between `edges`."""
        index = np.arange(len(drawn))
        key = mix(self.seed, _PART_KEY, stage.number)
        number = (mix(key + (index + edges[0]).view(np.uint64)) >> np.uint64(36)).view(np.int64)
        part = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
        # One sort by part and random number; what was sorted says which draw it was.
        found: Ints = drawn[np.sort((part << 48) + (number << 20) + index) & ((1 << 20) - 1)]
        return found if self.group == 1 else np.repeat(found, self.group)
