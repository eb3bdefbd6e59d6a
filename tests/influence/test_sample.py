from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from dynmix.influence.batch import Batches, next_token_loss
from dynmix.influence.curvature import EKFAC, Identity
from dynmix.influence.datainf import DataInf
from dynmix.influence.group import group_influence
from dynmix.influence.sample import SampleScorer, last_layers, sample_influence
from tests.influence.conftest import Batcher, Models, ReferenceLM
from tests.influence.test_group import mean_gradient, rows


def gradient(model: nn.Module, batches: Batches, names: list[str]) -> Tensor:
    """`mean_gradient` for parameters by name."""
    parameters = dict(model.named_parameters())
    return mean_gradient(model, batches, [parameters[name] for name in names])[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("layers", ["last", "embedding", "all"])
@pytest.mark.parametrize("tied", [False, True])
def test_without_curvature_it_is_the_product_of_gradients(
    tiny_lm: Models, token_batches: Batcher, kind: str, layers: str, tied: bool
) -> None:
    if tied and layers == "last":
        pytest.skip("the head alone is part of what a tied matrix does: autograd has no gradient of it")
    model = tiny_lm(kind, tied=tied, dtype=torch.float64).eval()
    samples = token_batches(7, ragged=True)
    tasks = {name: token_batches(5, seed=seed, ragged=True) for name, seed in (("a", 1), ("b", 2))}
    block, table = ("transformer.h.1", "wte") if kind == "gpt2" else ("model.layers.1", "embed_tokens")
    chosen = {"last": None, "embedding": f"{table}|lm_head", "all": "^(?!.*wpe)"}[layers]
    found = sample_influence(model, samples, tasks, Identity(), layers=chosen)
    measured = {
        "last": lambda name: block in name or "lm_head" in name,
        "embedding": lambda name: table in name or "lm_head" in name,
        "all": lambda name: "wpe" not in name,
    }[layers]
    names = [name for name, p in model.named_parameters() if measured(name) and (p.ndim == 2 or "bias" in name)]
    names = [name for name in names if ".ln_" not in name]
    towards = torch.stack([gradient(model, batches, names) for batches in tasks.values()])
    expected = torch.stack([towards @ gradient(model, [row], names) for row in rows(samples)])
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-5)  # norms compute in float32
    losses = [next_token_loss(model, row) for row in rows(samples)]
    np.testing.assert_allclose(found.loss, [float((nats / n).detach()) for nats, n in losses], rtol=1e-6)
    assert found.tokens.tolist() == [int(n) for _, n in losses]
    assert found.tasks == ("a", "b")


def test_reference_numbers_of_datainf(shared: Path) -> None:
    folder = shared / "reference" / "influence"
    with np.load(folder / "datainf_reference.npz") as file:
        expected = dict(file)
    with np.load(folder / "lm_masked_ekfac.npz") as file:
        data = dict(file)
    model = ReferenceLM().double()
    model.load_state_dict({k.removeprefix("param."): torch.as_tensor(v) for k, v in data.items() if "param." in k})

    def batches(split: str, size: int) -> list[dict[str, Tensor]]:
        ids, mask = (torch.as_tensor(data[f"{split}.{key}"]) for key in ("ids", "mask"))
        return [
            {"input_ids": ids[i : i + size], "attention_mask": mask[i : i + size]} for i in range(0, len(ids), size)
        ]

    train, queries = batches("train", 5), batches("query", 1)
    pairs = sample_influence(model, train, {str(i): [query] for i, query in enumerate(queries)}, layers="")
    # The reference's losses are sums over the sequences' tokens on both sides, and its curvature that of such sums.
    scored = np.array([int(query["attention_mask"][:, 1:].sum()) for query in queries])
    ours = (pairs.scores * pairs.tokens[:, None] * scored / pairs.tokens.mean()).T
    np.testing.assert_allclose(ours, -expected["IF_pairs.proposed"], rtol=1e-4)
    for name, curvature in (("proposed", DataInf()), ("identity", Identity())):
        one = sample_influence(model, train, {"all": batches("query", 3)}, curvature, layers="")
        unit = scored.mean() / (pairs.tokens.mean() if name == "proposed" else 1)
        np.testing.assert_allclose(one.scores[:, 0] * one.tokens * unit, -expected[f"IF_avgval.{name}"], rtol=1e-4)


