import json
import logging
import random
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import dynmix.controller
import dynmix.measurement
from dynmix import Influence, Static, TiKMiXD
from dynmix.callbacks import MixtureCallback
from dynmix.journal import Journal


@pytest.fixture(scope="module")
def plain(training, tmp_path_factory):
    """The run that all others are compared with: no worker, no accumulation, one process, no interruption."""
    folder = tmp_path_factory.mktemp("plain")
    trainer = training.run(folder)
    return trainer, training.facts(trainer), Journal(folder / "dynmix/journal.jsonl").rows()


def expected_order(training, trainer) -> list[list[int]]:
    domain, row, _ = trainer.train_dataset.schedule.assign(0, training.STEPS * training.BATCH)
    return np.stack([domain, row], axis=1).tolist()


def test_each_stage_starts_at_its_sample_and_the_weights_moved(plain, training):
    trainer, facts, rows = plain
    assert facts["order"] == expected_order(training, trainer)
    stage = training.STAGE_STEPS * training.BATCH
    assert [s[0] for s in facts["stages"]] == [0, stage, 2 * stage, 3 * stage]
    for k, (start, end, weights) in enumerate(facts["stages"]):
        drawn = np.bincount([d for d, _ in facts["order"][start : end or None]], minlength=3) / stage
        np.testing.assert_allclose(drawn, list(weights.values()), atol=2 / stage + 1e-9)
        if k:
            assert weights != facts["stages"][k - 1][2]
    assert facts["stages"][-1][2]["noise"] < 0.5
    assert [row["kind"] for row in rows] == ["stage"] * 4 + ["final"]


def test_journal_rows_say_what_happened(plain, training):
    _, facts, rows = plain
    for k, row in enumerate(rows[:-1]):
        start, end, weights = facts["stages"][k]
        assert (row["stage"], row["start"], row["end"], row["weights"]) == (k, start, end, weights)
        counts = np.bincount([d for d, _ in facts["order"][:start]], minlength=3) * training.LENGTH
        assert list(row["tokens"].values()) == counts.tolist()
        assert row["weights_before"] == (None if k == 0 else facts["stages"][k - 1][2])
        if k:
            assert np.shape(row["influence"]) == np.shape(row["standard_error"]) == (3, 3)
            assert (row["tasks"], row["guards"]) == (["web", "code", "held-out"], ["held-out"])
            assert row["step"] == k * training.STAGE_STEPS - 1
            assert min(row["predicted_gain"].values()) >= -1e-9
            assert row["error"] is None
    assert sum(rows[-1]["tokens"].values()) == training.STEPS * training.BATCH * training.LENGTH
    assert all(rows[-1]["task_loss"][task] < rows[0]["task_loss"][task] for task in ("web", "code"))


def test_log_keys_arrive_and_the_training_loss_is_not_lost(plain, training):
    history = plain[0].state.log_history
    decided = [entry for entry in history if "dynmix/weight/web" in entry and "dynmix/influence/web/noise" in entry]
    assert [entry["step"] for entry in decided] == [4, 9, 14]
    for key in ("dynmix/stage", "dynmix/tokens/code", "dynmix/task_loss/web", "dynmix/seconds/measure"):
        assert all(key in entry for entry in decided)
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, training.STEPS + 1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"dataloader_num_workers": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2},
    ],
)
def test_order_and_stages_do_not_depend_on_workers_or_accumulation(plain, training, tmp_path, arguments):
    # The static mixer, because accumulation changes the rounding of gradients and with it what is measured.
    reference = training.run(tmp_path / "a", mixer=Static())
    trainer = training.run(tmp_path / "b", mixer=Static(), **arguments)
    assert trainer.order == reference.order == expected_order(training, reference)
    if "gradient_accumulation_steps" not in arguments:
        assert training.facts(training.run(tmp_path / "c", **arguments)) == plain[1]


