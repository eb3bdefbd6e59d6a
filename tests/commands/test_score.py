import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dynmix.checkpoints import list_checkpoints, select_checkpoints
from dynmix.commands.score import score
from dynmix.mixture.store import TokenStore
from dynmix.peaks import PeakSnapshots
from dynmix.scores import Column
from dynmix.scoring import read_scores
from dynmix.tasks import Task
from tests.small import word_tokenizer

WORDS = ["<eos>", "<unk>", *(f"w{i}" for i in range(38))]

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(score)


def save_model(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tokenizer, two stores, two tasks, three checkpoints."""
    folder = tmp_path_factory.mktemp("world")
    word_tokenizer(WORDS, "<unk>", eos_token="<eos>").save_pretrained(folder / "tokenizer")
    for k, name in enumerate(("web", "code")):
        TokenStore.write(folder / "stores" / name, [[(7 * i + k) % 40 for i in range(n)] for n in (30, 17, 50)])
    (folder / "tasks").mkdir()
    for k, name in enumerate(("copy", "add.valid")):
        records = [{"context": f"w{i} w{i + k}", "gold": f" w{2 * i} w3", "choices": None} for i in range(12)]
        (folder / "tasks" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    for step in (5, 10, 20):
        save_model(folder / "run" / f"checkpoint-{step}", step)
    return folder


def call(world, *more, **changes):
    """Run the command on the world with options changed, or left out if None."""
    options = {
        "checkpoints": world / "run", "data": world / "stores", "tasks": world / "tasks",
        "tokenizer": world / "tokenizer", "sequence-length": 16, "batch-tokens": 64,
    } | {name.replace("_", "-"): value for name, value in changes.items()}  # fmt: skip
    pairs = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return CliRunner().invoke(app, [word for pair in pairs for word in pair] + [str(word) for word in more])


def tasks_of(world):
    return {
        name: Task.from_jsonl(world / "tasks" / f"{name}.jsonl", world / "tokenizer") for name in ("add.valid", "copy")
    }


def test_each_task_is_scored_by_the_checkpoint_where_it_peaks(world, tmp_path):
    done = call(world, out=tmp_path / "out", metric="bits_per_byte")
    assert done.exit_code == 0, done.output
    found = read_scores(tmp_path / "out")
    want = select_checkpoints(world / "run", tasks_of(world), metric="bits_per_byte")
    assert set(found.columns) == {Column(task, peak.path.name, peak.step) for task, peak in want.items()}
    assert found.domains == ("code", "web")
    assert len(found.row) == 2 * (97 // 16)
    assert "12 samples" in done.output
    again = call(world, out=tmp_path / "out", metric="bits_per_byte")
    assert again.exit_code == 0
    assert "tokens to score" not in again.output


@pytest.mark.parametrize(
    ("select", "steps"), [("last", [20]), ("all", [5, 10, 20]), ("1", [20]), ("2", [5, 20]), ("3", [5, 10, 20])]
)
def test_every_task_by_checkpoints_chosen_by_step(world, tmp_path, select, steps):
    done = call(world, out=tmp_path / "out", select=select, unit="document", max_length=16, sequence_length=None)
    assert done.exit_code == 0, done.output
    found = read_scores(tmp_path / "out")
    assert [column.step for column in found.columns] == [step for step in steps for _ in range(2)]
    assert found.tokens.tolist() == [30, 17, 50] * 2


def test_recorded_peaks_are_taken_as_they_are(world, tmp_path):
    peaks = PeakSnapshots(tmp_path / "peaks", metric="loss")
    values = {5: {"copy": 3.0, "add.valid": 1.0}, 10: {"copy": 2.0, "add.valid": 9.0}}
    for checkpoint in list_checkpoints(world / "run")[:2]:
        model = LlamaForCausalLM.from_pretrained(checkpoint.path)
        peaks.record(model, checkpoint.step, values[checkpoint.step])
    done = call(world, out=tmp_path / "out", checkpoints=tmp_path / "peaks")
    assert done.exit_code == 0, done.output
    assert set(read_scores(tmp_path / "out").columns) == {
        Column("copy", "step-0000010", 10), Column("add.valid", "step-0000005", 5)
    }  # fmt: skip
    refused = call(world, out=tmp_path / "other", checkpoints=tmp_path / "peaks", metric="accuracy")
    assert "was recorded with metric" in said(refused)
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "more.jsonl").write_text('{"text": "w1 w2"}')
    refused = call(world, "--tasks", tmp_path / "third", out=tmp_path / "other", checkpoints=tmp_path / "peaks")
    assert "peaks.json has no peak of 'more'" in said(refused)


def test_single_checkpoints_and_stores_and_files(world, tmp_path):
    done = call(
        world, "--checkpoints", world / "run" / "checkpoint-20", "--tasks", world / "tasks" / "add.valid.jsonl",
        "--data", world / "stores" / "web.idx", out=tmp_path / "out", checkpoints=world / "run" / "checkpoint-5",
        data=world / "stores" / "code", tasks=world / "tasks" / "copy.jsonl", select="all", task_limit=3,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "scoring.json").read_text())
    assert [one["step"] for one in config["checkpoints"]] == [5, 20]
    assert [one["name"] for one in config["domains"]] == ["code", "web"]
    assert [(one["name"], one["sequences"]) for one in config["tasks"]] == [("copy", 3), ("add.valid", 3)]


def test_overwrite_begins_anew(world, tmp_path):
    assert call(world, out=tmp_path / "out", select="last").exit_code == 0
    refused = call(world, out=tmp_path / "out", select="last", layers="lm_head")
    assert "layers was None and is 'lm_head'" in said(refused)
    assert "--overwrite" in said(refused)
    done = call(world, "--overwrite", out=tmp_path / "out", select="last", layers="lm_head")
    assert done.exit_code == 0, done.output


def said(done):
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    return done.output.replace("\n", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoints": "nowhere"}, "--checkpoints nowhere: no such folder"),
        ({"checkpoints": "{world}/stores"}, "stores: no checkpoint in it"),
        ({"checkpoints": "{world}/run", "select": "4"}, "--select 4: there are 3 checkpoints"),
        ({"select": "best"}, "--select best: peak, last, all, or a number"),
        ({"select": "0"}, "--select 0: peak, last, all, or a number"),
        ({"metric": "f1"}, "--metric f1: one of loss, bits_per_byte, accuracy"),
        ({"metric": "accuracy"}, "metric='accuracy': no example of task"),
        ({"data": "{world}/tasks"}, "tasks: no token store (.idx) in this folder; `dynmix prepare` makes them"),
        ({"data": "nowhere"}, "nowhere.idx: no such file"),
        ({"tasks": "nowhere"}, "--tasks nowhere: no such file"),
        ({"tasks": "{world}/run"}, "run: no such file, or no .jsonl"),
        ({"tokenizer": "./nowhere"}, "--tokenizer ./nowhere"),
        ({"task_limit": 0}, "--task-limit 0: at least 1 example"),
        ({"unit": "page", "select": "last"}, "unit='page'"),
        ({"sequence_length": 64, "select": "last"}, "takes 32 at most"),
        ({"layers": "nothing", "select": "last"}, "layers='nothing' selects no trainable linear layer"),
        ({"layers": "(", "select": "last"}, "layers='('"),
        ({"device": "warp", "select": "last"}, "device='warp'"),
    ],
)
def test_what_is_wrong_is_one_clear_line(world, tmp_path, changes, message):
    changes = {name: str(value).format(world=world) for name, value in changes.items()}
    assert message in said(call(world, out=tmp_path / "out", **changes))


def test_a_single_checkpoint_without_a_step_in_its_name_is_refused_by_its_own(world, tmp_path):
    save_model(tmp_path / "final", seed=1)  # as trainer.save_model("final") does; nothing else is beside it
    refused = call(world, checkpoints=tmp_path / "final", select="last", out=tmp_path / "out")
    assert f"--checkpoints {tmp_path / 'final'}: no whole checkpoint whose name ends in its step" in said(refused)


def test_names_that_collide_are_refused(world, tmp_path):
    same = call(world, "--data", world / "stores" / "web", out=tmp_path / "out")
    assert "have the same name 'web'" in said(same)


def test_the_module_is_light():
    heavy = "import sys, dynmix.commands.score; print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.strip() == ""


def test_a_folder_that_has_a_model_beside_its_checkpoints_is_a_folder_of_checkpoints(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    save_model(run, seed=99)  # as trainer.save_model() does
    done = call(world, checkpoints=run, select="all", out=tmp_path / "all")
    assert done.exit_code == 0, done.output
    assert {column.step for column in read_scores(tmp_path / "all").columns} == {5, 10, 20}


def test_checkpoints_as_a_shell_lists_them(world, tmp_path):
    both = [world / "run/checkpoint-5", world / "run/checkpoint-20"]
    done = call(world, both[1], checkpoints=both[0], out=tmp_path / "peak")
    assert done.exit_code == 0, done.output
    steps = {column.step for column in read_scores(tmp_path / "peak").columns}
    assert steps <= {5, 20}
    elsewhere = tmp_path / "checkpoint-7"
    save_model(elsewhere, seed=7)
    apart = call(world, elsewhere, checkpoints=both[0], out=tmp_path / "apart")
    assert "takes the checkpoints of one folder" in " ".join(apart.output.split())


def test_a_task_must_not_have_the_name_of_the_rest(world, tmp_path):
    shutil.copy(world / "tasks/copy.jsonl", tmp_path / "rest.jsonl")
    assert "rename the file" in " ".join(call(world, tasks=tmp_path, out=tmp_path / "out").output.split())
