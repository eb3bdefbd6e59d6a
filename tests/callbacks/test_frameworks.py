"""The two adapters in the loops people have: accelerate, Fabric, torch.compile, checkpointing, autocast, PEFT, TRL."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from dynmix import MixtureDataset, TiKMiXD
from dynmix.callbacks import MixtureCallback, MixtureHook
from dynmix.journal import Journal
from dynmix.snapshot import load_model
from tests.small import word_tokenizer

OPTIONS: dict[str, Any] = {"probe_sequences": 8, "curvature_sequences": 16, "task_sequences": 12, "keep": 0}
MIXER = TiKMiXD(confidence=0.0)


def bare(training, output: Path | None, weights: dict[int, dict[str, float]] | None) -> tuple[list[Any], list[Any]]:
    """A loop with everything at once: compiled, checkpointed, in bf16 autocast. With `weights` nothing is measured."""
    model, dataset = training.model(dropout=0.1), training.dataset()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch_size = training.BATCH
    hook = None
    if weights is None:
        hook = MixtureHook(
            compiled, dataset, training.tasks(), MIXER, training.STAGE_STEPS, batch_size=batch_size, output=output,
            **OPTIONS,
        )  # fmt: skip
    else:
        starts = sorted(weights)
        dataset.schedule.hold(starts[0])
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            dataset.publish(weights[start], start, end)
    order: list[Any] = []
    for batch in DataLoader(dataset, batch_size=batch_size):
        order += batch["input_ids"][:, :2].tolist()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if hook is not None:
            hook.step()
    if hook is not None:
        hook.finish()
    stages = [(stage.start, stage.weights) for stage in dataset.schedule.stages]
    return [order, [p.detach().clone() for p in model.parameters()]], stages


def test_a_compiled_checkpointed_bf16_loop_trains_bit_identical(training, tmp_path):
    (order, parameters), stages = bare(training, tmp_path, None)
    assert len(stages) == 4
    assert stages[0][1] != stages[1][1]
    (plain_order, plain), _ = bare(training, None, dict(stages[1:]))
    assert order == plain_order
    assert all(torch.equal(p, q) for p, q in zip(parameters, plain, strict=True))


def test_an_accelerate_loop_goes_on_bit_for_bit(training, tmp_path):
    def run(folder: Path, stop_at: int | None = None, resume: bool = False) -> tuple[list[Any], Any, Any]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, dataset = training.model(dropout=0.0), training.dataset()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        hook = MixtureHook(
            model, dataset, training.tasks(), MIXER, training.STAGE_STEPS, batch_size=training.BATCH,
            output=folder / "dynmix", **OPTIONS,
        )  # fmt: skip
        if resume:
            state = torch.load(folder / "state.pt", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            hook.load_state_dict(state["hook"])
        loader = DataLoader(dataset, batch_size=training.BATCH // 2, sampler=range(hook.position, len(dataset)))
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        order: list[Any] = []
        for batch in loader:
            with accelerator.accumulate(model):
                order += batch["input_ids"][:, :2].tolist()
                accelerator.backward(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                hook.step()
                if hook.steps == stop_at:
                    inner = accelerator.unwrap_model(model).state_dict()
                    saved = {"model": inner, "optimizer": optimizer.state_dict(), "hook": hook.state_dict()}
                    torch.save(saved, folder / "state.pt")
                    break
        stages = [(stage.start, stage.weights) for stage in dataset.schedule.stages]
        return order, stages, [p.detach() for p in accelerator.unwrap_model(model).parameters()]

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    order, stages, parameters = run(tmp_path / "whole")
    first, _, _ = run(tmp_path / "cut", stop_at=9)
    rest, resumed_stages, resumed = run(tmp_path / "cut", resume=True)
    assert first + rest == order
    assert resumed_stages == stages
    assert all(torch.equal(p, q) for p, q in zip(parameters, resumed, strict=True))


def test_in_a_fabric_loop_of_mixed_precision_the_model_itself_is_measured_and_saved(training, tmp_path):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    own, dataset = training.model(dropout=0.0), training.dataset()
    # What it sets up refuses a backward pass that is not fabric.backward.
    model, optimizer = fabric.setup(own, torch.optim.AdamW(own.parameters(), lr=1e-2))
    hook = MixtureHook(
        model, dataset, training.tasks(), MIXER, training.STAGE_STEPS, output=tmp_path, **{**OPTIONS, "keep": 1}
    )
    for batch in fabric.setup_dataloaders(DataLoader(dataset, batch_size=training.BATCH)):
        fabric.backward(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)
        optimizer.step()
        optimizer.zero_grad()
        hook.step()
    hook.finish()
    rows = Journal(tmp_path / "journal.jsonl").rows()
    assert len(dataset.schedule.stages) == 4
    assert all(row["error"] is None for row in rows)
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "LlamaForCausalLM"
    assert type(load_model(tmp_path / "snapshots/stage-0003")) is type(own)


def test_lora_adapters_are_what_is_measured_and_what_trains(training, tmp_path, monkeypatch):
    model = get_peft_model(training.model(dropout=0.0), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    monkeypatch.setattr(training, "model", lambda: model)
    trainer = training.run(tmp_path, options={"layers": "lora"})
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert len(trainer.train_dataset.schedule.stages) == 4
    assert all(row["error"] is None for row in rows)
    assert rows[-1]["task_loss"]["web"] < rows[0]["task_loss"]["web"]


WORDS = ["<eos>", "<pad>", "user", "assistant", *(f"w{i}" for i in range(60))]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"


def chats(low: int, count: int, tokenizer: Any) -> Dataset:
    """Questions with answers that follow from them, as a data set of `messages`; the answers alone are trained on."""

    def one(i: int) -> dict[str, list[int]]:
        words = [f"w{low + (i + k) % 20}" for k in range(6)]
        messages = [
            {"role": "user", "content": " ".join(words[:3])},
            {"role": "assistant", "content": " ".join(words[3:])},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        row = tokenizer(text, padding="max_length", max_length=16)
        answer = row["input_ids"].index(WORDS.index("assistant"))
        labels = [
            token if place > answer and real else -100
            for place, (token, real) in enumerate(zip(row["input_ids"], row["attention_mask"], strict=True))
        ]
        return {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": labels}

    return Dataset.from_list([one(i) for i in range(count)])


@pytest.mark.parametrize("mixer", [MIXER, {"name": "odm", "alpha": 0.9}])
def test_trl_trains_on_domains_of_chats(training, tmp_path, mixer):
    trl = pytest.importorskip("trl")
    tokenizer = word_tokenizer(WORDS, "<eos>", eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE)
    domains = {name: chats(low, 40, tokenizer) for name, low in (("low", 0), ("high", 30))}
    dataset = MixtureDataset(domains, "uniform", num_samples=160, sequence_length=16, block=8)
    tasks = {"high": list(chats(30, 12, tokenizer))}
    callback = MixtureCallback(dataset, tasks, mixer, 5, guards=None, **OPTIONS)
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=20, per_device_train_batch_size=8, train_sampling_strategy="sequential",
        learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False, save_strategy="no", logging_steps=1,
        gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        training.model(dropout=0.0), arguments, train_dataset=domains["low"], processing_class=tokenizer,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train_dataset = dataset  # SFTTrainer's own argument has to be a data set of `datasets`
    trainer.train()
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert all(row["error"] is None for row in rows)
    assert mixer != MIXER or dataset.schedule.stages[-1].weights["high"] > 0.5
    assert rows[-1]["task_loss"]["high"] < rows[0]["task_loss"]["high"] - 0.5
