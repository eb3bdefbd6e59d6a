"""`dynmix propose`: a saved influence and a prior in, weights out."""

from pathlib import Path
from typing import Annotated

import typer

from dynmix.commands import command, print_json


@command
def propose(
    source: Annotated[
        Path, typer.Argument(help="influence.json of `dynmix influence`, or a run folder or its journal.jsonl.")
    ],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Arguments of the mixer, as confidence=2.")
    ] = None,
    mixer: Annotated[str, typer.Option(help="A mixer that decides from influence; `dynmix mixers` lists them.")] = (
        "tikmix-d"
    ),
    prior: Annotated[
        str | None,
        typer.Option(
            help="natural, uniform, domain=weight,..., or a JSON file of weights. Default: natural; of a journal the "
            "weights that it was measured under."
        ),
    ] = None,
    upper: Annotated[list[str] | None, typer.Option(help="Largest weights: domain=weight,...")] = None,
    lower: Annotated[list[str] | None, typer.Option(help="Least weights: domain=weight,... (tikmix-d)")] = None,
    guards: Annotated[list[str] | None, typer.Option(help="Rows held and not optimised for, by commas.")] = None,
    stage: Annotated[int | None, typer.Option(help="Of a journal. Default: the last that was measured.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="JSON file for the weights.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the proposal as JSON.")] = False,
) -> None:
    """Decide weights from a saved influence, with what each constraint did in words."""
    from dataclasses import asdict

    from rich.console import Console

    from dynmix.saved_influence import numbers, parse_options, prior_weights, propose_from, read_influence
    from dynmix.tables import proposal_table
    from dynmix.whole_file import write_json

    influence, facts = read_influence(source, stage, guards=",".join(guards).split(",") if guards else None)
    before = prior_weights(prior, influence.domains, facts)
    found = propose_from(
        influence, before, mixer, parse_options(options or []), upper=numbers("--upper", upper),
        lower=numbers("--lower", lower),
    )  # fmt: skip
    content = {**asdict(found), "prior": before, "mixer": mixer}
    del content["groups"], content["decided_on"]
    if output is not None:
        write_json(output, content)
    if json:
        print_json(content)
        return
    console = Console(emoji=False)
    console.print(proposal_table(found, before))
    for task, gain in found.predicted_gain.items():
        error = found.predicted_gain_standard_error.get(task)
        kind = "guard" if task in influence.guards else "task"
        binds = f"; binds, multiplier {found.multipliers[task]:.3g}" if task in found.multipliers else ""
        uncertain = "" if error is None else f" ± {error:.2g}"
        typer.echo(f"{kind} {task}: predicted gain {gain:+.4g}{uncertain} nats/token{binds}")
    typer.echo(found.message or "no word of the mixer")
