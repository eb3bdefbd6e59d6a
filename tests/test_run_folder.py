import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import dynmix.run_folder
from dynmix import EKFAC
from dynmix.journal import Journal
from dynmix.run_folder import RunFolder
from tests import running
from tests.small import Bigram


def test_the_configuration_of_a_run_may_name_any_file(tmp_path):
    facts = {"domain": os.fsdecode(b"stadt-\xc3\xa4-\xff"), "path": Path("a")}
    RunFolder(tmp_path / "run").begin(facts)
    assert json.loads((tmp_path / "run" / "config.json").read_bytes()) == facts | {"path": "a"}


def test_a_disk_that_is_full_ends_no_run(tmp_path, monkeypatch, caplog):
    class Written:
        fitted = "something"

        def save(self, path):
            if full:
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            path.parent.mkdir(exist_ok=True)
            path.touch()

    def broken(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    folder, full = RunFolder(tmp_path), False
    assert folder.save_factors(Written(), 1, keep=2) == "stage-0001.safetensors"
    full = True
    monkeypatch.setattr("dynmix.snapshot.save_file", broken)
    assert folder.save_factors(Written(), 2, keep=2) is None  # nor would a run go on from a file that is not there
    assert folder.save_task_gradients(Written(), 2, keep=2) == "stage-0002.safetensors"
    folder.save_snapshot(nn.Linear(1, 1), 2, {}, keep=2)
    assert caplog.text.count("not saved, training goes on: Error while serializing: I/O error: No space left") == 3
    assert [path.name for path in (tmp_path / "factors").iterdir()] == ["stage-0001.safetensors"]


def test_what_is_saved_counts_as_such_where_what_is_older_cannot_be_deleted(tmp_path, monkeypatch, caplog):
    class Written:
        fitted = "something"

        def save(self, path):
            path.parent.mkdir(exist_ok=True)
            path.touch()

    def refused(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(1, "Operation not permitted")

    folder, there = RunFolder(tmp_path), tmp_path / "snapshots"
    for stage in range(1, 5):
        folder.save_snapshot(nn.Linear(1, 1), stage, {}, keep=2)
        folder.save_factors(Written(), stage, keep=2)
    assert sorted(path.name for path in there.iterdir()) == ["stage-0003", "stage-0004"]
    monkeypatch.setattr(shutil, "rmtree", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    folder.save_snapshot(nn.Linear(1, 1), 5, {}, keep=2)
    assert folder.save_factors(Written(), 5, keep=2) == "stage-0005.safetensors"
    assert "not saved" not in caplog.text
    for old in ("snapshots/stage-0003", "factors/stage-0003.safetensors"):
        assert f"{old} was not deleted, training goes on: [Errno 1] Operation not permitted" in caplog.text
    assert sorted(path.name for path in there.iterdir()) == ["stage-0003", "stage-0004", "stage-0005"]


def test_a_copy_that_somebody_made_of_a_snapshot_is_theirs(tmp_path):
    folder, copy = RunFolder(tmp_path), tmp_path / "snapshots" / "stage-0001-best"
    for stage in range(1, 4):
        folder.save_snapshot(nn.Linear(1, 1), stage, {}, keep=1)
        if stage == 1:
            shutil.copytree(copy.with_name("stage-0001"), copy)
    folder.rewind(2)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_run_that_is_rolled_back_keeps_its_own_snapshots_and_not_those_of_what_is_undone(tmp_path):
    first, model = running.controller(running.dataset(), output=tmp_path), Bigram()
    running.begun(first, model)
    state = running.stepped(first, model)[5]
    kept = tmp_path / "snapshots"
    assert sorted(path.name for path in kept.iterdir()) == ["stage-0003", "stage-0004"]
    again = running.controller(running.dataset(), output=tmp_path)
    again.load_state_dict(state)
    running.begun(again, model, 5)
    assert not list(kept.iterdir())
    running.stepped(again, model, 6, 9)
    assert [path.name for path in kept.iterdir()] == ["stage-0002"]


def test_what_is_undone_and_cannot_be_deleted_stops_no_run_and_does_not_count_as_newer(tmp_path, monkeypatch, caplog):
    first, model = running.controller(running.dataset(), output=tmp_path, keep=1), Bigram()
    running.begun(first, model)
    state = running.stepped(first, model)[5]
    again = running.controller(running.dataset(), output=tmp_path, keep=1)
    again.load_state_dict(state)
    removed = shutil.rmtree

    def busy(path, ignore_errors=False):
        if Path(path).name == "stage-0004":
            raise OSError(39, "Directory not empty", ".nfs0001")
        removed(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", busy)
    running.begun(again, model, 5)
    assert "snapshots/stage-0004 was not deleted, training goes on: [Errno 39] Directory not empty" in caplog.text
    running.stepped(again, model, 6, 14)
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["stage-0003", "stage-0004"]


def test_a_run_that_goes_on_without_rows_of_its_past_says_so(tmp_path, caplog):
    first, model = running.begun(running.controller(running.dataset(), output=tmp_path / "old")), Bigram()
    running.stepped(first, model, last=12)
    for folder, said in (("old", 0), ("new", 1)):
        again = running.controller(running.dataset(), output=tmp_path / folder)
        again.load_state_dict(first.state_dict())
        running.begun(again, model, 12)
        assert caplog.text.count("has no row of 3 of the 3 stages that this run goes on from, the first") == said


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    loop = running.begun(running.controller(running.dataset(), output=tmp_path, keep=1))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dynmix.run_folder, "write_snapshot", full)
    monkeypatch.setattr(Journal, "append", full)
    assert loop.step_ended(Bigram(), 4)
    assert len(loop.dataset.schedule.stages) == 2
    assert caplog.text.count("No space left on device") == 2


def test_factors_that_are_carried_from_stage_to_stage_survive_a_kill(tmp_path):
    """Killed after any stage and resumed, a run with a moving average publishes and journals the same."""

    def start(folder, state=None, steps=25, first=1):
        torch.manual_seed(0)
        model = Bigram()
        curvature = EKFAC(ema=0.5, refresh_every=2, factor_tokens=15 * 5)
        loop = running.controller(running.dataset(), curvature=curvature, output=folder)
        if state is not None:
            loop.load_state_dict(state)
        running.begun(loop, model, first - 1)
        return loop, running.stepped(loop, model, first, steps)

    whole, states = start(tmp_path / "whole")
    assert states[1]["curvature"] is None
    assert states[25]["curvature"] == "stage-0004.safetensors"
    assert len(list((tmp_path / "whole" / "factors").iterdir())) == 2
    assert whole.measurement.curvature_sequences == 15
    _, before = start(tmp_path / "killed", steps=11)
    again, _ = start(tmp_path / "killed", before[11], first=12)
    for one, other in zip(whole.dataset.schedule.stages, again.dataset.schedule.stages, strict=True):
        assert one == other
    rows = [Journal(tmp_path / name / "journal.jsonl").rows() for name in ("whole", "killed")]
    for one, other in zip(*rows, strict=True):
        assert one["influence"] == other["influence"]

    for file in (tmp_path / "killed" / "factors").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"stage-0002.safetensors is gone.* go on from a newer checkpoint, or with"):
        start(tmp_path / "killed", before[11], first=12)
    with pytest.raises(ValueError, match="carried from stage to stage are kept in files: pass output="):
        running.run(running.controller(running.dataset(), curvature=EKFAC(ema=0.5)))


def test_factors_of_the_last_checkpoint_are_kept_however_many_stages_it_is_old(tmp_path):
    def start(steps, saved, state=None):
        torch.manual_seed(0)
        model, first = Bigram(), 1 if state is None else saved[-1] + 1
        loop = running.controller(running.dataset(), curvature=EKFAC(ema=0.5), output=tmp_path)
        if state is not None:
            loop.load_state_dict(state)
        loop.plan(batch_size=running.BATCH)
        loop.begin(model, first - 1)
        for step in range(first, steps + 1):
            loop.step_ended(model, step)
            if step in saved:
                state = json.loads(json.dumps(loop.state_dict()))
                loop.saved(step)
        return loop.dataset.schedule.stages, state

    def kept():
        return [int(file.stem[6:]) for file in sorted((tmp_path / "factors").iterdir())]

    stages, state = start(20, saved=[2, 6])
    assert kept() == [1, 3, 4]
    assert start(20, [6], state)[0] == stages
    assert kept() == [1, 3, 4]  # the next kill may come before the next checkpoint
    start(20, saved=[2, 6, 11])
    assert kept() == [2, 3, 4]
