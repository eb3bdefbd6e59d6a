import json
import logging
import math
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dynmix.peaks import Checkpoint, PeakSnapshots, evenly_spaced, improvements, list_checkpoints, select_checkpoints
from dynmix.peaks import set_aside as set_folder_aside
from dynmix.snapshot import save_snapshot
from dynmix.tasks import Record, Task, TaskScore
from tests.small import word_tokenizer

VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, math.nan, math.inf, -math.inf])


def model_at(step):
    """A model that says which step it is of."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.bias, step)
    return model


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


def snapshots(folder):
    """Steps whose snapshot is there, checked to be the model of that step; nothing else lies in the folder."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name != "peaks.json":
            step = int(path.name.removeprefix("step-"))
            assert float(load_file(path / "model.safetensors")["bias"]) == step
            assert json.loads((path / "snapshot.json").read_text())["step"] == step
            found.append(step)
    return found


def on_disk(folder):
    return snapshots(folder), (folder / "peaks.json").read_text()


def run(peaks, curves, start, stop, saves, check=None):
    """Steps start + 1 ... stop; at `saves` the run writes a training checkpoint."""
    for step in range(start + 1, stop + 1):
        peaks.record(model_at(step), step, {task: curve[step - 1] for task, curve in curves.items()})
        if step in saves:
            peaks.prune(step)
        if check:
            check(step)


RUNS = st.integers(2, 9).flatmap(
    lambda n: st.tuples(
        st.fixed_dictionaries({task: st.lists(VALUES, min_size=n, max_size=n) for task in "ab"}),
        st.sets(st.integers(1, n)),
        st.integers(1, n),
    )
)


@given(RUNS, st.integers(0, 2), st.sampled_from([0.0, 0.3]))
@settings(max_examples=25)
def test_killed_and_resumed_it_ends_as_if_it_had_not_been(tmp_path_factory, drawn, keep, min_delta):
    curves, saves, killed = drawn
    saves |= {1}  # without a checkpoint nothing can be resumed
    folder, n = tmp_path_factory.mktemp("runs"), len(curves["a"])
    rule = {"metric": {"a": "loss", "b": "accuracy"}, "min_delta": min_delta, "keep": keep}
    run(PeakSnapshots(folder / "whole", **rule), curves, 0, n, saves)
    run(PeakSnapshots(folder / "killed", **rule), curves, 0, killed, saves)
    durable = max(step for step in saves if step <= killed)
    resumed = PeakSnapshots(folder / "killed", **rule)
    resumed.rewind(durable)
    run(resumed, curves, durable, n, saves)
    assert on_disk(folder / "killed") == on_disk(folder / "whole")
    for task, higher in (("a", False), ("b", True)):
        expected = slow_peak(list(enumerate(curves[task], 1)), higher, min_delta)
        chosen = resumed.selected.get(task)
        assert (chosen and (chosen.step, chosen.value)) == expected
        assert chosen is None or chosen.path.is_dir()


@given(RUNS, st.integers(0, 2))
@settings(max_examples=25)
def test_what_is_needed_stays_and_nothing_else(tmp_path_factory, drawn, keep):
    curves, saves, _ = drawn
    folder = tmp_path_factory.mktemp("run")
    peaks = PeakSnapshots(folder, keep=keep)

    def best(task, until):
        return slow_peak(list(enumerate(curves[task][:until], 1)), False, 0)

    def needed(until):
        new = [s for s in range(1, until + 1) if any((best(t, s) or (0,))[0] == s for t in curves)]
        return {found[0] for task in curves if (found := best(task, until))} | set(
            new[len(new) - keep :] if keep else []
        )

    durable = [0]

    def check(step):
        durable.extend({step} & saves)
        assert needed(step) | needed(durable[-1]) <= set(snapshots(folder))
        if step in saves:
            assert set(snapshots(folder)) == needed(step)
            assert len(snapshots(folder)) <= len(curves) + keep

    run(peaks, curves, 0, len(curves["a"]), saves, check)
    last = durable[-1]
    peaks.prune(last)
    assert set(snapshots(folder)) == needed(len(curves["a"])) | needed(last)


def recorded(folder, values, **rule):
    peaks = PeakSnapshots(folder, **rule)
    for step, value in values.items():
        peaks.record(model_at(step), step, {"a": value})
    return peaks


