"""A run from a recipe: its objects, and training that goes on where an earlier call stopped.

Knows the order of things; how each is made is `build`'s, and what is in the folder is `folder`'s.
"""

import logging
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import current_thread, main_thread
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
from dynmix.ranks import is_rank_0, on_every_rank
from dynmix.recipe.build import (
    check_parts,
    load_tokenizer,
    make_callback,
    make_dataset,
    make_model,
    model_config,
    splits_batches,
    training_arguments,
)
from dynmix.recipe.console import PrintStages, QuietProgress
from dynmix.recipe.folder import check_folder, write_recipe, write_start
from dynmix.recipe.names import RecipeError
from dynmix.recipe.read import structured
from dynmix.recipe.schema import Recipe, TaskFile
from dynmix.recipe.sources import domain_sources, task_sources
from dynmix.trainer_checkpoint import newest_checkpoint

logger = logging.getLogger("dynmix")


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
    check_folder(recipe)
    steps = recipe.training["max_steps"]
    if recipe.stages.steps >= steps:
        raise RecipeError(
            f"stages.steps={recipe.stages.steps}: the run of training.max_steps={steps} ends before its first stage "
            "does, and nothing would ever be decided; make stages shorter"
        )
    homogeneous = recipe.data.homogeneous
    micro = arguments.train_batch_size // (arguments.world_size if splits_batches(arguments) else 1)
    if homogeneous > 1 and homogeneous % micro:
        raise RecipeError(
            f"data.homogeneous={homogeneous}: micro-batches of {micro} sequences would hold several domains; give "
            f"{micro} or a multiple of it, or a smaller training.per_device_train_batch_size"
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
            write_recipe(recipe)
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
    journal = Journal(folder / "dynmix" / "journal.jsonl")
    if (folder / "model").is_dir():
        logger.warning("%s: this run is done; its model is in %s", folder, folder / "model")
        return journal.rows()[-1]["step"]  # fewer than were planned, where the data ended before
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None and is_rank_0():
        logger.warning("going on from %s", checkpoint)

    def write_down() -> None:
        if is_rank_0():
            write_start(run.recipe, checkpoint, run.arguments.world_size, run.tokenizer, run.dataset.fingerprint)

    on_every_rank(write_down)
    model = on_every_rank(lambda: make_model(run.recipe.model, run.config, run.recipe.seed, checkpoint))
    stop = _Stop()
    shown = [PrintStages(journal, console)] if console and is_rank_0() else []
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
        """Take SIGINT and SIGTERM; not in a thread, or in one of several processes, which would stop apart."""
        if arguments.world_size > 1 or current_thread() is not main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: Any) -> None:
            self.asked = True
            signal.signal(number, before[signal.Signals(number)])
            logger.warning("stopping after this step, with a checkpoint; once more stops at once")

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if asked."""
        if self.asked:
            control.should_save = control.should_training_stop = True
