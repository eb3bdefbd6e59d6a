"""README.md and docs/ are what they say: their code runs, their commands parse, their names exist.

Every ```python block is run, in order for each page, in a folder that has what the pages take for granted. A remark
may stand before a block: `<!-- afresh -->` runs the page's first block again before it, because it is an alternative to
what went before; `<!-- run -->` has the commands of a shell block run, where others are only parsed. The numbers of the
examples are made smaller (`SMALLER`, and `SHORT` for recipes), and so are the defaults of a measurement (`FEWER`), so
that a page takes a second or two.
"""

import json
import os
import re
import shlex
import shutil
import tomllib
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
import typer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dynmix import TokenStore
from dynmix.cli import app
from dynmix.controller import MixtureController
from dynmix.recipe.read import read_recipe
from tests.small import word_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SMALLER = {
    "num_samples=1600": "num_samples=64",
    "max_steps=200": "max_steps=8",
    "max_steps=100": "max_steps=8",
    "save_steps=50": "save_steps=4",
    "save_steps=100": "save_steps=4",
    "stage_steps=50": "stage_steps=4",
    "steps == 150": "steps == 6",
    "steps == 100": "steps == 8",
    "sequence_length=128": "sequence_length=32",
    "--sequence-length 128": "--sequence-length 32",
    "max_length=128": "max_length=32",
    "length=128)": "length=32)",
    "* 128}": "* 32}",
    "start=800)": "start=32)",
    "(800)": "(32)",
    "hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4": (
        "hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2"
    ),
}
SHORT = [
    "model.config.hidden_size=16", "model.config.intermediate_size=32", "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2", "data.sequence_length=32", "batch_size=8", "stages.steps=4",
    "training.max_steps=8", "training.per_device_train_batch_size=8", "training.disable_tqdm=true",
    "measurement.probe_sequences=8", "measurement.task_sequences=8", "measurement.curvature_sequences=8",
]  # fmt: skip
FEWER = {"probe_sequences": 8, "curvature_sequences": 8, "task_sequences": 8, "sample_sequences": 32}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text as printed, the remark before it, and the line before its first."""

    language: str
    text: str
    remark: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"(?:^<!-- ([a-z]+) -->\n)?^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(m[2], m[3], m[1] or "", text.count("\n", 0, m.start(3))) for m in found]


def commands(block: Block) -> list[list[str]]:
    """The words of each `dynmix` command of a shell block, behind `dynmix`."""
    lines = [shlex.split(line, comments=True) for line in block.text.splitlines()]
    return [words[words.index("dynmix") + 1 :] for words in lines if "dynmix" in words]


def smaller(block: Block) -> Block:
    text = block.text
    for printed, less in SMALLER.items():
        text = text.replace(printed, less)
    return replace(block, text=text)


def execute(page: Path, block: Block, scene: dict[str, object]) -> None:
    exec(compile("\n" * block.line + smaller(block).text, str(page), "exec"), scene)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What the pages name: token stores, text, tasks, and a tokenizer of the words w0 to w63 that is called gpt2."""
    folder, rng = tmp_path_factory.mktemp("pages"), np.random.default_rng(0)
    (folder / "texts").mkdir()
    (folder / "tasks").mkdir()
    for name, low in (("web", 0), ("code", 20)):
        for suffix, documents in (("", 150), (".valid", 8)):
            texts = [rng.integers(low, low + 30, rng.integers(50, 150)) for _ in range(documents)]
            TokenStore.write(folder / "stores" / (name + suffix), texts)
            if not suffix:
                lines = (json.dumps({"text": " ".join(f"w{token}" for token in text)}) for text in texts)
                (folder / f"texts/{name}.jsonl").write_text("\n".join(lines))
    word_tokenizer((f"w{i}" for i in range(64)), "w63", eos_token="w62").save_pretrained(folder / "gpt2")
    for low, name in ((0, "sums"), (20, "names")):
        lines = [json.dumps({"context": f"w{low + i}", "gold": f" w{low + i + 1} w{low + 3}"}) for i in range(20)]
        (folder / f"tasks/{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def scene(folder, tmp_path, monkeypatch):
    """A working folder with these, and what examples that define nothing else take for granted."""
    for part in ("texts", "tasks", "gpt2"):
        (tmp_path / part).symlink_to(folder / part)
    shutil.copytree(folder / "stores", tmp_path / "stores", copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    for name, number in FEWER.items():
        monkeypatch.setitem(MixtureController.__init__.__kwdefaults__, name, number)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    found = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "tokenizer": PreTrainedTokenizerFast.from_pretrained("gpt2"),
    }
    return found | ({"module": _module(model)} if find_spec("lightning") else {})


def _module(model: nn.Module) -> object:
    from lightning import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, number):
            return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Module()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


