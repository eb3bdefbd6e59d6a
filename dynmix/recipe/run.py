"""A run from a recipe: its folder, its objects, and training that goes on where an earlier call stopped.

    recipe.yaml       the recipe with all its values, which every later call must have, too
    run.json          versions, fingerprints of recipe, tokenizer and domains, and every start
    tokens/           stores of text that was tokenised here
    proxy/            what the small runs of `proxy` left
    checkpoint-N/     the Trainer's
    dynmix/           journal, config and snapshots
    model/            the trained model and its tokenizer, written last: the run is done

Knows the order of things; how each is made is `build`'s.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from dynmix.alone import alone
from dynmix.callbacks import MixtureCallback
from dynmix.journal import Journal
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.prepare.manifest import describe_tokenizer
from dynmix.ranks import is_rank_0, on_every_rank
from dynmix.recipe.build import (
    check_parts,
    load_tokenizer,
    make_callback,
    make_dataset,
    make_model,
    model_config,
    training_arguments,
)
from dynmix.recipe.console import PrintStages, QuietProgress
from dynmix.recipe.names import RecipeError
from dynmix.recipe.read import differences, read_recipe, structured, to_plain, to_yaml
from dynmix.recipe.schema import Recipe, TaskFile
from dynmix.recipe.sources import domain_sources, task_sources
from dynmix.trainer_checkpoint import newest_checkpoint
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


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, and has saved a checkpoint; the message says where."""


@dataclass
class RecipeRun:
    """The objects of a run, but for its model.

    Attributes:
        trainers: the Trainer, when there is one: a curvature may ask for its optimizer.
    """

    recipe: Recipe
    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerBase | None
    config: PreTrainedConfig
    dataset: MixtureDataset
    callback: MixtureCallback
    trainers: list[Trainer] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.output)


def build_run(recipe: Recipe, on_paper: bool = False) -> RecipeRun:
    """Build everything but the model, and check that the folder has no other run; text is tokenised if need be.

    Small runs of a proxy are made, unless `on_paper`.

    Raises:
        RecipeError: a value that makes no run, or a folder of another recipe; the message says which and what to do.
        ValueError: data that is not there or damaged, in the words of the library.
    """
    arguments = training_arguments(recipe)
    return on_every_rank(lambda: _built(recipe, arguments, on_paper))


def _built(recipe: Recipe, arguments: TrainingArguments, on_paper: bool) -> RecipeRun:
    _check_folder(recipe)
    steps = recipe.training["max_steps"]
    if recipe.stages.steps >= steps:
        raise RecipeError(
            f"stages.steps={recipe.stages.steps}: the run of training.max_steps={steps} ends before its first stage "
            "does, and nothing would ever be decided; make stages shorter"
        )
    try:
        check_parts(recipe)
    except ValueError as problem:
        raise RecipeError(str(problem)) from problem
    tokenizer = load_tokenizer(recipe)
    config = model_config(recipe.model, tokenizer, recipe.data.sequence_length)
    cache = Path(recipe.data.cache_dir or Path(recipe.output) / "tokens")
    domains: Mapping[str, Any] = {}
    held_out: Mapping[str, Path] = {}
    if recipe.data.groups is None:
        domains, held_out = domain_sources(recipe.domains, tokenizer, cache)
    tasks = task_sources("tasks", recipe.tasks, tokenizer, held_out, recipe.data.sequence_length)
    if not tasks:
        raise RecipeError("tasks: give at least one validation set, as name: path")
    guards = recipe.guards
    if isinstance(guards, Mapping):
        checked = {name: structured(TaskFile, each, f"guards.{name}") for name, each in guards.items()}
        guards = task_sources("guards", checked, tokenizer, held_out, recipe.data.sequence_length)
    weights = recipe.data.weights
    if recipe.proxy is not None or recipe.data.groups is not None:
        from dynmix.recipe.proxy import decided  # laws and scoring take seconds to import, and few runs need them

        if recipe.proxy is not None and not on_paper:  # what they leave is of this recipe
            _write_recipe(recipe)
        domains, weights = decided(recipe, domains, tasks, tokenizer, on_paper)
    dataset = make_dataset(recipe, domains, weights, tokenizer, cache)
    trainers: list[Trainer] = []
    callback = make_callback(recipe, dataset, tasks, guards, lambda: trainers[-1].optimizer if trainers else None)
    return RecipeRun(recipe, arguments, tokenizer, config, dataset, callback, trainers)


