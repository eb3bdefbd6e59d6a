import logging

import pytest
import torch
from torch import Tensor

from dynmix.influence.capture import Capture
from dynmix.influence.datainf import DataInf
from dynmix.influence.group import group_influence
from dynmix.influence.isolation import isolated
from tests.influence.conftest import Batcher, Models


def test_is_the_mean_of_damped_inverses(tiny_lm: Models, token_batches: Batcher) -> None:
    """Every sequence's rank-one curvature inverted by a solver, layer by layer."""
    model, batches = tiny_lm("llama", dtype=torch.float64), token_batches(6, ragged=True)
    capture = Capture(model, layers="k_proj")
    gradients: dict[str, list[Tensor]] = {}
    with isolated(model):
        tokens = [capture.run(b, lambda layer, a, g, m: gradients.setdefault(layer, []).append(g.mT @ a))[1]
                  for b in batches]  # fmt: skip
        G = {layer: torch.cat(parts).flatten(1) for layer, parts in gradients.items()}
        torch.manual_seed(1)
        matrices = {layer: torch.randn(3, *parts[0].shape[1:], dtype=torch.float64)
                    for layer, parts in gradients.items()}  # fmt: skip
        found = {layer: matrix.clone() for layer, matrix in matrices.items()}
        DataInf(damping=0.3).fit(capture, batches).precondition_all(found)
    for layer, g in G.items():
        damping = 0.3 * g.square().mean()
        eye = damping * torch.eye(g.shape[1], dtype=torch.float64)
        inverse = torch.stack([torch.linalg.inv(torch.outer(x, x) + eye) for x in g]).mean(0)
        expected = (matrices[layer].flatten(1) @ inverse).view_as(matrices[layer]) * torch.cat(tokens).mean()
        torch.testing.assert_close(found[layer], expected)


def test_serves_group_influence(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("gpt2")
    domains, tasks = {"d": token_batches(6), "e": token_batches(6, seed=3)}, {"t": token_batches(6, seed=1)}
    strong = group_influence(model, domains, tasks, DataInf(damping=1e6), layers="h.1.mlp")
    plain = group_influence(model, domains, tasks, DataInf(damping=2e6), layers="h.1.mlp")
    assert strong.scores == pytest.approx(2 * plain.scores, rel=1e-3)  # a scaled identity as damping grows
    assert (strong.standard_error > 0).all()


def test_a_layer_without_gradient_gives_nothing_and_broken_sequences_are_left_out(
    tiny_lm: Models, token_batches: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    model, whole = tiny_lm("llama", dtype=torch.float64), token_batches(4)
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = torch.nan
        model.lm_head.weight[:, :] = model.lm_head.weight.nan_to_num()
    ids = whole[0]["input_ids"].clamp(max=95)
    broken = torch.cat([ids, torch.full_like(ids[:1], 96)])
    capture = Capture(model, layers="layers.1")
    matrices = {name: capture.zeros(name, 1) + 1 for name in capture.layers}
    ours, theirs = ({k: x.clone() for k, x in matrices.items()} for _ in range(2))
    with isolated(model), caplog.at_level(logging.WARNING):
        DataInf().fit(capture, [{"input_ids": broken}]).precondition_all(ours)
        DataInf().fit(capture, [{"input_ids": ids}]).precondition_all(theirs)
        for layer, matrix in ours.items():
            torch.testing.assert_close(matrix, theirs[layer])
        with pytest.raises(ValueError, match="no sequence has a finite gradient"):
            DataInf().fit(capture, [{"input_ids": broken[-1:]}]).precondition_all(ours)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.zero_()
        dead = {"model.layers.1.mlp.up_proj": torch.ones_like(matrices["model.layers.1.mlp.up_proj"])}
        DataInf().fit(capture, [{"input_ids": ids}]).precondition_all(dead)
    assert "1 of 5 sequences are not finite" in caplog.text
    assert not dead["model.layers.1.mlp.up_proj"].any()


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_damping_is_checked(damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be finite and > 0"):
        DataInf(damping=damping)
