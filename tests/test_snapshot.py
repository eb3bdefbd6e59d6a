import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from dynmix.snapshot import save_snapshot


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.arange(3))


def test_any_module_is_saved_whole(tmp_path):
    model = Tied()
    path = save_snapshot(model, tmp_path, 7, {"step": 3}, keep=2)
    saved = load_file(path / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert json.loads((path / "snapshot.json").read_text()) == {"step": 3}


def test_a_transformers_model_with_a_tied_head_loads_again(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
    path = save_snapshot(nn.parallel.DataParallel(model), tmp_path, 1, {}, keep=1)
    again = GPT2LMHeadModel.from_pretrained(path).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_the_newest_are_kept_and_nothing_half_written_has_a_name(tmp_path, monkeypatch):
    for stage in range(1, 5):
        save_snapshot(Tied(), tmp_path, stage, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-0003", "stage-0004"]

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynmix.snapshot.save_file", broken)
    with pytest.raises(OSError, match="No space left"):
        save_snapshot(Tied(), tmp_path, 5, {}, keep=2)
    assert sorted(path.name for path in tmp_path.glob("stage-*")) == ["stage-0003", "stage-0004"]