def train(run: RecipeRun, console: Console | None = None) -> int:
    """Train to the end, from the newest whole checkpoint on, and save the model; return the steps that were done.

    Each stage is shown on the console; without one nothing is, not even a bar.

    Raises:
        Interrupted: by SIGINT or SIGTERM; a checkpoint was saved, and the same call goes on from it.
        ValueError: another process trains in the run folder.
    """
    with ExitStack() as held:
        # Keep another call out: the processes of a killed launcher train on, unless they are ended, too.
        on_every_rank(lambda: held.enter_context(alone(run.folder, "trains in it")) if is_rank_0() else None)
        return _train(run, console)


def _train(run: RecipeRun, console: Console | None) -> int:
    folder, steps = run.folder, run.recipe.training["max_steps"]
    if (folder / "model").is_dir():
        logger.warning("%s: this run is done; its model is in %s", folder, folder / "model")
        return int(steps)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None and is_rank_0():
        logger.warning("going on from %s", checkpoint)
    on_every_rank(lambda: _write_down(run, checkpoint))
    model = on_every_rank(lambda: make_model(run.recipe.model, run.config, run.recipe.seed, checkpoint))
    stop = _Stop()
    shown = [PrintStages(Journal(folder / "dynmix" / "journal.jsonl"), console)] if console and is_rank_0() else []
    trainer = Trainer(
        model,
        run.arguments,
        train_dataset=run.dataset,
        processing_class=run.tokenizer,
        data_collator=default_data_collator,  # it keeps labels and boundaries as they are
        callbacks=[run.callback, *shown, stop],
    )
    if trainer.pop_callback(ProgressCallback) is not None and console is not None:
        trainer.add_callback(QuietProgress)
    if console is None:
        trainer.remove_callback(PrinterCallback)
    run.trainers.append(trainer)
    with stop.listening(run.arguments):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    done = trainer.state.global_step
    if stop.asked and done < steps:
        raise Interrupted(
            f"stopped after step {done}: checkpoint-{done} is saved, and the same command goes on from it"
        )
    beside = folder / ".model.part"
    trainer.save_model(str(beside))
    if is_rank_0():
        shutil.rmtree(folder / "model", ignore_errors=True)
        os.replace(beside, folder / "model")
    return done


class _Stop(TrainerCallback):
    """Ends the training with a checkpoint after the step in which a signal arrived; a second signal ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, arguments: TrainingArguments) -> Iterator[None]:
        """Take SIGINT and SIGTERM; not in one of several processes, which would stop at different steps."""
        if arguments.world_size > 1:
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: Any) -> None:
            self.asked = True
            signal.signal(number, before[signal.Signals(number)])
            logger.warning("stopping after this step, with a checkpoint; once more stops at once")

        try:
            for number in before:
                signal.signal(number, ask)
        except ValueError:  # not the main thread: whoever owns that one takes signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if asked."""
        if self.asked:
            control.should_save = control.should_training_stop = True


def _check_folder(recipe: Recipe) -> None:
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


def _write_recipe(recipe: Recipe) -> None:
    if is_rank_0():
        facts = Path(recipe.output) / "run.json"
        if not facts.exists():  # first, because a recipe.yaml without it is the user's own
            write_json(facts, {"starts": []})
        write_whole(Path(recipe.output) / "recipe.yaml", to_yaml(recipe))


def _write_down(run: RecipeRun, checkpoint: Path | None) -> None:
    if not is_rank_0():
        return
    file, text = run.folder / "run.json", to_yaml(run.recipe)
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"starts": []}
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from": None if checkpoint is None else checkpoint.name,
        "processes": run.arguments.world_size,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("dynmix", "torch", "transformers", "accelerate")},
    }
    if checkpoint is not None and facts["starts"]:
        before = facts["starts"][-1]["versions"]
        for change in differences(before, start["versions"], "version of"):
            logger.warning("%s: what follows may differ in the last bits", change.replace("version of.", "version of "))
    tokenizer = None if run.tokenizer is None else describe_tokenizer(run.tokenizer)["fingerprint"]
    facts["fingerprints"] = {
        "recipe": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "tokenizer": tokenizer,
        "domains": run.dataset.fingerprint,
    }
    facts["starts"].append(start)
    write_json(file, facts)
    _write_recipe(run.recipe)
