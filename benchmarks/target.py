"""A target run on AutoMixer's regrouped data beside the mixtures and samplings that it is compared with, equal budget.

    python benchmarks/target.py runs/precision

Begins with the checkpoints of `sample_influence.py precision` (same folder and sizes, made where they are missing).
They score every sequence of the corpus (packed, 256 tokens); each arm then trains the same small Llama from the seed's
initial weights and order for the same number of tokens. What an arm spends on choosing is not counted: for AutoMixer
that is more than the run. Arms: the natural and the uniform mixture of the raw domains; the half of the tokens with the
lowest perplexity under the last checkpoint; AutoMixer's regrouping by n-gram importance for the tasks in place of
influence; AutoMixer with the tasks' peak checkpoints, and with the last one alone (its ablation). Two more, if named:
`ten` evenly spaced checkpoints, and `early`, five of them blended with `"early"`, by EK-FAC. A cell (arm, seed) is
kept in `target/`, so that a second call goes on. Printed: each task's loss in nats a token on examples that no score
has seen, and the tasks' mean, also of each seed.
"""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from pretraining.kept import write
from rich.console import Console
from rich.table import Table
from sample_influence import TASKS, halves, llama, proxy

from dynmix import EKFAC, MixtureDataset
from dynmix.checkpoints import evenly_spaced, list_checkpoints, select_checkpoints
from dynmix.mixers.regroup import group_weights, regroup
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import RowView
from dynmix.scores import SampleScores
from dynmix.scoring import all_sources, ngram_scores, peak_sources, perplexity_scores, read_scores, score_corpus

LENGTH = 256
ARMS = ("natural", "uniform", "perplexity", "n-gram", "automixer", "last")
MORE = ("ten", "early")


def thinned(path: Path, every: int, out: Path) -> Path:
    """Every so many sequence of a store, as a store of its own."""
    tokens = TokenStore.open(path).tokens
    TokenStore.write(out, (tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, every * LENGTH)))
    return out


def scored(
    folder: Path, paths: Mapping[str, Path], tasks: Mapping[str, Any], arm: str, batch_tokens: int
) -> SampleScores:
    """The scores that an arm selects by."""
    if arm == "n-gram":
        return ngram_scores(paths, tasks, unit="sequence", sequence_length=LENGTH)
    found = list_checkpoints(folder / "run")
    sources = {
        "automixer": lambda: peak_sources(select_checkpoints(folder / "run", tasks)),
        "last": lambda: all_sources(found[-1:], tasks),
        "perplexity": lambda: all_sources(found[-1:], tasks),
        "ten": lambda: all_sources(found, tasks),
        "early": lambda: all_sources(evenly_spaced(found, 5), tasks),
    }[arm]()
    out = folder / f"corpus-{next(iter(paths.values())).parent.name}-{'last' if arm == 'perplexity' else arm}"
    score_corpus(
        paths, tasks, sources, out, unit="sequence", sequence_length=LENGTH,
        curvature=EKFAC() if arm == "early" else None, curvature_sequences=256, batch_tokens=batch_tokens,
    )  # fmt: skip
    return perplexity_scores(out) if arm == "perplexity" else read_scores(out)


