"""What is said to be computed, against what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from dynmix.scoring.cost import parameters_met

SMALL = {"vocab_size": 2000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {"intermediate_size": 176, "tie_word_embeddings": False}),
        ("llama", {"intermediate_size": 176, "tie_word_embeddings": True}),
        ("gpt2", {"bos_token_id": None, "eos_token_id": None}),
        ("mixtral", {"intermediate_size": 128, "num_key_value_heads": 2, "num_local_experts": 8}),
    ],
)
def test_training_takes_six_operations_a_token_and_parameter_that_it_meets(kind, sizes):
    config = AutoConfig.for_model(kind, **SMALL, **sizes)
    kernels = {"experts_implementation": "eager"} if kind == "mixtral" else {}  # torch counts no grouped products
    model = AutoModelForCausalLM.from_config(config, **kernels)
    ids = torch.randint(0, 2000, (8, 8))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert 6 * parameters_met(model) * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.03)
