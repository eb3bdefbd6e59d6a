import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import Trainer
from typer.testing import CliRunner

import dynmix.recipe.proxy as proxy
import dynmix.recipe.run as runs
from dynmix.alone import alone
from dynmix.cli import app
from dynmix.inspection import inspect_path
from dynmix.journal import Journal
from dynmix.proxies.run import Proxies
from dynmix.recipe.read import example
from dynmix.scoring import Corpus

SIZE = ("hidden_size=16", "intermediate_size=32", "num_hidden_layers=1", "num_attention_heads=2")
TINY = [f"model.config.{each}" for each in SIZE]
SMALL = [f"proxy.model.config.{each}" for each in SIZE]
SHORT = [
    "tokenizer=tokenizer", "data.sequence_length=32", "data.max_epochs=null", "batch_size=4", "stages.steps=3",
    "training.max_steps=8", "training.per_device_train_batch_size=4", "measurement.probe_sequences=4",
    "measurement.curvature_sequences=4", "measurement.task_sequences=4",
]  # fmt: skip
HELD_OUT = ["domains.web.held_out=0.2", "domains.code.held_out=0.2"]


def _file(name: str) -> Path:
    """A recipe of the package, in the working folder."""
    file = Path(f"{name}.yaml")
    file.write_text(example(name))
    return file


def train(name: str, *overrides: str):
    """Run `dynmix train` on it."""
    return CliRunner().invoke(app, ["train", str(_file(name)), *SHORT, *overrides])


def parameters(folder: str) -> dict[str, str]:
    state = load_file(Path(folder) / "model/model.safetensors")
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items()}


def decisions(folder: str):
    rows = Journal(Path(folder) / "dynmix/journal.jsonl").rows()
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


class StopsAt(Trainer):
    """Gets the signal of Ctrl-C within a step."""

    step = 5

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(*args, **kwargs)


def test_an_interrupted_run_goes_on_and_ends_bit_for_bit_as_one_that_was_not(world, monkeypatch, caplog):
    moves = ["mixer.confidence=0", *HELD_OUT, *TINY]
    whole = train("tikmix-d", *moves, "output=whole", "training.save_steps=4")
    assert whole.exit_code == 0, whole.output
    assert "8 steps done" in whole.output
    with monkeypatch.context() as patched:
        patched.setattr(runs, "Trainer", StopsAt)
        stopped = train("tikmix-d", *moves, "output=cut", "training.save_steps=4")
    assert stopped.exit_code == 130
    assert "stopped after step 5: checkpoint-5 is saved" in stopped.output
    assert "Traceback" not in stopped.output
    # What a kill in the middle of saving leaves: the newest, and not whole.
    shutil.copytree("cut/checkpoint-5", "cut/checkpoint-7")
    with open("cut/checkpoint-7/optimizer.pt", "r+b") as file:
        file.truncate(100)
    done = train("tikmix-d", *moves, "output=cut", "training.save_steps=4")
    assert done.exit_code == 0, done.output
    assert "checkpoint-7 is half-written (optimizer.pt is cut short)" in caplog.text
    assert "going on from cut/checkpoint-5" in caplog.text
    assert parameters("cut") == parameters("whole")
    assert decisions("cut") == decisions("whole")
    assert len({json.dumps(row["weights"]) for row in decisions("whole")}) > 2  # the mixture did move

    planned = json.loads(train("tikmix-d", *moves, "output=planned", "--dry-run", "--json").stdout)
    stages = [row for row in decisions("whole") if row["kind"] == "stage"]
    assert [(stage["start"], stage["decided_after"] or 0) for stage in planned["stages"]] == [
        (row["start"], row["step"]) for row in stages
    ]
    assert not Path("planned/recipe.yaml").exists()
    taken = decisions("whole")[-1]["epochs"]
    for domain, plan in planned["domains"].items():
        assert plan["least_epochs"] - 0.01 <= taken[domain] <= plan["most_epochs"] + 0.01

    kept = json.loads(CliRunner().invoke(app, ["inspect", "whole/checkpoint-8", "--json"]).stdout)
    assert [stage["weights"] for stage in kept["tables"]["stages"]] == [
        {name: pytest.approx(weight, abs=1e-9) for name, weight in row["weights"].items()} for row in stages
    ]
    assert (kept["facts"]["step"], kept["facts"]["samples"]) == (8, 32)

    facts = json.loads(Path("cut/run.json").read_text())
    assert [start["from"] for start in facts["starts"]] == [None, "checkpoint-5"]
    assert facts["starts"][0]["versions"].keys() == {"python", "dynmix", "torch", "transformers", "accelerate"}
    assert facts["fingerprints"]["domains"].keys() == {"web", "code"}
    again = train("tikmix-d", *moves, "output=cut", "training.logging_steps=1")  # which does not make another run
    assert again.exit_code == 0
    assert "this run is done" in caplog.text
    other = train("tikmix-d", *moves, "output=cut", "training.learning_rate=1e-3")
    assert other.exit_code == 2
    assert "training.learning_rate was 0.0006 and is 0.001" in other.output.replace("\n", "")
    assert parameters("cut") == parameters("whole")


