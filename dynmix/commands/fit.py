"""`dynmix fit`: from a table of runs to a law and the best mixture by it."""

from pathlib import Path
from typing import Annotated

import typer

from dynmix.commands import command, numbers, print_json


@command
def fit(
    runs: Annotated[Path, typer.Argument(help="CSV, a row per run: weight/<domain> and loss/<target>, or RegMix's.")],
    losses: Annotated[
        Path | None, typer.Option(help="A second CSV with the losses; the first column of both is the index.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Columns of weights: names or patterns, by commas.")] = None,
    targets: Annotated[str | None, typer.Option(help="Columns of losses: names or patterns, by commas.")] = None,
    criterion: Annotated[str, typer.Option(help='"avg", or target=weight,... with patterns for groups.')] = "avg",
    law: Annotated[str, typer.Option(help='"auto", or a law by name, such as "power law".')] = "auto",
    experts: Annotated[Path | None, typer.Option(help="Cache of experts, for laws with MDE features.")] = None,
    max_epochs: Annotated[
        float | None, typer.Option(help="Times that a domain may be seen; needs --tokens and --total-tokens.")
    ] = None,
    tokens: Annotated[list[str] | None, typer.Option(help="That each domain has: domain=number,...")] = None,
    total_tokens: Annotated[float | None, typer.Option(help="Of the run that the mixture is for.")] = None,
    smooth: Annotated[bool, typer.Option(help="Answer 0.99 of the best mixture + 0.01 uniform.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for fit.json and fit.svg.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print fit.json's content.")] = False,
) -> None:
    """Fit a law to runs of several mixtures: how well it predicts, and the best mixture by it."""
    from rich.console import Console

    from dynmix.fit import fit_facts, fit_runs, print_fit, write_fit
    from dynmix.laws.experts import Experts
    from dynmix.laws.runs import read_runs

    found = fit_runs(
        read_runs(runs, losses, weights=weights, targets=targets),
        criterion,
        law,
        experts=None if experts is None else Experts.open(experts),
        tokens=numbers("--tokens", tokens),
        total_tokens=total_tokens,
        max_epochs=max_epochs,
        smooth=smooth,
    )
    paths = [] if output is None else write_fit(found, output)
    if json:
        print_json(fit_facts(found))
        return
    print_fit(found, Console(emoji=False))
    for path in paths:
        typer.echo(str(path))
