"""Which domain the sequences that a model was given are of, found by their content among the samples of a step.

So it does not matter how a loader shards, batches or accumulates them. Knows the dataset; no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynmix.mixture.dataset import MixtureDataset


class StepSamples:
    """The samples [start, stop) of a dataset, to be looked up by their token ids."""

    def __init__(self, dataset: MixtureDataset, start: int, stop: int) -> None:
        self._range = start, stop
        batch = dataset.look(start, stop).batch()
        assert batch is not None  # nobody has changed an item of it
        found: dict[bytes, list[int]] = {}
        for row, domain in zip(batch["input_ids"].numpy(), batch["domain"].tolist(), strict=True):
            found.setdefault(_key(row), []).append(domain)
        self._domains: Mapping[bytes, Sequence[int]] = found

    def domains(self, input_ids: Any) -> list[Sequence[int]]:
        """Numbers of the domains that each sequence, of ids [n, T], is of; more than one where domains share it.

        Raises:
            ValueError: a sequence that is none of these samples.
        """
        found = [self._domains.get(_key(row)) for row in np.asarray(input_ids)]
        known = [each for each in found if each is not None]
        if len(known) < len(found):
            start, stop = self._range
            raise ValueError(
                f"the model was given a sequence that is none of the samples {start} to {stop} of the dataset: what "
                "learns from the training steps works where sequences reach the model as the dataset gives them, and "
                "in order"
            )
        return known


def _key(ids: Any) -> bytes:
    return np.asarray(ids, dtype=np.int64).tobytes()