def test_two_processes_take_the_same_samples_and_decide_alike(plain, training, launch, tmp_path):
    launch(tmp_path, ranks=2, per_device_train_batch_size=training.BATCH // 2)
    ranks = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["stages"] == ranks[1]["stages"]
    assert ranks[0]["parameters"] == ranks[1]["parameters"]
    half = training.BATCH // 2
    joined = []
    for step in range(training.STEPS):
        for rank in ranks:
            joined += rank["order"][step * half : (step + 1) * half]
    first = training.STAGE_STEPS * training.BATCH
    assert joined[:first] == plain[1]["order"][:first]
    # Each rank has its own dropout, so the decided weights are not the plain run's; the order follows from them alone.
    decided = training.dataset().schedule
    decided.hold(first)
    for start, end, weights in ranks[0]["stages"][1:]:
        decided.publish(weights, start, end)
    domain, row, _ = decided.assign(0, training.STEPS * training.BATCH)
    assert joined == np.stack([domain, row], axis=1).tolist()


def test_stages_that_came_from_another_process_stay_as_they_are(training, sent, tmp_path):
    """As where accelerate's notebook_launcher starts the ranks: they would all decide in one memory."""
    shared = sent.schedule
    training.run(tmp_path)
    assert (sent.schedule.num_stages, shared.num_stages, shared.end) == (4, 1, None)


def test_killed_at_a_random_step_and_resumed_it_ends_bit_for_bit_the_same(launch, training, tmp_path):
    checkpoints = {"save_strategy": "steps", "save_steps": 3}
    launch(tmp_path / "whole", **checkpoints)
    whole = json.loads((tmp_path / "whole/facts-0.json").read_text())
    kill_at = random.randint(5, training.STEPS)
    print("killed at step", kill_at)
    assert launch(tmp_path / "killed", kill_at=kill_at, **checkpoints) == -9
    assert not (tmp_path / "killed/facts-0.json").exists()
    launch(tmp_path / "killed", resume=True, **checkpoints)
    resumed = json.loads((tmp_path / "killed/facts-0.json").read_text())
    saved = (kill_at - 1) // 3 * 3
    assert resumed["order"] == whole["order"][saved * training.BATCH :]
    assert resumed["losses"] == whole["losses"][saved:]
    assert resumed["stages"] == whole["stages"]
    assert resumed["parameters"] == whole["parameters"]

    def told(name: str) -> list:
        rows = Journal(tmp_path / name / "dynmix/journal.jsonl").rows()
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    assert told("killed") == told("whole")


def test_measuring_leaves_the_trajectory_bit_identical(training, tmp_path):
    measured = training.run(tmp_path / "a", mixer=Static(observe=True))
    unmeasured = training.run(tmp_path / "b", mixer=Static())
    without = training.run(tmp_path / "c", callback=False, stages=training.facts(measured)["stages"])
    assert training.facts(measured) == training.facts(unmeasured) == training.facts(without)
    rows = Journal(tmp_path / "a/dynmix/journal.jsonl").rows()
    assert sum(row["influence"] is not None for row in rows) == 3


def broken(monkeypatch, how):
    """Replace the measurement at boundaries, after the rehearsal."""
    real, calls = dynmix.measurement.group_influence, []

    def measure(*args, **kwargs):
        calls.append(1)
        return how(real(*args, **kwargs)) if len(calls) > 1 else real(*args, **kwargs)

    monkeypatch.setattr(dynmix.measurement, "group_influence", measure)


def raises(influence):
    raise RuntimeError("no kernel for it")


def with_nan(influence):
    scores = influence.scores.copy()
    scores[0, 1] = np.nan
    return Influence(scores, influence.tasks, influence.domains, influence.standard_error)


@pytest.mark.parametrize(("how", "word"), [(raises, "no kernel for it"), (with_nan, "not finite")])
def test_a_failed_measurement_keeps_the_weights_and_says_so(training, tmp_path, monkeypatch, caplog, how, word):
    broken(monkeypatch, how)
    with caplog.at_level(logging.WARNING, logger="dynmix"):
        trainer = training.run(tmp_path)
    stages = training.facts(trainer)["stages"]
    assert len(stages) == 4
    assert all(weights == stages[0][2] for _, _, weights in stages)
    assert word in caplog.text
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert all(word in row["error"] for row in rows[1:4])
    assert len(trainer.losses) == training.STEPS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='sequential'"),
        ({"steps": 21}, "raise num_samples to 168"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"options": {"max_epochs": 0.5}}, "max_epochs leaves 90 samples"),
        ({"options": {"max_epochs": {"noise": 0.2}}}, "first stage alone exceeds max_epochs"),
    ],
)
def test_what_cannot_work_is_refused_before_training(training, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        training.run(tmp_path, **arguments)


def test_a_loader_of_its_own_with_other_batches_is_refused(training, tmp_path, monkeypatch):
    """Steps would be no positions: stages would begin late, and a domain's tokens be counted that nobody read."""

    def own(self):
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)

    monkeypatch.setattr(training.Recording, "get_train_dataloader", own)
    with pytest.raises(ValueError, match="3 steps of 8 samples, but the loader has read only up to sample 12: let get"):
        training.run(tmp_path)


