import json

import pytest
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from dynmix.cli import app
from dynmix.mixture.store import TokenStore
from dynmix.scoring.inputs import find_stores
from tests.small import word_tokenizer

run = CliRunner().invoke


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer"
    words = ["<eos>", "<unk>", "one", "two"]
    word_tokenizer(words, "<unk>", pre_tokenizers.Whitespace(), eos_token="<eos>").save_pretrained(path)
    return path


@pytest.fixture
def arguments(tmp_path, tokenizer):
    (tmp_path / "texts").mkdir()
    for name in ("web", "code"):
        records = ({"text": text, "from": f"{name}/{text[:3]}"} for text in ("one two", "two"))
        (tmp_path / "texts" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return ["prepare", str(tmp_path / "texts"), "-t", str(tokenizer), "-o", str(tmp_path / "stores")]


def test_a_store_a_file_and_a_table_of_the_counts(tmp_path, arguments):
    done = run(app, arguments)
    assert done.exit_code == 0, done.output
    rows = [line.split()[1:-1:2] for line in done.stdout.splitlines() if line.startswith("│")]
    assert rows == [["code", "2", "5", "10"], ["web", "2", "5", "10"], ["total", "4", "10", "20"]]
    assert TokenStore.open(tmp_path / "stores/code").tokens.tolist() == [2, 3, 0, 3, 0]
    again = run(app, arguments)
    assert again.exit_code == 1
    assert "error: " in again.output
    assert "Traceback" not in again.output
    assert run(app, [*arguments, "--overwrite"]).exit_code == 0


def test_counts_as_json_with_a_field_and_held_out_documents(tmp_path, arguments):
    done = run(app, [*arguments, "--json", "--domain-from", "from", "--held-out", "0.5", "--workers", "1"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["total"] == {"documents": 4, "tokens": 10, "bytes": 20}
    names = {name.removesuffix(".valid") for name in found["stores"]}
    assert names == {"web_one", "web_two", "code_one", "code_two"}
    for name, counts in found["stores"].items():
        assert TokenStore.open(tmp_path / "stores" / name).num_tokens == counts["tokens"]


def test_names_are_no_markup(tmp_path, tokenizer):
    for name in ("web[en]", "[red]", "[", "[.b]"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "[").mkdir()
    (tmp_path / "[" / "b].jsonl").write_text('{"text": "one"}\n')
    names = [str(path) for path in tmp_path.rglob("*.jsonl")]
    done = run(app, ["prepare", *names, "-t", str(tokenizer), "-o", str(tmp_path / "stores")])
    assert done.exit_code == 0, done.output
    rows = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("│")]
    assert sorted(rows) == ["[", "[.b]", "[red]", "b]", "total", "web[en]"]


def test_what_is_wrong_with_an_input_is_said_in_a_line(tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txt": 1}\n')
    done = run(app, ["prepare", str(tmp_path / "bad.jsonl"), "-t", str(tokenizer), "-o", str(tmp_path / "stores")])
    assert done.exit_code == 1
    assert "bad.jsonl" in done.output.replace("\n", "")
    assert not list((tmp_path / "stores").glob("*.idx"))


def test_held_out_stores_are_no_domains_of_a_folder(tmp_path):
    for name in ("a", "a.valid", "b.valid"):
        TokenStore.write(tmp_path / name, [[1]])
    assert list(find_stores([tmp_path])) == ["a", "b.valid"]
    assert list(find_stores([tmp_path / "a.valid"])) == ["a.valid"]


@pytest.mark.parametrize("command", ["score", "proxies"])
def test_commands_refuse_a_tokenizer_that_did_not_make_the_stores(tmp_path, arguments, command):
    assert run(app, arguments).exit_code == 0
    words = ["<eos>", "<unk>", "two", "one"]
    word_tokenizer(words, "<unk>", pre_tokenizers.Whitespace(), eos_token="<eos>").save_pretrained(tmp_path / "other")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.jsonl").write_text('{"text": "one two"}\n')
    common = ["--data", tmp_path / "stores", "--tasks", tmp_path / "tasks", "--tokenizer", tmp_path / "other"]
    more = ["--checkpoints", tmp_path] if command == "score" else ["--tokens", "100000"]
    done = run(app, [command, *map(str, [*common, *more, "--out", tmp_path / "out"])])
    assert done.exit_code == 1
    assert "made with another tokenizer" in done.output.replace("\n", " ")


def test_the_trainer_refuses_such_a_tokenizer_too(tmp_path, arguments, tokenizer):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from dynmix import MixtureDataset
    from dynmix.callbacks import MixtureCallback

    assert run(app, arguments).exit_code == 0
    stores = {"web": tmp_path / "stores/web", "code": tmp_path / "stores/code"}
    dataset = MixtureDataset(stores, num_samples=16, sequence_length=2)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    right = AutoTokenizer.from_pretrained(tokenizer, pad_token="<eos>")
    wrong = word_tokenizer(["<eos>", "one"], "one", eos_token="<eos>")
    settings = TrainingArguments(
        str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, train_sampling_strategy="sequential",
        report_to="none", use_cpu=True, save_strategy="no",
    )  # fmt: skip
    for processing, refused in ((wrong, True), (right, False)):
        callback = MixtureCallback(dataset, tasks=stores, mixer="static", stage_steps=2)
        trainer = Trainer(model, settings, train_dataset=dataset, processing_class=processing, callbacks=[callback])
        if refused:
            with pytest.raises(ValueError, match="made with another tokenizer"):
                trainer.train()
        else:
            assert trainer.train().global_step == 4


def test_inspect_says_how_a_store_was_made_and_nothing_of_one_in_its_place(tmp_path, tokenizer, arguments):
    run(app, arguments)
    facts = json.loads(run(app, ["inspect", str(tmp_path / "stores/web"), "--json"]).stdout)["facts"]
    assert (facts["tokenizer"], facts["bytes_of_text"]) == (str(tokenizer), 10)
    TokenStore.write(tmp_path / "stores/web", [[1, 2]])
    assert "tokenizer" not in run(app, ["inspect", str(tmp_path / "stores/web")]).stdout
