import io
import sys

import pytest
from rich.progress import Progress

from dynmix.shown import Bar, stderr_console


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_that_is_gone_ends_no_work(monkeypatch, failure, terminal):
    class Gone(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, text):
            raise failure

    monkeypatch.setattr(sys, "stderr", Gone())
    console = stderr_console()
    console.print("words")
    with Progress(console=console) as bar:
        bar.update(bar.add_task("work", total=2), advance=1)
    assert console.is_terminal == terminal
    with Bar(total=2, leave=False, mininterval=0) as other:
        other.update()
    assert list(Bar(range(3))) == [0, 1, 2]
    monkeypatch.setattr(Gone, "flush", lambda self: self.write(""))  # where what is written waits in a buffer
    console.print("words")


def test_what_can_be_shown_is(capsys, monkeypatch):
    stderr_console().print("words")
    assert capsys.readouterr().err == "words\n"
    monkeypatch.setattr(sys, "stderr", None)
    stderr_console().print("words")
