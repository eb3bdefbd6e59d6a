"""The folder of a run: what is in it, and what may change of its recipe from one call to the next.

    recipe.yaml       the recipe with all its values, which every later call must have, too
    run.json          versions, fingerprints of recipe, tokenizer and domains, and every start
    tokens/           stores of text that was tokenised here
    proxy/            what the small runs of `proxy` left
    checkpoint-N/     the Trainer's
    dynmix/           journal, config and snapshots
    model/            the trained model and its tokenizer, written last: the run is done

Knows recipes as values; builds and trains nothing.
"""

import hashlib
import json
import logging
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dynmix.mixture.prepare.manifest import describe_tokenizer
from dynmix.ranks import is_rank_0
from dynmix.recipe.names import RecipeError
from dynmix.recipe.read import differences, read_recipe, to_plain, to_yaml
from dynmix.recipe.schema import Recipe
from dynmix.whole_file import write_json, write_whole

logger = logging.getLogger("dynmix")

# What may change from one call to the next: it does not change what is computed, but for rounding.
_FREE = {
    "output", "data.cache_dir", "stages.keep", "proxy.jobs",
    "measurement.micro_batch", "measurement.offload", "measurement.layer_groups",
    *(
        f"training.{name}"
        for name in (
            "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "disable_tqdm",
            "log_level", "logging_first_step", "logging_steps", "per_device_train_batch_size", "report_to", "run_name",
            "save_steps", "save_strategy", "save_total_limit",
        )
    ),
}  # fmt: skip

# What small runs do not depend on, but what is decided by them: it may change until that is there.
_OF_DECISION = {
    "training.max_steps",
    *(f"proxy.{name}" for name in ("blend", "criterion", "keep", "law", "max_epochs", "mixtures")),
}

# Sections that neither of the two depends on, but for `training.max_steps` above and for `model.path`, which may bring
# the tokenizer: they may change until the run has begun.
_OF_RUN = {"model", "guards", "mixer", "reference", "stages", "measurement", "training"}


def check_folder(recipe: Recipe) -> None:
    """Raises RecipeError where the folder has a run of another recipe or of none, or a recipe of the user's own."""
    folder = Path(recipe.output)
    file = folder / "recipe.yaml"
    trained = sorted([*folder.glob("checkpoint-*"), *folder.glob("model")])
    if not file.exists():
        if trained:
            raise RecipeError(f"output: {folder} has {trained[0].name} and no recipe.yaml: give another folder")
        return
    if not (folder / "run.json").exists():
        raise RecipeError(
            f"output: {file} is not of a run, which would write its own in its place: keep it in another folder, or "
            "give another output"
        )
    if not trained and not (folder / "proxy").exists():  # a call that failed as it began, and may have been mended
        return
    decided = any((folder / "proxy" / name).exists() for name in ("fit.json", "groups/groups.json"))
    before = to_plain(read_recipe(file))  # what an older version did not know has its default
    changes = [(each.partition(" was ")[0], each) for each in differences(before, to_plain(recipe))]
    found = [each for key, each in changes if not _may_change(key, decided=decided, trained=bool(trained))]
    if found:
        raise RecipeError(
            f"output: {folder} has a run of another recipe: {'; '.join(found[:5])}"
            + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            + ". Give another output, or the recipe as it was"
        )


def _may_change(key: str, *, decided: bool, trained: bool) -> bool:
    """Whether a value may differ from an earlier call's, which left small runs at least.

    `decided` says whether something was decided from these, `trained` whether the run itself has begun.
    """
    if key in _FREE or key.removeprefix("proxy.") in _FREE:
        return True
    if trained:
        return False
    if key in _OF_DECISION:
        return not decided
    return key.partition(".")[0] in _OF_RUN and key != "model.path"


def write_recipe(recipe: Recipe) -> None:
    """Keep the recipe in the folder, by one of several processes."""
    if is_rank_0():
        facts = Path(recipe.output) / "run.json"
        if not facts.exists():  # first, because a recipe.yaml without it is the user's own
            write_json(facts, {"starts": []})
        write_whole(Path(recipe.output) / "recipe.yaml", to_yaml(recipe))


def write_start(
    recipe: Recipe,
    checkpoint: Path | None,
    processes: int,
    tokenizer: PreTrainedTokenizerBase | None,
    domains: Mapping[str, str],
) -> None:
    """Write down that the run begins, or goes on from the checkpoint, and the fingerprints of what it is made of."""
    file = Path(recipe.output) / "run.json"
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"starts": []}
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from": None if checkpoint is None else checkpoint.name,
        "processes": processes,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("dynmix", "torch", "transformers", "accelerate")},
    }
    if checkpoint is not None and facts["starts"]:
        before = facts["starts"][-1]["versions"]
        for change in differences(before, start["versions"], "version of"):
            logger.warning("%s: what follows may differ in the last bits", change.replace("version of.", "version of "))
    facts["fingerprints"] = {
        "recipe": hashlib.blake2b(to_yaml(recipe).encode(), digest_size=16).hexdigest(),
        "tokenizer": None if tokenizer is None else describe_tokenizer(tokenizer)["fingerprint"],
        "domains": domains,
    }
    facts["starts"].append(start)
    write_json(file, facts)
    write_recipe(recipe)
