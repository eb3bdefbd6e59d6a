"""The log keys in trackers' own files: one run reports to each tracker that is installed, by the Trainer's `report_to`.

W&B is offline and MLflow in a local database; nothing leaves the machine.
"""

import json
import sqlite3
import struct
import sys
from importlib.util import find_spec

import pytest

from dynmix.journal import Journal
from dynmix.record import log_keys

TABLE = ["stage", "step", "domain", "weight", "tokens", "epochs"]


@pytest.fixture(scope="module")
def reported(training, tmp_path_factory):
    """Folder of the run, (step, keys and values) of each row of its journal, and the table of its weights."""
    folder = tmp_path_factory.mktemp("trackers")
    trackers = [name for name in ("tensorboard", "wandb", "trackio", "mlflow") if find_spec(name)]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"):
            patch.setenv(name, str(folder / name))
            (folder / name).mkdir()
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        patch.chdir(folder)  # MLflow's artifacts
        training.run(folder / "run", steps=10, report_to=trackers, project="test", run_name="one")
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()  # the Trainer leaves that to the end of the process
    rows = Journal(folder / "run/dynmix/journal.jsonl").rows()
    assert [row["kind"] for row in rows] == ["stage", "stage", "final"]
    assert ["training" in row["seconds"] for row in rows] == [False, True, True]
    assert all(row["seconds"]["training"] > 0 for row in rows[1:])
    table = [
        [row["stage"], row["step"], name, weight, row["tokens"][name], row["epochs"][name]]
        for row in rows
        for name, weight in (row["weights"] or {}).items()
    ]
    return folder, [(row["step"], log_keys(row)) for row in rows], table


def same(found, logged, prefix=""):
    """Whether `found`, a (step, values) a call of log, has every value logged at its step; to float32's digits."""
    for step, values in logged:
        at_step = {key: value for each, some in found if each == step for key, value in some.items()}
        assert {f"{prefix}{key}" for key in values} <= at_step.keys()
        assert {key: at_step[f"{prefix}{key}"] for key in values} == pytest.approx(values, rel=1e-6)
    first, decided, last = (values.keys() for _, values in logged)
    kinds = {"stage", "weight", "tokens", "task_loss", "seconds", "influence"}
    assert {key.split("/")[1] for key in decided} == kinds
    assert {key.split("/")[1] for key in first} == kinds - {"influence"}
    assert {key.split("/")[1] for key in last} == kinds - {"influence", "weight"}


def test_tensorboard(reported):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, logged, _ = reported
    events = EventAccumulator(str(next((folder / "run/runs").iterdir()))).Reload()
    found = [(each.step, {tag: each.value}) for tag in events.Tags()["scalars"] for each in events.Scalars(tag)]
    same(found, logged, "train/")


def test_wandb(reported):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    folder, logged, table = reported
    found = []
    for content in records(next((folder / "WANDB_DIR").rglob("*.wandb")).read_bytes()):
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            found.append((values.get("train/global_step"), values))
    same([each for each in found if each[0] is not None], logged, "train/")
    [shown] = [values for _, values in found if "dynmix/weights/_type" in values]
    assert (shown["dynmix/weights/_type"], shown["dynmix/weights/nrows"]) == ("table-file", len(table))
    saved = json.loads(next((folder / "WANDB_DIR").rglob("*.table.json")).read_text())
    assert (saved["columns"], saved["data"]) == (TABLE, table)


def records(content):
    """The records of W&B's file: after seven bytes LevelDB's log, blocks of 32 KiB, a record in one part or several."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""


def test_trackio(reported):
    pytest.importorskip("trackio", reason="trackio is not installed")
    folder, logged, table = reported
    with sqlite3.connect(folder / "TRACKIO_DIR/test.db") as database:
        values = [json.loads(line) for (line,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    same([(each["train/global_step"], each) for each in values if "train/global_step" in each], logged, "train/")
    [shown] = [each["dynmix/weights"] for each in values if "dynmix/weights" in each]
    assert [[line[name] for name in TABLE] for line in shown["_value"]] == table


def test_mlflow(reported):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    folder, logged, table = reported
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [run] = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    history = [client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
    same([(each.step, {each.key: each.value}) for points in history for each in points], logged)
    saved = json.loads(next(folder.rglob("dynmix/weights.json")).read_text())
    assert saved["columns"] == TABLE
    for line, expected in zip(saved["data"], table, strict=True):  # with ten digits
        assert dict(zip(TABLE, line, strict=True)) == pytest.approx(dict(zip(TABLE, expected, strict=True)))