def mixed(
    folder: Path,
    paths: Mapping[str, Path],
    tasks: Mapping[str, Any],
    arm: str,
    samples: int,
    block: int,
    batch_tokens: int,
    seed: int,
) -> MixtureDataset:
    """The arm's data: the raw domains, or groups of their sequences with weights by density."""
    if arm in ("natural", "uniform"):
        return MixtureDataset(paths, arm, num_samples=samples, sequence_length=LENGTH, block=block, seed=seed)  # type: ignore[arg-type]
    scores = scored(folder, paths, tasks, arm, batch_tokens)
    if arm == "perplexity":  # a threshold, as there is no task: the better half of all tokens
        order = np.argsort(-scores.scores[:, 0], kind="stable")
        members = {"low": order[: int(np.searchsorted(np.cumsum(scores.tokens[order]), scores.tokens.sum() / 2))]}
        weights = {"low": 1.0}
    else:
        groups = regroup(scores, blend="early" if arm == "early" else "step")
        found = group_weights(groups, max_epochs=4.0, tokens=samples * LENGTH)
        assert found is not None
        members, weights = {group.name: group.members for group in groups}, found
    parts = [PackedSequences(TokenStore.open(paths[name]), LENGTH) for name in scores.domains]
    views = {name: RowView(parts, scores.domain[own], scores.row[own]) for name, own in members.items()}
    domain = np.array(scores.domains)
    for name, own in members.items():
        names, counts = np.unique(domain[scores.domain[own]], return_counts=True)
        top = sorted(zip(counts / len(own), names, strict=True), reverse=True)[:4]
        print(arm, name, f"{weights[name]:.3f}", len(own), *(f"{n} {c:.0%}" for c, n in top))
    return MixtureDataset(views, weights, num_samples=samples, block=block, seed=seed)


def cell(folder: Path, arm: str, seed: int, steps: int, batch: int, hidden: int, depth: int, rate: float,
         paths: Mapping[str, Path], batch_tokens: int) -> dict[str, float]:  # fmt: skip
    """Mean loss by task after the arm's training run, nats a token."""
    from transformers import Trainer, TrainingArguments

    data = next(iter(paths.values())).parent.name
    file = folder / f"target/{data}-{arm}-{seed}-{steps}x{batch}-{hidden}x{depth}-{rate:g}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    dataset = mixed(folder, paths, halves(0), arm, steps * batch, batch, batch_tokens, seed)
    arguments = TrainingArguments(
        str(folder / f"target/{arm}-{seed}"), max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=steps // 20, save_strategy="no", logging_steps=100, report_to=[],
        train_sampling_strategy="sequential", weight_decay=0.1, bf16=torch.cuda.is_available(), seed=seed,
    )  # fmt: skip
    model = llama(hidden, depth, 512, seed)
    Trainer(model, arguments, train_dataset=dataset).train()
    losses = {name: task.evaluate(model, batch_tokens=batch_tokens).loss for name, task in halves(1).items()}
    write(file, losses)
    return losses


def main(
    folder: Path,
    arms: Annotated[str, typer.Option(help="Which, by commas.")] = ",".join(ARMS),
    seeds: int = 1,
    steps: int = 600,
    batch: int = 16,
    hidden: int = 128,
    depth: int = 4,
    rate: float = 3e-3,
    proxy_steps: int = 2400,
    proxy_batch: int = 8,
    proxy_hidden: int = 128,
    proxy_depth: int = 4,
    proxy_rate: float = 3e-3,
    every: Annotated[int, typer.Option(help="The raw corpus of all arms is every so many sequence of the texts.")] = 1,
    batch_tokens: int = 8192,
) -> None:
    if unknown := {*arms.split(",")} - {*ARMS, *MORE}:
        raise SystemExit(f"--arms {arms}: no {', '.join(sorted(unknown))}, there are {', '.join(ARMS + MORE)}")
    paths = proxy(folder, proxy_hidden, proxy_depth, proxy_steps, proxy_batch, proxy_rate)
    if every > 1:
        paths = {name: thinned(path, every, folder / f"every-{every}" / name) for name, path in paths.items()}
    title = f"loss in nats a token after {steps * batch * LENGTH:,} tokens, mean over {seeds} seeds"
    table = Table("arm", *TASKS, "mean", "of each seed", title=title)
    for arm in arms.split(","):
        runs = [
            cell(folder, arm, seed, steps, batch, hidden, depth, rate, paths, batch_tokens) for seed in range(seeds)
        ]
        means = [statistics.mean(run[task] for run in runs) for task in TASKS]
        each = " ".join(f"{statistics.mean(run.values()):.3f}" for run in runs)
        table.add_row(arm, *(f"{value:.3f}" for value in means), f"{statistics.mean(means):.3f}", each)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
