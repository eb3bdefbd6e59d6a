"""What is refused before a run; what one evaluates and keeps is in `callbacks/test_automixer.py`."""

from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix.callbacks import MixtureHook
from dynmix.mixers import AutoMixer
from dynmix.mixture.dataset import MixtureDataset

TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


PACKED = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
BLOCKS = {"attention_mask": torch.block_diag(*[torch.ones(3, 3)] * 2).tril()[None, None].bool()}
LEFT_PADDED = {
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
    "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]]),
}


@pytest.mark.parametrize(("extra", "refused"), [(PACKED, True), (BLOCKS, True), (LEFT_PADDED, False), ({}, False)])
def test_a_task_of_packed_documents_is_refused_as_it_would_be_scored_as_one(extra, refused):
    batch = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None], **extra}
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    dataset = MixtureDataset({"code": [{"input_ids": [1, 2, 3, 4]}] * 50}, num_samples=64, sequence_length=4)
    with pytest.raises(ValueError, match=r"tasks\['code'\] packs several documents") if refused else nullcontext():
        MixtureHook(model, dataset, {"code": [batch]}, AutoMixer(), stage_steps=4)


def test_items_that_draw_random_numbers_leave_the_training_its_own():
    class Drawing:
        def __len__(self):
            return 50

        def __getitem__(self, row):
            return {"input_ids": torch.randint(0, TINY["vocab_size"], (4,))}

    model = LlamaForCausalLM(LlamaConfig(**TINY))
    dataset = MixtureDataset({"code": Drawing()}, num_samples=64)
    batch = {"input_ids": torch.arange(6)[None]}
    hook = MixtureHook(model, dataset, {"code": [batch]}, AutoMixer(), stage_steps=4)
    before = torch.get_rng_state()
    hook.controller.sampler.rehearse(model)
    assert torch.equal(torch.get_rng_state(), before)
