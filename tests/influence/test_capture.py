import logging
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import (
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from dynmix.influence.batch import Batch, next_token_labels, next_token_loss, token_mask
from dynmix.influence.capture import Capture
from dynmix.influence.isolation import isolated, unwrap
from dynmix.influence.layers import Layers
from tests.influence.conftest import Batcher, Models


def captured(model: nn.Module, batch: Batch, **settings: Any) -> dict[str, Tensor]:
    """Per-sequence gradients [B, out, in (+1)] of every measured layer."""
    gradients: dict[str, Tensor] = {}
    capture = Capture(model, **settings)
    with isolated(model):
        capture.run(batch, lambda layer, a, g, mask: gradients.update({layer: g.mT @ a}))
    return gradients


def by_autograd(model: nn.Module, batch: Batch, layers: list[str], ids: int) -> list[Tensor]:
    """The same for sequence number `ids`, from the parameters of a model in eval mode, the slow way."""
    training = model.training
    model.eval()
    one = {key: value[ids : ids + 1] for key, value in batch.items()}
    loss = next_token_loss(model, one)[0].sum()
    result = []
    for name in layers:
        module = model.get_submodule(name)
        bias = getattr(module, "bias", None)
        parameters = [module.weight] if bias is None else [module.weight, bias]
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)  # type: ignore[arg-type]
        weight = grads[0].mT if isinstance(module, Conv1D) else grads[0]
        result.append(torch.cat([weight, *[g[:, None] for g in grads[1:]]], dim=1))
    model.train(training)
    return result


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_equals_autograd_per_sequence(tiny_lm: Models, token_batches: Batcher, kind: str, ragged: bool) -> None:
    model = tiny_lm(kind, dropout=0.3, dtype=torch.float64)
    [batch] = token_batches(3, ragged=ragged)
    gradients = captured(model, batch)
    n_linear = sum(isinstance(module, nn.Linear | Conv1D) for module in model.modules())
    assert len(gradients) == n_linear > 8
    for index in range(3):
        for name, expected in zip(gradients, by_autograd(model, batch, list(gradients), index), strict=True):
            torch.testing.assert_close(gradients[name][index], expected, rtol=1e-9, atol=1e-12)


def test_a_tied_head_has_the_gradient_of_its_use_as_a_layer(tiny_lm: Models, token_batches: Batcher) -> None:
    tied = tiny_lm("llama", tied=True, dtype=torch.float64)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = tiny_lm("llama", tied=False, dtype=torch.float64)
    weights = tied.state_dict()
    untied.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    [batch] = token_batches(2)
    ours = captured(tied, batch)
    [theirs] = by_autograd(untied, batch, ["lm_head"], 1)
    torch.testing.assert_close(ours["lm_head"][1], theirs)


