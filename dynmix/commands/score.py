"""`dynmix score`: the influence of every sample of a corpus on every task."""

from pathlib import Path
from typing import Annotated

import typer

from dynmix.commands import command, print_json


@command
def score(
    checkpoints: Annotated[
        list[Path],
        typer.Option(help="Folder of checkpoints (a Trainer's output_dir, or one with peaks.json), or one checkpoint."),
    ],
    data: Annotated[list[Path], typer.Option(help="Folder of token stores, each a domain, or one store.")],
    tasks: Annotated[list[Path], typer.Option(help="Folder of tasks' .jsonl(.gz) files, or one file.")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", "-t", help="The checkpoints' tokenizer: folder or name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the scores; what is there is continued.")],
    more: Annotated[
        list[Path] | None, typer.Argument(help="Further checkpoints: what a shell makes of run/checkpoint-*.")
    ] = None,
    select: Annotated[
        str,
        typer.Option(
            help="Checkpoints that score: peak (each task by the one where it is best), last, all, or so many."
        ),
    ] = "peak",
    metric: Annotated[
        str | None,
        typer.Option(help="What a peak is by: loss, bits_per_byte, accuracy. Default: what peaks.json says, or loss."),
    ] = None,
    unit: Annotated[str, typer.Option(help="What a sample is: sequence (packed row) or document.")] = "sequence",
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", "--max-length", help="Tokens of a row, and that a model reads at once.")
    ] = 1024,
    layers: Annotated[
        str | None,
        typer.Option(help="Regular expression on layers' names. Default: the vocabulary's and the last block."),
    ] = None,
    curvature: Annotated[
        str, typer.Option(help="datainf, or ekfac: dearer to set up, as dear to score with, and sharper.")
    ] = "datainf",
    task_limit: Annotated[int, typer.Option(help="Examples of a task that its gradient is made of, at most.")] = 256,
    shard_samples: Annotated[
        int | None, typer.Option(help="Samples a file, lost at most by a kill. Default: about 262,144 tokens.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a forward and backward pass.")] = 8192,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    ray: Annotated[int, typer.Option(help="Actors on a Ray cluster that score; 0: this process.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Begin anew: remove the scores that are in --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was scored as JSON.")] = False,
) -> None:
    """Score every sample of a corpus: how much it helps each task, by influence, at the checkpoints chosen."""
    from dynmix.influence.curvature import EKFAC, Curvature
    from dynmix.influence.datainf import DataInf
    from dynmix.mixture.prepare import check_tokenizer
    from dynmix.scoring import discard, read_scores, score_corpus
    from dynmix.scoring.inputs import find_sources, find_stores, find_tasks, some_examples

    curvatures: dict[str, Curvature] = {"datainf": DataInf(), "ekfac": EKFAC()}
    if curvature not in curvatures:
        raise ValueError(f"--curvature {curvature}: {' or '.join(curvatures)}")
    stores = find_stores(data)
    known = find_tasks(tasks, tokenizer, sequence_length)
    check_tokenizer(stores.values(), tokenizer)
    examples = {name: some_examples(task, task_limit) for name, task in known.items()}
    sources = find_sources([*checkpoints, *(more or [])], known, select, metric)
    if overwrite:
        discard(out)
    score_corpus(
        stores, examples, sources, out, unit=unit, sequence_length=sequence_length, layers=layers,  # type: ignore[arg-type]
        curvature=curvatures[curvature], batch_tokens=batch_tokens, shard_samples=shard_samples,
        device=device, actors=ray,
    )  # fmt: skip
    scores = read_scores(out)
    if json:
        own = [{"task": column.task, "checkpoint": column.checkpoint} for column in scores.columns]
        print_json({"out": out, "samples": len(scores.row), "columns": own})
        return
    columns = ", ".join(f"{column.task}/{column.checkpoint}" for column in scores.columns)
    typer.echo(f"{out}: {len(scores.row):,} samples, scores {columns}")
