"""A recipe from its file and from `key.sub=value` words, checked by names and types; and the other way round.

Knows YAML and the schema; builds nothing.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynmix.recipe.names import RecipeError, check_names, in_a_line, named, nearest
from dynmix.recipe.schema import AutoMixerProxy, MDEProxy, Recipe

T = TypeVar("T")

EXAMPLES = files("dynmix.recipe") / "examples"
PROXIES: dict[str, type[MDEProxy] | type[AutoMixerProxy]] = {"mde": MDEProxy, "automixer": AutoMixerProxy}


def example_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(each.name.removesuffix(".yaml") for each in EXAMPLES.iterdir() if each.name.endswith(".yaml"))


def example(name: str) -> str:
    """One of them, as text. Raises RecipeError."""
    check_names("--example", [name], example_names())
    return (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")


def read_recipe(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        file: YAML. `${oc.env:NAME}` is a variable of the environment, `${seed}` another value of the recipe.
        overrides: `key.sub=value`, the value as in YAML; it takes the place of what the file has there.

    Raises:
        RecipeError: no such file, no YAML, a key that is not known (with the nearest one that is), a value of another
            type, a value that must be given and is not.
    """
    try:
        tree = OmegaConf.create(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{file}: no such recipe; make one: dynmix train --example tikmix-d > {file.name}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as problem:
        tabs = "; YAML is indented by spaces, and never by tabs" if "start any token" in str(problem) else ""
        raise RecipeError(f"{file}: not to be read as YAML: {in_a_line(problem)}{tabs}") from None
    if not isinstance(tree, DictConfig):
        raise RecipeError(f"{file}: a recipe is a mapping of keys to values")
    tree = _expanded(tree)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise RecipeError(f"{word!r}: override a value of the recipe as key.sub=value")
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
            OmegaConf.update(tree, key, parsed["value"], merge=False, force_add=True)
        except (yaml.YAMLError, UnicodeEncodeError, OmegaConfBaseException, TypeError, AttributeError) as problem:
            raise RecipeError(f"{word!r}: {in_a_line(problem)}") from None
        tree = _expanded(tree)
    recipe = structured(Recipe, tree, str(file))
    if recipe.proxy is not None:
        name, options = named(f"{file}: proxy", recipe.proxy)
        check_names(f"{file}: proxy", [name], PROXIES)
        recipe.proxy = structured(PROXIES[name], options, f"{file}: proxy")
    return recipe


def structured(kind: type[T], values: Any, where: str) -> T:
    """`values` as an instance of a dataclass of the schema. Raises RecipeError, beginning with `where`."""
    _check_sections(kind, values, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), values)
        if missing := sorted(map(str, OmegaConf.missing_keys(merged))):
            raise RecipeError(f"{where}: {missing[0]!r} is missing")
        OmegaConf.resolve(merged)
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as problem:
        raise RecipeError(f"{where}: {_words(problem)}") from None


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts, lists and values; the proxy with its name."""
    plain = asdict(recipe)
    for name, kind in PROXIES.items():
        if isinstance(recipe.proxy, kind):
            plain["proxy"] = {"name": name, **plain["proxy"]}
    return plain


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, with all its values."""
    return str(yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True))


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """In words, what differs between two recipes as plain values."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = (
            differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
            for name in dict.fromkeys([*before, *now])
        )
        return [each for own in found for each in own]
    return [] if before == now else [f"{key} was {before!r} and is {now!r}"]


def _check_sections(kind: Any, values: Any, where: str, above: str = "") -> None:
    """Raises RecipeError for a value where a mapping is expected; the library's message would not name the key."""
    for each in fields(kind):
        section = next((own for own in (each.type, *get_args(each.type)) if is_dataclass(own)), None)
        if each.name not in values or (OmegaConf.is_config(values) and OmegaConf.is_interpolation(values, each.name)):
            continue
        value, key = values[each.name], f"{above}{each.name}"
        if get_origin(each.type) is dict:
            if not isinstance(value, Mapping):
                raise RecipeError(f"{where}: {key}={value!r}: a mapping is expected, of names to what each one is")
            continue
        if section is None or value is None:
            continue
        if not isinstance(value, Mapping):
            names = ", ".join(own.name for own in fields(section))
            raise RecipeError(f"{where}: {key}={value!r}: a mapping with keys of {names} is expected")
        _check_sections(section, value, where, f"{key}.")


def _expanded(tree: DictConfig) -> DictConfig:
    """With mappings in place of the names and paths that stand for them, and `~` as in a shell."""
    plain = cast(dict[Any, Any], _at_home(OmegaConf.to_container(tree)))
    measurement, proxy = plain.get("measurement"), plain.get("proxy")
    for within, key, name in (
        (plain, "mixer", "name"),
        (plain, "model", "path"),
        (plain, "proxy", "name"),
        (measurement, "curvature", "name"),
        (proxy, "model", "path"),
    ):
        if isinstance(within, dict) and isinstance(within.get(key), str):
            within[key] = {name: within[key]}
    for key in ("domains", "tasks", "guards"):
        if isinstance(plain.get(key), dict):
            plain[key] = {
                name: value if isinstance(value, dict) else {"path": value} for name, value in plain[key].items()
            }
    return OmegaConf.create(plain)


def _at_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _at_home(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _words(problem: OmegaConfBaseException) -> str:
    """The library's message in a line, with the whole key; of names that are not known, ours."""
    message = str(problem).partition("\n")[0]
    known = [each.name for each in fields(problem.object_type)] if is_dataclass(problem.object_type) else []
    if "not in" in message and known and problem.key not in known:
        return f"no key {problem.full_key!r}; {nearest(str(problem.key), known)}"
    return f"{problem.full_key}: {message}" if problem.full_key else message
