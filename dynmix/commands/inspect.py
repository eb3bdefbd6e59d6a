"""`dynmix inspect`: a path in, what is in it out."""

from pathlib import Path
from typing import Annotated

import typer

from dynmix.commands import command, print_json


@command
def inspect(
    path: Annotated[
        Path, typer.Argument(help="Token store or folder of them, run or journal, checkpoint, recipe, influence.")
    ],
    distinct: Annotated[
        bool, typer.Option("--distinct", help="Of stores, also the share of their text that is no repetition.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a store, a run, a checkpoint's mixture state, a recipe or a saved influence holds."""
    from dataclasses import asdict

    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dynmix.inspection import cell, in_yaml, inspect_path

    found = inspect_path(path, distinct=distinct)
    if json:
        print_json(asdict(found))
        return
    console = Console(emoji=False)
    console.print(f"{found.kind}: {found.path}", markup=False, highlight=False)
    console.print(in_yaml(found.facts), markup=False, highlight=False)
    for title, rows in found.tables.items():
        if not rows:
            continue
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for name, value in rows[0].items():
            table.add_column(escape(name), justify="right" if isinstance(value, int | float) else "left")
        for row in rows:
            table.add_row(*(escape(cell(value)) for value in row.values()))
        console.print(table)