def test_record_says_for_which_tasks_it_is_the_best(tmp_path, caplog):
    peaks = PeakSnapshots(tmp_path)
    assert peaks.record(model_at(5), 5, {"a": 2.0, "b": 1.0}) == ["a", "b"]
    assert peaks.record(model_at(6), 6, {"a": 2.0, "b": 0.5}) == ["b"]
    assert peaks.record(model_at(7), 7, {"a": 3.0, "b": math.nan}) == []
    assert "step 7: the value of task 'b' is nan" in caplog.text
    assert peaks.selected == {
        "a": Checkpoint(tmp_path / "step-0000005", 5, 2.0),
        "b": Checkpoint(tmp_path / "step-0000006", 6, 0.5),
    }
    assert snapshots(tmp_path) == [5, 6]
    assert PeakSnapshots(tmp_path).selected == peaks.selected
    tasks = json.loads((tmp_path / "peaks.json").read_text())["tasks"]
    assert tasks["b"] == {
        "metric": "loss", "peak": {"step": 6, "value": 0.5}, "curve": [[5, 1.0], [6, 0.5], [7, None]],
    }  # fmt: skip


def test_going_back_past_the_last_checkpoint_falls_back_on_what_is_there(tmp_path, caplog):
    peaks = recorded(tmp_path, {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0})
    shutil.rmtree(tmp_path / "step-0000003")
    with caplog.at_level(logging.WARNING):
        peaks.rewind(3)
    assert "the snapshot of task 'a' at its peak, step 3, is gone; its peak is now step 2" in caplog.text
    assert snapshots(tmp_path) == [2]
    again = PeakSnapshots(tmp_path)
    assert again.selected == peaks.selected == {"a": Checkpoint(tmp_path / "step-0000002", 2, 4.0)}
    # Worse than what was lost, but the best that there is.
    assert again.record(model_at(4), 4, {"a": 3.5}) == ["a"]
    again.rewind(1)
    assert "its peak is now still to come" in caplog.text
    assert again.selected == {}


def test_a_lost_snapshot_leaves_no_task_with_a_peak_that_was_never_saved(tmp_path):
    """Without step 2, step 3 of task b would have been a peak, and step 4 none."""
    peaks = PeakSnapshots(tmp_path, min_delta=0.5)
    for step, a, b in ((1, 5.0, 5.0), (2, 4.0, 4.4), (3, 6.0, 4.2), (4, 6.0, 3.8)):
        peaks.record(model_at(step), step, {"b": b, "a": a})
    shutil.rmtree(tmp_path / "step-0000002")
    peaks.rewind(4)
    assert {task: peak.step for task, peak in peaks.selected.items()} == {"a": 1, "b": 4}


