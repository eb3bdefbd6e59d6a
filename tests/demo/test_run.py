import io
import json

import pytest
from rich.console import Console

from dynmix.demo import corpus
from dynmix.demo.run import DemoSettings, run_demo
from dynmix.journal import Journal

SMALL = DemoSettings(
    stages=3, stage_steps=4, batch_size=4, sequence_length=32, hidden_size=32, layers=1, task_sequences=8
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:  # less text of every domain
        patch.setattr(corpus, "_CAPS", {name: size // 4 for name, size in corpus._CAPS.items()})
        run_demo(folder, seed=1, settings=SMALL, console=Console(file=printed, width=140))
    return folder, printed.getvalue()


def test_a_run_folder_holds_config_journal_snapshots_and_report(finished):
    folder, _ = finished
    for name in ("config.json", "journal.jsonl", "snapshots/stage-0002/model.safetensors", "report.html"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "config.json").read_text())["mixer"]["name"] == "TiKMiXD"
    assert json.loads((folder / "static/config.json").read_text())["mixer"]["name"] == "Static"


def test_both_runs_take_the_same_budget_from_the_same_start(finished):
    folder, _ = finished
    dynamic, static = (Journal(folder / name).rows() for name in ("journal.jsonl", "static/journal.jsonl"))
    assert [row["kind"] for row in dynamic] == [row["kind"] for row in static] == ["stage"] * 3 + ["final"]
    assert dynamic[0]["task_loss"] == static[0]["task_loss"]
    assert dynamic[0]["weights"] == static[0]["weights"]
    assert sum(dynamic[-1]["tokens"].values()) == sum(static[-1]["tokens"].values()) == 3 * 4 * 4 * 32
    assert dynamic[2]["weights"] != dynamic[0]["weights"]
    assert static[2]["weights"] == static[0]["weights"]


def test_it_prints_each_stage_and_the_comparison(finished):
    _, printed = finished
    for part in ("stage 0", "stage 1", "stage 2", "end of the run", "noise", "static prior", "report.html"):
        assert part in printed