class Reused(nn.Module):
    """One layer used twice, the second time with an in-place change after it, and a conditional one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.shared = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.pooled = nn.Linear(6, 6)
        self.head = nn.Linear(6, 20, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.shared(self.embedding(input_ids)).tanh_()
        x = self.shared(x)
        x *= 2.0
        x = x + self.pooled(x.mean(1)).mean()
        flat: Tensor = self.head(x.flatten(0, 1))  # tokens in one row, as some feed-forward layers have them
        return flat.view(*input_ids.shape, 20)


def test_reused_flattened_and_unmeasurable_layers(token_batches: Batcher, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Reused().double()
    batch = {"input_ids": torch.randint(0, 20, (3, 5))}
    capture = Capture(model)
    with caplog.at_level(logging.INFO), isolated(model):
        gradients: dict[str, Tensor] = {}
        capture.run(batch, lambda layer, a, g, mask: gradients.update({layer: g.mT @ a}))
    assert list(capture.layers) == ["shared", "head"]
    assert "2 linear layers are not measured: pooled, never" in caplog.text
    everything = sum(p.numel() for p in model.parameters())
    assert capture.coverage == pytest.approx((42 + 120) / everything)
    # The pooled layer mixes sequences through .mean(), so only the sum over sequences can be compared.
    loss = next_token_loss(model, batch)[0].sum()
    weight, bias, head = torch.autograd.grad(loss, [model.shared.weight, model.shared.bias, model.head.weight])
    torch.testing.assert_close(gradients["shared"].sum(0), torch.cat([weight, bias[:, None]], 1))
    torch.testing.assert_close(gradients["head"].sum(0), head)


def test_a_layer_that_loses_its_sequences_later_is_an_error() -> None:
    class Routed(Reused):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            if input_ids.shape[1] == 5:
                return self.head(self.shared(x))  # type: ignore[no-any-return]
            rows = self.shared(x.flatten(0, 1)[1:])
            return self.head(x + rows.mean())  # type: ignore[no-any-return]

    model = Routed()
    capture = Capture(model)
    with isolated(model):
        capture.run({"input_ids": torch.zeros(2, 5, dtype=torch.long)}, lambda *_: None)
        with pytest.raises(ValueError, match=r"'shared' cannot be measured: input of shape \[7, 6\].*layers="):
            capture.run({"input_ids": torch.zeros(2, 4, dtype=torch.long)}, lambda *_: None)


def test_layers_filter_stops_the_backward_pass_early(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("llama")
    [batch] = token_batches(2)
    full = captured(model, batch)
    assert list(captured(model, batch, layers=r"mlp\.up_proj$")) == [n for n in full if n.endswith("up_proj")]
    head = captured(model, batch, layers=lambda name: name == "lm_head")
    torch.testing.assert_close(head["lm_head"], full["lm_head"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="layers='nothing'"):
        Capture(model, layers="nothing")
    reached: list[Any] = []
    model.model.layers[0].register_full_backward_hook(lambda *args: reached.append(args))
    captured(model, batch, layers="lm_head")
    assert not reached


def test_frozen_layers_are_left_out_unless_all_are(tiny_lm: Models) -> None:
    model = tiny_lm("llama")
    everything = set(Capture(model).layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    assert set(Capture(model).layers) == {name for name in everything if "mlp" in name}
    assert set(Capture(model.requires_grad_(False)).layers) == everything


def test_a_layer_that_was_cut_into_flat_pieces_is_named(tiny_lm: Models) -> None:
    model = tiny_lm("llama")
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj' has no matrix but a flat piece .* with FSDP2"):
        Capture(model)
    assert "model.layers.1.mlp.up_proj" not in Capture(model, layers=Layers(exclude="up_proj")).layers


def test_loss_is_that_of_transformers(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("llama").eval()
    [batch] = token_batches(4, ragged=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    losses, tokens = next_token_loss(model, batch)
    torch.testing.assert_close(losses.sum() / tokens.sum(), theirs)
    assert tokens.tolist() == (batch["attention_mask"].sum(1) - 1).tolist()
    labels[:, :4] = -100
    explicit = {**batch, "labels": labels}
    assert next_token_labels(explicit).tolist() == labels[:, 1:].tolist()
    theirs = model(**{k: v for k, v in explicit.items() if k != "domain"}).loss
    losses, tokens = next_token_loss(model, explicit)
    torch.testing.assert_close(losses.sum() / tokens.sum(), theirs)


def test_bfloat16_is_summed_in_float32(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("llama", dtype=torch.bfloat16)
    [batch] = token_batches(2)
    dtypes: set[torch.dtype] = set()
    capture = Capture(model)
    with isolated(model), torch.autocast("cpu", dtype=torch.bfloat16):
        capture.run(batch, lambda layer, a, g, mask: dtypes.update({a.dtype, g.dtype, (g.mT @ a).dtype}))
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, ValueError, r"\[B, T\], got \[5\]: collate"),
        ([1, 2], TypeError, "a batch is a dict"),
        ({"input_ids": [1, 2]}, TypeError, "must hold tensors"),
        ({"ids": torch.zeros(2, 5, dtype=torch.long)}, TypeError, "input_ids"),
    ],
)
def test_bad_batches(tiny_lm: Models, batch: Any, error: type[Exception], message: str) -> None:
    model = Reused()
    with isolated(model), pytest.raises(error, match=message):
        Capture(model).run(batch, lambda *_: None)


def test_labels_need_something_to_come_from() -> None:
    with pytest.raises(ValueError, match="needs `input_ids` or `labels`"):
        next_token_labels({"inputs_embeds": torch.zeros(1, 2, 3)})


def test_token_mask() -> None:
    ids, four = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 1, 3, 3)
    assert token_mask({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}).sum() == 3
    left = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1], [0, 0, 1]])}
    assert token_mask(left).tolist() == [[True, True, True], [False, True, True]]  # what predicts a token is real
    assert token_mask(left | {"labels": torch.full_like(ids, -100)}).sum() == 3
    assert left["attention_mask"].sum() == 3
    assert token_mask({"input_ids": ids, "attention_mask": four}).shape == (2, 3)
    assert token_mask({"x": torch.zeros(4, 7)}).shape == (4, 1)


def random_numbers() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed_all() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def test_isolated_restores_everything(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("gpt2", dropout=0.5)
    model.register_buffer("steps", torch.arange(3.0))
    model.transformer.h[1].eval()
    next(model.parameters()).requires_grad_(False)
    next_token_loss(model, token_batches(2)[0])[0].sum().backward()  # type: ignore[no-untyped-call]
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    flags = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()]
    buffer = model.steps
    seed_all()
    expected = random_numbers()
    seed_all()

    for error in (None, RuntimeError("inside")):
        with pytest.raises(RuntimeError, match="inside") if error else nullcontext(), isolated(model):
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            random_numbers()
            model.steps += 1
            model.steps = torch.zeros(7)
            next(iter(reversed(list(model.parameters())))).grad = None
            model.train()
            if error:
                raise error
        after = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()]
        assert after == flags
        assert model.steps is buffer
        assert buffer.tolist() == [0.0, 1.0, 2.0]
        for parameter, (grad, content) in zip(model.parameters(), grads, strict=True):
            assert parameter.grad is grad
            assert grad is None or (content is not None and torch.equal(grad, content))
    assert random_numbers() == expected


def train(model: nn.Module, batches: list[dict[str, Tensor]], measure: bool) -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(7)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step, batch in enumerate(batches):
        loss = next_token_loss(model, batch)[0].mean()
        loss.backward()  # type: ignore[no-untyped-call]
        if measure and step % 2:  # between backward and step, the worst of moments
            assert captured(model, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=bool(step % 2))
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("compiled", [False, True])
def test_training_with_dropout_is_bit_identical(tiny_lm: Models, token_batches: Batcher, compiled: bool) -> None:
    runs = []
    for measure in (False, True):
        model = tiny_lm("gpt2", dropout=0.2)
        if compiled:
            model = torch.compile(model, backend="eager")
            assert unwrap(model) is not model  # type: ignore[arg-type]
        runs.append(train(model, token_batches(20), measure))
    (losses, parameters), (measured_losses, measured_parameters) = runs
    assert losses == measured_losses
    assert len(set(losses)) == 5
    assert all(torch.equal(p, q) for p, q in zip(parameters, measured_parameters, strict=True))


def test_a_model_compiled_in_place_is_seen(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("llama")
    [batch] = token_batches(2)
    expected = captured(model, batch)
    model.compile(backend="eager")
    model.eval()
    next_token_loss(model, batch)  # compiled by now, without hooks
    gradients = captured(model, batch)
    assert list(gradients) == list(expected)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_custom_loss_of_a_classifier() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return losses, torch.ones_like(losses)

    batch = {"x": torch.randn(6, 5), "y": torch.randint(0, 3, (6,))}
    gradients = captured(model, batch, loss=loss)
    weight, bias = torch.autograd.grad(loss(model, batch)[0].sum(), list(model[2].parameters()))
    torch.testing.assert_close(gradients["2"].sum(0), torch.cat([weight, bias[:, None]], 1))


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda losses, tokens: losses.sum(), r"Tensor \[\]"),
        (lambda losses, tokens: None, "NoneType"),
        (lambda losses, tokens: (losses, 3), r"Tensor \[2\], int"),
        (lambda losses, tokens: (losses[:1], tokens[:1]), r"Tensor \[1\], Tensor \[1\]"),
    ],
)
def test_a_loss_of_ones_own_that_is_none_is_told_what_to_return(
    tiny_lm: Models, token_batches: Batcher, returned: Callable[..., Any], got: str
) -> None:
    [batch] = token_batches(2)

    def loss(model: nn.Module, batch: Batch) -> Any:
        return returned(*next_token_loss(model, batch))

    with pytest.raises(TypeError, match=rf"loss= returned \({got}\) for 2 sequences: let it return two tensors"):
        captured(tiny_lm("llama"), batch, loss=loss)


class Scaled(nn.Linear):
    """A subclass that does something else with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.softmax(-1)


