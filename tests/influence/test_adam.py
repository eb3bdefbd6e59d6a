from typing import Any

import pytest
import torch
import transformers

from dynmix.influence.batch import next_token_loss
from dynmix.influence.capture import Capture
from dynmix.influence.curvature import AdamDiagonal
from dynmix.influence.group import group_influence
from dynmix.influence.isolation import isolated
from dynmix.influence.layers import Layers
from tests.influence.conftest import Batcher, Models

EVERYTHING = Layers(embeddings=True, norms=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_is_what_the_optimizer_does_with_a_gradient(
    tiny_lm: Models, token_batches: Batcher, kind: str, amsgrad: bool
) -> None:
    """From the same state, with momentum and decay off, a step of the optimizer moves by lr times the product."""
    model = tiny_lm(kind, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.0, 0.9), weight_decay=0.0, amsgrad=amsgrad)
    for seed in range(3):
        next_token_loss(model, token_batches(4, seed=seed)[0])[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    capture = Capture(model, layers=EVERYTHING)
    with isolated(model):
        fitted = AdamDiagonal(optimizer).fit(capture, [])
    torch.manual_seed(1)
    for name, layer in capture.layers.items():
        gradient = torch.randn(layer.shape, dtype=torch.float64)
        direction = fitted.precondition(name, gradient)
        for (parameter, moved), (_, g) in zip(layer.split(direction), layer.split(gradient), strict=True):
            state, beta = optimizer.state[parameter], 0.9
            v = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"] / (1 - beta ** state["step"].item())
            torch.testing.assert_close(moved, g / (v.sqrt() + 1e-8))


def test_the_step_it_predicts_is_taken(tiny_lm: Models, token_batches: Batcher) -> None:
    """A gradient that leaves the second moments as they are moves the parameter by lr times its product."""
    model = tiny_lm("llama", dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.5))
    next_token_loss(model, token_batches(4)[0])[0].mean().backward()
    optimizer.step()
    layer = Capture(model).layers["lm_head"]
    fitted = AdamDiagonal(optimizer).fit(Capture(model), [])
    v = optimizer.state[layer.weight]["exp_avg_sq"] / 0.5
    before, gradient = layer.weight.detach().clone(), v.sqrt()
    layer.weight.grad = gradient.clone()
    optimizer.step()
    moved = fitted.precondition("lm_head", gradient) * 1e-3
    torch.testing.assert_close(before - layer.weight.detach(), moved, rtol=1e-6, atol=1e-12)


def test_takes_a_mapping_or_a_function(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("llama")
    v = {parameter: torch.full_like(parameter, 4.0) for parameter in model.parameters()}
    sets = {"d": token_batches(4)}, {"t": token_batches(4, seed=1)}
    plain = group_influence(model, *sets, AdamDiagonal({p: torch.ones_like(p) for p in v}, eps=0.0))
    for source in (v, lambda: v):
        found = group_influence(model, *sets, AdamDiagonal(source, eps=0.0))
        assert found.scores == pytest.approx(plain.scores / 2)
    assert repr(AdamDiagonal(v)) == "AdamDiagonal(eps=None)"


def test_what_is_not_there_yet_is_named(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("llama")
    sets = {"d": token_batches(4)}, {"t": token_batches(4, seed=1)}
    with pytest.raises(ValueError, match=r"'lm_head.weight' has no second moments: take a step"):
        group_influence(model, *sets, AdamDiagonal(torch.optim.AdamW(model.parameters())), layers="lm_head")
    with pytest.raises(ValueError, match=r"source is a NoneType: .*lambda: trainer.optimizer"):
        AdamDiagonal(None)  # type: ignore[arg-type]  # of a Trainer that has not begun
    with pytest.raises(ValueError, match="no optimizer yet"):
        group_influence(model, *sets, AdamDiagonal(lambda: None))


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        transformers.Adafactor,  # of vectors it does keep second moments, which are no whole curvature
        torch.optim.Adamax,  # which has betas
    ],
)
def test_an_optimizer_of_another_kind_is_refused(tiny_lm: Models, token_batches: Batcher, make: Any) -> None:
    model = tiny_lm("llama")
    optimizer = make(model.parameters())
    next_token_loss(model, token_batches(4)[0])[0].mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"is none of Adam's kin: it has no betas, or.*take another curvature"):
        group_influence(
            model, {"d": token_batches(4)}, {"t": token_batches(4, seed=1)}, AdamDiagonal(lambda: optimizer)
        )
