"""A small Llama under training: one step, and a checkpoint from which it goes on bit for bit.

Knows a model, its optimizer and what it reads; no measurement.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.trainer_utils import set_seed

from dynmix import MixtureDataset
from dynmix.proxies import small_llama
from dynmix.whole_file import whole_file

LARGEST_NORM = 1.0  # of a gradient


@dataclass(frozen=True)
class Size:
    """Of the model and of a training step. The default has 1.4M parameters with a vocabulary of 4,096."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    length: int = 128  # tokens of a sequence
    batch: int = 32  # sequences of a step
    rate: float = 3e-3  # the highest learning rate

    @property
    def step_tokens(self) -> int:
        return self.batch * self.length

    def dataset(
        self, stores: Mapping[str, Any], weights: Any, steps: int, seed: int, max_epochs: Any = None
    ) -> MixtureDataset:
        """The stream of so many steps."""
        return MixtureDataset(
            stores, weights, num_samples=steps * self.batch, sequence_length=self.length, seed=seed, block=self.batch,
            max_epochs=max_epochs,
        )  # fmt: skip


def check_device(device: str) -> None:
    """Exit where there is no such device."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as problem:  # the former of a torch without CUDA
        raise SystemExit(f"--device {device}: {str(problem).splitlines()[0]}") from None


class Training:
    """A model with AdamW, and how many steps it has done.

    Args:
        size: of both.
        vocabulary: of the tokenizer.
        seed: of the parameters.
        device: where it trains.
        schedule: share of the highest learning rate in a step, counted from 0.
    """

    def __init__(
        self, size: Size, vocabulary: int, seed: int, device: str, schedule: Callable[[int], float] = lambda step: 1.0
    ) -> None:
        set_seed(seed)
        config = small_llama(vocabulary, size.hidden, size.layers, size.heads, size.length)
        config.use_cache = False
        self.model = LlamaForCausalLM(config).to(device)  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1)
        self.size, self.device, self.schedule, self.steps = size, device, schedule, 0

    def step(self, batch: dict[str, Tensor]) -> float:
        """One optimizer step; returns the training loss, nats a token."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.size.rate * self.schedule(self.steps)
        loss = self._backward(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss

    def _backward(self, batch: dict[str, Tensor]) -> float:
        """Give the parameters the gradients of the mean loss; returns that."""
        ids, labels = (batch[key].to(self.device) for key in ("input_ids", "labels"))
        loss = self.model(input_ids=ids, labels=labels).loss
        loss.backward()
        return float(loss.detach())

    def save(self, file: Path, more: Any = None) -> None:
        """Write everything, with something that JSON can hold."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}
        with whole_file(file) as beside:
            torch.save(state | {"more": json.dumps(more)}, beside)

    def load(self, file: Path) -> Any:
        """Take up what `save` wrote; returns what was written with it."""
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        return json.loads(state["more"])


def warm_up(steps: int) -> Callable[[int], float]:
    """Linearly up in `steps` steps, constant after them."""
    return lambda step: min(1.0, (step + 1) / max(1, steps))
