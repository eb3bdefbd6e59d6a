"""What a measurement costs over its floor F: one forward and backward pass over the same domain and task sequences.

    python benchmarks/influence.py

A Llama of hidden size 256 and 4 layers, 8 domains x 16 and 4 tasks x 8 sequences of 256 tokens. F is a training step's
forward and backward pass without its optimizer; the lines are ratios to F, measured in turn in one process.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix import EKFAC, Identity, group_influence

DOMAINS, DOMAIN_SEQUENCES, TASKS, TASK_SEQUENCES, LENGTH, MICRO_BATCH, VOCAB, ROUNDS = 8, 16, 4, 8, 256, 8, 4096, 3


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def batches(sequences: int) -> list[dict[str, torch.Tensor]]:
        shape = (MICRO_BATCH, LENGTH)
        return [
            {"input_ids": torch.randint(0, VOCAB, shape, generator=generator)} for _ in range(sequences // MICRO_BATCH)
        ]

    domains = {f"domain{i}": batches(DOMAIN_SEQUENCES) for i in range(DOMAINS)}
    tasks = {f"task{i}": batches(TASK_SEQUENCES) for i in range(TASKS)}
    few = [own[0] for own in list(domains.values())[:4]]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )

    def floor() -> None:
        for own in (*domains.values(), *tasks.values()):
            for batch in own:
                model(**batch, labels=batch["input_ids"]).loss.backward()
                model.zero_grad()

    ways: dict[str, Callable[[], object]] = {
        "Identity": lambda: group_influence(model, domains, tasks, Identity()),
        "EK-FAC, factors from 32 sequences (a quarter)": lambda: group_influence(
            model, domains, tasks, EKFAC(), curvature_batches=few
        ),
        "EK-FAC, factors from every sequence": lambda: group_influence(model, domains, tasks, EKFAC()),
    }
    floor()
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        base = seconds(floor)
        for name, way in ways.items():
            ratios[name].append(seconds(way) / base)
    table = Table("all pairs, with standard errors", "median of time / F")
    for name, values in ratios.items():
        table.add_row(name, f"{statistics.median(values):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
