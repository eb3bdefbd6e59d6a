import json
import re
from pathlib import Path

import pytest

import tests.callbacks.training

SCRIPT = Path(__file__).with_name("training.py")


@pytest.fixture(scope="session")
def training():
    """The module `training.py`, which is no test."""
    return tests.callbacks.training


@pytest.fixture
def sent(training, monkeypatch):
    """The dataset of the runs of a test, as if the process that started this one had made it."""
    made = training.dataset()
    monkeypatch.setattr(made._progress, "_maker", 0)
    monkeypatch.setattr(training, "dataset", lambda **_: made)
    return made


@pytest.fixture(scope="session")
def told(processes):
    """Run an adapter whose controller fails in one method on rank 1; returns what the two ranks raised."""

    def told(output: Path, adapter: str, method: str) -> list[str]:
        script = Path(__file__).with_name("failing.py")
        status, printed = processes.run(script, output, adapter, method, ranks=2, timeout=90)
        assert status == 0, printed[-4000:]
        return sorted(re.findall("<(. .*Error: .*)>", printed))

    return told


@pytest.fixture(scope="session")
def launch(processes):
    """Run `training.py` in its own process, or in so many ranks; returns the exit status."""

    def launch(output: Path, ranks: int = 1, script: Path = SCRIPT, **given) -> int:
        output.mkdir(parents=True, exist_ok=True)
        status, printed = processes.run(script, output, json.dumps(given), ranks=ranks)
        assert status in (0, -9), printed[-4000:]
        return status

    return launch
