import numpy as np
import pytest
import torch

from dynmix.influence.losses import task_losses


def test_losses_are_means_over_tokens_and_leave_no_trace(tiny_lm, token_batches):
    model = tiny_lm("llama", dropout=0.5)
    batches = token_batches(9, ragged=True)
    state = torch.get_rng_state()
    means, errors = task_losses(model, {"t": batches})
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    model.eval()
    nats, tokens = [], []
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                own = ids[None, : int(mask.sum())]
                nats.append(float(model(input_ids=own, labels=own).loss) * (own.shape[1] - 1))
                tokens.append(own.shape[1] - 1)
    assert means["t"] == pytest.approx(sum(nats) / sum(tokens), rel=1e-5)
    picks = np.random.default_rng(0).integers(0, len(nats), size=(4000, len(nats)))
    resampled = np.array(nats)[picks].sum(axis=1) / np.array(tokens)[picks].sum(axis=1)
    assert errors["t"] == pytest.approx(resampled.std(), rel=0.2)


def test_a_single_sequence_has_no_standard_error(tiny_lm, token_batches):
    _, errors = task_losses(tiny_lm("gpt2"), {"t": token_batches(1)})
    assert errors["t"] == np.inf