class Named(nn.Linear):
    """A subclass that is a linear layer still, in the precision of another type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).to(x.dtype)


class GatedNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return F.rms_norm(x * gate.sigmoid(), x.shape[-1:], self.weight)


class Odd(nn.Module):
    """Layers that only look like linear ones and norms, and some that are."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.plain, self.head = nn.Embedding(97, 8), nn.Linear(8, 8), nn.Linear(8, 97)
        self.scaled, self.pair, self.named, self.norm = Scaled(8, 8), Pair(8, 8), Named(8, 8), GatedNorm(8)
        self.watched, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.second.weight = self.plain.weight

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        x = self.plain(self.table(input_ids))
        with torch.no_grad():
            self.watched(x)
        x = self.second(self.computed(self.named(self.pair(self.scaled(x))[0])))
        return self.head(self.norm(x, x))


def test_what_only_looks_like_a_known_layer_is_named_and_left_out(
    token_batches: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Odd()
    [batch] = token_batches(3)
    found = captured(model, batch, layers=Layers(norms=True))
    assert set(found) == {"plain", "second", "named", "head"}
    for name, reason in {
        "scaled": "no linear map of its input",
        "pair": "its output is no tensor",
        "watched": "called without gradients",
        "norm": "more than one input",
        "computed": "no known kind",
        "plain and second": "a parameter in common but are measured apart",
    }.items():
        assert name in caplog.text
        assert reason in caplog.text
    for row in range(3):
        head, named = by_autograd(model, batch, ["head", "named"], row)
        torch.testing.assert_close(found["head"][row], head)
        assert (found["named"][row] - named).norm() < 0.02 * named.norm()  # rounded to bfloat16 on its way


class Shared(nn.Module):
    """Linear modules that hold the same parameters, one of which is also the head's table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(97, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 97, bias=False), nn.Linear(97, 8), nn.Linear(8, 97, bias=False)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.up.weight = self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        x = self.second(self.first(self.table(input_ids)).tanh()).tanh()
        return self.head(x + self.down(self.up(x).tanh()))


@pytest.mark.parametrize("embeddings", [False, True])
def test_modules_with_one_weight_are_one_layer(
    token_batches: Batcher, embeddings: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Shared().double()
    if not embeddings:
        model.table.weight = nn.Parameter(model.table.weight.detach().clone())
    [batch] = token_batches(3, ragged=True)
    found = captured(model, batch, layers=Layers(embeddings=embeddings))
    assert set(found) == {"first", "up", "down"}
    assert not caplog.text
    for row in range(3):
        for name, expected in zip(found, by_autograd(model, batch, list(found), row), strict=True):
            torch.testing.assert_close(found[name][row], expected)


def test_a_shared_weight_is_left_out_with_one_of_its_uses(
    token_batches: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    class Pooled(Shared):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            x = self.first(self.table(input_ids))
            return self.head(x + self.second(x.mean(1, keepdim=True)))

    torch.manual_seed(0)
    model = Pooled()
    [batch] = token_batches(3)
    capture = Capture(model)
    with isolated(model):
        for _ in range(2):
            capture.run(batch, lambda *_: None)
    assert list(capture.layers) == ["up"]
    assert "first, down, second" in caplog.text
    assert "first is not" in caplog.text


def test_a_frozen_bias_is_no_part_of_its_layer_and_a_bias_alone_is_named(
    token_batches: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    model = Odd()
    [batch] = token_batches(3)
    model.head.bias.requires_grad_(False)
    model.plain.weight.requires_grad_(False)
    model.scale = nn.Module()
    model.scale.gamma = nn.Parameter(torch.ones(8))
    found = captured(model, batch)
    assert found["head"].shape[2] == 8
    model.head.bias.requires_grad_(True)
    [expected] = by_autograd(model, batch, ["head"], 1)
    torch.testing.assert_close(found["head"][1], expected[:, :8])
    named = next(row.message for row in caplog.records if "of no known kind" in row.message)
    assert named.startswith("5 modules")  # plain and second have one weight
    assert "plain, second, " in named
    assert "scale" in named


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda self, idx: self.table(idx),
            "Odd.forward takes idx and none of a batch's .*module around it, take",
        ),
        (lambda self, input_ids: {"loss": self.table(input_ids).mean()}, "Odd.forward returned dict without logits"),
    ],
)
def test_models_of_another_interface(
    token_batches: Batcher, monkeypatch: pytest.MonkeyPatch, forward: Any, message: str
) -> None:
    monkeypatch.setattr(Odd, "forward", forward)
    with pytest.raises(TypeError, match=message):
        captured(Odd(), token_batches(3)[0])


@pytest.mark.parametrize(
    "returned",
    [lambda logits: {"loss": None, "logits": logits}, lambda logits: (None, logits), lambda logits: (logits,)],
)
def test_logits_are_found_in_whatever_the_trainer_takes(
    token_batches: Batcher, monkeypatch: pytest.MonkeyPatch, returned: Any
) -> None:
    [batch] = token_batches(3)
    model, forward = Odd(), Odd.forward
    expected = captured(model, batch)
    monkeypatch.setattr(Odd, "forward", lambda self, input_ids: returned(forward(self, input_ids)))
    found = captured(model, batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", [BartForConditionalGeneration, T5ForConditionalGeneration])
def test_an_encoder_decoder_is_refused(token_batches: Batcher, kind: type[PreTrainedModel]) -> None:
    sizes = {"vocab_size": 97, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    many = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")}
    config: Any = kind.config_class
    with pytest.raises(TypeError, match="ForConditionalGeneration is an encoder-decoder.*take a causal LM"):
        captured(kind(config(**sizes, **many)), token_batches(3)[0])


def test_a_masked_lm_is_refused(token_batches: Batcher) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(TypeError, match="BertForMaskedLM is a masked LM.*take a causal LM"):
        captured(BertForMaskedLM(BertConfig(vocab_size=97, **sizes)), token_batches(3)[0])


def test_logits_of_other_positions_than_the_tokens_are_refused(
    token_batches: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Odd, "forward", lambda self, input_ids: self.head(self.table(input_ids))[:, [-1]])
    with pytest.raises(ValueError, match=r"logits of \[3, 1\] positions for input_ids of \[3, 10\].*for each token"):
        captured(Odd(), token_batches(3)[0])


def test_isolated_restores_what_modules_count_and_tables_that_renormalise(tiny_lm: Models) -> None:
    """A rotary embedding that grew for long probes would turn shorter sequences otherwise from then on."""
    model = nn.ModuleDict({"table": nn.Embedding(9, 4, max_norm=0.1), "lm": tiny_lm("llama")})
    rotary = model["lm"].model.rotary_emb
    before, weight = rotary.max_seq_len_cached, model["table"].weight.detach().clone()
    with isolated(model):
        rotary.max_seq_len_cached = 7 * before
        model["table"](torch.arange(9))
        assert not torch.equal(model["table"].weight, weight)
    assert rotary.max_seq_len_cached == before
    assert torch.equal(model["table"].weight, weight)
