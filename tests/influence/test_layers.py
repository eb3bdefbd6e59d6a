"""Every kind of layer against autograd, on models that have it."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dynmix.influence.batch import next_token_loss
from dynmix.influence.capture import Capture, layer_parts
from dynmix.influence.gradients import gradients_of
from dynmix.influence.isolation import isolated
from dynmix.influence.layers import Layers
from dynmix.influence.task_gradients import with_tied_table
from tests.influence.conftest import Batcher, Models

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
}


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2))
    elif kind == "gpt-oss":  # transposed experts with biases and a gate of their own
        model = GptOssForCausalLM(GptOssConfig(**TINY, num_local_experts=4, num_experts_per_tok=2))
    else:  # norms of single heads
        model = Qwen3ForCausalLM(Qwen3Config(**TINY))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in name:
                parameter.add_(torch.randn_like(parameter) / 5)
    if kind != "qwen3":
        model.set_experts_implementation("eager")  # the fused ones know no float64
    return model.double()


def sequence_sums(model: nn.Module, batch: dict[str, Tensor], layers: Any) -> dict[str, Tensor]:
    """Of every layer the sequences' gradients one by one, [B, out, in]."""
    found: dict[str, Tensor] = {}
    capture = Capture(model, layers=layers)

    def take(layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
        zeros = capture.zeros(layer, len(g))
        gradients_of(a, g).add_weighted(torch.eye(len(g)), zeros)
        found[layer] = zeros

    with isolated(model):
        capture.run(batch, take)
    return found


def by_autograd(
    model: nn.Module, batch: dict[str, Tensor], layers: list[str], row: int, which: Any
) -> dict[str, Tensor]:
    known = Capture(model, layers=which).layers
    one = {key: x[row : row + 1] for key, x in batch.items()}
    training = model.training
    model.eval()
    parameters = {id(p): p for name in layers for p in known[name].parameters}
    loss = next_token_loss(model, one)[0].sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    model.train(training)
    of = {
        key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(parameters.items(), gradients, strict=True)
    }
    return {name: known[name].matrix(lambda p: of[id(p)]) for name in layers}


def checked(model: nn.Module, batch: dict[str, Tensor], layers: Any) -> dict[str, Tensor]:
    """`sequence_sums`, which are what `by_autograd` has."""
    found = sequence_sums(model, batch, layers)
    for row in range(len(batch["input_ids"])):
        for name, expected in by_autograd(model, batch, list(found), row, layers).items():
            torch.testing.assert_close(found[name][row], expected, rtol=1e-5, atol=1e-7)  # norms and routers: float32
    return found


EVERYTHING = Layers(embeddings=True, norms=True)


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "qwen3"])
@pytest.mark.parametrize("ragged", [False, True])
def test_experts_routers_norms_and_embeddings_equal_autograd(token_batches: Batcher, kind: str, ragged: bool) -> None:
    model, [batch] = build(kind), token_batches(3, ragged=ragged)
    checked(model, batch, EVERYTHING)
    kinds = {layer.kind for layer in Capture(model, layers=EVERYTHING).layers.values()}
    assert kinds == {"linear", "embedding", "norm"} | ({"expert", "router"} if kind != "qwen3" else set())
    covered = sum(
        rows * columns for rows, columns in (k.shape for k in Capture(model, layers=EVERYTHING).layers.values())
    )
    everything = sum(p.numel() for name, p in model.named_parameters() if "sinks" not in name)
    assert covered == everything


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_routers_that_compute_in_float32_whatever_the_model_does(token_batches: Batcher, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    settings = {key: value for key, value in TINY.items() if key != "head_dim"}
    model = GraniteMoeForCausalLM(GraniteMoeConfig(**settings, num_local_experts=4, num_experts_per_tok=2)).to(dtype)
    model.set_experts_implementation("eager")  # the fused ones know no float64
    [batch], every = token_batches(3), Layers()
    # Older versions of transformers have a linear layer inside, `router.layer`.
    found = {name: g for name, g in sequence_sums(model, batch, every).items() if ".router" in name}
    assert len(found) == 2
    for row in range(3):
        for name, expected in by_autograd(model, batch, list(found), row, every).items():
            apart = (found[name][row] - expected.float()).norm()
            assert apart < (0.1 if dtype == torch.bfloat16 else 1e-5) * expected.float().norm()


def test_latent_attention(token_batches: Batcher) -> None:
    torch.manual_seed(0)
    latent = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    settings = {key: value for key, value in TINY.items() if key != "head_dim"} | latent | {"num_key_value_heads": 2}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings, first_k_dense_replace=2)).double()
    assert len(checked(model, token_batches(3, ragged=True)[0], None)) == 2 * 8 + 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_norms_and_embeddings_of_dense_models_equal_autograd(
    tiny_lm: Models, token_batches: Batcher, kind: str
) -> None:
    model, [batch] = tiny_lm(kind, dtype=torch.float64), token_batches(2, ragged=True)
    found = checked(model, batch, Layers(include="norm|ln_|embed|wte|wpe", embeddings=True, norms=True))
    assert len(found) == (6 if kind == "llama" else 7)


