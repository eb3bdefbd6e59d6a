"""How often a domain may be seen: `max_epochs`, turned into what is left of each domain at a boundary.

Knows the dataset's sizes and counts; no mixer and no model.
"""

from collections.abc import Mapping

from dynmix.mixture.dataset import MixtureDataset


class EpochBudget:
    """Upper bounds on weights from a limit on epochs.

    Args:
        dataset: the mixture whose domains are limited.
        max_epochs: epochs of each domain over the whole run, one number for all or by name; None: no limit.

    Raises:
        ValueError: a name that is no domain, a limit below 0.
    """

    def __init__(self, dataset: MixtureDataset, max_epochs: float | Mapping[str, float] | None):
        self.dataset = dataset
        self._by_name = dict(max_epochs) if isinstance(max_epochs, Mapping) else {}
        self.of_all = None if max_epochs is None or isinstance(max_epochs, Mapping) else float(max_epochs)
        for name, limit in self.max_epochs.items():
            if name not in dataset.domains:
                raise ValueError(f"max_epochs: no domain {name!r}; the domains are {list(dataset.domains)}")
            if not limit >= 0:
                raise ValueError(f"max_epochs[{name!r}]={limit}: at least 0")

    @property
    def max_epochs(self) -> dict[str, float]:
        """Domain -> epochs; of domains that entered the run too, where there is one number for all."""
        return self._by_name if self.of_all is None else dict.fromkeys(self.dataset.domains, self.of_all)

    def left(self, position: int) -> dict[str, float]:
        """Return domain -> sequences that may still be drawn from `position` on, for the limited domains."""
        drawn = dict(zip(self.dataset.domains, self.dataset.schedule.counts(position).tolist(), strict=True))
        return {name: limit * self.dataset.sizes[name] - drawn[name] for name, limit in self.max_epochs.items()}

    def upper(self, start: int, samples: int) -> dict[str, float]:
        """Return domain -> the largest weight of a stage of `samples` samples from `start` on that stays within it."""
        return {name: max(0.0, left) / samples for name, left in self.left(start).items()}

    def entering(self, sizes: Mapping[str, int], samples: int) -> dict[str, float]:
        """Return the same for domains that are about to enter, by how many sequences they have."""
        return {} if self.of_all is None else {name: self.of_all * size / samples for name, size in sizes.items()}

    def check(self, total: int, first_end: int) -> None:
        """Raise ValueError if a run of `total` samples, or its first stage up to `first_end`, cannot stay within it."""
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
