"""`dynmix influence`: a checkpoint, domains and tasks in; the matrix of influences out."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from dynmix.commands import command, print_json


@command
def influence(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub name of a causal LM.")],
    data: Annotated[list[Path], typer.Option(help="Folder of token stores, each a domain, or one store.")],
    tasks: Annotated[
        list[Path], typer.Option(help="Folder of tasks' .jsonl(.gz) files, or one file; or a token store.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for influence.json, .png and .svg.")],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", "-t", help="Of the tasks' files. Default: the checkpoint's.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    curvature: Annotated[str, typer.Option(help="ekfac, kfac, datainf, identity or gauss-newton.")] = "ekfac",
    layers: Annotated[str | None, typer.Option(help="Regular expression on layers' names. Default: all.")] = None,
    probe_sequences: Annotated[int, typer.Option(help="Of each domain; the curvature is fitted on all of them.")] = 64,
    task_sequences: Annotated[int, typer.Option(help="Of each task, at most.")] = 128,
    micro_batch: Annotated[int, typer.Option(help="Sequences of a forward pass.")] = 8,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the matrix as JSON.")] = False,
) -> None:
    """Measure how every domain moves every task at a checkpoint, with standard errors; print, save and draw it."""
    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM

    from dynmix.batches import as_batches, scored_sequence
    from dynmix.heatmap import draw_influence
    from dynmix.influence.batch import check_fits
    from dynmix.influence.group import group_influence
    from dynmix.mixture.prepare import check_tokenizer
    from dynmix.recipe.build import curvature as named_curvature
    from dynmix.recipe.names import in_a_line
    from dynmix.scoring.inputs import find_stores, find_tasks
    from dynmix.shown import Bar
    from dynmix.tables import influence_table
    from dynmix.whole_file import write_json

    if min(probe_sequences, task_sequences, micro_batch) < 1 or sequence_length < 2:
        raise ValueError(
            "--probe-sequences, --task-sequences, --micro-batch: at least 1; --sequence-length: at least 2"
        )
    made = named_curvature(curvature, {}, None, "--curvature")
    stores, named = find_stores(data), tokenizer or checkpoint
    sources: dict[str, Any] = dict(_files_by_name(tasks))
    if files := [path for path in sources.values() if path.name.endswith((".jsonl", ".jsonl.gz"))]:
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
        found = group_influence(model, domains, sets, made, layers=layers, tick=bar.update)
    tokens = {name: store.num_tokens for name, store in stores.items()}
    facts = {"checkpoint": checkpoint, "curvature": repr(made), "layers": layers, "tokens": tokens}
    content = {**found.to_dict(), **facts}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "influence.json", content)
    draw_influence(found, [out / "influence.png", out / "influence.svg"])
    if json:
        print_json(content)
        return
    Console(emoji=False).print(influence_table(found))
    file = quote(str(out / "influence.json"))
    typer.echo(f"saved in {out}: influence.json, .png, .svg; weights from it: dynmix propose {file}")


def _files_by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """Name -> a task's file, or a store without suffix."""
    from dynmix.scoring.inputs import by_name

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
