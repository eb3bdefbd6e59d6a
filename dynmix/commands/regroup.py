"""The `regroup` command: scores in, groups out."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from dynmix.commands import command, print_json

logger = logging.getLogger("dynmix")


@command
def regroup(
    scores: Annotated[Path, typer.Argument(help="Folder that `dynmix score` wrote.")],
    data: Annotated[list[Path], typer.Option("--data", help="Folder of the token stores that were scored, or one.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder for the groups.")],
    keep: Annotated[float, typer.Option(help="Share of a group's tokens that is kept, the most influential.")] = 0.5,
    blend: Annotated[str, typer.Option(help="Weight of checkpoints: step, early or equal.")] = "step",
    budget: Annotated[int | None, typer.Option(help="Most tokens of a group.")] = None,
    max_epochs: Annotated[float | None, typer.Option(help="How often a group may be seen; needs --tokens.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that will be trained on.")] = None,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="By loss instead, the lowest of those below the mean: a baseline.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the groups as JSON.")] = False,
) -> None:
    """Regroup a scored corpus by the tasks that its samples help, with weights by influence density."""
    from dynmix.groups import write_groups
    from dynmix.mixers.regroup import group_weights
    from dynmix.mixers.regroup import regroup as grouped
    from dynmix.scoring import Corpus, perplexity_scores, read_scores
    from dynmix.scoring.folder import ScoreFolder
    from dynmix.scoring.inputs import find_stores

    if (max_epochs is None) != (tokens is None):
        raise ValueError("--max-epochs and --tokens: give both, or neither")
    facts = ScoreFolder(scores).config
    stores, known = find_stores(data), {each["name"]: each["fingerprint"] for each in facts["domains"]}
    if missing := [name for name in known if name not in stores]:
        raise ValueError(f"--data: no store {missing[0]!r}, which was scored; there are {sorted(stores)}")
    length, unit = int(facts["sequence_length"]), facts["unit"]
    corpus = Corpus({name: stores[name] for name in known}, unit, length)
    for name, now in zip(known, corpus.fingerprints, strict=True):
        if now != known[name]:
            raise ValueError(f"--data: {stores[name].path} is not the store {name!r} that was scored")
    found = perplexity_scores(scores) if perplexity else read_scores(scores)
    groups = grouped(found, keep=keep, blend=blend, budget=budget)  # type: ignore[arg-type]
    weights = group_weights(groups, max_epochs=max_epochs, tokens=tokens)
    if weights is None:
        logger.warning("the weights are in proportion to the groups' tokens")
        whole = sum(group.tokens for group in groups)
        weights = {group.name: group.tokens / whole for group in groups}
    paths = {name: stores[name].path for name in found.domains}
    write_groups(output, groups, weights, found, paths, unit=unit, sequence_length=length)
    made = {g.name: {"weight": weights[g.name], "samples": len(g.members), "tokens": g.tokens} for g in groups}
    if json:
        print_json(made)
        return
    for name, each in made.items():
        typer.echo(f"{name}: weight {each['weight']:.4f}, {each['samples']:,} samples, {each['tokens']:,} tokens")
