"""Mixers by name, for the command line and for recipes: those of this package and those that others registered.

Another distribution registers a mixer through an entry point, in its pyproject.toml:

    [project.entry-points."dynmix.mixers"]
    my-mixer = "my_package.mixers:MyMixer"

Knows names and where classes are; a mixer's module is imported when its name is asked for and not before.
"""

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from dynmix.mixers.base import Mixer

logger = logging.getLogger("dynmix.mixers")

GROUP = "dynmix.mixers"
BUILT_IN = {
    "static": "dynmix.mixers.static:Static",
    "natural": "dynmix.mixers.static:Natural",
    "uniform": "dynmix.mixers.static:Uniform",
    "temperature": "dynmix.mixers.static:Temperature",
    "unimax": "dynmix.mixers.static:UniMax",
    "fixed": "dynmix.mixers.static:Fixed",
    "staged": "dynmix.mixers.static:Staged",
    "odm": "dynmix.mixers.odm:ODM",
    "doremi": "dynmix.mixers.doremi:DoReMi",
    "doge": "dynmix.mixers.doge:DoGE",
    "loss-proportional": "dynmix.mixers.online:LossProportional",
    "ado": "dynmix.mixers.ado:ADO",
    "tikmix-d": "dynmix.mixers.tikmix_d:TiKMiXD",
    "tikmix-m": "dynmix.mixers.tikmix_m:TiKMiXM",
    "automixer": "dynmix.mixers.automixer:AutoMixer",
}


def mixer_names() -> list[str]:
    """Return the names of all mixers that can be made: the package's, then those of entry points, by name."""
    own = {_key(name) for name in BUILT_IN}
    return [*BUILT_IN, *(point.name for key, point in _third_party().items() if key not in own)]


def make_mixer(spec: Mixer | str | Mapping[str, Any]) -> Mixer:
    """Return the mixer that `spec` says.

    Args:
        spec: a mixer, returned as it is; a name; or a mapping of `name` and the constructor's arguments. Names are
            matched without regard to case, hyphens, underscores and blanks.

    Raises:
        ValueError: an unknown name, arguments that the mixer does not take or refuses, an entry point that cannot be
            imported or makes no mixer, a class, anything else that is no mixer.
    """
    if isinstance(spec, Mixer):
        return spec
    if isinstance(spec, type) and issubclass(spec, Mixer):
        raise ValueError(f"mixer={spec.__name__} is a class: pass an instance, {spec.__name__}(...)")
    if isinstance(spec, str):
        name, options = spec, {}
    elif isinstance(spec, Mapping):
        options = dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"mixer={dict(spec)!r}: a mapping needs the mixer's name as 'name'")
    else:
        raise ValueError(
            f"mixer={spec!r} is no mixer: pass a name, a mapping with 'name', or an instance of a subclass of "
            "dynmix.mixers.Mixer"
        )
    make = find_mixer(name)
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ValueError(f"mixer {name!r}: {error}; it is {make.__name__}{inspect.signature(make)}") from None
    mixer = make(**options)
    if not isinstance(mixer, Mixer):
        raise ValueError(f"mixer {name!r} is a {type(mixer).__name__}, no subclass of dynmix.mixers.Mixer")
    return mixer


def find_mixer(name: str) -> Callable[..., Any]:
    """Return the class, or factory, of that name. Raises ValueError as `make_mixer` does."""
    key = _key(name)
    own = {_key(known): place for known, place in BUILT_IN.items()}
    others = _third_party()
    if key in own:
        if key in others:
            taken = f"{others[key].value}{_distribution(others[key])}"
            logger.warning("mixer %r is dynmix's own; the entry point %s of that name is not used", name, taken)
        return cast(Callable[..., Any], EntryPoint(key, own[key], GROUP).load())
    if key not in others:
        close = difflib.get_close_matches(key, [*own, *others], n=1)
        named = {_key(known): known for known in mixer_names()}
        hint = f"did you mean {named[close[0]]!r}? " if close else ""
        raise ValueError(f"no mixer {name!r}: {hint}there are {', '.join(mixer_names())}")
    try:
        return cast(Callable[..., Any], others[key].load())
    except Exception as error:  # another distribution's module may fail in any way
        place = f"{others[key].value}{_distribution(others[key])}"
        raise ValueError(f"mixer {name!r}: its entry point {place} failed: {type(error).__name__}: {error}") from error


def _third_party() -> dict[str, EntryPoint]:
    return {_key(point.name): point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def _distribution(point: EntryPoint) -> str:
    return f" of {point.dist.name}" if point.dist else ""


def _key(name: str) -> str:
    return "".join(character for character in name.lower() if character not in "-_ ")
