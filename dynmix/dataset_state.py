"""What a run's state says of the dataset, and whether all ranks have the same one.

Knows the dataset and the ranks; nothing of models, measurements or decisions.
"""

from typing import Any

from dynmix.influence.isolation import random_state_kept
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.stream import Mixture
from dynmix.ranks import Ranks, on_every_rank


def stages_of(dataset: Mixture) -> dict[str, Any]:
    """Return the dataset's part of a run's state, JSON-able."""
    if isinstance(dataset, MixtureDataset):
        return dataset.state_dict()
    # Where a stream is in its sources is its loader's to keep, which knows what it has read ahead. The Trainer's reads
    # from the start again, through all stages.
    return {"schedule": dataset.schedule.state_dict(since=0), "sequence_length": dataset.sequence_length}


def check_ranks(dataset: Mixture) -> None:
    """Raise on every rank if the ranks' datasets are not one: each would take its samples from a stream of its own.

    Raises:
        ValueError: on a rank whose dataset is not that of rank 0, with what differs.
        RuntimeError: on the others, with what that one says.
    """
    ranks = Ranks(shared=True)
    if ranks.size == 1:
        return

    def check() -> None:
        if isinstance(dataset, MixtureDataset):
            found = dataset.differences(state)
        else:
            found = dataset.schedule.differences(state["schedule"])
        if found:
            raise ValueError(
                f"the dataset of rank {ranks.rank} is not that of rank 0, as it was there and is here: "
                f"{'; '.join(found)}; make it alike on every rank: of one seed, with domains and files in one order"
            )

    with random_state_kept():  # a domain's items may draw from it
        with ranks.together():
            state = ranks.exchange("the dataset", stages_of(dataset) if ranks.rank == 0 else {})[0]
        on_every_rank(check)
