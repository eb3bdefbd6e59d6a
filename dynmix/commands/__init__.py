"""The larger commands of `dynmix`, a module each: arguments in, calls of the library out."""

import errno
import logging
import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

from dynmix.commands.interrupt import INTERRUPTED
from dynmix.whole_file import finite

P = ParamSpec("P")
T = TypeVar("T")

_GO_ON = {"prepare", "train", "score", "proxies"}  # from where they were interrupted; the others begin anew


def command(function: Callable[P, T]) -> Callable[P, T]:
    """A command whose every failure is one sentence: exit code 1, 2 for a recipe that is none, 130 for Ctrl-C.

    With --verbose what was raised goes through, with its traceback.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt as stop:
            kept = "what is finished is kept, and the same command goes on from there"
            next_time = kept if function.__name__ in _GO_ON else "the same command begins anew"
            typer.secho(str(stop) or f"interrupted: {next_time}", fg="yellow", err=True)
            raise typer.Exit(INTERRUPTED) from stop
        except Exception as problem:
            if type(problem).__module__.startswith(("typer", "click")):
                raise  # typer's own: an exit, a usage error
            if logging.getLogger("dynmix").isEnabledFor(logging.INFO):
                raise
            fail(problem)

    return run


def fail(problem: Exception) -> NoReturn:
    """End with the problem in one sentence."""
    rank = os.environ.get("RANK", "0")
    place = "" if rank == "0" else f" (process {rank})"
    typer.secho(f"error{place}: {in_words(problem)}", fg="red", err=True)
    raise typer.Exit(2 if type(problem).__name__ == "RecipeError" else 1) from problem


def in_words(problem: Exception) -> str:
    """What happened and what to do; problems of machines are told by what the libraries say of them."""
    said = str(problem)
    if "out of memory" in said or "can't allocate memory" in said or isinstance(problem, MemoryError):
        return (
            "out of memory: what was saved is not lost; of a recipe lower measurement.micro_batch or measure fewer "
            "layers, for training lower training.per_device_train_batch_size; `dynmix influence` has --micro-batch, "
            "`dynmix score` --batch-tokens (and then another --out); and give the same command again "
            f"({_first_line(said)})"
        )
    full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # torch's writer of archives says only that something was not written.
    if full or "No space left" in said or "inline_container" in said or "PytorchStreamWriter failed" in said:
        return (
            "the disk is full: what was saved before is whole; make room and give the same command again "
            f"({_first_line(said)})"
        )
    if isinstance(problem, OSError) and problem.filename is not None and problem.strerror:
        return f"{problem.filename}: {problem.strerror.lower()}"
    if isinstance(problem, ValueError | OSError | ImportError | ArithmeticError):
        return said or type(problem).__name__
    return f"{type(problem).__name__}: {_first_line(said)} (`dynmix --verbose ...` shows where)"


def numbers(option: str, given: Sequence[str] | None) -> dict[str, float] | None:
    """Domain -> number from "domain=number,...", once or several times; None for none. Raises ValueError."""
    if not given:
        return None
    text = ",".join(given)
    try:
        return {name.strip(): float(number) for name, number in (part.rsplit("=", 1) for part in text.split(","))}
    except ValueError:
        raise ValueError(f"{option} {text!r}: write domain=number,...") from None


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, in ASCII, which every locale has; numbers that are none become null."""
    import json

    typer.echo(json.dumps(finite(value), indent=1, allow_nan=False, default=str))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