def test_processes_that_share_samples_are_refused(training, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "get_total_train_batch_size", lambda self, args: 2)
    with pytest.raises(ValueError, match="1 processes take 2 samples a step and not 8: in tensor, context and"):
        training.run(tmp_path)


def test_a_loader_that_would_go_on_at_another_sample_is_refused(training, tmp_path, monkeypatch):
    """Of batches that process 0 sends to two processes accelerate skips half as many as were taken."""
    training.run(tmp_path, steps=6, mixer=Static(), save_strategy="steps", save_steps=6)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="dispatch_batches=True: as it resumes.*set it to False"):
        training.run(tmp_path, resume=True, accelerator_config={"dispatch_batches": True})


def test_a_second_callback_is_refused(training, tmp_path, monkeypatch):
    data = training.dataset()
    monkeypatch.setattr(training, "dataset", lambda **_: data)
    with pytest.raises(ValueError, match="several MixtureCallbacks.*remove_callback"):
        training.run(tmp_path, extra=(MixtureCallback(data, training.tasks(), "odm", 5),))


@pytest.mark.parametrize("evaluated", [lambda data: data, lambda data: {"own": data}])
def test_an_evaluation_of_what_is_trained_on_is_refused_and_does_not_hang(training, tmp_path, evaluated):
    with pytest.raises(ValueError, match="eval_dataset is the dataset that is trained on"):
        training.run(tmp_path, evaluated=evaluated, eval_strategy="steps", eval_steps=2)


def test_a_task_that_does_not_fit_the_model_fails_at_once(training, tmp_path, monkeypatch):
    wrong = [{"input_ids": [training.VOCAB + 5] * 4}]
    monkeypatch.setattr(training, "tasks", lambda: {"wrong": wrong})
    with pytest.raises(ValueError, match=r"tasks\['wrong'\] has token 69, the model's vocabulary has 64"):
        training.run(tmp_path)


@pytest.mark.parametrize(
    "arguments", [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2}]
)
def test_a_run_ends_with_the_last_whole_step_of_its_data(training, tmp_path, caplog, arguments):
    limits = {"max_epochs": {"noise": 1}, "when_exhausted": "stop"}
    trainer = training.run(tmp_path, mixer=Static(), data_options=limits, **arguments)
    data = trainer.train_dataset
    end = data.schedule.exhausted_at
    steps = end // training.BATCH
    assert 100 < end < 140
    assert trainer.state.global_step == steps
    domain, row, _ = data.schedule.assign(0, steps * training.BATCH)
    assert trainer.order == np.stack([domain, row], axis=1).tolist()
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert [row["kind"] for row in rows] == ["stage"] * len(data.schedule.stages) + ["final"]
    assert f"the stream ends at position {end}, where its domains have been read as often as" in rows[-1]["message"]
    assert f"the run ends after step {steps}: the stream ends at position {end}" in caplog.text


def test_no_sample_is_seen_twice_where_the_dataset_says_so(training, tmp_path):
    trainer = training.run(tmp_path, data_options={"max_epochs": 1})
    assert len({tuple(sample) for sample in trainer.order}) == len(trainer.order) == training.STEPS * training.BATCH
    config = json.loads((tmp_path / "dynmix/config.json").read_text())
    assert config["max_epochs"] == dict.fromkeys(training.DOMAINS, 1)
    with pytest.raises(ValueError, match="max_epochs=2, and the dataset's is 1: say it once"):
        training.run(tmp_path, data_options={"max_epochs": 1}, options={"max_epochs": 2})


