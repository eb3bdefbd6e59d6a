"""What the published stages will do to domains: which will be read again, and which used up.

It is logged when training gets there, since nobody remembers a warning from thousands of steps before. Knows a
dataset's schedule; no model, no mixer and no journal.
"""

import logging

from dynmix.mixture.accounting import NewEpoch, UsedUp, in_words, new_epochs, used_up
from dynmix.mixture.stream import Mixture
from dynmix.ranks import is_rank_0

logger = logging.getLogger("dynmix.mixture")


class Ahead:
    """The events of a dataset's stages, in the order of their positions."""

    def __init__(self, dataset: Mixture):
        self.dataset = dataset
        self._untold: list[NewEpoch | UsedUp] = []

    def look(self, position: int, total: int) -> list[NewEpoch]:
        """Note what will happen from `position` to the end of the last stage; return the epochs that begin there.

        `total`: samples of the whole run. Raises ValueError if a domain is drawn that this run does not have.
        """
        schedule = self.dataset.schedule
        stop = min(schedule.end or total, total)
        again: list[NewEpoch] = []
        if position < stop:
            drawn = schedule.counts(stop) - schedule.counts(position)
            if needed := [name for name in self.dataset.gone if drawn[schedule.names.index(name)]]:
                raise ValueError(
                    f"{needed} are drawn {position}..{stop}, and are not among the domains of this run: list them "
                    "until the boundary of a stage that gives them no weight"
                )
            again = new_epochs(schedule, position, stop)
        self._untold += sorted([*again, *used_up(schedule, position, stop)])
        return again

    def behind(self, position: int) -> list[NewEpoch]:
        """The epochs that began in the last stage, before `position`."""
        start = self.dataset.schedule.starts[-1]
        return new_epochs(self.dataset.schedule, start, position) if start < position else []

    def tell(self, position: int, step: int) -> None:
        """Log what happened before `position`, the end of optimizer step `step`, and which stage begins there."""
        while self._untold and self._untold[0].position < position:
            what = self._untold.pop(0)
            if is_rank_0():
                logger.warning("%s, in step %d", what, step)
        if position in self.dataset.schedule.starts[-2:] and is_rank_0():
            logger.info("the stage of position %d begins with step %d", position, step + 1)

    def warn(self) -> None:
        """Log which domains will be read again."""
        if again := [each for each in self._untold if isinstance(each, NewEpoch)]:
            logger.warning("stage 0 will read again: %s", in_words(again, len(again)))
