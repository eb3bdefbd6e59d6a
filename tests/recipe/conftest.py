import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MODULES = {"web": ("argparse", "textwrap", "pathlib"), "code": ("json.decoder", "heapq", "bisect", "tokenize")}


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with what the recipes of the package name: texts/, tasks/, and a tokenizer; text of this Python."""
    folder = tmp_path_factory.mktemp("texts")
    documents = {name: [part for module in modules for part in _parts(module)] for name, modules in MODULES.items()}
    (folder / "texts").mkdir()
    for name, own in documents.items():
        (folder / f"texts/{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        documents["web"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder / "tokenizer"
    )
    (folder / "tasks").mkdir()
    for name, modules in (("sums", "web"), ("names", "code")):
        lines = [json.dumps({"context": text[:40], "gold": text[40:80]}) for text in documents[modules][:12]]
        (folder / f"tasks/{name}.jsonl").write_text("\n".join(lines))
    return folder


def _parts(module: str) -> list[str]:
    origin = find_spec(module).origin
    assert origin is not None
    text = Path(origin).read_text()
    return [text[i : i + 600] for i in range(0, min(len(text), 24_000), 600)]


@pytest.fixture
def world(texts, tmp_path, monkeypatch) -> Path:
    """A working folder of the test's own, in which the paths of the recipes are there."""
    for name in ("texts", "tasks", "tokenizer"):
        (tmp_path / name).symlink_to(texts / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
