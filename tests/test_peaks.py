import json
import logging
import math
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from dynmix.checkpoints import Checkpoint
from dynmix.peaks import PeakSnapshots
from dynmix.peaks import set_aside as set_folder_aside
from tests.test_checkpoints import VALUES, slow_peak


def model_at(step):
    """A model that says which step it is of."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.bias, step)
    return model


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


@given(RUNS, st.integers(0, 4))
@settings(max_examples=25)
def test_what_is_needed_stays_and_nothing_else(tmp_path_factory, drawn, keep):
    curves, saves, _ = drawn
    folder = tmp_path_factory.mktemp("run")
    peaks = PeakSnapshots(folder, keep=keep)

    def best(task, until):
        return slow_peak(list(enumerate(curves[task][:until], 1)), False, 0)

    def needed(until):
        new = [s for s in range(1, until + 1) if any((best(t, s) or (0,))[0] == s for t in curves)]
        return {found[0] for task in curves if (found := best(task, until))} | set(new[::-1][:keep])

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


def test_going_on_in_another_folder_says_that_what_was_before_is_not_known(tmp_path, caplog):
    PeakSnapshots(tmp_path / "first").rewind(0)
    PeakSnapshots(tmp_path / "first").rewind(2)  # before the first evaluation
    assert caplog.text == ""
    PeakSnapshots(tmp_path / "other").rewind(2)
    assert "other/peaks.json is not there: how the tasks did up to step 2 is not known" in caplog.text


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
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            peaks.prune(2)
    assert [path.name for path in tmp_path.glob(".*")] == [".step-0000001.deleted"]
    again = PeakSnapshots(tmp_path)
    again.rewind(2)
    assert snapshots(tmp_path) == [2]


def test_a_task_may_have_any_name(tmp_path):
    name = os.fsdecode(b"stadt-\xc3\xa4-\xff")  # as of a file whose name is not UTF-8
    PeakSnapshots(tmp_path).record(model_at(1), 1, {name: 5.0})
    assert PeakSnapshots(tmp_path).selected[name].step == 1


def test_a_run_that_begins_afresh_does_not_trip_over_what_a_kill_left_half_deleted(tmp_path):
    recorded(tmp_path, {1: 5.0})
    (tmp_path / ".step-0000001.deleted").mkdir()
    (tmp_path / ".step-0000001.deleted" / "model.safetensors").touch()
    set_folder_aside(tmp_path)
    recorded(tmp_path, {1: 5.0, 2: 4.0}).prune(2)
    assert {path.name for path in tmp_path.iterdir()} == {"previous-1", "peaks.json", "step-0000002"}


@pytest.mark.parametrize(("where", "how"), [(shutil, "rmtree"), (Path, "rename")])
def test_what_cannot_be_deleted_costs_room_and_nothing_else(tmp_path, monkeypatch, caplog, where, how):
    peaks = recorded(tmp_path, {1: 5.0, 2: 4.0})

    def busy(*args, **options):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(where, how, busy)
        peaks.prune(2)
    assert "was not deleted, training goes on: [Errno 16] Device or resource busy" in caplog.text
    peaks.prune(2)
    assert snapshots(tmp_path) == [2]


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


FAILING = """
import sys, torch.distributed as dist
from pathlib import Path
from dynmix import peaks
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
snapshots = peaks.PeakSnapshots(folder)

def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

peaks.write_json = peaks.run_folder.set_aside = full if rank == 0 else print
for attempt in (lambda: snapshots.rewind(0), lambda: peaks.set_aside(folder)):
    try:
        attempt()
    except Exception as failure:
        print(f"<{rank} {failure}>", flush=True)
dist.barrier()
"""


def test_what_fails_as_a_run_begins_on_the_rank_that_writes_is_raised_on_all(processes, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    status, printed = processes.run(tmp_path / "failing.py", tmp_path, ranks=2, timeout=60)
    assert status == 0, printed
    assert printed.count("<0 [Errno 28] No space left on device>") == 2
    assert printed.count("<1 another rank failed: OSError: [Errno 28] No space left on device>") == 2
