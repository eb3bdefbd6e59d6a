"""Labels drawn from the model itself, for curvatures that are to be the true Fisher and not the data's.

Knows models and batches; nothing of what is done with the gradients.
"""

from __future__ import annotations

import numpy as np
import torch

from dynmix.influence.batch import Batch, next_token_labels, next_token_logits, on_device
from dynmix.influence.capture import Capture


@torch.no_grad()
def sampled_labels(capture: Capture, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with every scored label replaced by a draw from the model's own prediction."""
    batch = on_device(batch, generator.device)
    logits, labels = next_token_logits(capture.model, batch)[:, :-1], next_token_labels(batch)
    draws = torch.multinomial(logits.flatten(0, 1).softmax(-1).nan_to_num(1.0), 1, generator=generator)
    drawn = torch.where(labels == -100, labels, draws.view(labels.shape))
    first = torch.full_like(drawn[:, :1], -100)  # nothing predicts the first token
    return {**batch, "labels": torch.cat([first, drawn], dim=1)}


def label_generator(capture: Capture, seed: int, number: int) -> torch.Generator:
    """What the labels of batch `number` are drawn with: the same in every pass, whoever reads the batches before it."""
    own = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
    return torch.Generator(next(capture.model.parameters()).device).manual_seed(own)
