"""Which domain the sequences that a model was given are of, found by their content among the samples of a step.

So it does not matter how a loader shards, batches or accumulates them. Knows the dataset; no model.
"""

from typing import Any

import numpy as np

from dynmix.mixture.dataset import MixtureDataset


class StepSamples:
    """The samples of an optimizer step, counted from 1, to be looked up by their token ids."""

    def __init__(self, dataset: MixtureDataset, step: int, batch_size: int) -> None:
        self._range = (step - 1) * batch_size, min(step * batch_size, len(dataset))
        batch = dataset.look(*self._range).batch()
        assert batch is not None  # nobody has changed an item of it
        self._domains: dict[bytes, list[int]] = {}
        for row, domain in zip(batch["input_ids"].numpy(), batch["domain"].tolist(), strict=True):
            self._domains.setdefault(_key(row), []).append(domain)

    def domains(self, input_ids: Any) -> list[list[int]]:
        """Numbers of the domains that each sequence, of ids [n, T], is of; more than one where domains share it.

        Raises:
            ValueError: a sequence that is none of these samples.
        """
        try:
            return [self._domains[_key(row)] for row in np.asarray(input_ids)]
        except KeyError:
            first, last = self._range[0], self._range[1] - 1
            raise ValueError(
                f"the model was given a sequence that is none of the samples {first} to {last} of the dataset: what "
                "learns from the training steps works where sequences reach the model as the dataset gives them, and "
                "in order"
            ) from None


def _key(ids: Any) -> bytes:
    return np.asarray(ids, dtype=np.int64).tobytes()
