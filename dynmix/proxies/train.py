"""One run: a proxy trained on a mixture by the Trainer, and its losses on the validation sets.

    runs/<run>/result.json              weights, and losses in nats per token; written last: the run is done
    runs/<run>/model/                   the proxy, as `from_pretrained` reads it
    runs/<run>/log_probabilities.npy    log p of each scored token of the sets, float16[n_tokens], nats
    runs/<run>/trainer/                 the Trainer's newest checkpoint, until the run is done

Knows a plan and a name; no other run, and no processes.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from dynmix.batches import Batch
from dynmix.influence.batch import next_token_labels, next_token_logits
from dynmix.influence.isolation import isolated
from dynmix.proxies.plan import Plan, new_model
from dynmix.snapshot import write_snapshot
from dynmix.trainer_checkpoint import newest_checkpoint
from dynmix.whole_file import whole_file, write_json

logger = logging.getLogger("dynmix.proxies")

CHECKPOINTS = 10  # of a run


def read_result(out: Path, run: str) -> dict[str, float] | None:
    """Return a run's loss on each validation set, in nats per token; None if it is not done."""
    file = out / "runs" / run / "result.json"
    losses: dict[str, float] | None = json.loads(file.read_text(encoding="utf-8"))["losses"] if file.exists() else None
    return losses


def train_run(out: Path, run: str, weights: Mapping[str, float]) -> None:
    """Train a run of the plan in a folder, from its newest checkpoint on if it has one, and keep its result.

    On a processor the result does not depend, to the last bit, on how often it was interrupted; with another number of
    threads it may.

    Raises:
        ValueError: the run diverged: a loss is not finite.
    """
    plan, folder = Plan.read(out), out / "runs" / run
    model = _trained(plan, weights, folder / "trainer")
    found = {name: token_log_probabilities(model, batches) for name, batches in plan.validation.items()}
    losses = {name: -float(values.mean(dtype=np.float64)) for name, values in found.items()}
    if bad := [name for name, loss in losses.items() if not np.isfinite(loss)]:
        raise ValueError(f"its loss on {bad[0]} is {losses[bad[0]]}: it diverged; give a lower learning rate")
    with whole_file(folder / "log_probabilities.npy") as beside, open(beside, "wb") as file:
        np.save(file, np.concatenate([*found.values()]).astype(np.float16))
    facts = {"weights": dict(weights), "training": plan.config["training"]}
    write_snapshot(model, folder / "model", facts)
    write_json(folder / "result.json", {"weights": dict(weights), "losses": losses})
    shutil.rmtree(folder / "trainer", ignore_errors=True)


def token_log_probabilities(model: nn.Module, batches: Sequence[Batch]) -> NDArray[np.float32]:
    """Return log p of each scored token, in the order of the batches, float32[n_tokens], nats; leaves no trace."""
    device, parts = next(model.parameters()).device, []
    with isolated(model), torch.no_grad():
        for batch in batches:
            inputs = {key: x.to(device) for key, x in batch.items()}
            labels = next_token_labels(inputs).flatten()
            logits = next_token_logits(model, inputs)[:, :-1].flatten(0, 1)
            nats = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
            parts.append(-nats[labels != -100].cpu().numpy())
    return np.concatenate(parts)


def _trained(plan: Plan, weights: Mapping[str, float], folder: Path) -> nn.Module:
    training = plan.training
    set_seed(training.seed)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        logger.info("goes on from %s", checkpoint)
    model = new_model(plan.model, checkpoint)
    every = -(-training.steps // CHECKPOINTS)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=training.steps,
            per_device_train_batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=training.steps // 10,
            train_sampling_strategy="sequential",
            save_strategy="steps",
            save_steps=every,
            save_total_limit=1,
            logging_steps=every,
            disable_tqdm=True,
            report_to="none",
            seed=training.seed,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=training.dataset(plan.config["paths"], weights),
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return model