def test_experts_go_on_from_where_they_were(world, monkeypatch):
    config = ["model_type=mixtral", "num_local_experts=2", "num_key_value_heads=2", "tie_word_embeddings=false"]
    small = ["mixer=static", *HELD_OUT, *TINY, *(f"model.config.{each}" for each in config)]
    whole = train("tikmix-d", *small, "output=whole-experts", "training.save_steps=4")
    assert whole.exit_code == 0, whole.output
    with monkeypatch.context() as patched:
        patched.setattr(runs, "Trainer", StopsAt)
        assert train("tikmix-d", *small, "output=cut-experts").exit_code == 130
    done = train("tikmix-d", *small, "output=cut-experts")
    assert done.exit_code == 0, done.output
    assert parameters("cut-experts") == parameters("whole-experts")


def small_runs(stores, validation, out, **options):
    """Stands in for trained proxies: a table of mixtures whose losses are lowest at 0.3 of web."""
    out.mkdir(parents=True)
    lines = [
        f"{k},{w},{1 - w},{4 + (w - 0.3) ** 2},{5 + (w - 0.3) ** 2}" for k, w in enumerate((0.1, 0.2, 0.4, 0.6, 0.9))
    ]
    (out / "runs.csv").write_text("\n".join(["run,weight/web,weight/code,loss/web,loss/code", *lines]) + "\n")
    return Proxies(("0",), {}, out / "runs.csv", None)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tikmix-m", ["mixer.mixtures=16", "mixer.surrogate=ridge", *HELD_OUT, *TINY]),
        ("staged", [*HELD_OUT, *TINY]),
        ("automixer", [
            "proxy.training={max_steps: 4, learning_rate: 1e-3}", "proxy.batch_size=4", "proxy.every=2", *TINY, *SMALL,
        ]),
        ("mde", ["proxy.tokens=600", "proxy.batch_size=4", "proxy.law=ridge", *HELD_OUT, *TINY, *SMALL]),
    ],
)  # fmt: skip
def test_every_other_recipe_of_the_package_trains_a_model(world, monkeypatch, name, more):
    if name in ("mde", "automixer"):
        planned = train(name, *more, "output=run", "--dry-run", "--json")
        assert json.loads(planned.stdout)["domains"].keys() == {"web", "code"}
        assert not Path("run/proxy").exists()
    monkeypatch.setattr(proxy, "run_proxies", small_runs)
    done = train(name, *more, "output=run", "training.max_steps=5")
    assert done.exit_code == 0, done.output
    rows = decisions("run")
    assert [row["kind"] for row in rows] == ["stage", "stage", "final"]
    assert rows[-1]["tokens"].keys() == ({"sums", "names"} if name == "automixer" else {"web", "code"})
    assert sum(rows[-1]["tokens"].values()) == 5 * 4 * 32
    if name == "staged":
        assert [row["weights"]["web"] for row in rows[:2]] == [pytest.approx(0.8), pytest.approx(0.5)]
    if name in ("mde", "automixer"):
        file = Path("run/proxy") / ("fit.json" if name == "mde" else "groups/groups.json")
        best = json.loads(file.read_text())["weights"]
        assert rows[0]["weights"] == {domain: pytest.approx(best[domain], abs=1e-6) for domain in rows[0]["domains"]}


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("mde", "proxy.law=rigde", "proxy.law='rigde': there are 'auto', 'power law'"),
        ("mde", "proxy.criterion=sum=1", "no target is called 'sum'"),
        ("mde", "proxy.max_epochs=1e-6", "proxy.max_epochs=1e-06: no mixture fits"),
        ("mde", "proxy.mixtures=0", "proxy.mixtures=0: with the experts 3 small runs are the fewest"),
        ("automixer", "proxy.curvature=datainff", "did you mean 'datainf'?"),
        ("automixer", "proxy.blend=late", "proxy.blend='late': one of step, early, equal"),
        ("automixer", "proxy.keep=2", "proxy.keep=2.0: a share"),
        ("automixer", "data.packing=best_fit", "data.packing='best_fit': the sequences that are regrouped are cut"),
        ("automixer", "data.max_epochs={web: 2}", "data.max_epochs: give one number, or proxy.max_epochs"),
        ("automixer", "data.distinct_epochs=2", "data.distinct_epochs: give data.max_epochs; groups take"),
        ("mde", "data={max_epochs: 4, distinct_epochs: 4}", "data.distinct_epochs takes the place of data.max_epochs"),
    ],
)
def test_what_a_proxy_takes_at_its_end_is_checked_before_its_small_runs(world, name, word, message):
    planned = train(name, *(HELD_OUT if name == "mde" else []), *TINY, *SMALL, word, "output=run", "--dry-run")
    assert planned.exit_code
    assert message in " ".join(planned.output.split())


