import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix.mixture.store import TokenStore
from dynmix.scoring import Source

VOCABULARY, LENGTH = 97, 12


def examples(seed: int, n: int = 7) -> list[dict[str, torch.Tensor]]:
    """Of several lengths, with only their last tokens scored."""
    rng, found = np.random.default_rng(seed), []
    for length in rng.integers(3, LENGTH, n):
        ids = torch.from_numpy(rng.integers(0, VOCABULARY, length))
        labels = ids.clone()
        labels[: length // 2] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def save_model(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@dataclass
class Setting:
    """Two stores, three tasks, and two checkpoints that share a task."""

    folder: Path
    domains: dict[str, Path]
    tasks: dict[str, Any]
    sources: list[Source]

    def arguments(self, **changes: Any) -> dict[str, Any]:
        return {
            "domains": self.domains,
            "tasks": self.tasks,
            "checkpoints": self.sources,
            "sequence_length": LENGTH,
            "curvature_sequences": 9,
            "batch_tokens": 5 * LENGTH,
            "shard_samples": 12,
            "progress": False,
        } | changes


def make_setting(folder: Path) -> Setting:
    """The same for every process: what is there already is used."""
    lengths = {"web": [30, 5, 1, 0, 40, 12, 13, 2, 90, 60], "code": [25, 26, 27, 3, 100, 1]}
    domains = {name: folder / "stores" / name for name in lengths}
    sources = [
        Source("step-3", 3, folder / "checkpoints" / "step-3", ("arc", "math.valid")),
        Source("step-8", 8, folder / "checkpoints" / "step-8", ("math.valid", "code")),
    ]
    if not (folder / "ready").exists():
        rng = np.random.default_rng(0)
        for name, sizes in lengths.items():
            TokenStore.write(domains[name], [rng.integers(0, VOCABULARY, size) for size in sizes])
        for source in sources:
            save_model(source.path, source.step)
        (folder / "ready").touch()
    return Setting(
        folder, domains, {name: examples(i) for i, name in enumerate(("arc", "math.valid", "code"))}, sources
    )


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("scoring"))


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a finished folder, by name."""
    return {os.path.relpath(p, out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
