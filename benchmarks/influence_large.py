"""What a measurement of a 1B Llama in bf16 costs on a GPU: time over its floor F, memory, and share of a stage.

    python benchmarks/influence_large.py [--tokens 2_000_000] [--blocks 16] [--measured 16]

A Llama of hidden size 2048 (16 blocks, 5632 in their MLPs, a vocabulary of 32,000), 8 domains and 9 tasks with as many
tokens each, in sequences of 1,024. F is a training step's forward and backward pass over the same tokens, timed on a
part of them. `--measured` takes the linear layers of so many blocks, the last ones. The lines are ratios to F, and the
share of a stage of 500 steps of half a million tokens each, by the same F. Each line is one run after a warm-up.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import typer
from influence import passes
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix import EKFAC, AdamDiagonal, Identity, group_influence
from dynmix.influence.curvature import Curvature

DOMAINS, TASKS, STAGE_TOKENS = 8, 9, 500 * 524_288


def main(
    tokens: int = 2_000_000,
    factor_tokens: int = 262_144,
    hidden: int = 2048,
    width: int = 5632,
    blocks: int = 16,
    measured: int = 16,
    length: int = 1024,
    batch: int = 8,
    vocab: int = 32_000,
    ways: str = "identity,adam,ekfac",
) -> None:
    if unknown := {*ways.split(",")} - {"identity", "adam", "ekfac"}:
        raise SystemExit(f"--ways {ways}: no {', '.join(sorted(unknown))}, there are identity, adam and ekfac")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no GPU: on CPUs the model of 1B takes days; to try it, --hidden 128 --width 256 --tokens 20000")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=width, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, max_position_embeddings=length, dtype=torch.bfloat16,
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config)
    model.bfloat16()
    count = max(1, tokens // (DOMAINS + TASKS) // (batch * length))
    generator = torch.Generator().manual_seed(0)

    def batches(n: int) -> list[dict[str, torch.Tensor]]:
        return [
            {"input_ids": torch.randint(0, vocab, (batch, length), generator=generator).to(device)} for _ in range(n)
        ]

    domains = {f"domain{i}": batches(count) for i in range(DOMAINS)}
    tasks = {f"task{i}": batches(count) for i in range(TASKS)}
    fit_on = batches(max(1, factor_tokens // (batch * length)))
    total = (DOMAINS + TASKS) * count * batch * length

    def seconds(action: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    some = domains["domain0"][:8]
    passes(model, some)
    floor = seconds(lambda: passes(model, some)) / (len(some) * batch * length)  # a token
    print(f"F: {1 / floor:,.0f} tokens/s, {6 * sum(p.numel() for p in model.parameters()) / floor / 1e12:.0f} TFLOP/s")
    for p in model.parameters():
        p.grad = None
    names = [f"layers.{i}." for i in range(blocks - measured, blocks)]
    moments = {p: torch.rand_like(p, dtype=torch.float32) * 1e-6 for p in model.parameters()}
    curvatures: dict[str, Callable[[], Curvature]] = {
        "identity": lambda: Identity(),
        "adam": lambda: AdamDiagonal(moments),
        "ekfac": lambda: EKFAC(),
    }
    table = Table("curvature", "time / F", "share of a stage", "peak memory, GiB", title=f"{total:,} tokens")
    for name in ways.split(","):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        def measure(name: str = name) -> None:
            group_influence(
                model, domains, tasks, curvatures[name](), curvature_batches=fit_on,
                layers=lambda layer: any(part in layer for part in names),
            )  # fmt: skip

        try:
            spent = seconds(measure)
        except torch.OutOfMemoryError as problem:
            print(name, str(problem)[:200])
            continue
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
        print(f"{name}: {spent:.1f} s", flush=True)
        table.add_row(name, f"{spent / floor / total:.2f}", f"{spent / floor / STAGE_TOKENS:.2%}", f"{peak:.1f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
