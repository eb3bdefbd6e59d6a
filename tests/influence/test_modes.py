"""A measurement of one model in the ways that it is trained: types, attention kernels, checkpointing, compiled."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed._composable.checkpoint_activation import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix.influence.batch import next_token_loss
from dynmix.influence.curvature import EKFAC
from dynmix.influence.group import group_influence
from tests.influence.conftest import Batcher, Models


@pytest.fixture
def sets(token_batches: Batcher) -> tuple[Any, Any]:
    return {"a": token_batches(8, seed=1, ragged=True), "b": token_batches(4, seed=2)}, {"t": token_batches(6, seed=3)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_the_same_weights_in_float32(tiny_lm: Models, sets: Any, dtype: torch.dtype) -> None:
    low = tiny_lm("llama", dtype=dtype)
    exact = tiny_lm("llama", dtype=dtype).float()
    found, expected = (group_influence(model, *sets, EKFAC()) for model in (low, exact))
    assert found.finite
    error = 0.1 if dtype == torch.bfloat16 else 0.02
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=error * np.abs(expected.scores).max())
    np.testing.assert_allclose(found.task_loss, expected.task_loss, rtol=error)  # type: ignore[arg-type]


def test_attention_by_sdpa_and_written_out_is_the_same(sets: Any) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=97, num_attention_heads=4, initializer_range=0.2, **sizes)
    found = []
    for kernel in ("sdpa", "eager"):
        config._attn_implementation = kernel
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double()
        assert model.config._attn_implementation == kernel
        found.append(group_influence(model, *sets, EKFAC()))
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-5)  # its softmax is float32
    np.testing.assert_allclose(found[0].standard_error, found[1].standard_error, rtol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_neither_the_measurement_nor_the_training(
    tiny_lm: Models, sets: Any, token_batches: Batcher, reentrant: bool
) -> None:
    expected = group_influence(tiny_lm("llama"), *sets, EKFAC())
    trained = []
    for measure in (False, True):
        model = tiny_lm("llama", dropout=0.2)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        if measure:
            assert np.array_equal(group_influence(model, *sets, EKFAC()).scores, expected.scores)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        for batch in token_batches(8):
            next_token_loss(model, batch)[0].mean().backward()  # type: ignore[no-untyped-call]
            if measure:
                group_influence(model, *sets, EKFAC(), layers="lm_head")
            optimizer.step()
            optimizer.zero_grad()
        trained.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def wrapped(model: Any, how: str) -> None:
    """Checkpoint every block, in eval mode too."""
    blocks = model.model.layers
    for number, block in enumerate(blocks):
        if how == "composable":
            composable(block)
        else:
            blocks[number] = checkpoint_wrapper(block, CheckpointImpl[how])


@pytest.mark.parametrize("how", ["REENTRANT", "NO_REENTRANT", "composable"])
def test_checkpointing_that_does_not_follow_eval_mode(
    tiny_lm: Models, sets: Any, token_batches: Batcher, how: str
) -> None:
    expected = [
        group_influence(tiny_lm("llama"), *sets, EKFAC(), layers=layers) for layers in (None, r"layers\.0\.self_attn")
    ]
    gradients = []
    for measure in (False, True):
        model = tiny_lm("llama")
        wrapped(model, how)
        model.enable_input_require_grads()
        if measure:
            for layers, alike in zip((None, r"layers\.0\.self_attn"), expected, strict=True):
                assert np.array_equal(group_influence(model, *sets, EKFAC(), layers=layers).scores, alike.scores)
        calls: list[int] = []
        first = next(module for name, module in model.named_modules() if name.endswith("mlp.up_proj"))
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        next_token_loss(model, token_batches(2)[0])[0].sum().backward()  # type: ignore[no-untyped-call]
        assert len(calls) == 2  # it checkpoints again
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_inside_of_inference_mode(tiny_lm: Models, sets: Any) -> None:
    model = tiny_lm("llama")
    expected = group_influence(model, *sets, EKFAC())
    with torch.inference_mode():
        assert np.array_equal(group_influence(model, *sets, EKFAC()).scores, expected.scores)
        assert torch.is_inference_mode_enabled()


def test_a_compiled_model_is_the_one_inside(tiny_lm: Models, sets: Any) -> None:
    model = tiny_lm("llama")
    expected = group_influence(model, *sets, EKFAC())
    assert np.array_equal(
        group_influence(torch.compile(model, backend="eager"), *sets, EKFAC()).scores, expected.scores
    )  # type: ignore[arg-type]
