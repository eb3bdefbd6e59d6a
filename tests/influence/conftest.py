"""Tiny causal LMs built from their configurations (nothing is downloaded) and batches for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 97
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

Models = Callable[..., Any]
Batcher = Callable[..., list[dict[str, Tensor]]]


@pytest.fixture(scope="session")
def tiny_lm() -> Models:
    """`tiny_lm("llama" | "gpt2" | "qwen2", tied=False, dropout=0.0, seed=0, dtype=torch.float32)`, in training mode."""

    def build(
        kind: str, *, tied: bool = False, dropout: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Any:
        torch.manual_seed(seed)
        common: dict[str, Any] = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "initializer_range": 0.2}
        model: Any
        if kind == "llama":
            model = LlamaForCausalLM(
                LlamaConfig(**common, **SIZES, num_key_value_heads=2, attention_dropout=dropout, mlp_bias=True)
            )
        elif kind == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**common, **SIZES, num_key_value_heads=2, attention_dropout=dropout))
        elif kind == "gpt2":
            drops: dict[str, Any] = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
            model = GPT2LMHeadModel(GPT2Config(**common, **drops, n_embd=32, n_layer=2, n_head=4, n_positions=32))
        else:
            raise ValueError(kind)
        return model.to(dtype).train()

    return build


@pytest.fixture(scope="session")
def token_batches() -> Batcher:
    """`token_batches(n_sequences, length=10, size=4, seed=0, ragged=False)`: batches, padded right if ragged."""

    def build(
        n: int, *, length: int = 10, size: int = 4, seed: int = 0, ragged: bool = False
    ) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCABULARY, (n, length), generator=generator)
        mask = torch.ones_like(ids)
        if ragged:
            lengths = torch.randint(3, length + 1, (n,), generator=generator)
            mask = (torch.arange(length) < lengths[:, None]).long()
        return [
            {
                "input_ids": ids[i : i + size],
                "attention_mask": mask[i : i + size],
                "domain": torch.zeros(len(ids[i : i + size])),
            }
            for i in range(0, n, size)
        ]

    return build


class ReferenceLM(nn.Module):
    """The model of the fixtures lm_*: embedding plus its running mean, one hidden layer, an untied head."""

    def __init__(self, vocabulary: int = 11, width: int = 6, hidden: int = 5) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.fc, self.head = nn.Linear(width, hidden), nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.emb(input_ids)
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        logits: Tensor = self.head(torch.tanh(self.fc(x + mean)))
        return logits


class ReferenceMLP(nn.Module):
    """The model of the fixture mlp_ekfac: a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc2(torch.tanh(self.fc1(x)))
        return logits


def classification_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    return losses, torch.ones_like(losses)


@dataclass
class Reference:
    """One fixture: numbers by key, its model in float64, and batches of its sequences."""

    numbers: dict[str, np.ndarray[Any, Any]]
    model: nn.Module
    settings: dict[str, Any]  # loss=, if it is not that of a language model

    def batches(self, split: str, rows: np.ndarray[Any, Any] | None = None, size: int = 5) -> list[dict[str, Tensor]]:
        keys = {"x": "x", "y": "y"} if self.settings else {"ids": "input_ids", "mask": "attention_mask"}
        arrays = {ours: torch.as_tensor(self.numbers[f"{split}.{theirs}"]) for theirs, ours in keys.items()}
        if rows is not None:
            arrays = {key: array[rows] for key, array in arrays.items()}
        total = len(next(iter(arrays.values())))
        return [{k: a[i : i + size] for k, a in arrays.items()} for i in range(0, total, size)]


@pytest.fixture(scope="session", params=["mlp_ekfac", "lm_ekfac", "lm_masked_ekfac"])
def reference(request: pytest.FixtureRequest, shared: Path) -> Reference:
    """Factors and scores computed by an independent implementation, in float64."""
    with np.load(shared / "reference" / "influence" / f"{request.param}.npz") as file:
        numbers = dict(file)
    mlp = request.param.startswith("mlp")
    model: nn.Module = (ReferenceMLP() if mlp else ReferenceLM()).double()
    model.load_state_dict({k.removeprefix("param."): torch.as_tensor(v) for k, v in numbers.items() if "param." in k})
    return Reference(numbers, model, {"loss": classification_loss} if mlp else {})