def test_a_run_that_its_data_ends_says_twice_how_many_steps_it_took(world):
    few = ["data.max_epochs=0.03", "training.max_steps=80", "output=run", "--json"]
    done, again = (train("tikmix-d", *few, *TINY, *HELD_OUT) for _ in range(2))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(again.stdout)
    assert json.loads(done.stdout)["steps"] == decisions("run")[-1]["step"] < 80


def test_what_small_runs_leave_is_of_their_recipe(world):
    small = ["proxy.training={max_steps: 1, learning_rate: 1e-3}", "proxy.batch_size=4", "proxy.every=2", *TINY, *SMALL]
    limits = ["data.max_epochs=1", "training.max_steps=500", "output=run"]
    refused = train("automixer", *small, *limits, "--only-proxy")
    assert "seen 1 times at most" in " ".join(refused.output.split())  # the run's limit, not the proxy's of 4
    changed = train("automixer", *small, *limits, "proxy.keep=1", "proxy.every=1", "--only-proxy")
    assert "a run of another recipe: proxy.every was 2 and is 1" in " ".join(changed.output.split())
    # What only the groups depend on may be mended until they are there.
    assert train("automixer", *small, *limits, "proxy.keep=1", "--only-proxy").exit_code == 0
    facts = json.loads(Path("run/proxy/groups/groups.json").read_text())
    assert all(500 * 4 * 32 * weight <= facts["tokens"][name] + 1 for name, weight in facts["weights"].items())
    changed = train("automixer", *small, *limits, "--dry-run")
    assert "a run of another recipe: proxy.keep was 1.0 and is 0.5" in " ".join(changed.output.split())
    assert inspect_path(Path("run")).facts["starts"] == 0  # the run itself has not begun


def test_a_proxy_scores_sequences_as_the_run_will_read_them(world, monkeypatch):
    def score(corpus, tasks, sources, out, **options):
        items.extend(Corpus(corpus, sequence_length=32).items(np.arange(1), np.zeros(1, int)))
        raise ValueError("this is enough")

    items: list = []
    monkeypatch.setattr(proxy, "score_corpus", score)
    more = ["proxy.training={max_steps: 1, learning_rate: 1e-3}", "proxy.batch_size=4", "proxy.every=2", *TINY, *SMALL]
    assert "this is enough" in train("automixer", *more, "data.boundaries=position_ids", "output=run").output
    assert "position_ids" in items[0]