def test_a_kill_at_any_moment_leaves_nothing_half(tmp_path, monkeypatch):
    peaks = recorded(tmp_path, {1: 5.0, 2: 4.0})

    def killed(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dynmix.peaks.write_json", killed)  # the snapshot is there, and not yet in peaks.json
        with pytest.raises(KeyboardInterrupt):
            peaks.record(model_at(3), 3, {"a": 3.0})
    with monkeypatch.context() as patch:
        patch.setattr("dynmix.peaks.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            peaks.prune(2)
    assert [path.name for path in tmp_path.glob(".*")] == [".step-0000001.deleted"]
    again = PeakSnapshots(tmp_path)
    again.rewind(2)
    assert snapshots(tmp_path) == [2]


def test_a_task_may_have_any_name(tmp_path):
    name = os.fsdecode(b"stadt-\xc3\xa4-\xff")  # as of a file whose name is not UTF-8
    PeakSnapshots(tmp_path).record(model_at(1), 1, {name: 5.0})
    assert (tmp_path / "peaks.json").read_bytes().isascii()  # it is read back in whatever locale there is
    assert PeakSnapshots(tmp_path).selected[name].step == 1


def test_a_run_that_begins_afresh_does_not_trip_over_what_a_kill_left_half_deleted(tmp_path):
    recorded(tmp_path, {1: 5.0})
    (tmp_path / ".step-0000001.deleted").mkdir()
    (tmp_path / ".step-0000001.deleted" / "model.safetensors").touch()
    set_folder_aside(tmp_path)
    recorded(tmp_path, {1: 5.0, 2: 4.0}).prune(2)
    assert {path.name for path in tmp_path.iterdir()} == {"previous-1", "peaks.json", "step-0000002"}


def test_a_snapshot_that_cannot_be_written_is_no_peak(tmp_path, monkeypatch, caplog):
    peaks = recorded(tmp_path, {1: 5.0})

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dynmix.peaks.write_snapshot", full)
        assert peaks.record(model_at(2), 2, {"a": 3.0}) == []
    assert "step-0000002 was not saved and is no peak of ['a']" in caplog.text
    assert peaks.record(model_at(3), 3, {"a": 4.0}) == ["a"]
    assert PeakSnapshots(tmp_path).selected["a"].step == 3


def test_what_an_earlier_run_left_is_moved_aside(tmp_path):
    for number in (1, 2):
        recorded(tmp_path, {1: 5.0 - number})
        set_folder_aside(tmp_path)
        assert snapshots(tmp_path / f"previous-{number}") == [1]
    set_folder_aside(tmp_path)
    set_folder_aside(tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["previous-1", "previous-2"]


def test_impossible_arguments_and_other_files_are_refused(tmp_path):
    for arguments, message in (
        ({"metric": "perplexity"}, "metric='perplexity'"),
        ({"metric": {"a": "loss", "b": "bits"}}, "metric='bits'"),
        ({"min_delta": -1.0}, "min_delta=-1.0"),
        ({"min_delta": math.nan}, "min_delta=nan"),
        ({"keep": -1}, "keep=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            PeakSnapshots(tmp_path, **arguments)
    peaks = recorded(tmp_path, {3: 5.0})
    with pytest.raises(ValueError, match=r"step 3 comes after step 3 is recorded: call rewind\(2\)"):
        peaks.record(model_at(3), 3, {"a": 1.0})
    for arguments in ({"metric": "accuracy"}, {"min_delta": 0.1}):
        with pytest.raises(ValueError, match=r"peaks.json was recorded with metric=\{'a': 'loss'\} and min_delta=0.0"):
            PeakSnapshots(tmp_path, **arguments)
    with pytest.raises(ValueError, match="metric of task 'b' is None"):
        PeakSnapshots(tmp_path, metric={"a": "loss"}).record(model_at(4), 4, {"b": 1.0})
    for damage in ("{", "[]", '{"tasks": {"a": {}}}'):
        (tmp_path / "peaks.json").write_text(damage)
        with pytest.raises(ValueError, match="peaks.json: damaged"):
            PeakSnapshots(tmp_path)


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from dynmix.peaks import PeakSnapshots, set_aside
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
set_aside(folder)
peaks = PeakSnapshots(folder)
found = [peaks.record(torch.nn.Linear(1, 1), step, {"a": value}) for step, value in
         enumerate([3.0, 2.0, 4.0] if rank == 0 else [1.0, 5.0, 0.0], 1)]
peaks.prune(2)
peaks.rewind(2)
(folder / f"rank-{rank}").write_text(repr((found, peaks.selected, peaks.curves)))
"""


def test_every_rank_records_what_rank_0_has_measured(processes, tmp_path):
    (tmp_path / "two.py").write_text(TWO_RANKS)
    status, printed = processes.run(tmp_path / "two.py", tmp_path, ranks=2)
    assert status == 0, printed
    assert (tmp_path / "rank-0").read_text() == (tmp_path / "rank-1").read_text()
    assert (tmp_path / "rank-0").read_text().startswith("([['a'], ['a'], []], {'a': Checkpoint(path=")
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-0000002"]


# -- from a folder of checkpoints --------------------------------------------------------------------------------------

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
    monkeypatch.setattr("dynmix.peaks.write_json", refused)
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
    shutil.copytree(whole, checkpoints / "checkpoint-94")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (checkpoints / "checkpoint-94/model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoints / ".step-0000003.writing").mkdir()
    with caplog.at_level(logging.WARNING):
        selected = select_checkpoints(checkpoints, tasks())
    left = {step: loss for step, loss in losses.items() if step != best}
    assert selected["up"].step == min(left, key=left.get)
    for step in (best, 90, 91, 92, 93, 94):
        assert f"checkpoint-{step} is passed over" in caplog.text
    assert "writing" not in caplog.text
    for path in checkpoints.glob("checkpoint-*"):
        (path / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no checkpoint in it"):
        select_checkpoints(checkpoints, tasks())


def test_checkpoints_of_all_kinds_are_listed_by_step(trained, tmp_path):
    model = LlamaForCausalLM.from_pretrained(trained / "checkpoint-2")
    for stage, step in ((1, 499), (2, 999)):
        save_snapshot(model, tmp_path, stage, {"stage": stage, "step": step}, keep=9)
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
