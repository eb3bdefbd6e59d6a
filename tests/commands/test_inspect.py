import json

import pytest
from typer.testing import CliRunner

from dynmix import MixtureDataset, MixtureStream, TokenStore
from dynmix.cli import app


def call(*words):
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


def test_a_store_and_a_folder_of_stores(tmp_path):
    TokenStore.write(tmp_path / "web", [[1, 2, 3], [4]])
    TokenStore.write(tmp_path / "code", [[5, 6]])
    found = json.loads(call(tmp_path / "web.idx", "--json").stdout)
    assert found["kind"] == "token store"
    assert (found["facts"]["documents"], found["facts"]["tokens"]) == (2, 4)
    assert found["facts"]["document_tokens"] == {"least": 1, "median": 2.0, "most": 3}
    assert call(tmp_path / "web").exit_code == 0
    folder = json.loads(call(tmp_path, "--json").stdout)
    assert folder["tables"]["stores"] == [
        {"store": "code", "documents": 1, "tokens": 2, "dtype": "uint16"},
        {"store": "web", "documents": 2, "tokens": 4, "dtype": "uint16"},
    ]
    assert "folder of token stores" in call(tmp_path).output
    assert not folder["facts"]["unfinished"]
    (tmp_path / ".prepare").mkdir()
    assert json.loads(call(tmp_path, "--json").stdout)["facts"]["unfinished"]


def test_how_much_of_a_store_is_no_repetition(tmp_path):
    TokenStore.write(tmp_path / "web", [range(1000)])
    TokenStore.write(tmp_path / "again", [range(100)] * 10)
    folder = json.loads(call(tmp_path, "--distinct", "--json").stdout)
    assert [row["distinct_share"] for row in folder["tables"]["stores"]] == [0.101, 1.0]  # 100 of 993 grams
    store = json.loads(call(tmp_path / "web", "--distinct", "--json").stdout)
    assert store["facts"]["distinct_share"] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no such file or folder"),
        ("nothing.jsonl", "no such file or folder"),
        ("texts/web.jsonl", "there is nothing of dynmix's in it"),
        ("texts/journal.jsonl", "journal.jsonl:1: not a row of a journal"),
        ("empty", "there is nothing of dynmix's in it"),
        ("checkpoint-3", "half-w"),
        (".", "there is nothing of dynmix's in it"),
    ],
)
def test_what_is_none_is_one_sentence(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "checkpoint-3", "texts"):
        (tmp_path / folder).mkdir()
    for file in ("web.jsonl", "journal.jsonl"):
        (tmp_path / "texts" / file).write_text('{"text": "a document"}\n')
    done = call(name)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_recipe_with_all_its_values(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("output: run\nmodel: base\ndomains: {web: stores/web}\ntasks: {web: web}\nstages: {steps: 5}\n")
    found = json.loads(call(file, "--json").stdout)
    assert found["facts"]["mixer"] == {"name": "tikmix-d"}
    assert found["facts"]["measurement"]["probe_sequences"] == 64
    file.write_text("outptu: run\n")
    done = call(file)
    assert done.exit_code == 2
    assert "did you mean 'output'?" in done.output


def checkpoint(folder, state):
    state = {"dataset": state, "batch_size": 4, "stage_steps": 10, "mixer": {}}
    (folder / "checkpoint-11").mkdir(exist_ok=True)
    about = {"global_step": 11, "max_steps": 25, "stateful_callbacks": {"dynmix": state}}
    (folder / "checkpoint-11" / "trainer_state.json").write_text(json.dumps(about))
    return folder / "checkpoint-11"


def test_a_checkpoint_of_a_run_that_a_domain_joined(tmp_path):
    stores = {name: TokenStore.write(tmp_path / name, [range(100)]) for name in ("web", "code")}
    dataset = MixtureDataset({"web": stores["web"]}, num_samples=100, sequence_length=10, block=4)
    dataset.extend({"code": stores["code"]})
    dataset.publish({"web": 0.5, "code": 0.5}, start=40)
    found = json.loads(call(checkpoint(tmp_path, dataset.state_dict()), "--json").stdout)
    assert [row["weights"] for row in found["tables"]["stages"]] == [
        {"web": 1.0, "code": 0.0}, {"web": 0.5, "code": 0.5},
    ]  # fmt: skip
    assert [(row["domain"], row["sequences"]) for row in found["tables"]["domains"]] == [("web", 10), ("code", 10)]


def test_a_checkpoint_of_a_stream_and_a_damaged_one(tmp_path):
    sources = {name: [{"input_ids": [1] * 10}] * 9 for name in ("web", "code")}
    stream = MixtureStream(sources, num_samples=100, sequence_length=10, block=4)
    found = json.loads(call(checkpoint(tmp_path, stream.state_dict()), "--json").stdout)
    assert [(row["domain"], row["sequences"]) for row in found["tables"]["domains"]] == [("web", None), ("code", None)]
    done = call(checkpoint(tmp_path, {}))
    assert done.exit_code == 1
    assert "checkpoint-11 is damaged: KeyError: 'schedule'" in done.output.replace("\n", " ")


def test_names_of_tasks_are_no_markup(tmp_path):
    file = tmp_path / "influence.json"
    tasks = ["mmlu[five]", "[/b]", "mmlu:books:1"]
    file.write_text(json.dumps({"scores": [[0.1], [0.2], [0.3]], "tasks": tasks, "domains": ["pile:books:1"]}))
    shown = call(file).output
    assert all(name in shown for name in (*tasks, "pile:books:1"))
