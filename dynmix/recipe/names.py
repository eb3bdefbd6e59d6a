"""Arguments that a recipe passes on by name: known ones pass, others are refused with the nearest right name."""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any


class RecipeError(ValueError):
    """A recipe that cannot be a run; the message names the key and says what to do."""


def in_a_line(problem: Exception) -> str:
    """What a library says of a problem, which may be of several lines, in one."""
    return " ".join(str(problem).split())


def check_names(where: str, given: Collection[str], known: Collection[str]) -> None:
    """Raises RecipeError for a name that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            raise RecipeError(f"{where}: no key {name!r}; {nearest(name, known)}")


def nearest(name: str, known: Collection[str]) -> str:
    """What to say to a name that is not known."""
    close = difflib.get_close_matches(str(name), [str(each) for each in known], n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(map(str, known))[:40])}"


def check_arguments(where: str, given: Mapping[str, Any], make: Callable[..., Any]) -> None:
    """`check_names` against what `make` takes."""
    parameters = inspect.signature(make).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        check_names(where, given, [each.name for each in parameters])


def named(where: str, spec: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of what is given as a mapping with `name`. Raises RecipeError."""
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise RecipeError(f"{where}: give a name, or name and arguments, as {{name: ..., ...}}")
    return spec["name"], {key: value for key, value in spec.items() if key != "name"}
