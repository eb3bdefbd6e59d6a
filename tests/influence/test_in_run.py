"""Against autograd by hand: the gradient of each micro-batch's summed loss, dotted with each row of R."""

import json
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn

from dynmix import EKFAC, Identity, Layers, group_influence
from dynmix.influence.batch import next_token_loss
from dynmix.influence.in_run import ParameterProducts, TokenProducts
from dynmix.influence.tally import Tally
from dynmix.influence.task_gradients import TaskGradients, sequence_products, task_gradients


def gradients_for(model: nn.Module, token_batches: Any, curvature: Any = None, **options: Any) -> TaskGradients:
    tasks = {"t": token_batches(6, seed=1, ragged=True), "u": token_batches(3, seed=2)}
    fit_on = token_batches(8, seed=3)
    return task_gradients(model, tasks, curvature or EKFAC(), fit_on, **{"folds": 2} | options)


def by_hand(model: nn.Module, batch: dict[str, Tensor], R: TaskGradients) -> np.ndarray:
    """<gradient of the batch's summed loss, R> by autograd in float64."""
    named = dict(model.named_parameters())
    losses, _ = next_token_loss(model, {k: v for k, v in batch.items() if k != "domain"})
    found = torch.autograd.grad(losses.sum(), [named[name] for name in R.parameters])
    products = [
        (stack.double() * g.double()).flatten(1).sum(1) for stack, g in zip(R.parameters.values(), found, strict=True)
    ]
    return torch.stack(products).sum(0).numpy()


def tokens_of(batch: dict[str, Tensor]) -> int:
    return int(batch["attention_mask"][:, 1:].sum())


def with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_both_forms_are_autograds(tiny_lm: Any, token_batches: Any, kind: str, tied: bool) -> None:
    """With micro-batches of different scored tokens, accumulated, and each loss scaled in a way of its own."""
    model = tiny_lm(kind, tied=tied)
    if tied and kind == "llama":
        first, second = (block.mlp for block in model.model.layers)
        second.up_proj.weight, second.up_proj.bias = first.up_proj.weight, first.up_proj.bias
    R = gradients_for(model, token_batches, layers=Layers(norms=True))
    assert R.folds == (2, 2)
    batches = token_batches(24, seed=5, ragged=True)
    expected = [by_hand(model, batch, R) for batch in batches]
    singles = [by_hand(model, {k: v[i : i + 1] for k, v in b.items()}, R) for b in batches for i in range(4)]
    whole, single = ParameterProducts(model, R), TokenProducts(model, R)
    for scale, batch in zip((0.37, 65536.0, 1e-4, 1.0, 2.0, 3.0), batches, strict=True):
        (model(**with_labels(batch)).loss * scale).backward()
    seen, apart = whole.take(), single.take()
    assert [float(one.tokens.sum()) for one in seen] == [tokens_of(batch) for batch in batches]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate([one.products for one in seen]), expected, atol=2e-5 * scale)
    np.testing.assert_allclose(np.concatenate([one.products for one in apart]), singles, atol=2e-5 * scale)
    assert np.concatenate([one.tokens for one in apart]).sum() == sum(map(tokens_of, batches))
    assert torch.equal(torch.cat([one.input_ids for one in seen]), torch.cat([b["input_ids"] for b in batches]))
    assert not whole.silent
    whole.detach()
    single.detach()
    model(**with_labels(batches[0])).loss.backward()
    assert whole.take() == single.take() == []


@pytest.mark.parametrize("every", [False, True])
def test_a_frozen_models_influence_is_the_group_influence(tiny_lm: Any, token_batches: Any, every: bool) -> None:
    model = tiny_lm("gpt2")
    tasks = {"t": token_batches(6, seed=1, ragged=True), "u": token_batches(4, seed=2)}
    domains = {"a": token_batches(8, seed=3, ragged=True), "b": token_batches(12, seed=4, ragged=True)}
    pool = [*domains["a"], *domains["b"]]
    expected = group_influence(model, domains, tasks, EKFAC(), error_sequences=None)
    R = task_gradients(model, tasks, EKFAC(), pool, folds=3)
    watch = (TokenProducts if every else ParameterProducts)(model, R)
    tally = Tally(2, R.folds)
    for number, batches in enumerate(domains.values()):
        for batch in batches:
            model(**with_labels(batch)).loss.backward()
        for seen in watch.take():
            tally.add(number, seen.products, seen.tokens)
    found = Tally(2, R.folds)
    found.load_state_dict(json.loads(json.dumps(tally.state_dict())))
    influence = found.influence(R, ["a", "b"])
    np.testing.assert_allclose(influence.scores, expected.scores, rtol=2e-4, atol=2e-5 * np.abs(expected.scores).max())
    np.testing.assert_allclose(influence.task_loss, expected.task_loss, rtol=1e-6)
    np.testing.assert_allclose(influence.task_loss_standard_error, expected.task_loss_standard_error, rtol=1e-6)
    assert influence.standard_error is not None
    assert np.isfinite(influence.standard_error).all()
    probes = sequence_products(model, R, domains)
    whole = np.stack([p.sum(0) / n.sum() for p, n in probes.values()], axis=1)
    by_task = np.stack([whole[rows].sum(0) for rows in R.rows])
    np.testing.assert_allclose(by_task, expected.scores, rtol=2e-4, atol=2e-5 * np.abs(expected.scores).max())