@pytest.mark.parametrize("curvature", [DataInf(), EKFAC(), Identity()], ids=lambda c: type(c).__name__)
def test_the_mean_over_a_domain_is_its_group_influence(tiny_lm: Models, token_batches: Batcher, curvature: Any) -> None:
    model = tiny_lm("llama", dtype=torch.float64)
    domain, tasks = token_batches(9, ragged=True), {"a": token_batches(4, seed=1), "b": token_batches(6, seed=2)}
    group = group_influence(model, {"domain": domain}, tasks, curvature, layers="layers.1|lm_head")
    found = sample_influence(model, domain, tasks, curvature, layers="layers.1|lm_head", curvature_batches=domain)
    mean = (found.scores * found.tokens[:, None]).sum(0) / found.tokens.sum()
    np.testing.assert_allclose(mean, group.scores[:, 0], rtol=1e-6)


def test_a_score_does_not_depend_on_the_batch_it_is_in(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("llama", dtype=torch.float64)
    samples = token_batches(8, ragged=True)
    scorer = SampleScorer(model, {"a": token_batches(4, seed=1), "b": token_batches(4, seed=2)}, samples)
    together = np.concatenate([scorer(batch).scores for batch in samples])
    alone = np.concatenate([scorer(row).scores for row in rows(samples)])
    np.testing.assert_allclose(together, alone, rtol=1e-9)


def test_layers_by_default_are_the_head_and_the_last_block(tiny_lm: Models) -> None:
    for kind, block in (("llama", "model.layers.1"), ("gpt2", "transformer.h.1")):
        model = tiny_lm(kind)
        wanted = last_layers(model)
        chosen = [name for name, module in model.named_modules() if wanted(name)]
        assert "lm_head" in chosen
        assert len(chosen) > 1
        assert all(name == "lm_head" or name.startswith(block) for name in chosen)
        everything = last_layers(model, blocks=9)
        assert sum(everything(name) for name, _ in model.named_modules()) == 2 * len(chosen) - 1
    with pytest.raises(ValueError, match="name the layers"):
        last_layers(nn.Linear(2, 2))
    model.requires_grad_(False)
    last_layers(model)  # of a model that does not train at all, everything is measured
    model.transformer.h[0].attn.requires_grad_(True)
    with pytest.raises(ValueError, match=r"the head and those of transformer.h.1, are frozen: .*h.0.attn"):
        last_layers(model)
    model.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    with pytest.raises(ValueError, match="are frozen: no linear layer trains"):
        last_layers(model)


def test_linear_layers_below_the_blocks_are_not_among_those_by_default() -> None:
    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(vocab_size=97, word_embed_proj_dim=16, **sizes))
    wanted = last_layers(model)
    chosen = {name for name, _ in model.named_modules() if wanted(name)}
    assert {name for name in chosen if not name.startswith("model.decoder.layers.1.")} == {"lm_head"}


def test_the_backward_pass_ends_where_the_chosen_layers_end(tiny_lm: Models, token_batches: Batcher) -> None:
    model, samples = tiny_lm("llama"), token_batches(4)
    reached = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *args, n=number: reached.append((n, args[-1].requires_grad)))
    sample_influence(model, samples, {"a": samples})
    assert set(reached) == {(0, False), (1, True)}


