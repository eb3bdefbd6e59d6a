"""`dynmix prepare`: raw text in, token stores out."""

from pathlib import Path
from typing import Annotated

import typer

from dynmix.commands import command, print_json


@command
def prepare(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="jsonl (.gz, .zst), text or parquet files, folders of them, or saved HF data sets."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the stores, one per domain.")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", "-t", help="Folder or name of a transformers tokenizer.")],
    text_field: Annotated[str, typer.Option(help="Field of a record that holds its text.")] = "text",
    append_eos: Annotated[bool, typer.Option(help="End each document with the tokenizer's EOS.")] = True,
    domain_from: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field whose value is a document's domain, not its file.")
    ] = None,
    domain_default: Annotated[
        str | None, typer.Option(metavar="NAME", help="Domain of what lacks that field. Default: an error.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of documents that goes to <domain>.valid, by hash.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", help="Processes. Default: as many as cores.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace stores that are there; discard unfinished work of other arguments.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Tokenise text files into token stores: a file, or a sub-folder, is a domain. Killed, it goes on where it was."""
    from dynmix.mixture.prepare import prepare, read_manifest

    stores = prepare(
        inputs, output, tokenizer, text_field=text_field, append_eos=append_eos, domain_from=domain_from,
        domain_default=domain_default, held_out=held_out, workers=workers, overwrite=overwrite,
    )  # fmt: skip
    manifest = read_manifest(output)
    assert manifest is not None
    last = len(manifest["preparations"]) - 1
    facts = {name: each for name, each in manifest["stores"].items() if each["preparation"] == last}
    counts = {name: {key: each[key] for key in ("documents", "tokens", "bytes")} for name, each in facts.items()}
    total = {key: sum(each[key] for each in counts.values()) for key in ("documents", "tokens", "bytes")}
    if json:
        print_json({"stores": counts, "total": total})
    else:
        _print_table(counts, total)
        typer.echo(f"{len(stores)} domains in {output}")


def _print_table(counts: dict[str, dict[str, int]], total: dict[str, int]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("store", show_footer=True)
    table.columns[0].footer = "total"
    for key in total:
        table.add_column(key if key != "bytes" else "bytes of text", f"{total[key]:,}", justify="right", no_wrap=True)
    for name, each in counts.items():
        table.add_row(escape(name), *(f"{count:,}" for count in each.values()))
    Console(emoji=False).print(table)
