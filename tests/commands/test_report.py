import json
import shutil
import signal
import threading
import time

import pytest
from typer.testing import CliRunner

from dynmix.cli import app
from dynmix.journal import Journal
from tests.journal_rows import journal_row


def row(stage: int, kind: str = "stage"):
    measured, last = stage > 0 and kind == "stage", kind == "final"
    return journal_row(
        stage, tasks=["q/a", "Q?A"], kind=kind, end=None if last else 100 * stage + 100,
        weights=None if last else {"web": 0.5 + 0.1 * stage, "code": 0.5 - 0.1 * stage},
        influence=[[0.5, -0.25], [None, 1.0]] if measured else None,
        standard_error=[[0.1, 0.5], [None, 0.5]] if measured else None,
        task_loss={"q/a": 3.0 - stage, "Q?A": 2.0}, task_loss_standard_error={"q/a": 0.1, "Q?A": 0.1},
        predicted_gain={"q/a": 0.1} if measured else None, message=f"words of {stage}",
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run folder whose journal has two stages."""
    journal = Journal(tmp_path / "run/dynmix/journal.jsonl")
    journal.append(row(0))
    journal.append(row(1))
    return tmp_path / "run"


def call(*words):
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_a_run_folder_its_inner_folder_and_its_journal_give_the_same_page(run):
    pages = []
    for path in (run, run / "dynmix", run / "dynmix/journal.jsonl"):
        done = call(path, "--json")
        assert done.exit_code == 0, done.output
        pages.append(json.loads(done.stdout)["report"])
    assert set(pages) == {str(run / "dynmix/report.html")}
    assert "words of 1" in (run / "dynmix/report.html").read_text()


def test_figures_are_files_of_their_own(run, tmp_path):
    Journal(run / "dynmix/journal.jsonl").append(row(1, "final"))
    done = call(run, "--figures", tmp_path / "one", "--format", "svg", "--format", "png", "--format", "pdf", "--json")
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)["figures"]
    # "q/a" and "Q?A" are one name where "/" and "?" cannot be in it and cases are not told apart.
    stems = ["weights", "loss-q_a", "gain-q_a", "loss-Q_A-2", "influence-stage-0001"]
    assert written == [str(tmp_path / f"one/{stem}.{kind}") for stem in stems for kind in ("svg", "png", "pdf")]
    assert sorted(map(str, (tmp_path / "one").iterdir())) == sorted(written)
    for path in (tmp_path / "one").iterdir():
        content = path.read_bytes()
        assert content.startswith({".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[path.suffix])
        assert b"var(--" not in content
    assert not (run / "dynmix/report.html").exists()
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.svg")}
    assert call(run, "--figures", tmp_path / "one").exit_code == 0
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.svg")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "png"), "--figures"),
        (("--figures", "here", "--watch"), "--watch"),
        (("--figures", "here", "--format", "tiff"), "tiff"),
        (("--watch", "--every", "0"), "0.1"),
        (("--output", "."), "is a directory"),
    ],
)
def test_what_makes_no_sense_is_refused(run, words, message):
    done = call(run, *words)
    assert done.exit_code == 2
    assert message in done.output
    assert not (run / "dynmix/report.html").exists()


def test_a_watched_page_follows_the_run_from_before_its_first_row_to_its_last(run):
    journal, page = run / "dynmix/journal.jsonl", run / "dynmix/report.html"
    lines = [*journal.read_text().splitlines(keepends=True), json.dumps(row(2, "final")) + "\n"]
    shutil.rmtree(run)
    seen = []

    def train():
        time.sleep(0.2)  # the watch is there first
        journal.parent.mkdir(parents=True)
        for number, line in enumerate(lines):
            with open(journal, "a") as file:  # a row in two writes, as a reader may find it
                file.write(line[:50])
                file.flush()
                time.sleep(0.02)
                file.write(line[50:])
            while not page.exists() or f"words of {number}" not in page.read_text():
                time.sleep(0.01)
            seen.append(page.read_text())

    training = threading.Thread(target=train, daemon=True)
    training.start()
    done = call(run, "--watch", "--every", "0.1")
    training.join(60)
    assert done.exit_code == 0, done.output
    assert ['http-equiv="refresh"' in text for text in seen] == [True, True, False]
    assert ["has not ended" in text for text in seen] == [True, True, False]


def test_ctrl_c_leaves_a_page_that_no_longer_loads_itself_again(run):
    page = run / "dynmix/report.html"

    def stop():
        while not page.exists():
            time.sleep(0.01)
        assert 'http-equiv="refresh"' in page.read_text()
        signal.raise_signal(signal.SIGINT)  # which Python hands to the main thread

    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    done = call(run, "--watch", "--every", "0.1")
    stopping.join(60)
    assert done.exit_code == 130
    assert "stopped watching" in done.output
    assert "has not ended" in page.read_text()
    assert 'http-equiv="refresh"' not in page.read_text()
