import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from dynmix.callbacks import PeakCallback
from dynmix.peaks import PeakSnapshots
from dynmix.tasks import Record, Task
from tests.small import word_tokenizer

EVERY = 3


@pytest.fixture
def tasks(training):
    """Two domains' held-out sequences as texts, and one with choices."""
    tokenizer = word_tokenizer((f"w{i}" for i in range(training.VOCAB)), "w0", bos_token="w0")

    def text(row):
        return " ".join(f"w{i}" for i in row["input_ids"])

    made = {
        name: Task(name, [Record("here", "", text(row)) for row in training.sequences(i, 6, salt=1)], tokenizer)
        for i, name in ((0, "web"), (2, "noise"))
    }
    rows = [text(row).split() for row in training.sequences(1, 6, salt=1)]
    records = [Record("here", " ".join(r[:-1]), f" {r[-1]}", (f" {r[-1]}", f" {r[-2]}")) for r in rows]
    return {name: Task(name, task.records, tokenizer, max_length=16) for name, task in made.items()} | {
        "code": Task("code", records, tokenizer, max_length=16)
    }


METRIC = {"web": "loss", "noise": "bits_per_byte", "code": "accuracy"}


class Stop(TrainerCallback):
    """Ends a run as a kill does: between two steps, with nothing said to anybody."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def left(folder):
    """Everything that is in the folder, tensors and files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found[str(path.relative_to(folder))] = {name: t.tolist() for name, t in load_file(path).items()}
        elif path.suffix == ".json":
            found[str(path.relative_to(folder))] = json.loads(path.read_text())
    return found


def test_evaluating_leaves_the_trajectory_bit_identical(training, tmp_path, tasks):
    watched = training.run(tmp_path / "a", callback=False, extra=(PeakCallback(tasks, every=2),))
    alone = training.run(tmp_path / "b", callback=False)
    assert training.facts(watched) == training.facts(alone)
    assert [e["loss"] for e in watched.state.log_history if "loss" in e] == [
        e["loss"] for e in alone.state.log_history if "loss" in e
    ]


def test_peaks_are_of_the_model_as_it_was(training, tmp_path, tasks):
    callback = PeakCallback(tasks, every=EVERY, metric=METRIC)
    trainer = training.run(tmp_path, callback=False, extra=(callback,))
    history = trainer.state.log_history
    steps = [*range(EVERY, training.STEPS, EVERY), training.STEPS]
    logged = [entry for entry in history if "dynmix/task_loss/web" in entry]
    assert [entry["step"] for entry in logged] == steps
    assert "dynmix/task_accuracy/web" not in logged[0]
    peaks = PeakSnapshots(tmp_path / "peaks", metric=METRIC)
    assert [step for step, _ in peaks.curves["web"]] == steps
    assert [value for _, value in peaks.curves["web"]] == [entry["dynmix/task_loss/web"] for entry in logged]
    assert [value for _, value in peaks.curves["code"]] == [entry["dynmix/task_accuracy/code"] for entry in logged]
    assert len({peak.step for peak in peaks.selected.values()}) > 1
    for name, peak in peaks.selected.items():
        score = tasks[name].evaluate(type(trainer.model).from_pretrained(peak.path))
        assert score.metric(METRIC[name]) == pytest.approx(peak.value, rel=1e-6)
    # Without checkpoints nothing but the peaks is kept.
    assert {p.name for p in (tmp_path / "peaks").glob("step-*")} == {p.path.name for p in peaks.selected.values()}


@pytest.mark.parametrize("killed", [7, 11, 18])
def test_killed_and_resumed_it_ends_with_the_same_peaks(training, tmp_path, tasks, killed):
    settings = {"callback": False, "save_strategy": "steps", "save_steps": 4}

    def made():
        return PeakCallback(tasks, every=EVERY, metric=METRIC, keep=1)

    whole = training.run(tmp_path / "whole", extra=(made(),), **settings)
    with pytest.raises(KeyboardInterrupt):
        training.run(tmp_path / "killed", extra=(made(), Stop(killed)), **settings)
    resumed = training.run(tmp_path / "killed", extra=(made(),), resume=True, **settings)
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    assert left(tmp_path / "killed/peaks") == left(tmp_path / "whole/peaks")
    assert len(list((tmp_path / "whole/peaks").glob("step-*"))) <= 2 * (len(tasks) + 1)


def test_a_run_that_goes_on_in_another_folder_says_what_it_does_not_know(training, tmp_path, tasks, caplog):
    def run(folder, every, **options):
        extra = (PeakCallback(tasks, every=every, folder=tmp_path / folder),)
        training.run(tmp_path, callback=False, extra=extra, save_strategy="steps", save_steps=2, **options)

    run("first", every=5, steps=2)
    run("first", every=5, steps=4, resume=True)
    assert "peaks.json" not in caplog.text
    run("second", every=5, steps=6, resume=True)
    assert "second/peaks.json is not there: how the tasks did up to step 4 is not known" in caplog.text


def test_a_fresh_run_moves_an_earlier_ones_peaks_aside(training, tmp_path, tasks):
    for metric in ("loss", "bits_per_byte"):
        training.run(tmp_path, callback=False, steps=2, extra=(PeakCallback(tasks, every=1, metric=metric),))
    assert set(PeakSnapshots(tmp_path / "peaks/previous-1").selected) == set(tasks)
    assert set(PeakSnapshots(tmp_path / "peaks", metric="bits_per_byte").selected) == set(tasks)


