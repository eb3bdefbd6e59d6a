"""The larger commands of `dynmix`, a module each: arguments in, calls of the library out."""

from typing import NoReturn

import typer


def fail(problem: Exception) -> NoReturn:
    """End with exit code 1 and the problem in one line."""
    typer.secho(f"error: {problem}", fg="red", err=True)
    raise typer.Exit(1) from problem
