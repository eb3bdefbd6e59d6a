"""The adapter for transformers' `Trainer`.

Knows the Trainer's events and arguments; everything a boundary does is the controller's. State travels in the
Trainer's own checkpoint, in `trainer_state.json`.
"""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dynmix.callbacks.loop import check_micro_batch, check_read
from dynmix.callbacks.weights_table import log_weights_table
from dynmix.controller import MixtureController
from dynmix.mixers.base import Mixer
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.stream import Mixture, MixtureStream
from dynmix.mixture.text import check_stores
from dynmix.ranks import on_every_rank
from dynmix.trainer_checkpoint import STATE

logger = logging.getLogger("dynmix")


class MixtureCallback(TrainerCallback):
    """Decides the mixture of a `MixtureDataset` anew every `stage_steps` optimizer steps of a `Trainer`.

    Args:
        dataset: the Trainer's `train_dataset`.
        tasks: name -> batches, examples or a token store: what the mixture is optimised for.
        mixer: decides the weights: a mixer, the name of one, or a mapping with its `name` and arguments.
        stage_steps: optimizer steps per stage.
        output: folder for journal, config and snapshots; default `<args.output_dir>/dynmix`.
        options: further arguments of `dynmix.controller.MixtureController`.

    Raises (when training begins):
        ValueError: Trainer arguments under which steps would not be positions of the dataset, each with its remedy; a
            tokenizer (`processing_class`) that the dataset's stores were not made with; a data collator that loses the
            dataset's `boundaries`.
    """

    def __init__(
        self,
        dataset: Mixture,
        tasks: Mapping[str, Any],
        mixer: Mixer | str | Mapping[str, Any],
        stage_steps: int,
        *,
        output: str | Path | None = None,
        **options: Any,
    ):
        self.dataset = dataset
        self.output = output
        self.controller = MixtureController(dataset, tasks, mixer, stage_steps=stage_steps, output=output, **options)
        self._trainer: Trainer | None = None
        self._finished = self._can_go_back = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the arguments, load the state of a checkpoint, and let the controller begin."""
        self._trainer, self._finished = trainer_on_the_stack(self), False
        self._can_go_back = bool(state.global_step) or args.save_strategy != "no"  # to a checkpoint
        self.controller.watch(model_of(kwargs))
        on_every_rank(lambda: self._prepare(args, state, kwargs))
        log(self._trainer, self.controller.begin(model_of(kwargs), state.global_step), control)
        _saved(state)[STATE] = self.controller.state_dict()

    def _prepare(self, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        """All that comes before the ranks first work together."""
        split, _ = _dealing(args)
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * (1 if split else args.world_size)
        self._check(args, state, batch_size)
        if isinstance(self.dataset, MixtureDataset):
            if isinstance(tokenizer := kwargs.get("processing_class"), PreTrainedTokenizerBase):
                domains = self.dataset.sequences.values()
                check_stores([rows.store for rows in domains if isinstance(rows, PackedSequences)], tokenizer)
            collate = getattr(kwargs.get("train_dataloader"), "collate_fn", None)
            if self.dataset.boundaries and collate is not None:
                self.dataset.check_collate(collate)
        self.controller.write_to(self.output or Path(args.output_dir or ".") / "dynmix")
        if state.global_step:
            if STATE not in _saved(state):
                raise ValueError(
                    f"the checkpoint at step {state.global_step} holds no state of a MixtureCallback: it was saved by "
                    "a run without one, and which samples that run took is not known here"
                )
            self.controller.load_state_dict(_saved(state)[STATE])
        self.controller.plan(batch_size=batch_size, max_steps=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the controller, log what it decided, and put its state where the next checkpoint will save it.

        The last step also closes the journal: once training has ended, the trackers have closed their files.

        Raises:
            ValueError: the loader of a Trainer subclass has read less than the steps take.
        """
        check_read(
            self.dataset,
            state.global_step,
            self.controller.batch_size,
            "let get_train_dataloader make batches of per_device_train_batch_size, and each process its part of them "
            "(self.accelerator.prepare)",
        )
        if logs := self.controller.step_ended(model_of(kwargs), state.global_step):
            log(self._trainer, logs, control)
            if not self._can_go_back:
                self.controller.saved(state.global_step)
        _saved(state)[STATE] = self.controller.state_dict()
        if self.controller.why_over(state.global_step):
            control.should_training_stop = True
        if state.global_step >= state.max_steps or control.should_training_stop:
            self._finish(model_of(kwargs), state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the journal of a run that an evaluation stopped, before `load_best_model_at_end` puts another model."""
        if control.should_training_stop and not self._finished:
            self._finish(model_of(kwargs), state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the controller that a checkpoint was saved."""
        self._can_go_back = True
        self.controller.saved(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the journal with the final task losses, if nobody has by now."""
        if not self._finished:
            self.controller.finish(model_of(kwargs), state.global_step)
        self._trainer = None

    def _finish(self, model: nn.Module, state: TrainerState, control: TrainerControl) -> None:
        log(self._trainer, self.controller.finish(model, state.global_step), control)
        self._finished = True
        if self._trainer is not None and self.controller.folder is not None and state.is_world_process_zero:
            journal = self.controller.folder.path / "journal.jsonl"
            log_weights_table(journal, self._trainer.callback_handler.callbacks)

    def _check(self, args: TrainingArguments, state: TrainerState, batch_size: int) -> None:
        others = [] if self._trainer is None else self._trainer.callback_handler.callbacks
        if sum(isinstance(each, MixtureCallback) for each in others) > 1:
            # The first would decide every stage, and the state of the last would be saved.
            raise ValueError(
                "the Trainer has several MixtureCallbacks, and the mixture of a run is decided by one: keep one of "
                "them; trainer.remove_callback(...) takes out the others"
            )
        if self._trainer is not None and self._trainer.train_dataset is not self.dataset:
            raise ValueError(
                "the Trainer's train_dataset is not the dataset given to MixtureCallback: pass the same one"
            )
        evaluated = None if self._trainer is None or args.eval_strategy == "no" else self._trainer.eval_dataset
        if any(each is self.dataset for each in (evaluated.values() if isinstance(evaluated, dict) else [evaluated])):
            raise ValueError(
                "the Trainer's eval_dataset is the dataset that is trained on, whose later stages are not decided yet "
                "when it is evaluated: pass text that is held out, or a MixtureDataset of its own"
            )
        split, dispatched = _dealing(args)
        if isinstance(self.dataset, MixtureStream):
            _check_stream(self.dataset, args)
        elif args.train_sampling_strategy != "sequential":
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy!r} would shuffle the stages together: pass "
                "TrainingArguments(train_sampling_strategy='sequential'); MixtureDataset is shuffled already"
            )
        else:
            check_micro_batch(self.dataset, args.train_batch_size // (args.world_size if split else 1))
        if args.auto_find_batch_size:
            raise ValueError("auto_find_batch_size changes what a step is during the run: set it to False")
        apart = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if self._trainer is not None and (found := self._trainer.get_total_train_batch_size(args)) != apart:
            raise ValueError(
                f"{args.world_size} processes take {found} samples a step and not {apart}: in tensor, context and "
                "sequence parallelism several of them share samples, and a model that is split so is not measured "
                "rightly here; use DDP or FSDP"
            )
        # Batches that are dealt out together accelerate (1.15) takes for one as it counts what to skip.
        skips_too_few = args.world_size > 1 and dispatched and not split and isinstance(self.dataset, MixtureDataset)
        if state.global_step and skips_too_few:
            raise ValueError(
                "dispatch_batches=True: as it resumes, accelerate would skip but a part of the samples already taken; "
                "set it to False, the samples of the run are the same"
            )
        if args.ignore_data_skip and state.global_step:
            raise ValueError("ignore_data_skip=True would start the data again from its first sample: set it to False")
        if state.max_steps > -(-len(self.dataset) // batch_size):
            raise ValueError(
                f"the run takes {state.max_steps} steps of {batch_size} samples, the dataset has {len(self.dataset)}: "
                f"raise num_samples to {state.max_steps * batch_size} or lower max_steps; for a second epoch of the "
                "data raise num_samples as well, each domain is reshuffled on its own"
            )


def _check_stream(stream: MixtureStream, args: TrainingArguments) -> None:
    if stream.world_size not in (None, 1):
        raise ValueError(
            f"world_size={stream.world_size}: the Trainer gives each process its part of what it reads, so that a "
            "MixtureStream is read whole; pass world_size=1 and no rank"
        )
    split, dispatched = _dealing(args)
    # Without dispatch_batches every process reads all of it, and of as many batches as there are processes keeps one.
    size = args.train_batch_size * (args.world_size if dispatched is False and not split else 1)
    if args.dataloader_num_workers > 1 and stream.batch_size != size:
        raise ValueError(f"batch_size={stream.batch_size} of the MixtureStream: with these arguments it must be {size}")


def _saved(state: TrainerState) -> dict[str, Any]:
    assert isinstance(state.stateful_callbacks, dict)  # a list only until the Trainer has started
    return state.stateful_callbacks


def _dealing(args: TrainingArguments) -> tuple[bool, bool | None]:
    """Whether a batch is split over the processes, and whether one reads for all of them; None: accelerate decides."""
    config: Any = args.accelerator_config
    return config.split_batches, config.dispatch_batches


def model_of(kwargs: Mapping[str, Any]) -> nn.Module:
    """Return the model that an event carries."""
    model = kwargs["model"]
    assert isinstance(model, nn.Module)
    return model


def log(trainer: Trainer | None, logs: dict[str, float] | None, control: TrainerControl) -> None:
    """Give figures to the Trainer's trackers, if there is a Trainer and there are any."""
    if trainer is None or not logs:
        return
    # Trainer.log clears should_log, and with it the line of the training loss that is due at this step.
    should_log = control.should_log
    trainer.log(logs)
    control.should_log = should_log


def trainer_on_the_stack(callback: TrainerCallback) -> Trainer | None:
    """Return the Trainer that fires the event: events do not carry it, and only `Trainer.log` reaches the trackers."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    logger.warning("%s runs outside a Trainer: its figures go to no tracker", type(callback).__name__)
    return None
