"""What a recipe's domains, tasks and guards are made of: paths, or text that is tokenised once.

Knows paths and `prepare`; no model and no run.
"""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dynmix.mixture.files import TOKEN_SUFFIXES
from dynmix.mixture.folders import files_in
from dynmix.mixture.prepare import prepare
from dynmix.mixture.prepare.inputs import SUFFIXES, find_domains
from dynmix.mixture.prepare.manifest import describe_tokenizer
from dynmix.mixture.remote import is_remote, one_at_a_time
from dynmix.mixture.store import TokenStore
from dynmix.recipe.names import RecipeError
from dynmix.recipe.schema import Domain, TaskFile
from dynmix.tasks import Task

logger = logging.getLogger("dynmix")


def domain_sources(
    domains: Mapping[str, Domain], tokenizer: PreTrainedTokenizerBase | None, cache: Path
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Domains as `MixtureDataset` takes them, and the stores of what was held out of them.

    Text is tokenised into a folder of `cache` that is named by the files, their sizes and times, and the tokenizer:
    one process does it, the others wait, and a later run finds it.

    Raises:
        ValueError: a path that is not there, text without a tokenizer, or that cannot be prepared.
    """
    if not domains:
        raise RecipeError("domains: give at least one, as name: path")
    found: dict[str, Any] = {}
    held_out: dict[str, Path] = {}
    for name, domain in domains.items():
        paths = _paths(name, domain)
        texts = [path for path in paths if is_text(path)]
        if texts and len(texts) < len(paths):
            raise RecipeError(f"domains.{name}.path: {texts[0]} is text and others are tokens: make them two domains")
        if not texts:
            if domain.held_out is not None:
                raise RecipeError(f"domains.{name}.held_out: it is for text, and {paths[0]} is tokens already")
            found[name] = paths[0] if len(paths) == 1 else paths
            held_out[name] = Path(f"{str(paths[0]).removesuffix('.idx').removesuffix('.bin')}.valid")
            continue
        if tokenizer is None:
            raise RecipeError(f"tokenizer: domain {name!r} is text, to tokenise it: give a folder or name of one")
        folder = _tokenised(name, texts, domain, tokenizer, cache)
        found[name], held_out[name] = TokenStore.open(folder / name), folder / f"{name}.valid"
    return found, held_out


def task_sources(
    kind: str,
    tasks: Mapping[str, TaskFile],
    tokenizer: PreTrainedTokenizerBase | None,
    held_out: Mapping[str, Path],
    max_length: int,
) -> dict[str, Any]:
    """Tasks or guards (`kind` is "tasks" or "guards") as the controller takes them: a `Task`, or the path of a store.

    `held_out` has the store of what was held out of each domain; a sequence has at most `max_length` tokens.

    Raises:
        ValueError: nothing at the path, no examples, a file without a tokenizer, a domain without a held-out part.
    """
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        where = f"{kind}.{name}"
        if (task.path is None) == (task.held_out is None):
            raise RecipeError(f"{where}: give `path` or `held_out`")
        of_file = task.path is not None and task.path.endswith((".jsonl", ".jsonl.gz"))
        if not of_file and (task.limit is not None or task.metric != "auto"):
            raise RecipeError(
                f"{where}: `limit` and `metric` are for questions in a .jsonl file; of a token store "
                "measurement.task_sequences sequences are used"
            )
        if task.held_out is not None:
            if task.held_out not in held_out:
                raise RecipeError(f"{where}.held_out: no domain {task.held_out!r}; there are {', '.join(held_out)}")
            store = held_out[task.held_out]
            if not Path(f"{store}.idx").exists():
                raise RecipeError(
                    f"{where}.held_out: nothing was held out of domain {task.held_out!r} ({store}.idx is not there): "
                    f"give domains.{task.held_out}.held_out=0.01, or prepare the stores with --held-out"
                )
            found[name] = str(store)
        elif of_file:
            if not Path(str(task.path)).is_file():
                raise RecipeError(f"{where}.path: {task.path}: no such file, seen from {os.getcwd()}")
            if tokenizer is None:
                raise RecipeError(f"tokenizer: {where} is text, to tokenise it: give a folder or name of one")
            options: Any = {"name": name, "max_length": max_length, "limit": task.limit, "metric": task.metric}
            found[name] = Task.from_jsonl(str(task.path), tokenizer, **options)
        else:
            store = Path(str(task.path))
            if not any(Path(f"{store}{end}").is_file() for end in (".idx", "")):
                raise RecipeError(
                    f"{where}.path: {store}: no such token store (.idx with .bin) or .jsonl, seen from {os.getcwd()}"
                )
            found[name] = str(store)
    return found


def is_text(path: str) -> bool:
    """Whether there is text to tokenise: a file of one of `prepare`'s kinds, or a folder of these without tokens."""
    if is_remote(path) or not os.path.isdir(path):
        return path.endswith(SUFFIXES)
    names = [name for file in files_in(path) if (name := os.path.basename(file))[0] not in "._"]
    saved = {"dataset_info.json", "state.json"} <= {*names} or "dataset_dict.json" in names
    return (
        not saved
        and not any(each.endswith(TOKEN_SUFFIXES) for each in names)
        and any(each.endswith(SUFFIXES) for each in names)
    )


def _paths(name: str, domain: Domain) -> list[str]:
    given = domain.path if isinstance(domain.path, list) else [domain.path]
    if not given or not all(isinstance(path, str) and path for path in given):
        raise RecipeError(f"domains.{name}.path: {domain.path!r}: a path, or a list of paths")
    paths: list[str] = []
    for path in map(os.path.expanduser, given):
        matched = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not is_remote(path) else []
        # A glob of token files is the data set's own business, with what it leaves out.
        paths += matched if matched and all(map(is_text, matched)) else [path]
    for path in paths:
        if path.endswith(SUFFIXES) and not is_remote(path) and not os.path.isfile(path):
            raise RecipeError(f"domains.{name}.path: {path}: no such file, seen from {os.getcwd()}")
    return paths


def _tokenised(name: str, texts: list[str], domain: Domain, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Path:
    described = describe_tokenizer(tokenizer)
    stamps = [[each.name, each.stamp] for each in find_domains({name: texts}, cache)[name]]
    of_tokenizer = [described[key] for key in ("fingerprint", "added", "eos")]
    parts = json.dumps([stamps, of_tokenizer, domain.text_field, domain.held_out], sort_keys=True)
    folder = cache / f"{name}-{hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()}"
    with one_at_a_time(cache, str(folder)):
        # The manifest is the last to be written.
        if not (folder / "manifest.json").exists():
            logger.info("domain %r: tokenising %d files into %s", name, len(stamps), folder)
            prepare({name: texts}, folder, tokenizer, text_field=domain.text_field, held_out=domain.held_out)
    return folder
