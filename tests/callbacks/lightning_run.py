"""A small run of Lightning's Trainer whose every sample is recorded; imported by tests, and run as ranks."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from dynmix import TiKMiXD
from dynmix.callbacks.lightning import MixtureCallback
from tests.callbacks import training


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = training.model(dropout=0.0)
        self.order: list[list[int]] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self.order += batch["input_ids"][:, :2].tolist()
        loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        assert isinstance(loss, torch.Tensor)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Manual(Module):
    automatic_optimization = False

    def __init__(self, steps_of_a_batch: float) -> None:
        super().__init__()
        self.steps_of_a_batch = steps_of_a_batch

    def training_step(self, batch: dict[str, Any], number: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, number))
        optimizer: Any = self.optimizers()
        for _ in range(int((number + 1) * self.steps_of_a_batch) - int(number * self.steps_of_a_batch)):
            optimizer.step()
        optimizer.zero_grad()


class Stop(pl.Callback):
    """Ends a run, and saves it as Lightning's ModelCheckpoint does."""

    def __init__(self, step: float, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:
        if number + 1 == self.step * trainer.accumulate_grad_batches:
            trainer.should_stop = True
            trainer.save_checkpoint(self.path)


class Result:
    def __init__(self, module: Module, dataset: Any) -> None:
        self.model, self.train_dataset, self.order, self.losses = module.model, dataset, module.order, []


def run(
    output: Path,
    *,
    accumulation: int = 1,
    workers: int = 0,
    stop_at: float | None = None,
    steps_of_a_batch: float = 0,
    resume: bool = False,
    callback: bool = True,
    shuffle: bool = False,
    in_order: bool = False,
    model: str = "model",
    processes: int = 1,
    trainer: dict[str, Any] | None = None,
) -> Any:
    """What two runs must agree on; `stop_at` a step ends it there, with a checkpoint that `resume` goes on from.

    With `steps_of_a_batch` the module steps by itself: so often a batch, or once in several.
    """
    module, dataset = Manual(steps_of_a_batch) if steps_of_a_batch else Module(), training.dataset()
    made = MixtureCallback(
        dataset, training.tasks(), TiKMiXD(confidence=0.0), training.STAGE_STEPS, model=model,
        probe_sequences=8, curvature_sequences=16, task_sequences=12, keep=0,
    )  # fmt: skip
    loader = DataLoader(
        dataset,
        batch_size=training.BATCH // accumulation // processes,
        sampler=None if shuffle or in_order else made.sampler,
        shuffle=shuffle,
        num_workers=workers,
    )
    runner = pl.Trainer(
        **{
            "default_root_dir": output, "max_steps": training.STEPS, "accumulate_grad_batches": accumulation,
            "accelerator": "cpu", "devices": processes, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False,
            "callbacks": [*([made] if callback else []), *([Stop(stop_at, output / "run.ckpt")] if stop_at else [])],
        }
        | (trainer or {})
    )  # fmt: skip
    runner.fit(module, loader, ckpt_path=output / "run.ckpt" if resume else None)
    return training.facts(Result(module, dataset))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    facts = run(folder, **json.loads(sys.argv[2]))
    (folder / f"facts-{os.environ['RANK']}.json").write_text(json.dumps(facts))