class Trained:
    """Four steps of two micro-batches, with dropout; what is differentiated is scaled, and some is checkpointed."""

    def __init__(self, model: Any, batches: Any, R: TaskGradients | None, **options: Any) -> None:
        torch.manual_seed(1)
        self.model, self.seen = model, list[Any]()
        watches = [] if R is None else [watch(model, R) for watch in (ParameterProducts, TokenProducts)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        if options.get("checkpoint"):
            model.gradient_checkpointing_enable({"use_reentrant": options["checkpoint"] == "reentrant"})
            model.enable_input_require_grads()
        dtype = options.get("autocast")
        self.trace: list[Tensor] = []
        if dtype is not None:  # as accelerate does it: what comes out are copies, and the loss is made before
            inner = torch.autocast("cpu", dtype)(type(model).forward)
            model.forward = MethodType(ConvertOutputsToFp32(inner), model)
        for number, batch in enumerate(batches):
            loss = model(**with_labels(batch), use_cache=False).loss / 2
            scaler.scale(loss).backward()
            self.trace.append(loss.detach())
            if number % 2:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                self.seen.append([watch.take() for watch in watches])
        self.trace += [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "options", [{}, {"checkpoint": "reentrant"}, {"checkpoint": "other"}, {"autocast": torch.bfloat16}]
)
def test_training_is_the_same_bit_for_bit(tiny_lm: Any, token_batches: Any, options: dict[str, Any]) -> None:
    batches = token_batches(32, seed=5, ragged=True)
    R = gradients_for(tiny_lm("llama"), token_batches, Identity())
    without = Trained(tiny_lm("llama", dropout=0.2), batches, None, **options)
    watched = Trained(tiny_lm("llama", dropout=0.2), batches, R, **options)
    assert all(torch.equal(a, b) for a, b in zip(without.trace, watched.trace, strict=True))
    for by_parameter, by_token in watched.seen:  # the two forms see the same, in a way of their own
        for one, other in zip(by_parameter, by_token, strict=True):
            expected, scale = other.products.sum(0), np.abs(other.products).sum(0).max()
            np.testing.assert_allclose(
                one.products[0], expected, atol=(3e-2 if "autocast" in options else 1e-4) * scale
            )


@pytest.mark.parametrize("checkpoint", [None, "reentrant", "other"])
def test_two_forward_passes_before_their_backward_passes(tiny_lm: Any, token_batches: Any, checkpoint: Any) -> None:
    model = tiny_lm("llama")
    R = gradients_for(model, token_batches, Identity())
    batches = token_batches(8, seed=5)
    singles = [by_hand(model, {k: v[i : i + 1] for k, v in b.items()}, R) for b in batches for i in range(4)]
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint == "reentrant"})
        model.enable_input_require_grads()
    watch = TokenProducts(model, R)
    for loss in [model(**with_labels(batch), use_cache=False).loss for batch in batches]:
        loss.backward()
    found = np.concatenate([one.products for one in watch.take()])
    np.testing.assert_allclose(found, singles, atol=2e-5 * np.abs(singles).max())


def test_a_gradient_that_did_not_come_by_the_logits_is_not_of_the_forward_pass_before(
    tiny_lm: Any, token_batches: Any
) -> None:
    model = tiny_lm("gpt2")
    watch = ParameterProducts(model, gradients_for(model, token_batches))
    first, second = token_batches(8, seed=5)
    model(**with_labels(first)).loss.backward()
    model(**with_labels(second), output_hidden_states=True).hidden_states[-1].sum().backward()
    with pytest.raises(ValueError, match="logits"):
        watch.take()


def test_an_evaluation_may_come_between_a_forward_pass_and_its_backward_pass(tiny_lm: Any, token_batches: Any) -> None:
    model = tiny_lm("gpt2")
    watch = ParameterProducts(model, gradients_for(model, token_batches))
    first, second = token_batches(8, seed=5)
    loss = model(**with_labels(first)).loss
    model.eval()(**second)
    model.train()
    loss.backward()
    assert [one.input_ids.tolist() for one in watch.take()] == [first["input_ids"].tolist()]