def test_the_journal_and_the_log_say_where_domains_are_read_again(training, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="dynmix.mixture")
    trainer = training.run(tmp_path, mixer=Static())
    domain, _, epoch = trainer.train_dataset.schedule.assign(0, training.STEPS * training.BATCH)
    position = int(np.flatnonzero((domain == 2) & (epoch == 1))[0])  # noise, which has half of the weight
    assert not epoch[domain < 2].any()
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    stage = position // (training.STAGE_STEPS * training.BATCH)
    assert [row["new_epochs"] for row in rows[:-1]] == [
        {"noise": [[2, position]]} if k == stage else {} for k in range(4)
    ]
    begins = f"domain 'noise' begins its epoch 2 at position {position}, reshuffled"
    assert f"{begins}, in step {position // training.BATCH + 1}" in caplog.text
    assert f"stage {stage} will read again: {begins}" in caplog.text
    for k in (1, 2, 3):
        start = k * training.STAGE_STEPS * training.BATCH
        assert f"stage {k} begins at position {start}, with the weights" in caplog.text
        assert f"the stage of position {start} begins with step {k * training.STAGE_STEPS + 1}" in caplog.text


def test_a_run_goes_on_with_other_processes_workers_and_batches(training, launch, tmp_path):
    """1 process, 2 workers, 8 x 4; then 2 processes without workers, 4 x 4; then the first again."""
    common = {"steps": 8, "save_strategy": "steps", "save_steps": 3, "data_options": {"samples": 256}}
    one = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "dataloader_num_workers": 2}
    two = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    options = {"options": {"stage_steps": 2}}
    begun = training.run(tmp_path, mixer=Static(), lr_scheduler_type="constant", **common | one | options)
    domain, row, _ = begun.train_dataset.schedule.assign(0, 256)
    expected = np.stack([domain, row], axis=1).tolist()
    assert begun.order == expected
    shutil.rmtree(tmp_path / "checkpoint-6")
    shutil.rmtree(tmp_path / "checkpoint-8")
    launch(tmp_path, 2, static=True, resume=True, lr_scheduler_type="constant", **common | two | options)
    ranks = [json.loads((tmp_path / f"facts-{rank}.json").read_text())["order"] for rank in (0, 1)]
    batches = [order[at : at + 4] for at in range(0, len(ranks[0]), 4) for order in ranks]
    assert [sample for batch in batches for sample in batch] == expected[3 * 32 :]
    shutil.rmtree(tmp_path / "checkpoint-8")
    ended = training.run(tmp_path, mixer=Static(), resume=True, lr_scheduler_type="constant", **common | one | options)
    assert ended.order == expected[6 * 32 :]
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert [row["start"] for row in rows] == [0, 64, 128, 192, 256]


def test_max_epochs_bounds_what_a_domain_gives(training, tmp_path):
    trainer = training.run(tmp_path, options={"max_epochs": {"web": 0.9, "code": 1.0}})
    counts = trainer.train_dataset.schedule.counts(training.STEPS * training.BATCH)
    assert counts[0] <= 0.9 * training.ROWS + 2  # a stage keeps its proportions to within a few samples
    assert counts[1] <= training.ROWS + 2


def test_resuming_other_data_or_another_batch_is_refused(training, tmp_path):
    training.run(tmp_path, steps=6, save_strategy="steps", save_steps=6, lr_scheduler_type="constant")
    with pytest.raises(ValueError, match="keep per-device batch x gradient accumulation x processes the same"):
        training.run(tmp_path, resume=True, per_device_train_batch_size=4, steps=20)
    original = training.dataset
    try:
        training.dataset = lambda: original(seed=1)
        with pytest.raises(ValueError, match="seed"):
            training.run(tmp_path, resume=True)
    finally:
        training.dataset = original


@pytest.mark.parametrize("ended", [4, 5])
def test_a_run_that_ended_at_a_boundary_can_be_continued(training, tmp_path, ended):
    """Its next stage was not decided, because there was none."""
    settings = {"save_strategy": "steps", "save_steps": ended, "lr_scheduler_type": "constant"}
    training.run(tmp_path, steps=ended + 0, mixer=Static(), options={"stage_steps": 2}, **settings)
    trainer = training.run(tmp_path, steps=12, mixer=Static(), options={"stage_steps": 2}, resume=True, **settings)
    domain, row, _ = trainer.train_dataset.schedule.assign(ended * training.BATCH, 12 * training.BATCH)
    assert trainer.order == np.stack([domain, row], axis=1).tolist()
    stages = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert [r["start"] for r in stages] == [*range(0, 12 * training.BATCH, 2 * training.BATCH), 12 * training.BATCH]


