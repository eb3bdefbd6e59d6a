import json
import logging
import math
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dynmix.checkpoints import Checkpoint, evenly_spaced, improvements, list_checkpoints, select_checkpoints
from dynmix.peaks import PeakSnapshots
from dynmix.snapshot import write_snapshot
from dynmix.tasks import Record, Task, TaskScore
from tests.small import word_tokenizer

VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, math.nan, math.inf, -math.inf])


def slow_peak(curve, higher, min_delta):
    """The definition: the last point is the peak if it beats the peak of what was before by more than min_delta."""
    if not curve:
        return None
    before, (step, value) = slow_peak(curve[:-1], higher, min_delta), curve[-1]
    if not math.isfinite(value):
        return before
    if before is None:
        return step, value
    gain = (value - before[1]) * (1 if higher else -1)
    return (step, value) if gain > min_delta else before


@given(st.lists(VALUES, max_size=12), st.booleans(), st.sampled_from([0.0, 0.25, 0.4]))
def test_the_peak_is_the_best_so_far_and_the_earliest_of_equals(values, higher, min_delta):
    curve = list(enumerate(values))
    metric = "accuracy" if higher else "loss"
    steps = list(improvements(curve, metric, min_delta))
    expected = slow_peak(curve, higher, min_delta)
    assert steps[-1:] == ([] if expected is None else [expected[0]])
    assert steps == [i for i in range(len(curve)) if (slow_peak(curve[: i + 1], higher, min_delta) or (-1,))[0] == i]
    if min_delta == 0 and expected:
        finite = [value for value in values if math.isfinite(value)]
        assert expected == (values.index(expected[1]), max(finite) if higher else min(finite))


WORDS = [f"w{i}" for i in range(30)]


def tokenizer():
    return word_tokenizer(WORDS, "w0", bos_token="w1")


def task(name, texts):
    return Task(name, [Record("here", "", text) for text in texts], tokenizer(), max_length=8)


def tasks():
    return {"up": task("up", ["w3 w4 w5 w6", "w7 w8 w9"]), "odd": task("odd", ["w29 w3 w28 w4"])}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a Trainer leaves: checkpoint-2, ..., checkpoint-8."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    rows = [{"input_ids": [(start + i) % 30 for i in range(8)]} for start in range(30)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, save_steps=2, learning_rate=1e-2, lr_scheduler_type="constant",
        per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [row | {"labels": row["input_ids"]} for row in rows]
    Trainer(LlamaForCausalLM(config), arguments, train_dataset=data).train()
    return folder


@pytest.fixture
def checkpoints(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def slow_losses(folder, sets):
    steps = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}
    return {
        name: {step: one.evaluate(LlamaForCausalLM.from_pretrained(steps[step])).loss for step in sorted(steps)}
        for name, one in sets.items()
    }


def test_selecting_from_a_folder_is_evaluating_every_checkpoint(checkpoints):
    losses = slow_losses(checkpoints, tasks())
    assert len(losses["up"]) == 4
    selected = select_checkpoints(checkpoints, tasks())
    for name, curve in losses.items():
        step = min(curve, key=curve.get)
        assert selected[name] == Checkpoint(checkpoints / f"checkpoint-{step}", step, curve[step])
    assert selected["up"].step != selected["odd"].step
    assert select_checkpoints(checkpoints, tasks(), min_delta=99.0)["up"].step == 2
    bits = select_checkpoints(checkpoints, tasks(), metric={"up": "bits_per_byte", "odd": "loss"})
    assert (bits["up"].step, bits["odd"]) == (selected["up"].step, selected["odd"])
    with pytest.raises(ValueError, match="metric='accuracy': no example of task 'up' has choices"):
        select_checkpoints(checkpoints, tasks(), metric="accuracy")
    with pytest.raises(ValueError, match="tasks is empty"):
        select_checkpoints(checkpoints, {})


