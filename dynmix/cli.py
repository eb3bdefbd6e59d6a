"""The `dynmix` command: arguments in, calls of the library out.

Knows no method and no format; each command is a call of the function it is named after. Exit codes: 0 done, 1 failed,
2 asked for in a way that makes no sense, 130 interrupted.
"""

import logging
import sys
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from dynmix.commands import command, print_json
from dynmix.commands.fit import fit
from dynmix.commands.influence import influence
from dynmix.commands.inspect import inspect
from dynmix.commands.prepare import prepare
from dynmix.commands.propose import propose
from dynmix.commands.proxies import proxies
from dynmix.commands.regroup import regroup
from dynmix.commands.report import report
from dynmix.commands.score import score
from dynmix.commands.train import train
from dynmix.shown import UNENCODABLE, Forgiving

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for each in (prepare, train, influence, propose, score, regroup, proxies, fit, report, inspect):
    app.command()(each)


def _print_version(asked: bool) -> None:
    if asked:
        print(version("dynmix"))
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is done, and where something failed.")
    ] = False,
    asked: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Dynamic data mixing for language-model pretraining."""
    if sys.stderr is not None:
        # Not bars and log of ours alone: transformers shows a bar where it saves a model.
        sys.stderr = Forgiving(sys.stderr)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors=UNENCODABLE)
    log = logging.getLogger("dynmix")
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    if not log.hasHandlers():  # and none for all, which would print again what other libraries print themselves
        log.addHandler(RichHandler(console=Console(stderr=True), show_path=False))  # stdout is for what was asked for
        log.propagate = False  # nor do they print ours again, where one makes a handler for all


@app.command()
@command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the model's parameters and the data's order.")] = 0,
    mixer: Annotated[
        str, typer.Option(help="Name of the mixer that decides; `dynmix mixers` lists them.")
    ] = "tikmix-d",
    json: Annotated[bool, typer.Option("--json", help="Print where the page is, as JSON.")] = False,
) -> None:
    """Pretrain a small Llama with a dynamic mixture and with its static prior, on text of this Python installation."""
    from dynmix.demo.run import run_demo

    page = run_demo(output, seed, console=Console(stderr=json), mixer=mixer)
    if json:
        print_json({"report": page})


@app.command()
@command
def mixers(json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """List the mixers by name, with what each needs to have measured."""
    from dynmix.tables import mixer_facts, mixer_table

    if json:
        print_json(mixer_facts())
    else:
        Console().print(mixer_table())