def test_leaves_no_trace(tiny_lm: Models, token_batches: Batcher) -> None:
    model, samples = tiny_lm("gpt2", dropout=0.3), token_batches(4)
    before, state = {k: x.clone() for k, x in model.state_dict().items()}, torch.get_rng_state()
    sample_influence(model, samples, {"a": samples})
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_sequences_that_are_not_finite_score_nan_alone(tiny_lm: Models, token_batches: Batcher) -> None:
    model, samples = tiny_lm("llama"), token_batches(4)
    scorer = SampleScorer(model, {"a": token_batches(4, seed=1)}, samples)
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = torch.nan
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4], [1, 96, 3, 4]])}
    found = scorer(batch)
    assert np.isfinite(found.scores[0]).all()
    assert np.isnan(found.scores[1]).all()
    nothing = scorer({"input_ids": batch["input_ids"], "labels": torch.full((2, 4), -100)})
    assert np.isnan(nothing.scores).all()
    assert nothing.tokens.tolist() == [0, 0]


def test_refusals(tiny_lm: Models, token_batches: Batcher) -> None:
    model, samples = tiny_lm("llama"), token_batches(4)
    with pytest.raises(ValueError, match="tasks is empty"):
        sample_influence(model, samples, {})
    with pytest.raises(ValueError, match="samples is empty"):
        sample_influence(model, [], {"a": samples}, curvature_batches=samples)
    with pytest.raises(ValueError, match="read only once"):
        sample_influence(model, iter(samples), {"a": samples})
    with pytest.raises(ValueError, match="task 'a' has no batches"):
        sample_influence(model, samples, {"a": []})
    with pytest.raises(ValueError, match="selects no trainable linear layer"):
        sample_influence(model, samples, {"a": samples}, layers="nothing")


@pytest.mark.parametrize("curvature", [Identity(), EKFAC(), DataInf()])
def test_scores_by_token_add_up_to_those_of_sequences(tiny_lm: Models, token_batches: Batcher, curvature: Any) -> None:
    model = tiny_lm("llama", tied=True, dtype=torch.float64).eval()
    batches = token_batches(8, ragged=True)
    tasks = {"t": token_batches(4, seed=1), "u": token_batches(4, seed=2)}
    everything = r"^(?!.*nothing)"  # the embedding, which is one with the head, too
    scorer = SampleScorer(model, tasks, batches, curvature=curvature, layers=everything)
    for batch in batches:
        by_token = scorer.by_token(batch)
        assert by_token.shape == (*batch["input_ids"].shape, 2)
        np.testing.assert_allclose(by_token.sum(1), scorer(batch).scores, rtol=1e-8, atol=1e-12)
        assert (by_token[batch["attention_mask"].numpy() == 0] == 0).all()


def test_scores_by_token_are_products_of_a_layers_inputs_and_output_gradients(
    tiny_lm: Models, token_batches: Batcher
) -> None:
    model = tiny_lm("gpt2", dtype=torch.float64).eval()
    [batch], tasks = token_batches(3), {"t": token_batches(4, seed=1)}
    name = "transformer.h.1.mlp.c_proj"
    found = SampleScorer(model, tasks, [batch], curvature=Identity(), layers=name.replace(".", r"\.")).by_token(batch)
    towards = gradient(model, tasks["t"], [f"{name}.weight", f"{name}.bias"])
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, a, y: seen.extend([a[0], y]))
    nats, tokens = next_token_loss(model, batch)
    hook.remove()
    a, (g,) = seen[0], torch.autograd.grad(nats.sum(), [seen[1]])
    for row in range(3):
        for t in range(a.shape[1]):
            own = torch.cat([torch.outer(a[row, t], g[row, t]).flatten(), g[row, t]])  # GPT-2 keeps [in, out]
            np.testing.assert_allclose(found[row, t, 0], (own @ towards / tokens[row]).item(), rtol=1e-8, atol=1e-12)


def test_scores_by_token_refuse_stacked_experts(token_batches: Batcher) -> None:
    from tests.influence.test_layers import build

    model, batches = build("mixtral"), token_batches(4)
    scorer = SampleScorer(model, {"t": batches}, batches, curvature=Identity(), layers="experts")
    with pytest.raises(ValueError, match="through stacked experts"):
        scorer.by_token(batches[0])
