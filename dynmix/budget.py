"""How often a domain may be seen: `max_epochs`, turned into what is left of each domain at a boundary.

Knows the dataset's sizes and counts; no mixer and no model.
"""

from collections.abc import Mapping

from dynmix.mixture.limits import Limits, MaxEpochs
from dynmix.mixture.stream import Mixture


class EpochBudget:
    """Upper bounds on weights from a limit on epochs.

    Args:
        dataset: the mixture whose domains are limited.
        max_epochs: epochs of each domain over the whole run, one number for all or by name; None: the dataset's limit,
            if it has one.

    Raises:
        ValueError: a name that is no domain, a limit below 0, or another one than the dataset's.
    """

    def __init__(self, dataset: Mixture, max_epochs: MaxEpochs):
        self.dataset, own = dataset, dataset.schedule.limits.max_epochs
        if None not in (max_epochs, own) and max_epochs != own:
            raise ValueError(f"max_epochs={max_epochs}, and the dataset's is {own}: say it once, to MixtureDataset")
        self._given = Limits(max_epochs, "repeat")
        if unknown := [name for name in self._given.epochs(dataset.sizes) if name not in dataset.sizes]:
            raise ValueError(f"max_epochs: no domain {unknown[0]!r}; the domains are {list(dataset.domains)}")

    @property
    def _limits(self) -> Limits:
        return self._given if self._given.max_epochs is not None else self.dataset.schedule.limits

    @property
    def max_epochs(self) -> dict[str, float]:
        """Domain -> epochs; of domains that entered the run too, where there is one number for all."""
        return self._limits.epochs(self.dataset.sizes)

    @property
    def of_entering(self) -> float | None:
        """Epochs of any domain that enters the run: the one number for all; None where limits are by name, or none."""
        limit = self._limits.max_epochs
        return None if limit is None or isinstance(limit, Mapping) else float(limit)

    def left(self, position: int) -> dict[str, float]:
        """Return domain -> sequences that may still be drawn from `position` on, for the limited domains."""
        left = self._limits.draws(self.dataset.sizes) - self.dataset.schedule.counts(position)
        return {name: n for name, n in zip(self.dataset.domains, left.tolist(), strict=True) if name in self.max_epochs}

    def upper(self, start: int, samples: int) -> dict[str, float]:
        """Return domain -> the largest weight of a stage of `samples` samples from `start` on that stays within it.

        Where all domains are limited and less is left of them, the stage is as long as that, its mixture what is left.
        """
        left = {name: max(0.0, n) for name, n in self.left(start).items()} | dict.fromkeys(self.dataset.gone, 0.0)
        length = min(samples, sum(left.values())) if len(left) == len(self.dataset.domains) else samples
        return {name: n / length for name, n in left.items()} if length else {}

    def entering(self, sizes: Mapping[str, int], samples: int) -> dict[str, float]:
        """Return the same for domains that are about to enter, by how many sequences they have."""
        limit = self.of_entering
        return {} if limit is None else {name: limit * size / samples for name, size in sizes.items()}

    def check(self, total: int, first_end: int) -> None:
        """Raise ValueError if a run of `total` samples, or its first stage up to `first_end`, cannot stay within it.

        Where the dataset keeps the limit itself, neither can exceed it.
        """
        if self.dataset.schedule.limits.hard:
            return
        if len(self.max_epochs) == len(self.dataset.domains):
            room = sum(limit * self.dataset.sizes[name] for name, limit in self.max_epochs.items())
            if room < total:
                raise ValueError(
                    f"max_epochs leaves {room:.0f} samples over all domains and the run takes {total}: raise it or "
                    "train for fewer steps"
                )
        over = [name for name, left in self.left(first_end).items() if left < 0]
        if over:
            raise ValueError(f"the first stage alone exceeds max_epochs of {over}: lower their weights or raise it")
