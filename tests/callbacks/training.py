"""A small Trainer run whose every sample is recorded; imported by tests and run as a script in processes of its own."""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from dynmix import MixtureDataset, Static, TiKMiXD
from dynmix.callbacks import MixtureCallback

DOMAINS, ROWS, LENGTH, VOCAB = ("web", "code", "noise"), 60, 16, 64
BATCH, STAGE_STEPS, STEPS = 8, 5, 20


def sequences(domain: int, rows: int = ROWS, salt: int = 0) -> list[dict[str, Any]]:
    """Sequences that say what they are: the domain, the row, then tokens of a distribution of the domain's own."""
    rng = np.random.default_rng((domain, salt))
    table = rng.integers(0, VOCAB, size=(rows, LENGTH))
    if domain < 2:
        table = np.cumsum(np.full((rows, LENGTH), 3 + domain), axis=1) % VOCAB + rng.integers(0, 2, (rows, LENGTH))
        table %= VOCAB
    table[:, 0], table[:, 1] = domain, np.arange(rows)
    return [{"input_ids": row.tolist()} for row in table]


def dataset(seed: int = 0, samples: int = STEPS * BATCH, **options: Any) -> MixtureDataset:
    return MixtureDataset(
        {name: sequences(i) for i, name in enumerate(DOMAINS)},
        weights={"web": 0.3, "code": 0.2, "noise": 0.5},
        num_samples=samples,
        seed=seed,
        block=BATCH,
        **options,
    )


def tasks() -> dict[str, Any]:
    return {"web": sequences(0, 12, salt=1), "code": sequences(1, 12, salt=1)}


def model(dropout: float = 0.1) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


class Recording(Trainer):
    """Writes down the (domain, row) of every sequence that reaches the model, and optionally kills itself."""

    def __init__(self, *args: Any, kill_at: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.order: list[list[int]] = []
        self.losses: list[float] = []
        self.kill_at = kill_at

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.order += inputs["input_ids"][:, :2].tolist()
        if self.kill_at and self.state.global_step + 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(float(loss))
        return loss


def run(
    output: Path,
    *,
    mixer: Any = None,
    callback: bool = True,
    extra: tuple[TrainerCallback, ...] = (),
    steps: int = STEPS,
    kill_at: int = 0,
    resume: bool = False,
    stages: list[Any] | None = None,
    options: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    evaluated: Callable[[MixtureDataset], Any] = lambda data: None,
    **arguments: Any,
) -> Recording:
    """Train; `arguments` go to TrainingArguments and `options` to MixtureCallback; `stages` are decided beforehand."""
    data = dataset(**data_options or {})
    for start, end, weights in stages or []:
        if start == 0:
            data.schedule.hold(end)
        else:
            data.schedule.publish(weights, start, end)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": 5e-3,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    made = [
        MixtureCallback(
            data,
            tasks=tasks(),
            mixer=mixer or TiKMiXD(confidence=0.0),  # so that each stage moves, whatever the noise
            **{
                "stage_steps": STAGE_STEPS,
                "probe_sequences": 8,
                "curvature_sequences": 16,
                "task_sequences": 12,
                "keep": 0,
            }
            | (options or {}),
        )
    ]
    trainer = Recording(
        model(),
        TrainingArguments(output_dir=str(output), **settings | arguments),
        train_dataset=data,
        eval_dataset=evaluated(data),
        callbacks=[*(made if callback else ()), *extra],
        kill_at=kill_at,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def facts(trainer: Recording) -> dict[str, Any]:
    """What two runs must agree on bit for bit."""
    data = trainer.train_dataset
    assert isinstance(data, MixtureDataset)
    state = trainer.model.state_dict()
    content = b"".join(state[name].detach().numpy().tobytes() for name in sorted(state))
    return {
        "order": trainer.order,
        "stages": [[s.start, s.end, s.weights] for s in data.schedule.stages],
        "parameters": hashlib.sha256(content).hexdigest(),
        "losses": trainer.losses,
    }


if __name__ == "__main__":
    folder, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    if given.pop("static", False):
        given["mixer"] = Static()
    trained = run(folder, **given)
    rank = os.environ.get("RANK", "0")
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts(trained)))
