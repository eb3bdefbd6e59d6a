import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("training.py")


@pytest.fixture(scope="session")
def training():
    """The module `training.py`, which is no test."""
    spec = importlib.util.spec_from_file_location("dynmix_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["dynmix_training"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def launch():
    """Run `training.py` in its own process, or `processes` of them under torchrun; returns the exit status."""

    def launch(output: Path, processes: int = 1, script: Path = SCRIPT, **given) -> int:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(script), str(output), json.dumps(given)]
        output.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode not in (0, -9):
            raise AssertionError(done.stderr[-4000:])
        return done.returncode

    return launch