@pytest.mark.parametrize("event", ["on_step_end", "on_log"])
def test_the_end_of_a_stopped_run_is_recorded(training, tmp_path, tasks, event):
    """Also where it is stopped once its last step has ended, as an evaluation does."""

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 7

    stopping = type("Stopping", (TrainerCallback,), {event: stop})()
    callback = PeakCallback(tasks, every=5, folder=tmp_path / "elsewhere")
    training.run(tmp_path, callback=False, extra=(stopping, callback))
    assert [step for step, _ in callback.snapshots.curves["web"]] == [5, 7]
    assert (tmp_path / "elsewhere/peaks.json").exists()


@pytest.mark.parametrize("arguments", [{"eval_strategy": "steps"}, {"eval_strategy": "epoch", "num_train_epochs": 3}])
def test_the_end_of_an_early_stop_is_recorded_before_the_best_model_is_put_back(training, tmp_path, tasks, arguments):
    kept = {}

    def on_evaluate(self, args, state, control, metrics, model, **kwargs):
        metrics["eval_worse"] = state.global_step  # the first is the best
        control.should_training_stop = state.global_step > 8
        kept[state.global_step] = {name: t.clone() for name, t in model.state_dict().items()}

    stopping = type("Stopping", (TrainerCallback,), {"on_evaluate": on_evaluate})()
    callback = PeakCallback(tasks, every=5)
    steps = {} if "num_train_epochs" in arguments else {"eval_steps": 4, "save_steps": 8}  # stopped where none is saved
    trainer = training.run(
        tmp_path,
        callback=False,
        extra=(callback, stopping),
        steps=training.STEPS if steps else -1,
        data_options={"samples": 8 * training.BATCH} if not steps else None,
        evaluated=lambda data: training.sequences(0, 4, salt=1),
        save_strategy=arguments["eval_strategy"],
        load_best_model_at_end=True,
        metric_for_best_model="worse",
        greater_is_better=False,
        **steps,
        **arguments,
    )
    end = trainer.state.global_step
    assert end < trainer.state.max_steps
    assert trainer.state.best_global_step < end
    assert callback.snapshots.last_step == end
    assert [e["step"] for e in trainer.state.log_history if "dynmix/task_loss/web" in e][-1] == end
    assert max(peak.step for peak in callback.snapshots.selected.values()) == end
    saved = load_file(tmp_path / f"peaks/step-{end:07d}/model.safetensors")
    assert all(torch.equal(tensor, kept[end][name]) for name, tensor in saved.items())


def test_an_evaluation_that_fails_does_not_end_the_run_unless_it_is_the_first(training, tmp_path, tasks, caplog):
    real, asked = tasks["web"].evaluate, []

    def evaluate(model, *, batch_tokens):
        asked.append(batch_tokens)
        if failure := failing.get(len(asked)):
            raise failure
        return real(model, batch_tokens=batch_tokens)

    tasks["web"].evaluate = evaluate
    failing = {2: torch.OutOfMemoryError("too little"), 4: RuntimeError("no kernel for it")}
    callback = PeakCallback(tasks, every=2, batch_tokens=64)
    trainer = training.run(tmp_path, callback=False, extra=(callback,), steps=8)
    assert trainer.state.global_step == 8
    assert asked == [64, 64, 32, 32, 32]
    assert [step for step, _ in callback.snapshots.curves["web"]] == [2, 4, 8]
    assert "the tasks were not evaluated after step 6: RuntimeError: no kernel for it" in caplog.text
    asked.clear()
    failing = dict.fromkeys(range(2, 6), RuntimeError("no kernel for it"))
    trainer = training.run(tmp_path, callback=False, extra=(PeakCallback(tasks, every=2),), steps=4)
    assert len(asked) == 2  # nor is it tried again at each event that ends a run
    assert [e["step"] for e in trainer.state.log_history if e.keys() == {"epoch", "step"}] == []
    asked.clear()
    failing = {1: RuntimeError("no kernel for it")}
    with pytest.raises(RuntimeError, match="no kernel"):
        training.run(tmp_path, callback=False, extra=(PeakCallback(tasks, every=2),), steps=4)


def test_what_cannot_work_is_refused_before_training(training, tmp_path, tasks):
    for arguments, message in (
        ({"every": 0}, "every=0"),
        ({"every": 1, "metric": "accuracy"}, "no example of task 'web' has choices"),
        ({"every": 1, "metric": {"web": "loss"}}, "metric of task 'noise' is None"),
        ({"every": 1, "min_delta": math.inf}, "min_delta=inf"),
        ({"every": 1, "tasks": {}}, "tasks is empty"),
        ({"every": 1, "keep": -1}, "keep=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            PeakCallback(**{"tasks": tasks} | arguments)
    long = Task("long", tasks["web"].records, tasks["web"]._tokenizer, max_length=17)
    with pytest.raises(ValueError, match="make the task with max_length=16"):
        training.run(tmp_path, callback=False, extra=(PeakCallback({"long": long}, every=1),))
