"""`dynmix propose`: a saved influence and a prior in, weights out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dynmix.commands import command, numbers, print_json


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
    from inspect import signature

    from omegaconf import OmegaConf
    from rich.console import Console

    from dynmix.mixers.registry import find_mixer, make_mixer
    from dynmix.recipe.names import check_arguments
    from dynmix.saved_influence import read_influence
    from dynmix.tables import proposal_table
    from dynmix.whole_file import write_json

    influence, facts = read_influence(source, stage, guards=",".join(guards).split(",") if guards else None)
    before = _prior(prior, influence.domains, facts)
    words = options or []
    if bad := [word for word in words if "=" not in word]:
        raise ValueError(f"{bad[0]!r}: arguments of the mixer are given as key=value")
    given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    arguments = {str(name): value for name, value in given.items()}
    most, least = numbers("--upper", upper), numbers("--lower", lower)
    if over := [f"{name}={bound:g}" for name, bound in (most or {}).items() if bound > 1]:
        raise ValueError(f"--upper {over[0]}: weights are from 0 to 1")
    make = find_mixer(mixer)
    check_arguments(f"mixer {mixer!r}", arguments, make)
    if least is not None:
        if "lower" not in signature(make).parameters:
            raise ValueError(f"--lower: {mixer} takes no least weights; tikmix-d does")
        arguments["lower"] = least
    made = make_mixer({"name": mixer, **arguments})
    if "influence" not in made.needs or made.needs - {"influence", "guards", "measure"}:
        raise ValueError(f"--mixer {mixer}: it decides from {sorted(made.needs) or 'nothing measured'}, in a run alone")
    found = made.propose(influence, before, most)
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


def _prior(given: str | None, domains: Sequence[str], facts: Mapping[str, Any]) -> dict[str, float]:
    """Domain -> weight of the prior, one for each; `facts` are what is saved beside the influence."""
    import json

    from dynmix.mixers.simplex import mixture

    if given is None and facts.get("weights"):
        weights = facts["weights"]
    elif given == "uniform":
        return dict.fromkeys(domains, 1 / len(domains))
    elif given in (None, "natural"):
        tokens = facts.get("tokens")
        if not tokens or not all(tokens.get(name) for name in domains):
            raise ValueError("--prior natural: how many tokens the domains have is not saved; give domain=weight,...")
        total = sum(tokens[name] for name in domains)
        return {name: tokens[name] / total for name in domains}
    elif "=" in str(given):
        weights = numbers("--prior", [given])
    else:
        try:
            weights = json.loads(Path(str(given)).read_text(encoding="utf-8"))
            weights = weights.get("weights", weights)
        except (OSError, ValueError, AttributeError) as problem:
            raise ValueError(
                f"--prior {given}: natural, uniform, domain=weight,... or a JSON file: {problem}"
            ) from None
    return mixture(weights, domains, "--prior")
