from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dynmix import Identity, Layers, group_influence
from dynmix.influence.batch import next_token_loss
from dynmix.influence.task_gradients import TaskGradients, sequence_products, task_gradients


def test_rows_are_the_folds_gradients(tiny_lm: Any, token_batches: Any) -> None:
    """With strata of two sequences in a row, each fold has as many of every kind."""
    model = tiny_lm("gpt2", tied=True)
    batches = token_batches(8, seed=1, ragged=True, size=3)
    R = task_gradients(model, {"t": batches}, Identity(), batches, folds=4, layers=Layers(norms=True), strata={"t": 2})
    assert R.folds == (2,)
    named = dict(model.named_parameters())
    sums = {name: torch.zeros_like(stack) for name, stack in R.parameters.items()}
    tokens, number = np.zeros(2), 0
    for batch in batches:
        losses, counts = next_token_loss(model, batch)
        for loss, count in zip(losses, counts, strict=True):
            tokens[number % 2] += int(count)
            for name, g in zip(
                sums, torch.autograd.grad(loss, [named[n] for n in sums], retain_graph=True), strict=True
            ):
                sums[name][number % 2] += g
            number += 1
    assert R.tokens.tolist() == tokens.tolist()
    assert set(sums) == {name for name in named if "wpe" not in name}
    for name, stack in R.parameters.items():
        torch.testing.assert_close(stack, sums[name] / tokens.sum(), atol=2e-6, rtol=1e-4)


def test_files(tiny_lm: Any, token_batches: Any, tmp_path: Path) -> None:
    model, batches = tiny_lm("llama"), token_batches(4)
    R = task_gradients(model, {"t": batches}, Identity(), batches, folds=3)
    R.save(tmp_path / "in_run" / "r.safetensors")
    again = TaskGradients.load(tmp_path / "in_run" / "r.safetensors").on(model)
    assert (again.tasks, again.folds, again.layers) == (R.tasks, R.folds, R.layers)
    assert again.loss.tolist() == R.loss.tolist()
    assert all(torch.equal(stack, R.parameters[name]) for name, stack in again.parameters.items())
    with pytest.raises(ValueError, match="and the model has none"):
        again.on(tiny_lm("gpt2"))
    with pytest.raises(ValueError, match="cannot be read"):
        TaskGradients.load(tmp_path / "missing.safetensors")
    torch.save({}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        TaskGradients.load(tmp_path / "other.safetensors")


def test_what_cannot_be_measured(tiny_lm: Any, token_batches: Any) -> None:
    model, batches = tiny_lm("llama"), token_batches(4)
    nothing = [
        {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["input_ids"], -100)} for batch in batches
    ]
    for tasks, message in (({"t": nothing}, "'t' has no scored token"), ({"t": []}, "'t' has no batches")):
        with pytest.raises(ValueError, match=message):
            task_gradients(model, tasks, Identity(), batches)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layers .*up_proj' and .*up_proj' share '.*up_proj.weight'"):
        task_gradients(model, {"t": batches}, Identity(), batches)
    model.model.layers[1].mlp.down_proj.bias = model.model.layers[0].mlp.down_proj.bias
    with pytest.raises(ValueError, match=r"layers .*down_proj' and .*down_proj' share '.*down_proj.bias'"):
        task_gradients(model, {"t": batches}, Identity(), batches, layers="down_proj")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="the gradient of t is not finite"):
        task_gradients(model, {"t": batches}, Identity(), batches, layers="self_attn")


def test_products_leave_out_sequences_that_are_not_finite(
    tiny_lm: Any, token_batches: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model: nn.Module = tiny_lm("llama")
    batches = token_batches(4, size=2)
    expected = group_influence(model, {"d": batches[:1]}, {"t": batches}, Identity(), error_sequences=None)
    R = task_gradients(model, {"t": batches}, Identity(), batches, folds=2)
    products, tokens = sequence_products(model, R, {"d": batches[:1]})["d"]
    assert products.sum() / tokens.sum() == pytest.approx(float(expected.scores[0, 0]), rel=1e-4)
    with torch.no_grad():
        model.get_input_embeddings().weight[batches[1]["input_ids"][0, 0]] = torch.inf
    products, tokens = sequence_products(model, R, {"d": batches})["d"]
    assert len(products) == len(tokens) < 4
    assert np.isfinite(products).all()
    assert "are not finite and left out" in caplog.text
