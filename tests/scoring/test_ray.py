"""On a local Ray of two workers; skipped where Ray is not installed."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from dynmix.scoring import score_corpus

from .conftest import contents

ray = pytest.importorskip("ray")

SMALL = {"shard_samples": 4}  # nine shards, by two checkpoints

DRIVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import make_setting
from dynmix.scoring import score_corpus
import ray

done = []
def tick():
    done.append(1)
    if len(done) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

ray.init(num_cpus=2, include_dashboard=False)
score_corpus(**make_setting(Path(sys.argv[2])).arguments(out=sys.argv[3], shard_samples=4, actors=2, tick=tick))
"""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    """Scored by this process."""
    out = tmp_path_factory.mktemp("here")
    score_corpus(**setting.arguments(out=out, **SMALL))
    return out


def test_a_driver_that_is_killed_goes_on(setting, finished, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(setting.folder), str(out)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    parts = {path: path.stat().st_mtime_ns for path in [*out.glob("scores-*"), *out.glob("parts/*/*.parquet")]}
    assert parts
    assert len(list(out.glob("scores-*"))) < 9
    ticks = []
    score_corpus(**setting.arguments(out=out, **SMALL, actors=2, tick=lambda: ticks.append(1)))
    assert 0 < len(ticks) <= 18 - 5
    assert contents(out) == contents(finished)


def test_an_actor_that_is_killed_is_replaced(setting, finished, tmp_path):
    marker = tmp_path / "killed"

    def load(path):
        model = LlamaForCausalLM.from_pretrained(path)
        forwards = []

        def die(*_):
            forwards.append(1)
            if len(forwards) == 15 and not marker.exists():  # past the preparation
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        model.register_forward_pre_hook(die)
        return model

    score_corpus(**setting.arguments(out=tmp_path / "out", **SMALL, actors=2, load=load))
    assert marker.exists()
    assert contents(tmp_path / "out") == contents(finished)


def test_relative_paths_are_from_where_the_caller_is(setting, finished, monkeypatch):
    monkeypatch.chdir(setting.folder)  # the workers, started before, are elsewhere, as those of a cluster are
    sources = [replace(source, path=source.path.relative_to(setting.folder)) for source in setting.sources]
    score_corpus(**setting.arguments(out="out-of-ray", checkpoints=sources, **SMALL, actors=1))
    found, want = contents(setting.folder / "out-of-ray"), contents(finished)
    assert found.keys() == want.keys()
    assert all(found[name] == want[name] for name in want if name != "scoring.json")  # it has the paths


def test_what_is_wrong_in_an_actor_reaches_the_caller(setting, tmp_path):
    with pytest.raises(ValueError, match="layers='nothing' selects no trainable linear layer"):
        score_corpus(**setting.arguments(out=tmp_path / "out", **SMALL, actors=1, layers="nothing"))


def test_a_failure_of_another_kind_in_an_actor_says_what_it_was(setting, tmp_path):
    def load(path):
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(RuntimeError, match=r"an actor failed: OSError: \[Errno 28\] No space left on device"):
        score_corpus(**setting.arguments(out=tmp_path / "out", **SMALL, actors=1, load=load))