def test_training_goes_on_from_a_checkpoint_with_its_own_tokenizer(world):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    size = {key: int(value) for key, value in (each.split("=") for each in SIZE)}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **size)).save_pretrained("base")
    AutoTokenizer.from_pretrained("tokenizer").save_pretrained("base")
    more = ["tokenizer=null", "model=base", "measurement.layers=mlp", "output=run", "training.max_steps=4", *HELD_OUT]
    done = train("continued", *more)
    assert done.exit_code == 0, done.output
    before, after = load_file("base/model.safetensors"), load_file("run/model/model.safetensors")
    assert before.keys() == after.keys()
    assert 0 < max(float((before[name] - after[name]).abs().max()) for name in before) < 0.01
    rows = decisions("run")
    assert rows[1]["guards"] == ["web"]
    assert rows[1]["influence"] is not None
    assert Path("run/model/tokenizer.json").exists()


def test_a_folder_with_checkpoints_of_no_recipe_is_left_alone(world):
    Path("run/checkpoint-5").mkdir(parents=True)
    done = train("staged", *HELD_OUT, *TINY, "output=run")
    assert done.exit_code == 2
    assert "no recipe.yaml" in done.output
    assert [path.name for path in Path("run").iterdir()] == ["checkpoint-5"]


def test_a_recipe_that_is_kept_in_the_run_folder_is_not_written_over(world):
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("# of the user\n" + example("staged"))
    done = train("staged", *HELD_OUT, *TINY, "output=run")
    assert done.exit_code == 2
    assert "run/recipe.yaml is not of a run" in done.output
    assert Path("run/recipe.yaml").read_text().startswith("# of the user")


def test_a_second_run_of_the_same_folder_is_kept_out_while_the_first_one_trains(world, monkeypatch):
    monkeypatch.setattr("dynmix.alone.PATIENCE", 0.0)
    with alone(Path("mine"), "trains in it"):
        result = train("staged", *HELD_OUT, *TINY, "output=mine")
    assert (result.exit_code, sorted(os.listdir("mine"))) == (1, [".lock", "tokens"])
    assert f"mine: another process ({os.getpid()}) trains in it" in result.output


def test_a_second_call_is_kept_out_while_the_first_one_makes_small_runs(world, monkeypatch):
    monkeypatch.setattr("dynmix.alone.PATIENCE", 0.0)
    more = ["proxy.training={max_steps: 1, learning_rate: 1e-3}", "proxy.batch_size=4", "proxy.every=2", *TINY, *SMALL]
    with alone(Path("mine/proxy"), "makes these small runs"):
        result = train("automixer", *more, "output=mine", "--only-proxy")
    assert (result.exit_code, os.listdir("mine/proxy")) == (1, [".lock"])
    assert f"mine/proxy: another process ({os.getpid()}) makes these small runs" in " ".join(result.output.split())


RANKS = """
import os, sys
from pathlib import Path
import torch.distributed as dist
import dynmix.recipe.run as runs
import dynmix.trainer_checkpoint as checkpoints
from dynmix.recipe.read import read_recipe

def fails(*_, **__):
    raise OSError("no disk")

os.chdir(sys.argv[1])
rank = int(os.environ["RANK"])
for owner, name, where in ((runs, "load_tokenizer", 1), (checkpoints, "_newest", 0), (runs, "make_model", 1)):
    whole = getattr(owner, name)
    if rank == where:
        setattr(owner, name, fails)
    try:
        recipe = read_recipe(Path("recipe.yaml"), [*sys.argv[2:], "training.per_device_train_batch_size=2"])
        runs.train(runs.build_run(recipe))
    except Exception as failure:
        print(f"<{rank} {name} {type(failure).__name__}: {failure}>", flush=True)
    setattr(owner, name, whole)
dist.barrier()
dist.destroy_process_group()
"""


def test_what_one_rank_cannot_read_of_a_recipe_is_told_to_the_others(world, processes):
    Path("recipe.yaml").write_text(example("tikmix-d"))
    Path("ranks.py").write_text(RANKS)
    given = [*SHORT, *HELD_OUT, *TINY, "output=run", "training.use_cpu=true"]
    status, printed = processes.run(world / "ranks.py", world, *given, ranks=2, timeout=120)
    assert status == 0, printed
    for name, where in (("load_tokenizer", 1), ("_newest", 0), ("make_model", 1)):
        assert f"<{where} {name} OSError: no disk>" in printed
        assert f"<{1 - where} {name} RuntimeError: another rank failed: OSError: no disk>" in printed
