import functools
import json
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrize import register_parametrization
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dynmix.snapshot import check_like, load_like, write_snapshot

TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.arange(3))


def test_any_module_is_saved_whole(tmp_path):
    model, path = Tied(), tmp_path / "snapshot"
    write_snapshot(model, path, {"step": 3})
    saved = load_file(path / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert json.loads((path / "snapshot.json").read_text()) == {"step": 3}


def test_a_transformers_model_with_a_tied_head_loads_again(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
    write_snapshot(nn.parallel.DataParallel(model), tmp_path / "snapshot", {})
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "snapshot").eval()
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynmix.snapshot.save_file", broken)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(Tied(), tmp_path / "snapshot", {})
    assert not list(tmp_path.iterdir())


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
    model.lm_head.requires_grad_(False)  # and what does not train is not measured in it either
    check_like(model)
    write_snapshot(model, tmp_path / "snapshot", {})
    ids = torch.arange(20)[None]
    twin = load_like(model, tmp_path / "snapshot").eval()
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    assert [name for name, parameter in twin.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]


def test_what_is_named_otherwise_in_the_model_trains(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    write_snapshot(model, tmp_path / "snapshot", {})
    register_parametrization(model.lm_head, "weight", nn.Identity())  # names of its own, as FSDP1 gives them
    assert all(parameter.requires_grad for parameter in load_like(model, tmp_path / "snapshot").parameters())


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
