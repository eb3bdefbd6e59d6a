"""What a run's state says of the dataset, and whether all ranks have the same one, read to the same plan.

Knows the dataset and the ranks; nothing of models, measurements or decisions.
"""

from collections.abc import Mapping
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


def check_ranks(dataset: Mixture, plan: Mapping[str, Any]) -> None:
    """Raise on every rank if the ranks' datasets are not one: each would take its samples from a stream of its own.

    Args:
        dataset: this rank's.
        plan: numbers that must be alike as well, or the ranks would stop at different steps, by name.

    Raises:
        ValueError: on a rank whose dataset or plan is not that of rank 0, with what differs.
        RuntimeError: on the others, with what that one says.
    """
    ranks = Ranks(shared=True)
    if ranks.size == 1:
        return

    def check() -> None:
        found = [f"{name} was {first[name]} and is {here}" for name, here in plan.items() if here != first[name]]
        if found := dataset.differences(state) + found:
            raise ValueError(
                f"the dataset of rank {ranks.rank} is not that of rank 0, as it was there and is here: "
                f"{'; '.join(found)}; make run and dataset alike on every rank: of one seed, with stages of one "
                "length, and domains and files in one order"
            )

    with random_state_kept():  # a domain's items may draw from it
        with ranks.together():
            own = (stages_of(dataset) if ranks.rank == 0 else {}, plan)
            state, first = ranks.exchange("the dataset", own)[0]
        on_every_rank(check)
