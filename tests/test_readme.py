import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix import MixtureDataset, TiKMiXD, TokenStore
from dynmix.callbacks import MixtureHook
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
    assert len(EXAMPLES) == 3
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
