"""The `dynmix` command: arguments in, calls of the library out.

Knows no method and no format; each command is a call of the function it is named after.
"""

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler

from dynmix.commands import fail
from dynmix.commands.fit import fit
from dynmix.commands.prepare import prepare
from dynmix.commands.proxies import proxies
from dynmix.commands.regroup import regroup
from dynmix.commands.score import score

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(prepare)
app.command()(score)
app.command()(regroup)
app.command()(proxies)
app.command()(fit)


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done, not only warnings.")] = False,
) -> None:
    """Dynamic data mixing for language-model pretraining."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logging.getLogger("dynmix").setLevel(logging.INFO if verbose else logging.WARNING)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the model's parameters and the data's order.")] = 0,
    mixer: Annotated[
        str, typer.Option(help="Name of the mixer that decides; `dynmix mixers` lists them.")
    ] = "tikmix-d",
) -> None:
    """Pretrain a small Llama with a dynamic mixture and with its static prior, on text of this Python installation."""
    from dynmix.demo.run import run_demo

    try:
        run_demo(output, seed, mixer=mixer)
    except ValueError as problem:
        fail(problem)


@app.command()
def mixers() -> None:
    """List the mixers by name, with what each needs to have measured."""
    from rich.console import Console

    from dynmix.tables import mixer_table

    Console().print(mixer_table())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, or its journal.jsonl.")],
    baseline: Annotated[Path | None, typer.Option(help="A second run to compare with.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: report.html in the run folder.")
    ] = None,
) -> None:
    """Draw a run's journal as one HTML page."""
    from dynmix.report import write_report

    def journal(path: Path) -> Path:
        return path / "journal.jsonl" if path.is_dir() else path

    source = journal(run)
    try:
        page = write_report(
            source, output or source.parent / "report.html", baseline=None if baseline is None else journal(baseline)
        )
    except (ValueError, OSError) as problem:
        fail(problem)
    typer.echo(str(page))
