"""`dynmix train`: a recipe in, a run out."""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from dynmix.commands import command, print_json
from dynmix.commands.interrupt import end_at_once

if TYPE_CHECKING:
    from dynmix.recipe.schema import Recipe

logger = logging.getLogger("dynmix")

_RANKED = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}  # of torchrun, of kinds of MPI


@command
def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file that describes the run.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.SUB=VALUE", help="Values in place of the recipe's, as training.max_steps=500."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop: tokens, epochs, stages, cost.")
    ] = False,
    example: Annotated[str | None, typer.Option(metavar="NAME", help="Print a recipe to begin with.")] = None,
    examples: Annotated[bool, typer.Option("--examples", help="List these recipes.")] = False,
    only_proxy: Annotated[
        bool, typer.Option("--only-proxy", help="Make the small runs of the recipe's proxy and stop.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan, or what was done, as JSON.")] = False,
) -> None:
    """Train what a recipe describes; in a folder where it has begun, go on from the newest checkpoint, bit for bit.

    On several processes: accelerate launch -m dynmix train recipe.yaml (without GPUs: --multi_gpu --num_processes 2)
    """
    from dynmix.recipe.read import example as example_text
    from dynmix.recipe.read import example_names, read_recipe

    if example is not None or examples:
        if recipe is not None:
            raise typer.BadParameter("prints a recipe and trains none: leave RECIPE out", param_hint="--example")
        typer.echo(example_text(example).rstrip() if example is not None else "\n".join(example_names()))
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe; --examples lists some to begin with", param_hint="RECIPE")
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and not _RANKED & os.environ.keys():
        logger.warning(
            "accelerate was asked for several processes and started one, as it does without GPUs: give --multi_gpu, too"
        )
    asked = read_recipe(recipe, overrides or [])
    if os.environ.get("WORLD_SIZE", "1") != "1":
        end_at_once(lambda: _kept(asked.output) if os.environ.get("RANK") == "0" else "")

    import torch.distributed as dist

    try:
        _done(asked, dry_run, only_proxy, json)
    finally:
        # By now the model is gone: DDP's, if it is the last to know of the process group, may wait forever for a thread
        # of gloo that waits for Python's lock.
        if dist.is_initialized():
            dist.destroy_process_group()


def _done(asked: "Recipe", dry_run: bool, only_proxy: bool, json: bool) -> None:
    from rich.console import Console

    from dynmix.ranks import is_rank_0
    from dynmix.recipe import run as runs
    from dynmix.recipe.plan import make_plan, print_plan

    run = runs.build_run(asked, on_paper=dry_run)
    if dry_run:
        plan = make_plan(run)
        if is_rank_0():
            print_json(asdict(plan)) if json else print_plan(plan, Console(emoji=False))
    elif not only_proxy:
        steps = runs.train(run, None if json else Console(stderr=True, emoji=False))
        journal = quote(str(run.folder / "dynmix"))
        facts = {"output": asked.output, "steps": steps, "model": str(run.folder / "model")}
        if is_rank_0():
            print_json(facts) if json else typer.echo(
                f"{steps} steps done; model in {facts['model']}; the report: dynmix report {journal}"
            )


def _kept(output: str) -> str:
    steps = [
        path.parent.name.removeprefix("checkpoint-") for path in Path(output).glob("checkpoint-*/trainer_state.json")
    ]
    newest = max(map(int, filter(str.isdecimal, steps)), default=None)
    kept = "there is no checkpoint yet" if newest is None else f"checkpoint-{newest} is kept"
    return f"interrupted: {kept}, and the same command goes on from {'the beginning' if newest is None else 'it'}"
