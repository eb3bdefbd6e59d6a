"""Lightning's Trainer with the callback: the same samples, swaps and parameters as a loop with `MixtureHook`."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from dynmix import TiKMiXD
from dynmix.callbacks import MixtureHook
from dynmix.controller import MixtureController
from dynmix.journal import Journal

pytest.importorskip("lightning", reason="Lightning is not installed")

OPTIONS = {"probe_sequences": 8, "curvature_sequences": 16, "task_sequences": 12, "keep": 0}


@pytest.fixture(scope="module")
def lightning():
    """The module `lightning_run.py`, which imports Lightning."""
    from tests.callbacks import lightning_run

    return lightning_run


@pytest.fixture(scope="module")
def whole(lightning, tmp_path_factory):
    """A run from its beginning to its end: its folder, and what another must agree with."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, lightning.run(folder)


def in_a_loop(training, output: Path, accumulation: int = 1) -> dict:
    dataset, model, order = training.dataset(), training.model(dropout=0.0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    hook = MixtureHook(
        model, dataset, training.tasks(), TiKMiXD(confidence=0.0), training.STAGE_STEPS, batch_size=training.BATCH,
        output=output, **OPTIONS,
    )  # fmt: skip
    for number, batch in enumerate(DataLoader(dataset, batch_size=training.BATCH // accumulation)):
        order += batch["input_ids"][:, :2].tolist()
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        (loss / accumulation).backward()
        if (number + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
            hook.step()
    hook.finish()
    return training.facts(Recorded(model, dataset, order))


class Recorded:
    def __init__(self, model, train_dataset, order):
        self.model, self.train_dataset, self.order, self.losses = model, train_dataset, order, []


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 2), (2, 0)])
def test_it_is_the_run_of_a_loop_with_the_hook(accumulation, workers, lightning, training, tmp_path):
    expected = in_a_loop(training, tmp_path / "loop", accumulation)
    found = lightning.run(tmp_path / "lightning", accumulation=accumulation, workers=workers)
    assert found == expected
    rows, loop = (Journal(tmp_path / name).rows() for name in ("lightning/dynmix/journal.jsonl", "loop/journal.jsonl"))
    assert [row["weights"] for row in rows] == [row["weights"] for row in loop]
    assert rows[-1]["task_loss"] == loop[-1]["task_loss"]


@pytest.mark.parametrize("stopped", [8, 9])  # in a stage, and where the next is decided
def test_it_goes_on_from_a_checkpoint_bit_for_bit(stopped, lightning, whole, tmp_path):
    folder, uncut = whole
    first = lightning.run(tmp_path / "cut", stop_at=stopped)
    rest = lightning.run(tmp_path / "cut", resume=True)
    assert first["order"] + rest["order"] == uncut["order"]
    assert rest["stages"] == uncut["stages"]
    assert rest["parameters"] == uncut["parameters"]
    rows = [Journal(path / "dynmix/journal.jsonl").rows() for path in (tmp_path / "cut", folder)]
    assert [row["weights"] for row in rows[0]] == [row["weights"] for row in rows[1]]


@pytest.mark.parametrize(("stopped", "before", "after"), [(9, 1, 2), (9, 2, 1), (8.5, 2, 2)])
def test_it_goes_on_with_whole_steps(stopped, before, after, lightning, training, whole, tmp_path):
    """Where batches are of another size than those of the checkpoint, or it was saved between the parts of a step."""
    first = lightning.run(tmp_path, stop_at=stopped, accumulation=before)
    rest = lightning.run(tmp_path, resume=True, accumulation=after)
    _, uncut = whole
    taken = int(stopped) * training.BATCH
    assert first["order"][:taken] + rest["order"] == uncut["order"]
    assert [start for start, _, _ in rest["stages"]] == [0, 40, 80, 120]


@pytest.mark.parametrize(("steps_of_a_batch", "message"), [(2, "2 optimizer steps in 1 b"), (0.5, "1 .* in 2 b")])
def test_manual_optimization_is_refused_where_a_step_is_no_batch(steps_of_a_batch, message, lightning, tmp_path):
    with pytest.raises(ValueError, match=message + "atches, of which each takes 1: in manual optimization call"):
        lightning.run(tmp_path, steps_of_a_batch=steps_of_a_batch)


def test_manual_optimization_is_the_same_run(lightning, whole, tmp_path):
    assert lightning.run(tmp_path, steps_of_a_batch=1) == whole[1]


def test_two_processes_take_the_same_samples_and_decide_alike(whole, processes, tmp_path):
    _, one = whole
    script = Path(__file__).with_name("lightning_run.py")
    status, printed = processes.run(script, tmp_path / "two", json.dumps({"processes": 2}), ranks=2)
    assert status == 0, printed
    ranks = [json.loads((tmp_path / f"two/facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["stages"] == ranks[1]["stages"]
    assert [start for start, _, _ in ranks[0]["stages"]] == [start for start, _, _ in one["stages"]]
    assert ranks[0]["stages"][0] == one["stages"][0]
    first_stage = len(one["order"]) // 4
    both = [sample for rank in ranks for sample in rank["order"][: first_stage // 2]]
    assert sorted(both) == sorted(one["order"][:first_stage])


def test_stages_that_came_from_another_process_stay_as_they_are(lightning, sent, tmp_path):
    """As where the strategy is ddp_notebook or ddp_spawn: its ranks would all decide in one memory."""
    shared = sent.schedule
    lightning.run(tmp_path)
    assert (sent.schedule.num_stages, shared.num_stages, shared.end) == (4, 1, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": True}, "reads through a RandomSampler: pass DataLoader.*sampler=callback.sampler"),
        ({"in_order": True}, "reads through a SequentialSampler"),
        ({"trainer": {"max_epochs": 3, "max_steps": -1}}, "takes 60 steps of 8 samples, and one pass .* has 20: pass"),
        ({"model": "lm"}, r"model='lm': the Module has no such module; name the causal LM in it, one of \['model'\]"),
    ],
)
def test_what_cannot_be_is_said_before_it_trains(options, message, lightning, tmp_path):
    with pytest.raises(ValueError, match=message):
        lightning.run(tmp_path, **options)


def test_processes_that_share_samples_are_refused(lightning, tmp_path, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr(SingleDeviceStrategy, "distributed_sampler_kwargs", {"num_replicas": 2}, raising=False)
    with pytest.raises(ValueError, match="SingleDeviceStrategy has 1 processes take the samples of 2: in tensor"):
        lightning.run(tmp_path)


def test_a_checkpoint_of_a_run_without_it_is_refused(lightning, tmp_path):
    lightning.run(tmp_path, stop_at=3, callback=False)
    with pytest.raises(ValueError, match="at step 3 holds no state of a MixtureCallback"):
        lightning.run(tmp_path, resume=True)


def test_a_second_run_of_one_callback_is_refused_in_words_that_are_true(lightning, training, tmp_path):
    data = training.dataset()
    made = lightning.MixtureCallback(data, training.tasks(), "static", training.STAGE_STEPS)
    module, loader = lightning.Module(), DataLoader(data, training.BATCH, sampler=made.sampler)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"default_root_dir": tmp_path, "callbacks": [made], "enable_checkpointing": False, **quiet}
    lightning.pl.Trainer(max_steps=6, **given).fit(module, loader)
    with pytest.raises(ValueError, match="told of 6 steps, and the Trainer begins anew: pass fit the ckpt_path"):
        lightning.pl.Trainer(max_steps=12, **given).fit(module, loader)


def test_snapshots_go_only_once_the_checkpoint_is_on_the_disk(lightning, training, tmp_path, monkeypatch):
    told = []

    def saved(self, step):
        told.append((step, (tmp_path / f"saved/{step}.ckpt").exists()))

    monkeypatch.setattr(MixtureController, "saved", saved)
    saving = lightning.pl.callbacks.ModelCheckpoint(
        tmp_path / "saved", "{step}", auto_insert_metric_name=False, every_n_train_steps=6, save_top_k=-1
    )
    data = training.dataset()
    made = lightning.MixtureCallback(data, training.tasks(), "static", training.STAGE_STEPS, model="model")
    lightning.pl.Trainer(
        default_root_dir=tmp_path, max_steps=training.STEPS, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[saving, made],
    ).fit(lightning.Module(), DataLoader(data, training.BATCH, sampler=made.sampler))  # fmt: skip
    assert told == [(6, True), (12, True), (18, True)]


def test_what_fails_on_one_rank_before_they_work_together_is_raised_on_all(told, tmp_path):
    assert told(tmp_path, "lightning", "plan") == [
        "0 RuntimeError: another rank failed: OSError: no disk",
        "1 OSError: no disk",
    ]
