"""The training loop of all runs: until a budget of operations is spent, whatever they are spent on.

The learning rate falls with what is spent, so that a run that pays for its mixture is a shorter whole run and not one
that was cut off. Killed at any moment, it goes on from its last state, bit for bit. Knows `MixtureHook` as any user's
loop does.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from dynmix import MixtureDataset
from dynmix.callbacks import MixtureHook

from .cost import Counter, Spent
from .training import Training

WARM_UP = 0.05  # of the budget


def cosine(share: float) -> float:
    """Share of the highest learning rate after this share of the budget."""
    return min(1.0, (share + 1e-3) / WARM_UP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def step_flops(training: Training, dataset: MixtureDataset) -> float:
    """Operations of one training step without any mixer. Changes the model: give it one that is thrown away."""
    with Counter() as counter:
        training.step(next(iter(DataLoader(dataset, batch_size=training.size.batch))))
    return float(counter.total)


def train(
    training: Training,
    dataset: MixtureDataset,
    hook: MixtureHook | None,
    spent: Spent,
    budget: float,
    state: Path,
    *,
    title: str = "",
    evaluate: Callable[[], Any] | None = None,
    curve: int = 8,
    save_every: int = 50,
    free: bool = False,
) -> list[dict[str, Any]]:
    """Train until `budget` operations are spent, and return the curve: what `evaluate` said at `curve` even points.

    Raises `SystemExit` where nothing of the budget is left.

    Args:
        training: the model, at its first step.
        dataset: read in order.
        hook: told of each step; None for none.
        spent: goes on from what was spent before.
        budget: operations, those of `spent` included.
        state: file that the run goes on from.
        title: of the bar.
        evaluate: called on the way, at nobody's cost.
        curve: how often.
        save_every: steps.
        free: what `hook` spends is written down, and not taken from the budget.
    """
    size = training.size
    first = spent.flops["before"]  # the run itself has what that has left

    def paid() -> float:
        return spent.total - free * spent.flops["mixing"]

    def done() -> float:
        return (paid() - first) / (budget - first)

    training.schedule = lambda step: cosine(done())
    if first >= budget:
        raise SystemExit(f"{title}: all of the budget is spent before the run begins")
    found: list[dict[str, Any]] = []
    per_step: float | None = None  # counted in the first, with all that watches it
    if state.exists():
        more = training.load(state)
        spent.flops, spent.seconds = more["spent"]["flops"], more["spent"]["seconds"]
        found, per_step = more["curve"], more["per_step"]
        if hook is not None:
            hook.load_state_dict(more["hook"])
    loader = DataLoader(dataset, batch_size=size.batch, sampler=range(training.steps * size.batch, len(dataset)))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(escape(title), total=budget, completed=int(paid()))
        for batch in loader:
            if paid() >= budget:
                break
            before = spent.flops["training"]
            with spent.on("training", per_step):
                training.step(batch)
            if per_step is None:
                per_step = spent.flops["training"] - before
            if hook is not None:
                with spent.on("mixing"):
                    hook.step()
            if evaluate is not None and done() >= (len(found) + 1) / curve and len(found) < curve - 1:
                found.append({"tokens": training.steps * size.step_tokens, "loss": evaluate()})
            if training.steps % save_every == 0:
                more = {"spent": asdict(spent), "curve": found, "per_step": per_step}
                training.save(state, more | {"hook": None if hook is None else hook.state_dict()})
            bar.update(task, completed=paid())
    if evaluate is not None:
        found.append({"tokens": training.steps * size.step_tokens, "loss": evaluate()})
    return found