def test_an_early_stop_closes_the_journal_too(training, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 7

    training.run(tmp_path, extra=(Stop(),))
    rows = Journal(tmp_path / "dynmix/journal.jsonl").rows()
    assert [row["kind"] for row in rows] == ["stage", "stage", "final"]
    assert rows[-1]["start"] == 7 * training.BATCH


def test_the_losses_of_an_early_stop_are_those_of_its_step_and_not_of_the_best_model(training, tmp_path):
    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = state.global_step
            control.should_training_stop = state.global_step == 6

    often = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = training.run(
        tmp_path,
        extra=(Worse(),),
        evaluated=lambda data: [each | {"labels": each["input_ids"]} for each in training.sequences(0, 8, salt=3)],
        load_best_model_at_end=True,
        **often,
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    final = Journal(tmp_path / "dynmix/journal.jsonl").rows()[-1]
    assert (final["kind"], final["step"]) == ("final", 6)
    model = type(trainer.model).from_pretrained(tmp_path / "checkpoint-6")
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, MixtureCallback))
    assert final["task_loss"] == callback.controller.measurement.losses(model)[0]
    assert [entry["step"] for entry in trainer.state.log_history if "dynmix/task_loss/web" in entry][-1] == 6


def test_final_losses_are_logged_before_the_trackers_close(training, tmp_path):
    class Tracker(TrainerCallback):
        closed, late = False, []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.closed:
                self.late.append(logs)

        def on_train_end(self, *args, **kwargs):
            self.closed = True

    tracker = Tracker()
    trainer = training.run(tmp_path, extra=(tracker,))
    assert not [logs for logs in tracker.late if any(key.startswith("dynmix/") for key in logs)]
    assert any(
        entry["step"] == training.STEPS and "dynmix/task_loss/web" in entry for entry in trainer.state.log_history
    )


def test_a_checkpoint_without_our_state_is_refused(training, tmp_path):
    training.run(tmp_path, callback=False, steps=6, save_strategy="steps", save_steps=6)
    with pytest.raises(ValueError, match="holds no state of a MixtureCallback"):
        training.run(tmp_path, resume=True)


def test_what_an_earlier_run_left_is_moved_aside(training, tmp_path):
    for _ in range(2):
        training.run(tmp_path, steps=6, options={"keep": 1})
    assert len(Journal(tmp_path / "dynmix/journal.jsonl").rows()) == 3
    assert len(Journal(tmp_path / "dynmix/previous-1/journal.jsonl").rows()) == 3
    assert (tmp_path / "dynmix/previous-1/snapshots/stage-0001/model.safetensors").exists()


def test_snapshots_are_whole_models_and_the_newest_are_kept(training, tmp_path):
    trainer = training.run(tmp_path, mixer=TiKMiXD(), options={"keep": 2})
    folder = tmp_path / "dynmix/snapshots"
    assert sorted(path.name for path in folder.iterdir()) == ["stage-0002", "stage-0003"]
    loaded = type(trainer.model).from_pretrained(folder / "stage-0003")
    assert json.loads((folder / "stage-0003/snapshot.json").read_text()) == {"stage": 3, "step": 14, "samples": 112}
    difference = (loaded.lm_head.weight - trainer.model.lm_head.weight).abs().max()
    assert 0 < difference < 1
    assert not list(folder.rglob("*.bin"))


def test_a_collator_that_loses_boundaries_is_refused_before_anything_is_written(training, tmp_path, monkeypatch):
    def padded(items):
        batch = default_data_collator(items)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    monkeypatch.setattr(training.Recording, "get_train_dataloader", with_collator(padded))
    with pytest.raises(
        ValueError, match=r"padded\) adds a 2-D attention_mask.*data_collator=transformers.default_data"
    ):
        training.run(tmp_path, mixer=Static(), data_options={"boundaries": "position_ids"})
    assert not (tmp_path / "dynmix").exists()


def with_collator(collate):
    def get_train_dataloader(trainer):
        trainer.data_collator = collate
        return Trainer.get_train_dataloader(trainer)

    return get_train_dataloader


def test_what_fails_on_one_rank_before_they_work_together_is_raised_on_all(told, tmp_path):
    assert told(tmp_path, "trainer", "plan") == [
        "0 RuntimeError: another rank failed: OSError: no disk",
        "1 OSError: no disk",
    ]
