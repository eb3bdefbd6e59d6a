import os
import subprocess
import sys

import pytest

import dynmix.alone
from dynmix.alone import alone

HOLDER = """
import sys
from pathlib import Path
from dynmix.alone import alone
with alone(Path(sys.argv[1]), "works in it"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_one_processs_at_a_time_and_is_free_when_that_was_killed(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.setattr(dynmix.alone, "PATIENCE", 0.0)
        with (
            pytest.raises(ValueError, match=rf"new: another process \({holder.pid}\) works in it"),
            alone(folder, "works in it"),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with alone(folder, "works in it"):
        assert (folder / ".lock").read_text() == str(os.getpid())


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(dynmix.alone.fcntl, "flock", none)
    with alone(tmp_path, "works in it"):
        pass
