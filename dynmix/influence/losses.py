"""The tasks' losses, where no influence is asked for.

Knows models and batches; the losses that come with an influence are `group_influence`'s own.
"""

import numpy as np
import torch
from torch import nn

from dynmix.influence.batch import Batch, Sets, next_token_loss, on_device
from dynmix.influence.dealing import Turns
from dynmix.influence.isolation import isolated, unwrap
from dynmix.influence.sets import mean_and_error
from dynmix.observation import Array
from dynmix.ranks import Ranks


def task_losses(
    model: nn.Module, tasks: Sets, *, over_ranks: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """Return each task's mean loss in nats per token, and its standard error over the task's sequences.

    Leaves no trace in the model. The standard error is infinite for a single sequence. `over_ranks` as in
    `group_influence`.
    """
    model = unwrap(model)
    device = next(model.parameters()).device
    ranks = Ranks(over_ranks)

    def run(batch: Batch) -> tuple[Array, Array]:
        nats, tokens = next_token_loss(model, on_device(batch, device))
        return nats.double().cpu().numpy(), tokens.double().cpu().numpy()

    means, errors = {}, {}
    with ranks.together(), isolated(model), torch.no_grad():
        turns = Turns(ranks, run)
        own = [{turn.number: run(turn.batch) for turn in turns(batches) if turn.mine} for batches in tasks.values()]
        for name, found in zip(tasks, turns.gathered("the tasks' losses", own), strict=True):
            nats, tokens = (np.concatenate(parts) for parts in zip(*found.values(), strict=True))
            means[name], errors[name] = mean_and_error(nats, tokens)
    return means, errors
