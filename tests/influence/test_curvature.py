import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynmix.influence import factors
from dynmix.influence.batch import Batches, next_token_labels, next_token_loss
from dynmix.influence.capture import Capture
from dynmix.influence.curvature import EKFAC, KFAC, Identity
from dynmix.influence.factored import sampled_labels
from dynmix.influence.factors import FittedFactors
from dynmix.influence.isolation import isolated
from tests.influence.conftest import Batcher, Models
from tests.influence.test_capture import captured
from tests.influence.test_group import Poisoned


def fitted(model: nn.Module, batches: Batches, curvature: EKFAC | None = None, **settings: Any) -> FittedFactors:
    with isolated(model):
        return (curvature or EKFAC()).fit(Capture(model, **settings), batches)


def sequence_gradients(model: nn.Module, batches: Batches, **settings: Any) -> dict[str, Tensor]:
    """Per layer the gradients of all sequences, [n, out, in]."""
    parts = [captured(model, batch, **settings) for batch in batches]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


def test_factors_and_scores_of_the_reference(reference: Any) -> None:
    numbers, modules = reference.numbers, list(reference.numbers["modules"])
    ekfac = fitted(reference.model, reference.batches("train"), **reference.settings)
    train = sequence_gradients(reference.model, reference.batches("train"), **reference.settings)
    query = sequence_gradients(reference.model, reference.batches("query"), **reference.settings)
    assert sorted(ekfac.factors) == sorted(modules)
    total = np.zeros_like(numbers["score.kron_ekfac_heur"])
    for name in modules:
        f: Any = ekfac.factors[name]
        np.testing.assert_allclose(train[name], numbers[f"grad_train.{name}"], rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(query[name], numbers[f"grad_query.{name}"], rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(f.A, numbers[f"factor.{name}.A"], rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(f.S, numbers[f"factor.{name}.S"], rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(f.Lambda.sum(), numbers[f"factor.{name}.Lam"].sum(), rtol=1e-4)
        # the reference's curvature is that of whole sequences, ours that of a token
        towards = ekfac.precondition(name, query[name]) / ekfac.tokens_per_sequence
        scores = torch.einsum("qoi,noi->qn", towards, train[name]).numpy()
        np.testing.assert_allclose(scores, numbers[f"kron_ekfac_heur.{name}"], rtol=1e-4, atol=1e-9)
        total += scores
    np.testing.assert_allclose(total, numbers["score.kron_ekfac_heur"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("largest_basis", [1024, 40])
def test_trace_is_that_of_the_fisher(
    tiny_lm: Models,
    token_batches: Batcher,
    kind: str,
    largest_basis: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factors, "WIDE", 1)
    model, batches = tiny_lm(kind, dtype=torch.float64), token_batches(9, ragged=True)
    with caplog.at_level(logging.INFO):
        ekfac = fitted(model, batches, EKFAC(largest_basis=largest_basis))
    gradients = sequence_gradients(model, batches)
    assert set(gradients) == set(ekfac.factors)
    for layer, g in gradients.items():
        torch.testing.assert_close(ekfac.factors[layer].Lambda.sum(), g.square().sum((1, 2)).mean())
    assert (ekfac.factors["lm_head"].QS is None) == (largest_basis == 40)
    assert ("identity basis" in caplog.text) == (largest_basis == 40)


def test_tokens_are_counted_by_the_mask(tiny_lm: Models, token_batches: Batcher) -> None:
    """The same sequences without their padding give the same factors."""
    model = tiny_lm("llama", dtype=torch.float64)
    padded = token_batches(6, size=6, ragged=True)
    bare = [
        {"input_ids": ids[None, : int(mask.sum())]}
        for ids, mask in zip(padded[0]["input_ids"], padded[0]["attention_mask"], strict=True)
    ]
    ours, theirs = fitted(model, padded), fitted(model, bare)
    assert ours.tokens_per_sequence == theirs.tokens_per_sequence < 9
    for layer, f in ours.factors.items():
        torch.testing.assert_close(f.A, theirs.factors[layer].A)
        torch.testing.assert_close(f.S, theirs.factors[layer].S)
        torch.testing.assert_close(f.Lambda.sum(), theirs.factors[layer].Lambda.sum())


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def linear_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """g is whatever the batch says, so that gradients can be constructed."""
    losses = (model(batch["x"]) * batch["g"]).sum(1)
    return losses, torch.ones_like(losses)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_is_the_exact_damped_inverse_where_the_fisher_is_a_kronecker_product(damping: float) -> None:
    """Every pair of an input and an output gradient occurs once: E[gg^T x aa^T] = E[gg^T] x E[aa^T]."""
    torch.manual_seed(0)
    inputs, outputs = torch.randn(7, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    x, g = inputs.repeat_interleave(5, 0), outputs.repeat(7, 1)
    batches = [{"x": x[:20], "g": g[:20]}, {"x": x[20:], "g": g[20:]}]
    ekfac = fitted(OneLayer(), batches, EKFAC(damping=damping), loss=linear_loss)
    gradients = torch.einsum("no,ni->noi", g, x).flatten(1)
    fisher = gradients.mT @ gradients / len(gradients)
    damped = fisher + damping * fisher.trace() / 6 * torch.eye(6, dtype=torch.float64)
    matrix = torch.randn(4, 2, 3, dtype=torch.float64)
    expected = torch.linalg.solve(damped, matrix.flatten(1).mT).mT.view_as(matrix)
    torch.testing.assert_close(ekfac.precondition("layer", matrix), expected)


def test_is_a_scaled_identity_as_damping_grows(tiny_lm: Models, token_batches: Batcher) -> None:
    model, batches = tiny_lm("llama", dtype=torch.float64), token_batches(6)
    ekfac = fitted(model, batches, EKFAC(damping=1e9))
    for layer, g in sequence_gradients(model, batches).items():
        scale = ekfac.tokens_per_sequence / (1e9 * ekfac.factors[layer].Lambda.mean())
        error = ekfac.precondition(layer, g) - scale * g
        assert error.norm() < 1e-5 * (scale * g).norm()


def test_is_symmetric_and_positive(tiny_lm: Models, token_batches: Batcher) -> None:
    model, batches = tiny_lm("gpt2", dtype=torch.float64), token_batches(6)
    ekfac = fitted(model, batches)
    for layer, g in sequence_gradients(model, batches).items():
        products = ekfac.precondition(layer, g).flatten(1) @ g.flatten(1).mT
        torch.testing.assert_close(products, products.mT)
        assert torch.linalg.eigvalsh(products).min() > -1e-9 * products.abs().max()


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_layer_without_gradient_gives_zero_not_nan(tiny_lm: Models, token_batches: Batcher, damping: float) -> None:
    model = tiny_lm("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    ekfac = fitted(model, token_batches(4), EKFAC(damping=damping))
    dead = "model.layers.1.mlp.up_proj"
    assert ekfac.factors[dead].Lambda.abs().max() == 0
    assert ekfac.precondition(dead, torch.ones_like(ekfac.factors[dead].Lambda)).abs().max() == 0
    for layer, f in ekfac.factors.items():
        assert ekfac.precondition(layer, torch.ones_like(f.Lambda)).isfinite().all()


def test_sequences_that_are_not_finite_are_left_out(
    tiny_lm: Models, token_batches: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    model, batches = Poisoned(tiny_lm("llama", dtype=torch.float64)), token_batches(8)
    for batch in batches:
        batch["input_ids"][:, 0] = 5
    clean = fitted(model, [batches[0], {"input_ids": batches[1]["input_ids"][1:]}])
    batches[1]["input_ids"][0, 0] = 96
    assert not caplog.text
    poisoned = fitted(model, batches)
    assert "1 of 8 sequences are not finite" in caplog.text
    assert poisoned.tokens_per_sequence == clean.tokens_per_sequence
    for layer, f in clean.factors.items():
        torch.testing.assert_close(poisoned.factors[layer].A, f.A)
        torch.testing.assert_close(poisoned.factors[layer].Lambda.sum(), f.Lambda.sum())


def test_sampled_labels_follow_the_model(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("llama")
    [batch] = token_batches(1)
    mask = torch.ones(2000, 10, dtype=torch.long)
    mask[:, 8:] = 0
    many = {"input_ids": batch["input_ids"].repeat(2000, 1), "attention_mask": mask}
    with isolated(model):
        sampled = sampled_labels(Capture(model), many, 0, 0)
        expected = model(input_ids=batch["input_ids"]).logits[0, 3].softmax(-1).detach()
    assert (sampled["labels"][:, 0] == -100).all()
    assert (next_token_labels(sampled) == -100).equal(next_token_labels(many) == -100)
    drawn = torch.bincount(sampled["labels"][:, 4], minlength=97) / 2000
    assert (drawn - expected).abs().max() < 5 * 0.5 / math.sqrt(2000)
    assert (drawn - expected).abs().sum() < 0.5 < (drawn.roll(1) - expected).abs().sum()


def test_sampled_curvature_is_reproducible_and_needs_tokens(
    reference: Any, tiny_lm: Models, token_batches: Batcher
) -> None:
    model, batches = tiny_lm("llama"), token_batches(4)
    state = torch.get_rng_state()
    one, two, other = (fitted(model, batches, EKFAC(labels="sampled", seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.factors["lm_head"].Lambda, two.factors["lm_head"].Lambda)
    assert not torch.equal(one.factors["lm_head"].Lambda, other.factors["lm_head"].Lambda)
    if reference.settings:
        with pytest.raises(ValueError, match="needs the default loss"):
            fitted(reference.model, reference.batches("train"), EKFAC(labels="sampled"), **reference.settings)


def test_float32_agrees_with_float64(tiny_lm: Models, token_batches: Batcher) -> None:
    batches = token_batches(16, ragged=True)
    single, double = (fitted(tiny_lm("llama").to(dtype), batches) for dtype in (torch.float32, torch.float64))
    assert single.factors["lm_head"].A.dtype == torch.float32  # type: ignore[union-attr]
    for layer, f in double.factors.items():
        torch.testing.assert_close(single.factors[layer].A, f.A, rtol=1e-3, atol=1e-5, check_dtype=False)
        torch.testing.assert_close(
            single.factors[layer].Lambda.sum(), f.Lambda.sum(), rtol=1e-3, atol=0, check_dtype=False
        )


def test_eigenvectors_are_retried_in_float64(
    monkeypatch: pytest.MonkeyPatch, tiny_lm: Models, token_batches: Batcher
) -> None:
    model, batches, eigh = tiny_lm("llama"), token_batches(4), torch.linalg.eigh
    expected = fitted(model, batches)

    def fails_in_float32(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    retried = fitted(model, batches)
    for layer, g in sequence_gradients(model, batches).items():
        ours, theirs = (k.precondition(layer, g).flatten(1) @ g.flatten(1).mT for k in (retried, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("curvature", [EKFAC, KFAC])
def test_eigenvectors_are_sought_in_the_precision_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tiny_lm: Models, token_batches: Batcher, curvature: type[EKFAC] | type[KFAC]
) -> None:
    model, eigh, seen = tiny_lm("llama"), torch.linalg.eigh, []

    def watched(matrix: Tensor) -> Any:
        seen.append(matrix)
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    for dtype in ("float32", "float64"):
        seen.clear()
        factors = curvature(eigh_dtype=dtype).fit(Capture(model, loss=next_token_loss), token_batches(4)).factors  # type: ignore[arg-type]
        assert {str(matrix.dtype) for matrix in seen} == {f"torch.{dtype}"}
        assert {f.QA.dtype for f in factors.values() if f.QA is not None} == {torch.float32}


def test_a_layer_that_was_not_fitted_is_named(tiny_lm: Models, token_batches: Batcher) -> None:
    ekfac = fitted(tiny_lm("llama"), token_batches(2), layers="lm_head")
    with pytest.raises(ValueError, match="'other' had no gradient"):
        ekfac.precondition("other", torch.ones(2, 2))


def test_identity_changes_nothing(tiny_lm: Models) -> None:
    model, matrix = tiny_lm("llama"), torch.randn(2, 3)
    assert Identity().fit(Capture(model, loss=next_token_loss), []).precondition("any", matrix) is matrix
