"""The tasks' losses, where no influence is asked for.

Knows models and batches; the losses that come with an influence are `group_influence`'s own.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dynmix.influence.capture import Batches, Loss, isolated, next_token_loss, unwrap
from dynmix.influence.group import ratio_of_sums


def task_losses(
    model: nn.Module, tasks: Mapping[str, Batches], loss: Loss = next_token_loss
) -> tuple[dict[str, float], dict[str, float]]:
    """Return each task's mean loss in nats per token, and its standard error over the task's sequences.

    Leaves no trace in the model. The standard error is infinite for a single sequence.
    """
    model = unwrap(model)
    device = next(model.parameters()).device
    means, errors = {}, {}
    with isolated(model), torch.no_grad():
        for name, batches in tasks.items():
            parts = [
                loss(model, {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()})
                for batch in batches
            ]
            nats, tokens = (np.concatenate([part[i].double().cpu().numpy() for part in parts]) for i in (0, 1))
            mean, variance = ratio_of_sums(nats[:, None], tokens)
            means[name], errors[name] = float(mean[0]), float(np.sqrt(variance[0]))
    return means, errors
