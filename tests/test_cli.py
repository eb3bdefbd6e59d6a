import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dynmix.cli import app
from dynmix.mixers.registry import mixer_names
from dynmix.mixture.store import TokenStore

run = CliRunner().invoke


@pytest.fixture
def tokenizer(tmp_path):
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(path)
    return path


def test_prepare_makes_a_store_a_file(tmp_path, tokenizer):
    for name in ("web", "code"):
        lines = "\n".join(json.dumps({"text": text}) for text in ("one two", "two"))
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.jsonl").write_text(lines)
    arguments = ["prepare", str(tmp_path / "texts"), "-t", str(tokenizer), "-o", str(tmp_path / "stores")]
    done = run(app, arguments)
    assert done.exit_code == 0, done.output
    assert "web: 2 documents, 5 tokens" in done.output
    assert TokenStore.open(tmp_path / "stores/code").tokens.tolist() == [2, 3, 0, 3, 0]
    again = run(app, arguments)
    assert again.exit_code == 1
    assert "error: " in again.output
    assert "Traceback" not in again.output
    assert run(app, [*arguments, "--overwrite"]).exit_code == 0


def test_prepare_says_what_is_wrong_with_an_input(tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txt": 1}\n')
    done = run(app, ["prepare", str(tmp_path / "bad.jsonl"), "-t", str(tokenizer), "-o", str(tmp_path / "stores")])
    assert done.exit_code == 1
    assert "bad.jsonl" in done.output.replace("\n", "")
    assert not list((tmp_path / "stores").glob("*.idx"))


def test_report_of_a_folder_without_a_journal_is_one_clear_line(tmp_path):
    done = run(app, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert "journal.jsonl" in done.output.replace("\n", "")


def test_mixers_lists_every_name_with_what_it_needs():
    done = run(app, ["mixers"])
    assert done.exit_code == 0
    for name in mixer_names():
        assert any(line.strip().startswith(name) for line in done.output.splitlines()), name
    assert "reference_loss" in done.output


def test_a_demo_with_a_mixer_that_is_not_there_or_needs_a_reference_is_refused_at_once(tmp_path):
    for name, message in (("tikmix", "no mixer 'tikmix'"), ("doremi", "reference model")):
        done = run(app, ["demo", "--mixer", name, "--output", str(tmp_path / "run")])
        assert done.exit_code == 1
        assert message in done.output
        assert not (tmp_path / "run").exists()