def test_positions_looked_up_once_for_all_sequences_are_refused(tiny_lm: Any, token_batches: Any) -> None:
    model = tiny_lm("gpt2")
    [batch] = token_batches(3, seed=5)
    for exclude in ("wpe", None):
        R = gradients_for(model, token_batches, Identity(), layers=Layers(exclude=exclude, embeddings=True))
        expected = by_hand(model, batch, R)
        whole, single = ParameterProducts(model, R), TokenProducts(model, R)
        model(**with_labels(batch)).loss.backward()
        [seen] = whole.take()
        np.testing.assert_allclose(seen.products[0], expected, atol=2e-5 * np.abs(expected).max())
        if exclude:
            [seen] = single.take()
            np.testing.assert_allclose(seen.products.sum(0), expected, atol=2e-5 * np.abs(expected).max())
        else:
            with pytest.raises(ValueError, match=r"'transformer\.wpe' looks up its rows once .* layers="):
                single.take()
        whole.detach()
        single.detach()


def step_of(model: nn.Module, batch: dict[str, Tensor], how: str) -> None:
    inputs = with_labels(batch)
    labels = inputs["labels"][:, 1:].flatten()

    def logits(some: dict[str, Tensor] = inputs) -> Tensor:
        given = {k: v for k, v in some.items() if k != "labels"}
        return model(**given).logits[:, :-1].flatten(0, 1)  # type: ignore[no-any-return]

    if how == "smoothed":
        F.cross_entropy(logits(), labels, label_smoothing=0.1).backward()
    elif how == "weighted":
        (F.cross_entropy(logits(), labels, reduction="none") * torch.linspace(0.5, 1, len(labels))).sum().backward()
    elif how == "together":
        (model(**inputs).loss + model(**inputs).loss).backward()
    elif how == "twice":
        loss = model(**inputs).loss
        loss.backward(retain_graph=True)
        loss.backward()
    elif how == "elsewhere":
        model(**inputs)
        sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    elif how == "fused":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.lm_head, "forward", lambda x: x.sum((1, 2)))
            model(input_ids=batch["input_ids"]).logits.sum().backward()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("smoothed", "label smoothing"),
        ("weighted", "tokens that weigh differently"),
        ("together", "several forward passes had one backward pass"),
        ("twice", "one of them two"),
        ("elsewhere", "the logits that the model returned had none"),
        ("fused", "a fused loss, such as Liger's"),
    ],
)
def test_what_cannot_be_undone_says_so_and_training_goes_on(
    tiny_lm: Any, token_batches: Any, how: str, message: str
) -> None:
    model = tiny_lm("llama")
    watch = ParameterProducts(model, gradients_for(model, token_batches, Identity()))
    step_of(model, token_batches(4, seed=5)[0], how)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad) or how == "fused"
    with pytest.raises(ValueError, match=message):
        watch.take()


def test_a_loss_made_outside_of_the_model_and_one_that_is_not_finite(tiny_lm: Any, token_batches: Any) -> None:
    """Which tokens are scored is then seen by their gradients; an evaluation in between is no training."""
    model = tiny_lm("llama")
    R = gradients_for(model, token_batches, Identity())
    watch, batch = ParameterProducts(model, R), token_batches(4, seed=5)[0]
    ids, labels = batch["input_ids"], batch["input_ids"][:, 1:].clone()
    labels[:, :4] = -100
    F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels.flatten()).backward()
    model.eval()(**with_labels(batch)).loss.backward()
    (model.train()(**with_labels(batch)).loss * torch.inf).backward()
    model(input_ids=ids, labels=torch.full_like(ids, -100)).logits.sum().mul(0).backward()
    [seen] = watch.take()
    assert seen.tokens.tolist() == [float((labels != -100).sum())]
    expected = by_hand(model, {"input_ids": ids, "labels": F.pad(labels, (1, 0), value=-100)}, R)
    np.testing.assert_allclose(seen.products[0], expected, atol=2e-5 * np.abs(expected).max())
    assert watch.skipped == 1


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.up, self.head = nn.Embedding(97, 8), nn.Linear(8, 12), nn.Linear(12, 97)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.up(self.embedding(input_ids)).relu())
        return logits


def test_compiled_models_with_a_loss_of_their_logits(token_batches: Any) -> None:
    batch = token_batches(4, seed=5)[0]
    ids = batch["input_ids"]
    R = gradients_for(Small(), token_batches, Identity())
    found = []
    for watched in (False, True):
        model = Small()
        compiled = torch.compile(model, backend="aot_eager")
        watch = ParameterProducts(compiled, R) if watched else None
        F.cross_entropy(compiled(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        found.append([p.grad for p in model.parameters()])
        if watch is not None:
            [seen] = watch.take()
            expected = by_hand(model, batch, R)
            np.testing.assert_allclose(seen.products[0], expected, atol=2e-5 * np.abs(expected).max())
            with pytest.raises(ValueError, match="which torch.compile hides"):
                TokenProducts(compiled, R)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_two_processes_with_ddp_and_fsdp2(processes: Any) -> None:
    status, printed = processes.run(Path(__file__).with_name("in_run_worker.py"), ranks=2)
    assert status == 0, printed[-3000:]
