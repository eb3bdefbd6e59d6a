"""The influence of domains on tasks at a checkpoint, outside of any run.

Knows where models, stores and tasks are; what is measured is `dynmix.influence`'s.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dynmix.batches import as_batches, scored_sequence
from dynmix.influence.batch import check_fits
from dynmix.influence.group import group_influence
from dynmix.mixture.prepare import check_tokenizer
from dynmix.observation import Influence
from dynmix.recipe.build import curvature as named_curvature
from dynmix.recipe.names import in_a_line
from dynmix.scoring.inputs import by_name, find_stores, find_tasks
from dynmix.shown import Bar


def measure_checkpoint(
    checkpoint: str,
    data: Sequence[Path],
    tasks: Sequence[Path],
    *,
    tokenizer: str | None,
    sequence_length: int,
    curvature: str,
    layers: str | None,
    probe_sequences: int,
    task_sequences: int,
    micro_batch: int,
    device: str | None,
) -> tuple[Influence, dict[str, Any]]:
    """Return the influence, and what it is of, JSON-able: checkpoint, curvature, tokens of each domain.

    Args: as `dynmix influence --help` says.

    Raises:
        ValueError: a path that is none, a task or domain without text, a model that cannot be loaded, stores of another
            tokenizer.
    """
    if min(probe_sequences, task_sequences, micro_batch) < 1 or sequence_length < 2:
        raise ValueError(
            "--probe-sequences, --task-sequences, --micro-batch: at least 1; --sequence-length: at least 2"
        )
    made = named_curvature(curvature, {}, None, "--curvature")
    stores = find_stores(data)
    found, named = _tasks(tasks), tokenizer or checkpoint
    sources: dict[str, Any] = dict(found)
    if files := [path for path in found.values() if path.name.endswith((".jsonl", ".jsonl.gz"))]:
        sources |= find_tasks(files, named, sequence_length)
        check_tokenizer(stores.values(), named)
    options: Any = {"sequence_length": sequence_length, "micro_batch": micro_batch}
    domains = {n: as_batches(s, name=f"domain {n!r}", sequences=probe_sequences, **options) for n, s in stores.items()}
    sets = {n: as_batches(s, name=f"task {n!r}", sequences=task_sequences, **options) for n, s in sources.items()}
    for name, batches in sets.items():
        scored_sequence(batches, f"task {name!r}")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    except (OSError, ValueError) as problem:
        raise ValueError(f"{checkpoint}: no causal LM to load ({in_a_line(problem)[:300]})") from problem
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for kind, batches_of in (("domain", domains), ("task", sets)):
        for name, batches in batches_of.items():
            check_fits(model, batches, f"{kind} {name!r}")
    count = (made.passes + 1) * sum(map(len, domains.values())) + 2 * sum(map(len, sets.values()))
    with Bar(total=count, desc="measuring", unit="batch") as bar:
        influence = group_influence(model, domains, sets, made, layers=layers, tick=bar.update)
    tokens = {name: store.num_tokens for name, store in stores.items()}
    return influence, {"checkpoint": checkpoint, "curvature": repr(made), "layers": layers, "tokens": tokens}


def _tasks(paths: Sequence[Path]) -> dict[str, Path]:
    """Name -> a task's file, or a store without suffix."""
    files: list[Path] = []
    for path in paths:
        inside = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")]) if path.is_dir() else []
        inside = inside or (sorted(path.glob("*.idx")) if path.is_dir() else [path])
        if not inside:
            raise ValueError(f"--tasks {path}: no .jsonl or .jsonl.gz file and no token store in this folder")
        files += inside
    found = by_name("--tasks", files, (".jsonl.gz", ".jsonl", ".idx", ".bin"))
    for name, file in found.items():
        if not file.exists() and not file.with_name(f"{name}.idx").exists():
            raise ValueError(f"--tasks {file}: no such file or token store")
    return {name: file.with_name(name) if file.suffix in (".idx", ".bin") else file for name, file in found.items()}
