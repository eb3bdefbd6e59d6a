import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from dynmix.run_folder import RunFolder


def test_the_configuration_of_a_run_may_name_any_file(tmp_path):
    facts = {"domain": os.fsdecode(b"stadt-\xc3\xa4-\xff"), "path": Path("a")}
    RunFolder(tmp_path / "run").write_config(facts)
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