def test_experts_that_are_used_twice(token_batches: Batcher) -> None:
    model, [batch] = build("mixtral"), token_batches(3, ragged=True)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    found = checked(model, batch, None)
    assert {name.split(".")[2] for name in found if "experts" in name} == {"0"}


def test_the_forward_of_experts_is_the_models_own(token_batches: Batcher) -> None:
    model, [batch] = build("mixtral"), token_batches(3)
    model.eval()
    expected, _ = next_token_loss(model, batch)
    with isolated(model):
        losses, _ = Capture(model).run(batch, lambda *_: None)
    torch.testing.assert_close(losses, expected)
    assert "forward" not in vars(model.model.layers[0].mlp.experts)


def test_patterns_include_and_exclude() -> None:
    model = build("qwen3")
    mlp = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")]
    assert list(Capture(model, layers=Layers(include="mlp")).layers) == mlp
    assert list(Capture(model, layers=Layers(include="mlp", exclude=r"layers\.1|down")).layers) == mlp[:2]
    assert "lm_head" not in Capture(model, layers=Layers(exclude="lm_head")).layers
    assert list(Capture(model, layers=Layers(include=lambda name: name == "lm_head")).layers) == ["lm_head"]
    assert not [name for name in Capture(model).layers if "norm" in name or "embed" in name]
    for wrong in ({"include": "*.mlp"}, {"include": ["mlp"]}, {"exclude": "("}):
        with pytest.raises(ValueError, match=r"layers=.* is no regular expression"):
            Layers(**wrong)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_by_what_it_is(tiny_lm: Models, kind: str, tied: bool) -> None:
    model = tiny_lm(kind, tied=tied)
    every = list(Capture(model).layers)
    assert every.pop() == "lm_head"
    assert list(Capture(model, layers=Layers(head=False)).layers) == every
    assert list(Capture(model, layers=Layers("attn", head=False)).layers) == [n for n in every if "attn" in n]
    parts = layer_parts(model, Layers(head=False), 3)
    assert [name for part in parts for name in Capture(model, layers=part).layers] == every
    assert with_tied_table(model, Layers(head=False)) == Layers(head=False)
    # A table that is asked for and tied is measured in both of its uses.
    found = Capture(model, layers=Layers(embeddings=True, head=False)).layers
    assert ("lm_head" in found) == tied
    assert len(found) == len(every) + (2 if kind == "gpt2" else 1)


class Odd(nn.Module):
    """A matrix that is no layer, and an embedding that is another one's subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(97, 8), nn.Linear(8, 97)
        self.odd = nn.Module()
        self.odd.mixing = nn.Parameter(torch.randn(8, 8))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids) @ self.odd.mixing)  # type: ignore[no-any-return]


def test_what_cannot_be_measured_is_named_once(token_batches: Batcher, caplog: pytest.LogCaptureFixture) -> None:
    model, [batch] = Odd(), token_batches(2)
    with caplog.at_level(logging.WARNING):
        sequence_sums(model, batch, None)
        sequence_sums(model, batch, None)
    assert [record.message for record in caplog.records] == [
        "1 modules have parameters of no known kind, not measured: odd"
    ]


def test_lora_adapters(tiny_lm: Models, token_batches: Batcher) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = tiny_lm("llama", dtype=torch.float64)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.double()
    found = checked(adapted, token_batches(2)[0], None)
    assert len(found) == 2 * 2 * 2
    assert all("lora_" in name for name in found)


def test_layers_with_the_same_input_are_found(tiny_lm: Models, token_batches: Batcher) -> None:
    model, [batch] = tiny_lm("llama"), token_batches(2)
    assert isinstance(model, LlamaForCausalLM)
    capture = Capture(model)
    inputs: dict[str, int] = {}
    kept = []

    def take(layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
        kept.append(a)
        inputs[layer] = id(a)

    with isolated(model):
        capture.run(batch, take)
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert capture.sharing[f"{attention}.k_proj"] == tuple(f"{attention}.{x}_proj" for x in "qkv")
    assert capture.sharing[f"{mlp}.up_proj"] == (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    assert capture.sharing[f"{mlp}.down_proj"] == (f"{mlp}.down_proj",)
    assert len({inputs[f"{attention}.{x}_proj"] for x in "qkv"}) == 1
