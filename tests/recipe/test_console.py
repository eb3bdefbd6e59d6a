import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from dynmix.journal import Journal
from dynmix.recipe.console import PrintStages, QuietProgress
from tests.journal_rows import journal_row


class Gone(io.StringIO):
    """A terminal that was closed, or a pipe."""

    def __init__(self, failure):
        super().__init__()
        self.failure = failure

    def write(self, text):
        raise self.failure


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")])
def test_a_terminal_that_is_gone_ends_no_run(tmp_path, monkeypatch, caplog, failure):
    monkeypatch.setattr(Console, "on_broken_pipe", lambda self: sys.exit(1))  # rich's own also closes stdout
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(journal_row(0))
    shown = PrintStages(journal, Console(file=Gone(failure)))
    shown.on_train_begin(None, SimpleNamespace(global_step=0))
    shown.on_step_end()
    shown.on_train_end()
    assert caplog.text.count("was not shown") == 1

    def gone(*args, **kwargs):
        raise failure

    monkeypatch.setattr(ProgressCallback, "on_log", gone)
    state = TrainerState()
    QuietProgress().on_log(TrainingArguments(str(tmp_path)), state, TrainerControl(), logs={"loss": 1.0})
    assert caplog.text.count("was not shown") == 2


def test_a_journal_is_read_when_it_has_grown(tmp_path, monkeypatch):
    journal, console, read = Journal(tmp_path / "journal.jsonl"), Console(file=io.StringIO()), []
    real = Journal.rows
    monkeypatch.setattr(Journal, "rows", lambda self: read.append(1) or real(self))
    shown = PrintStages(journal, console)
    shown.on_train_begin(None, SimpleNamespace(global_step=0))
    journal.append(journal_row(0))
    for _ in range(5):
        shown.on_step_end()
    journal.append(journal_row(kind="final", weights=None, end=None))
    shown.on_train_end()
    assert (console.file.getvalue().count("stage 0"), console.file.getvalue().count("end of the run")) == (1, 1)
    assert len(read) == 3
