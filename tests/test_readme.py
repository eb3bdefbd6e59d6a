import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from typer.testing import CliRunner

from dynmix import MixtureDataset, TiKMiXD, TokenStore
from dynmix.callbacks import MixtureCallback, MixtureHook
from dynmix.cli import app
from dynmix.journal import Journal
from dynmix.mixers.registry import BUILT_IN

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """What the examples take for granted: a model, an optimizer, stores of tokens in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, low in (("web", 0), ("code", 20)):
        for suffix, documents in (("", 2000), (".valid", 20)):
            texts = (rng.integers(low, low + 30, rng.integers(50, 150)) for _ in range(documents))
            TokenStore.write(tmp_path / "stores" / (name + suffix), texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3), "TiKMiXD": TiKMiXD}


def test_the_two_ways_to_plug_it_in_take_at_most_ten_lines():
    assert len(EXAMPLES) == 5
    assert all(len(example.splitlines()) <= 10 for example in EXAMPLES[:2])


def test_trainer_example_as_printed(scene):
    exec(EXAMPLES[0], scene)
    assert len(scene["dataset"].schedule.stages) == 4
    rows = Journal(Path("run/dynmix/journal.jsonl")).rows()
    assert rows[-1]["kind"] == "final"
    assert all(rows[-1]["task_loss"][task] < rows[0]["task_loss"][task] for task in ("web", "code"))


def test_loop_example_as_printed(scene):
    domains = {"web": "stores/web", "code": "stores/code"}
    scene["dataset"] = MixtureDataset(domains, num_samples=1600, sequence_length=128)
    scene["tasks"] = {"web": "stores/web.valid", "code": "stores/code.valid"}
    exec(EXAMPLES[1], scene)
    assert len(scene["dataset"].schedule.stages) == 4
    assert scene["hook"].steps == 200


def test_mixer_example_as_printed(scene):
    exec(EXAMPLES[2], scene)
    domains = {"web": "stores/web", "code": "stores/code"}
    dataset = MixtureDataset(domains, num_samples=96, sequence_length=128)
    hook = MixtureHook(scene["model"], dataset, {"web": "stores/web.valid"}, scene["Greedy"](), 4, batch_size=8)
    for batch in DataLoader(dataset, batch_size=8):
        scene["model"](input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        scene["optimizer"].step()
        scene["optimizer"].zero_grad()
        hook.step()
    first, second, _ = (stage.weights["web"] for stage in dataset.schedule.stages)
    assert second in (pytest.approx(0.5 * first), pytest.approx(0.5 * first + 0.5))


@pytest.fixture
def tokenizer(tmp_path):
    """Of words w0 to w63, and two tasks in its words."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w63"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w62")
    fast.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "tasks").mkdir()
    for low, name in ((0, "sums"), (20, "names")):
        lines = [json.dumps({"context": f"w{low + i}", "gold": f" w{low + i + 1} w{low + 3}"}) for i in range(20)]
        (tmp_path / f"tasks/{name}.jsonl").write_text("\n".join(lines))
    return fast


def test_checkpoints_as_mixers_as_printed(scene, tokenizer, tmp_path):
    domains = {"web": "stores/web", "code": "stores/code"}
    scene["dataset"] = MixtureDataset(domains, num_samples=1600, sequence_length=128)
    scene |= {"tokenizer": tokenizer, "MixtureCallback": MixtureCallback, "MixtureDataset": MixtureDataset}
    exec(EXAMPLES[3], scene)
    args = TrainingArguments(
        "run", max_steps=120, per_device_train_batch_size=8, train_sampling_strategy="sequential", save_steps=60,
        report_to=[],
    )  # fmt: skip
    Trainer(scene["model"], args, train_dataset=scene["dataset"], callbacks=[scene["callback"]]).train()
    stages = scene["dataset"].schedule.stages
    assert {name for name, weight in stages[1].weights.items() if weight} == {"group:sums", "group:names"}

    commands = README.partition("dynmix score --checkpoints")
    for line in (f"score --checkpoints{commands[2].splitlines()[0]}", "regroup scores --data stores --out groups"):
        assert f"dynmix {line}" in README
        done = CliRunner().invoke(app, line.split(), catch_exceptions=False)
        assert done.exit_code == 0, done.output
    exec(EXAMPLES[4], scene)
    assert set(scene["dataset"].domains) >= {"sums", "names"}
    assert len(scene["dataset"][0]["input_ids"]) == 128


def test_every_mixer_is_in_the_table():
    table = README.partition("## Mixers")[2].partition("Static ones")[0]
    assert set(re.findall(r"`([a-z-]+)`", table.partition("| Name")[2])) >= set(BUILT_IN)


def test_every_checking_command_selects_tests():
    """The table of promises names tests that exist."""
    commands = re.findall(r"`pytest (.*?)`", README)
    assert len(commands) == 6
    root = Path(__file__).parent
    names = [
        name
        for path in root.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    ]
    for command in commands:
        words = re.search(r'-k "(.*)"', command).group(1).split(" or ")
        for word in words:
            assert any(word in name for name in names), word
