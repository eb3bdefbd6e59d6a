import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import dynmix.proxies.run as run_module
from dynmix.cli import app
from dynmix.mixture.store import TokenStore
from dynmix.proxies.train import train_run
from tests.small import word_tokenizer

WORDS = ["<eos>", "<unk>", *(f"w{i}" for i in range(62))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tokenizer, two stores, two tasks."""
    folder = tmp_path_factory.mktemp("world")
    word_tokenizer(WORDS, "<unk>", eos_token="<eos>").save_pretrained(folder / "tokenizer")
    for k, name in enumerate(("web", "code")):
        TokenStore.write(folder / "stores" / name, [[2 + (7 * i + 31 * k) % 31 for i in range(n)] for n in (70, 90)])
    (folder / "tasks").mkdir()
    for k, name in enumerate(("copy", "news.valid")):
        records = [{"context": f"w{i} w{i + k}", "gold": f" w{2 * i} w3"} for i in range(12)]
        (folder / "tasks" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


class Here:
    """Workers' stand-in: trains in this process, and cannot train one run."""

    broken = ""

    def __init__(self, out, *rest):
        self.out = out

    def train(self, run, weights):
        return "no luck" if run == self.broken else train_run(self.out, run, weights)

    def close(self):
        pass


def call(world, out, **changes):
    """Run the command on the world with options changed, or left out if None."""
    options = {
        "data": world / "stores", "tasks": world / "tasks", "tokenizer": world / "tokenizer", "out": out,
        "mixtures": 4, "tokens": 256, "sequence-length": 16, "batch-size": 4, "hidden-size": 16, "layers": 1,
        "heads": 2, "threads": 1,
    } | {name.replace("_", "-"): value for name, value in changes.items()}  # fmt: skip
    pairs = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return CliRunner().invoke(app, ["proxies", *(word for pair in pairs for word in pair)])


def test_from_stores_to_the_best_mixture(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_module, "Workers", Here)
    monkeypatch.setattr(Here, "broken", "mixture-002")
    out = tmp_path / "out"
    done = call(world, out, max_epochs=1.5)
    assert done.exit_code == 1
    assert "5 of 6 runs are done" in done.output
    assert "1 runs failed; the same command tries them again:\n  mixture-002: no luck; its log is" in done.output
    assert "web has 10 sequences: " in caplog.text  # 16 are drawn
    assert "expert-web 1.6 times" in caplog.text
    monkeypatch.setattr(Here, "broken", "")
    done = call(world, out)
    assert done.exit_code == 0, done.output
    command = done.output.split("6 of 6 runs are done: dynmix ")[1]
    assert [len(row) for row in csv.reader((out / "runs.csv").open())] == [5] * 7
    fitted = CliRunner().invoke(app, [*command.split(), "--law", "ridge + MDE", "-o", str(tmp_path / "fit")])
    assert fitted.exit_code == 0, fitted.output
    best = json.loads((tmp_path / "fit/fit.json").read_text())
    assert best["weights"].keys() == {"web", "code"}
    assert best["targets"].keys() == {"copy", "news.valid"}
    assert np.isfinite(best["predicted"])
    refused = call(world, out, learning_rate=0.1)
    assert "training learning_rate was 0.002 and is 0.1" in said_of(refused)


def said_of(done):
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    return done.output.replace("\n", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "nowhere.idx: no such file"),
        ({"data": "{world}/stores/web"}, "1 domains and 2 validation sets"),
        ({"tasks": "nowhere"}, "--tasks nowhere: no such file"),
        ({"tokenizer": "./nowhere"}, "--tokenizer ./nowhere"),
        ({"tokens": 10}, "tokens=10: at least one step"),
        ({"model": "./nowhere"}, "model ./nowhere: no configuration of a causal LM"),
        ({"heads": 3}, "hidden_size=16, layers=1, heads=3: at least 1, and an even number"),
        ({"heads": 0}, "heads=0: at least 1"),
        ({"layers": 0}, "layers=0, heads=2: at least 1"),
        ({"task_limit": 0}, "--task-limit 0"),
        ({"frequency": 3}, "frequency=3"),
        ({"jobs": 0}, "jobs=0"),
        ({"batch_size": 500, "sequence_length": 200, "tokens": 100_000}, "domain 'code' has not one whole sequence"),
        ({"out": "{world}/tasks/copy.jsonl"}, "copy.jsonl: file exists"),
    ],
)
def test_what_is_wrong_is_one_clear_line(world, tmp_path, changes, message):
    changes = {name: str(value).format(world=world) for name, value in changes.items()}
    assert message in said_of(call(world, **{"out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()


def test_the_module_is_light():
    heavy = "import sys, dynmix.commands.proxies; print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.strip() == ""
