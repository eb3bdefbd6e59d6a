"""`dynmix influence`: a checkpoint, domains and tasks in; the matrix of influences out."""

from pathlib import Path
from shlex import quote
from typing import Annotated

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
    from rich.console import Console

    from dynmix.heatmap import draw_influence
    from dynmix.measure_checkpoint import measure_checkpoint
    from dynmix.tables import influence_table
    from dynmix.whole_file import write_json

    found, facts = measure_checkpoint(
        checkpoint, data, tasks, tokenizer=tokenizer, sequence_length=sequence_length, curvature=curvature,
        layers=layers, probe_sequences=probe_sequences, task_sequences=task_sequences, micro_batch=micro_batch,
        device=device,
    )  # fmt: skip
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
