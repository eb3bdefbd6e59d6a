"""DoGE's proxy against its authors' rule, worked out one gradient after the other."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.pretraining.cost import Counter
from benchmarks.pretraining.doge import DogeProxy
from benchmarks.pretraining.training import Size

SIZE = Size(hidden=16, layers=1, heads=1, length=12, batch=4, rate=0.05)


def proxy() -> DogeProxy:
    """Two examples a step of each of two tasks, one of them of short examples."""
    drawn = np.random.default_rng(0)
    lengths = {"long": (12, 9, 12), "short": (3, 4, 5)}
    tasks: dict[str, Any] = {
        name: [{"input_ids": drawn.integers(1, 30, length)} for length in of] for name, of in lengths.items()
    }
    return DogeProxy(SIZE, 30, 0, "cpu", 2, tasks)


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.from_numpy(np.random.default_rng(seed).integers(1, 30, (4, 12)))
    return {"input_ids": ids, "labels": ids.clone(), "domain": torch.tensor([1, 0, 0, 1])}


def test_a_step_follows_the_authors_rule() -> None:
    training, given = proxy(), batch(0)
    model = copy.deepcopy(training.model)

    def gradient(ids: Tensor, labels: Tensor) -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def product(one: list[Tensor], other: list[Tensor]) -> float:
        return sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))

    own = [gradient(given["input_ids"][given["domain"] == j], given["labels"][given["domain"] == j]) for j in (0, 1)]
    aims = [gradient(ids[:2], labels[:2]) for ids, labels in training._tasks]
    scores = np.array([sum(product(g, aim) for aim in aims) for g in own])
    moved = np.exp(SIZE.rate / 0.05 * np.clip(scores / np.mean([np.sqrt(product(g, g)) for g in own]), 0, 5))
    alpha = moved / moved.sum()
    assert abs(alpha[0] - 0.5) > 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr=SIZE.rate, betas=(0.9, 0.95), weight_decay=0.1)
    for parameter, a, b in zip(model.parameters(), *own, strict=True):
        parameter.grad = float(alpha[0]) * a + float(alpha[1]) * b
    optimizer.step()
    training.step(given)
    np.testing.assert_allclose(training.alpha, alpha, rtol=1e-5)
    np.testing.assert_allclose(training.mean, alpha, rtol=1e-5)
    for ours, theirs in zip(training.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_examples_are_read_in_turn_and_their_padding_is_not_learnt_from() -> None:
    training = proxy()
    ids, labels = training._tasks[1]
    assert ids.shape == labels.shape == (3, 12)
    assert (labels != -100).sum(1).tolist() == [3, 4, 5]
    training.steps = 1
    assert training._examples(ids, labels)[1].equal(labels[[2, 0]])


def test_a_proxy_goes_on_bit_for_bit_and_every_step_costs_the_same(tmp_path: Path) -> None:
    one, costs = proxy(), []
    for seed in range(4):
        with Counter() as counter:
            one.step(batch(seed))
        costs.append(counter.total)
        if seed == 1:
            one.save(tmp_path / "state.pt", {"found": 3})
    assert len(set(costs)) == 1
    other = proxy()
    assert other.load(tmp_path / "state.pt") == {"found": 3}
    for seed in (2, 3):
        other.step(batch(seed))
    assert one.alpha.equal(other.alpha)
    assert one.mean.equal(other.mean)
    assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))
