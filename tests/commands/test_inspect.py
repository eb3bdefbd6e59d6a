import json

import pytest
from typer.testing import CliRunner

from dynmix import TokenStore
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no such file or folder"),
        ("empty", "there is nothing of dynmix's in it"),
        ("checkpoint-3", "half-w"),
        (".", "there is nothing of dynmix's in it"),
    ],
)
def test_what_is_none_is_one_sentence(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "checkpoint-3"):
        (tmp_path / folder).mkdir()
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