def test_a_folder_that_can_be_read_alone_has_peaks_too(checkpoints, monkeypatch, caplog):
    def refused(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    want = select_checkpoints(checkpoints, tasks())
    (checkpoints / "evaluations.json").unlink()
    monkeypatch.setattr("dynmix.checkpoints.write_json", refused)
    assert select_checkpoints(checkpoints, tasks()) == want
    assert caplog.text.count("evaluations.json is not written") == 1


def test_a_killed_selection_goes_on_where_it_was(checkpoints, monkeypatch):
    real, calls = Task.evaluate, []

    def evaluate(self, model):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(self.name)
        return real(self, model)

    monkeypatch.setattr(Task, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        select_checkpoints(checkpoints, tasks())
    calls.extend("killed")
    select_checkpoints(checkpoints, tasks())
    assert len(calls) == 5 + len("killed") + 3
    first = select_checkpoints(checkpoints, tasks())
    assert len(calls) == 5 + len("killed") + 3
    # Another text under the name of a task, and other weights under the name of a checkpoint, are evaluated anew.
    select_checkpoints(checkpoints, tasks() | {"up": task("up", ["w5"])})
    assert len(calls) == 5 + len("killed") + 3 + 4
    shutil.copytree(checkpoints / "checkpoint-8", checkpoints / "checkpoint-2", dirs_exist_ok=True)
    os.utime(checkpoints / "checkpoint-2/model.safetensors", ns=(1, 1))
    assert select_checkpoints(checkpoints, tasks())["up"].value <= first["up"].value
    assert len(calls) == 5 + len("killed") + 3 + 4 + 2


def test_what_a_kill_left_broken_is_passed_over_and_named(checkpoints, caplog):
    losses = slow_losses(checkpoints, tasks())["up"]
    best = select_checkpoints(checkpoints, tasks())["up"].step
    weights = (checkpoints / f"checkpoint-{best}/model.safetensors").read_bytes()
    (checkpoints / f"checkpoint-{best}/model.safetensors").write_bytes(weights[:-50])
    whole = checkpoints / f"checkpoint-{2 if best != 2 else 4}"
    for number, broken in enumerate(("config.json", "model.safetensors")):
        shutil.copytree(whole, checkpoints / f"checkpoint-{90 + number}")
        (checkpoints / f"checkpoint-{90 + number}" / broken).unlink()
    shutil.copytree(whole, checkpoints / "checkpoint-92")
    (checkpoints / "checkpoint-92/config.json").write_text('{"model_type": "llama", "hidd')
    shutil.copytree(whole, checkpoints / "checkpoint-93")
    (checkpoints / "checkpoint-93/config.json").write_text(
        json.dumps(json.loads((whole / "config.json").read_text()) | {"num_hidden_layers": 2})
    )
    shutil.copytree(whole, checkpoints / "checkpoint-95")  # quantised by a package that is not here
    (checkpoints / "checkpoint-95/config.json").write_text(
        json.dumps(
            json.loads((whole / "config.json").read_text())
            | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        )
    )
    shutil.copytree(whole, checkpoints / "checkpoint-94")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (checkpoints / "checkpoint-94/model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoints / ".step-0000003.writing").mkdir()
    with caplog.at_level(logging.WARNING):
        selected = select_checkpoints(checkpoints, tasks())
    left = {step: loss for step, loss in losses.items() if step != best}
    assert selected["up"].step == min(left, key=left.get)
    for step in (best, 90, 91, 92, 93, 94, 95):
        assert f"checkpoint-{step} is passed over" in caplog.text
    assert "writing" not in caplog.text
    for path in checkpoints.glob("checkpoint-*"):
        (path / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no checkpoint in it"):
        select_checkpoints(checkpoints, tasks())


def test_checkpoints_of_all_kinds_are_listed_by_step(trained, tmp_path):
    model = LlamaForCausalLM.from_pretrained(trained / "checkpoint-2")
    for stage, step in ((1, 499), (2, 999)):
        write_snapshot(model, tmp_path / f"stage-{stage:04d}", {"stage": stage, "step": step})
    PeakSnapshots(tmp_path).record(model, 700, {"a": 1.0})
    for name in ("checkpoint-1000", "checkpoint-80", "iter_000300", "final"):
        shutil.copytree(trained / "checkpoint-2", tmp_path / name)
    (tmp_path / "step-5").write_text("a file")
    found = list_checkpoints(tmp_path)
    assert [c.step for c in found] == [80, 300, 499, 700, 999, 1000]
    assert [c.path.name for c in found[:4]] == ["checkpoint-80", "iter_000300", "stage-0001", "step-0000700"]
    assert all(c.value is None for c in found)


def test_evenly_spaced_and_last():
    found = [Checkpoint(None, step) for step in range(1, 11)]
    assert [c.step for c in evenly_spaced(found, 5)] == [2, 4, 6, 8, 10]
    assert [c.step for c in evenly_spaced(found, 3)] == [3, 6, 10]
    assert evenly_spaced(found, 1) == found[-1:]
    assert evenly_spaced(found, 99) == found
    with pytest.raises(ValueError, match="n=0"):
        evenly_spaced(found, 0)


def test_a_task_that_is_finite_nowhere_is_named(checkpoints, monkeypatch):
    nowhere = TaskScore(math.nan, math.nan, math.nan, math.nan, None, None, 1)
    monkeypatch.setattr(Task, "evaluate", lambda self, model: nowhere)
    with pytest.raises(ValueError, match="task 'up' has a finite loss in none of the 4 checkpoints"):
        select_checkpoints(checkpoints, tasks())


def test_damaged_evaluations_are_named_with_what_to_do(checkpoints):
    (checkpoints / "evaluations.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluations.json: damaged \(Expecting .*\): remove it"):
        select_checkpoints(checkpoints, tasks())