RUN = [page for page in PAGES if any(b.language == "python" or b.remark == "run" for b in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_code_runs_as_printed(page, scene):
    python = [block for block in blocks(page) if block.language == "python"]
    for block in blocks(page):
        if block.language == "python":
            if "lightning" in block.text and find_spec("lightning") is None:
                continue  # an extra
            for each in [*(python[:1] if block.remark == "afresh" else []), block]:
                execute(page, each, scene)
        elif block.language == "yaml":
            Path("recipe.yaml").write_text(block.text)
        elif block.remark == "run":
            for words in commands(smaller(block)):
                if words[0] == "prepare":
                    shutil.rmtree("stores")  # a reader who makes them has none yet
                short = SHORT if words[:2] == ["train", "recipe.yaml"] else []
                done = CliRunner().invoke(app, [*words, *short])
                assert done.exit_code == 0, f"{name_of(page)}:{block.line}: dynmix {shlex.join(words)}\n{done.output}"


def test_a_block_that_fails_says_where_it_stands(scene):
    page, wrong = ROOT / "README.md", Block("python", "model\nno_such_name\n", "", 40)
    with pytest.raises(NameError) as failure:
        execute(page, wrong, scene)
    assert failure.traceback[-1].lineno + 1 == 42


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_ones_that_there_are(page):
    """Every command and option of a shell block, and every `dynmix ...` in the text, is known to the command line."""
    group = typer.main.get_command(app)
    for block in blocks(page):
        for words in commands(block) if block.language == "bash" else []:
            name, *rest = words
            assert name in group.commands, f"{name_of(page)}:{block.line}"
            group.commands[name].make_context(name, rest)  # raises for an option or a value that is none
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for command, options in re.findall(r"`dynmix ([a-z]+)([^`]*)`", text):
        assert command in group.commands, f"{name_of(page)}: dynmix {command}"
        known = {option for parameter in group.commands[command].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", options)) <= known, f"{name_of(page)}: dynmix {command}{options}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_targets_extras_and_links_are_there(page):
    text = page.read_text()
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).is_file(), script
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shell = "".join(block.text for block in blocks(page) if block.language == "bash")
    asked = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)", shell, re.MULTILINE)
    assert set(asked) <= set(targets)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install '[^']*\[([a-z-]+)\]'", text)) <= set(extras)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).is_file(), f"{name_of(page)} links to {target}"


def test_the_lowest_versions_are_the_declared_ones():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    for name in ("transformers", "accelerate"):
        [lowest] = [each.removeprefix(f"{name}>=") for each in declared if each.startswith(f"{name}>=")]
        assert [each for each in pinned if each.startswith(f"{name}==")] == [f"{name}=={lowest}"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_are_ones(page, tmp_path):
    for block in blocks(page):
        if block.language == "yaml":
            (tmp_path / "recipe.yaml").write_text(block.text)
            read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("package", ["dynmix", "dynmix.callbacks", "dynmix.mixers", "dynmix.laws", "dynmix.scoring"])
def test_the_reference_has_every_public_name(package):
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    documented = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", pages, re.MULTILINE)
    assert len(set(documented)) == len(documented)
    found = [resolve_name(name) for name in documented if "lightning" not in name or find_spec("lightning")]
    module = import_module(package)
    missing = [name for name in module.__all__ if not any(getattr(module, name) is one for one in found)]
    assert missing == []
