"""Factors against brute force, layer kind by layer kind; their budget, averages and files."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmix.influence.batch import Batches
from dynmix.influence.capture import Capture
from dynmix.influence.carried import Carried
from dynmix.influence.curvature import EKFAC, KFAC
from dynmix.influence.factored import FactoredCurvature, within_budget
from dynmix.influence.factors import FittedFactors, add_gram
from dynmix.influence.gradients import gradients_of
from dynmix.influence.isolation import isolated
from dynmix.influence.layers import Layers
from tests.influence.conftest import Batcher, Models

EVERYTHING = Layers(embeddings=True, norms=True)


def fitted(
    model: nn.Module,
    batches: Batches,
    curvature: FactoredCurvature,
    before: FittedFactors | None = None,
    **settings: Any,
) -> FittedFactors:
    with isolated(model):
        return curvature.fit(Capture(model, **settings), batches, previous=before)


def brute(model: nn.Module, batches: Batches, layers: Any = None) -> tuple[dict[str, Tensor], ...]:
    """Layer -> sequences' gradients [n, out, in], and all tokens' inputs and output gradients as rows."""
    gradients: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    capture = Capture(model, layers=layers)

    def take(layer: str, a: Tensor, g: Tensor, mask: Tensor) -> None:
        each = capture.zeros(layer, len(g))
        gradients_of(a, g).add_weighted(torch.eye(len(g)), each)
        gradients.setdefault(layer, []).append(each)
        if not a.is_floating_point():
            a, g = g, torch.nn.functional.one_hot(a, capture.layers[layer].shape[0]).to(g)
        inputs.setdefault(layer, []).append(a[mask])
        outputs.setdefault(layer, []).append(g[mask])

    with isolated(model):
        for batch in batches:
            capture.run(batch, take)
    return tuple({layer: torch.cat(parts) for layer, parts in some.items()} for some in (gradients, inputs, outputs))


def covariance(x: Tensor, like: Tensor) -> Tensor:
    full = x.mT @ x / len(x)
    return full if like.ndim == 2 else full.diagonal()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_ekfac_equals_brute_force_on_every_kind_of_layer(
    tiny_lm: Models, token_batches: Batcher, kind: str, tied: bool
) -> None:
    model, batches = tiny_lm(kind, dtype=torch.float64, tied=tied), token_batches(7, ragged=True)
    ekfac = fitted(model, batches, EKFAC(largest_basis=64), layers=EVERYTHING)
    gradients, inputs, outputs = brute(model, batches, EVERYTHING)
    assert set(gradients) == set(ekfac.factors)
    for layer, f in ekfac.factors.items():
        torch.testing.assert_close(f.A, covariance(inputs[layer], f.A), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(f.S, covariance(outputs[layer], f.S), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(f.Lambda, f.rotated(gradients[layer]).square().mean(0), rtol=1e-6, atol=1e-12)
        for Q, matrix in ((f.QA, f.A), (f.QS, f.S)):
            if Q is not None:
                torch.testing.assert_close(Q.mT @ matrix @ Q, (Q.mT @ matrix @ Q).diagonal().diag())
        H = (f.Lambda + 0.1 * f.Lambda.mean()) / ekfac.tokens_per_sequence
        expected = f.restored(f.rotated(gradients[layer]) / H)
        torch.testing.assert_close(ekfac.precondition(layer, gradients[layer]), expected)
    head = ekfac.factors["lm_head"]
    assert head.S.shape == (97,)
    assert head.QS is None


def test_a_head_never_has_a_basis_of_its_vocabulary(tiny_lm: Models, token_batches: Batcher) -> None:
    """Not even where it is less than four times as wide as the model."""
    model, batches = tiny_lm("llama"), token_batches(2)
    ekfac = fitted(model, batches, EKFAC(largest_basis=40))
    assert ekfac.factors["lm_head"].QS is None
    assert ekfac.factors["model.layers.0.mlp.gate_proj"].QS is not None


def test_layers_with_one_input_have_one_covariance_and_one_basis(tiny_lm: Models, token_batches: Batcher) -> None:
    ekfac = fitted(tiny_lm("llama"), token_batches(4), EKFAC())
    q, k, v, o = (ekfac.factors[f"model.layers.0.self_attn.{x}_proj"] for x in "qkvo")
    assert q.A is k.A is v.A
    assert q.QA is k.QA is v.QA
    assert q.A is not o.A


@pytest.mark.parametrize("length", [3, 60])
def test_eigenvalues_do_not_depend_on_the_way_to_them(
    tiny_lm: Models, token_batches: Batcher, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are turned in short sequences and gradients in long ones, all at once or in small blocks."""
    model, batches = tiny_lm("llama", dtype=torch.float64), token_batches(5, length=length)
    one = fitted(model, batches, EKFAC())
    monkeypatch.setattr("dynmix.influence.gradients._ENTRIES", {"cpu": 2048})
    other = fitted(model, batches, EKFAC())
    gradients, _, _ = brute(model, batches)
    for layer, f in one.factors.items():
        torch.testing.assert_close(f.Lambda, f.rotated(gradients[layer]).square().mean(0))
        torch.testing.assert_close(f.Lambda, other.factors[layer].Lambda)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_kfac_is_the_product_of_the_sides_with_the_trace_of_the_fisher(
    tiny_lm: Models, token_batches: Batcher, kind: str
) -> None:
    model, batches = tiny_lm(kind, dtype=torch.float64), token_batches(7, ragged=True)
    kfac = fitted(model, batches, KFAC(largest_basis=64), layers=EVERYTHING)
    gradients, inputs, outputs = brute(model, batches, EVERYTHING)
    for layer, f in kfac.factors.items():
        g = gradients[layer]
        torch.testing.assert_close(f.Lambda.sum(), g.square().sum((1, 2)).mean(), rtol=1e-6, atol=1e-12)
        if (g.shape[2] == 1 and "norm" in layer) or ".ln_" in layer:
            torch.testing.assert_close(f.Lambda, g.square().mean(0), rtol=1e-6, atol=1e-12)
            continue
        A, S = covariance(inputs[layer], f.A), covariance(outputs[layer], f.S)
        A, S = (x if x.ndim == 2 else x.diag() for x in (A, S))
        torch.testing.assert_close(f.A if f.A.ndim == 2 else f.A.diag(), A, rtol=1e-6, atol=1e-12)
        if f.Lambda.numel() > 1100:
            continue  # a dense matrix too large to be solved in a test
        ratio = g.square().sum((1, 2)).mean() / (A.trace() * S.trace())
        H = ratio * torch.kron(S, A) + 0.1 * f.Lambda.mean() * torch.eye(A.shape[0] * S.shape[0], dtype=torch.float64)
        expected = torch.linalg.solve(H / kfac.tokens_per_sequence, g[:2].flatten(1).mT).mT.view_as(g[:2])
        torch.testing.assert_close(kfac.precondition(layer, g[:2]), expected, rtol=1e-6, atol=1e-9)


