"""The models that snapshots become; what a run evaluates and keeps is in `callbacks/test_automixer.py`."""

import functools
import types
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix.callbacks import MixtureHook
from dynmix.mixers import AutoMixer
from dynmix.mixture.dataset import MixtureDataset
from dynmix.sampling import check_like, load_like
from dynmix.snapshot import write_snapshot

TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Scaled(LlamaForCausalLM):
    """A Llama with something of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.full((config.vocab_size,), 3.0))
        self.post_init()

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * self.scale
        return found


class OwnConfig(LlamaConfig):
    model_type = "nobody-registered-this"


class Own(LlamaForCausalLM):
    config_class = OwnConfig


class Halved(LlamaForCausalLM):
    """Not what its configuration says."""

    def __init__(self, config, width):
        super().__init__(config)


@pytest.mark.parametrize("make", [lambda: Scaled(LlamaConfig(**TINY)), lambda: Own(OwnConfig(**TINY))])
def test_snapshots_become_models_of_the_class_that_trains(make, tmp_path):
    model = make().eval()
    check_like(model)
    write_snapshot(model, tmp_path / "snapshot", {})
    twin = load_like(model, tmp_path / "snapshot").eval()
    ids = torch.arange(20)[None]
    assert type(twin) is type(model)
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


def test_layers_that_checkpoint_their_activations_are_no_other_model(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    check_like(model)
    write_snapshot(model, tmp_path / "snapshot", {})
    ids = torch.arange(20)[None]
    twin = load_like(model, tmp_path / "snapshot").eval()
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("around", [functools.wraps(torch.nn.Sequential.forward), torch.autocast("cpu", enabled=False)])
def test_a_copy_does_not_call_the_model_that_trains(tmp_path, around):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    write_snapshot(model, tmp_path / "snapshot", {})
    x = torch.ones(2, 3)
    before, forward = model(x), model.forward
    model.forward = types.MethodType(around(lambda self, x: forward(x)), model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert not torch.equal(model(x), before)
    assert torch.equal(load_like(model, tmp_path / "snapshot")(x), before)


def test_a_closure_over_the_model_and_a_name_without_a_value_is_no_hindrance(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    write_snapshot(model, tmp_path / "snapshot", {})

    def closing(model):
        if model is None:
            never = 1
        return lambda x: torch.nn.Sequential.forward(model, x) if x is not None else never

    model.forward = closing(model)
    with torch.no_grad():
        model[0].weight.zero_()
    found = load_like(model, tmp_path / "snapshot")
    assert not torch.equal(found(torch.ones(2, 3)), model(torch.ones(2, 3)))  # a closure over the model itself is, too


def test_a_model_whose_snapshots_would_not_load_is_refused_at_the_start():
    with pytest.raises(ValueError, match="cannot be made from its configuration alone: TypeError"):
        check_like(Halved(LlamaConfig(**TINY), width=2))
    changed = LlamaForCausalLM(LlamaConfig(**TINY))
    changed.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"differs from it in \['adapter.bias', 'adapter.weight'\]"):
        check_like(changed)


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