def test_kfac_has_the_references_scores_but_for_its_scale(reference: Any) -> None:
    numbers = reference.numbers
    kfac = fitted(reference.model, reference.batches("train"), KFAC(), **reference.settings)
    for name in numbers["modules"]:
        train, query = (torch.as_tensor(numbers[f"grad_{split}.{name}"]) for split in ("train", "query"))
        f = kfac.factors[name]
        ratio = float(f.Lambda.sum() / (f.A.trace() * f.S.trace()))
        scores = torch.einsum("qoi,noi->qn", kfac.precondition(name, query) / kfac.tokens_per_sequence, train) * ratio
        expected = torch.as_tensor(numbers[f"kron_kfac_heur.{name}"])
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-9)


def test_sums_of_halves_are_grams() -> None:
    torch.manual_seed(0)
    for n in (5, 130, 515):
        x, total = torch.randn(20, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        add_gram(total, x)
        torch.testing.assert_close(total.tril(), (x.mT @ x).tril())


@pytest.mark.parametrize(("sizes", "budget", "most"), [([100, 1, 1, 1], 60, 1), ([1, 1, 100, 100], 110, 2)])
def test_a_budget_holds_for_batches_of_unlike_sizes_too(sizes: list[int], budget: int, most: int) -> None:
    batches = [{"input_ids": torch.zeros(1, size, dtype=torch.long)} for size in sizes]
    some = list(within_budget(batches, budget))
    assert 0 < len(some) <= most
    assert len(some) == 1 or sum(batch["input_ids"].numel() for batch in some) <= budget


def test_factor_tokens_are_a_budget(tiny_lm: Models, token_batches: Batcher) -> None:
    batches = token_batches(12, size=2, ragged=True)
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    assert within_budget(batches, None) is batches
    assert within_budget(batches, sum(tokens)) is batches
    half = list(within_budget(batches, sum(tokens) // 2))
    assert half == batches[::2]
    assert list(within_budget(batches, 1)) == batches[:1]
    assert list(within_budget(iter(batches), sum(tokens[:3]))) == batches[:3]
    model = tiny_lm("llama", dtype=torch.float64)
    few = fitted(model, batches, EKFAC(factor_tokens=sum(tokens) // 2))
    for layer, f in fitted(model, half, EKFAC()).factors.items():
        assert torch.equal(few.factors[layer].Lambda, f.Lambda)


@pytest.mark.parametrize("curvature", [EKFAC, KFAC])
def test_the_moving_average(tiny_lm: Models, token_batches: Batcher, curvature: type[FactoredCurvature]) -> None:
    model, first, second = tiny_lm("llama", dtype=torch.float64), token_batches(4), token_batches(4, seed=1, length=6)
    old = fitted(model, first, curvature(ema=0.75))
    same = fitted(model, first, curvature(ema=0.75), before=old)
    new, alone = fitted(model, second, curvature(ema=0.75), before=old), fitted(model, second, curvature())
    assert new.tokens_per_sequence == 0.75 * 9 + 0.25 * 5
    torch.manual_seed(0)
    for layer, f in new.factors.items():
        before, now = old.factors[layer], alone.factors[layer]
        torch.testing.assert_close(f.A, 0.75 * before.A + 0.25 * now.A)
        torch.testing.assert_close(f.S, 0.75 * before.S + 0.25 * now.S)
        # The old eigenvalues as a full matrix, of which the new bases see the diagonal.
        full = torch.kron(before.QS, before.QA) if before.QS is not None else None
        if full is not None and len(full) < 600:
            basis = torch.kron(f.QS, f.QA)
            seen = (basis.mT @ (full * before.Lambda.flatten()) @ full.mT @ basis).diagonal().view_as(f.Lambda)
            torch.testing.assert_close(before.seen_from(f), seen)
        torch.testing.assert_close(f.Lambda.sum(), 0.75 * before.Lambda.sum() + 0.25 * now.Lambda.sum())
        g = torch.randn_like(f.Lambda)
        torch.testing.assert_close(same.precondition(layer, g), old.precondition(layer, g), rtol=1e-5, atol=1e-5)


def test_factors_in_a_file_are_the_same_bits(tiny_lm: Models, token_batches: Batcher, tmp_path: Path) -> None:
    curvature = EKFAC(largest_basis=64)
    saved = fitted(tiny_lm("llama"), token_batches(4), curvature, layers=EVERYTHING)
    carried, again = Carried(curvature), Carried(curvature)
    carried.fitted, carried.used = saved, 3
    carried.save(tmp_path / "factors.safetensors")
    again.load(tmp_path / "factors.safetensors")
    loaded: Any = again.fitted
    assert again.used == 3
    assert (loaded.damping, loaded.tokens_per_sequence) == (saved.damping, saved.tokens_per_sequence)
    for layer, f in saved.factors.items():
        for part, tensor in vars(f).items():
            other = getattr(loaded.factors[layer], part)
            assert other is tensor is None or torch.equal(other, tensor)
    assert loaded.factors["model.layers.0.mlp.up_proj"].A is loaded.factors["model.layers.0.mlp.gate_proj"].A
    assert [path.name for path in tmp_path.iterdir()] == ["factors.safetensors"]
    with pytest.raises(ValueError, match="gone is gone"):
        again.load(tmp_path / "gone")
    (tmp_path / "torn").write_bytes((tmp_path / "factors.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"torn.*cannot be read"):
        again.load(tmp_path / "torn")


def test_carried_factors_go_on_exactly(tiny_lm: Models, token_batches: Batcher, tmp_path: Path) -> None:
    """Fitted at the first and the third time, averaged; from a file after any time it goes on to the same bits."""
    model = tiny_lm("llama")
    times = [token_batches(4, seed=seed) for seed in range(4)]
    curvature = EKFAC(ema=0.5, refresh_every=2)
    carried, capture, results = Carried(curvature), Capture(model), []
    with isolated(model):
        for number, batches in enumerate(times):
            assert carried.passes == (0 if number % 2 else 2)
            results.append(carried.fit(capture, batches))
            carried.save(tmp_path / f"{number}")
        assert results[1] is not None
        for number in range(3):
            again = Carried(curvature)
            again.load(tmp_path / f"{number}")
            for later in range(number + 1, 4):
                found = again.fit(capture, times[later])
                for layer, f in results[later].factors.items():
                    assert torch.equal(found.factors[layer].Lambda, f.Lambda)
    lambdas = [r.factors["lm_head"].Lambda for r in results]
    assert torch.equal(lambdas[0], lambdas[1])
    assert not torch.equal(lambdas[1], lambdas[2])


def test_factors_that_are_not_finite_are_not_carried(
    tiny_lm: Models, token_batches: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    model, carried = tiny_lm("llama"), Carried(EKFAC(ema=0.5))
    capture = Capture(model)
    with isolated(model), caplog.at_level(logging.ERROR):
        good = carried.fit(capture, token_batches(4))
        weight = model.lm_head.weight[3, 3].item()
        with torch.no_grad():
            model.lm_head.weight[3, 3] = torch.nan
        assert not carried.fit(capture, token_batches(4)).finite
        assert carried.fitted is not None
        assert torch.equal(carried.fitted.factors["lm_head"].Lambda, good.factors["lm_head"].Lambda)
        with torch.no_grad():
            model.lm_head.weight[3, 3] = weight
        assert carried.fit(capture, token_batches(4)).finite


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -1.0}, "damping must be finite and >= 0"),
        ({"labels": "true"}, "labels must be"),
        ({"eigh_dtype": "bfloat16"}, "eigh_dtype must be"),
        ({"factor_tokens": 0}, "factor_tokens must be at least 1"),
        ({"largest_basis": None}, "largest_basis must be a number of at least 0, got None"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1"),
        ({"refresh_every": 0}, "refresh_every must be at least 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EKFAC(**settings)
    with pytest.raises(ValueError, match=message):
        replace(KFAC(), **settings)
