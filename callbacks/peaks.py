"""The adapter that records where tasks peak, for any run of transformers' `Trainer`; it needs no mixture.

Knows the Trainer's events; where tasks peak and which snapshots stay is `dynmix.peaks`'.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynmix.callbacks.trainer import log, model_of, trainer_on_the_stack
from dynmix.checkpoints import check_tasks
from dynmix.peaks import PeakSnapshots, evaluated, set_aside
from dynmix.ranks import on_every_rank
from dynmix.retry import within_memory
from dynmix.scores import Metric
from dynmix.tasks import Task

logger = logging.getLogger("dynmix")


class PeakCallback(TrainerCallback):
    """Evaluates tasks during a run and keeps, for each, the snapshot of the model where it peaks.

    Logs `dynmix/task_loss/<task>` in nats per token and `dynmix/task_accuracy/<task>`. The run itself stays the same
    bit for bit. Resumed from a Trainer's checkpoint, it goes on from what was recorded up to there. Where memory runs
    out in an evaluation, it starts again with smaller batches; one that fails after the first is logged and left out.

    Args:
        tasks: by name.
        every: optimizer steps from one evaluation to the next; the last step is evaluated as well.
        folder: of `peaks.json` and the snapshots; None: `<args.output_dir>/peaks`.
        metric, min_delta, keep: as in `dynmix.peaks.PeakSnapshots`.
        batch_tokens: tokens of a forward pass of an evaluation, as in `dynmix.tasks.Task.evaluate`.

    Raises:
        ValueError: impossible arguments, at once; a task that does not fit the model, when training begins.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        *,
        every: int,
        folder: str | Path | None = None,
        metric: Metric | Mapping[str, Metric] = "loss",
        min_delta: float = 0.0,
        keep: int = 0,
        batch_tokens: int = 8192,
    ):
        if every < 1:
            raise ValueError(f"every={every}: at least every step, 1")
        if keep < 0:
            raise ValueError(f"keep={keep}: at least 0 snapshots")
        check_tasks(tasks, metric, min_delta)
        self.tasks, self.every, self.folder, self.batch_tokens = dict(tasks), every, folder, batch_tokens
        self.metric, self.min_delta, self.keep = metric, min_delta, keep
        self.snapshots: PeakSnapshots | None = None
        self._trainer: Trainer | None = None
        self._tried: int | None = None  # step at which it was evaluated last, or failed to be

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the tasks fit the model, and go on from what was recorded, or start afresh."""
        self._trainer = trainer_on_the_stack(self)
        for task in self.tasks.values():
            task.check(model_of(kwargs))
        folder = self.folder or Path(args.output_dir or ".") / "peaks"
        if not state.global_step:
            set_aside(folder)
        rule: dict[str, Any] = {"metric": self.metric, "min_delta": self.min_delta, "keep": self.keep}
        self.snapshots = on_every_rank(lambda: PeakSnapshots(folder, **rule))
        self.snapshots.rewind(state.global_step)
        self._tried = self.snapshots.last_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate, record and log, if it is time or the last step."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        if not last and state.global_step % self.every:
            return
        log(self._trainer, self._record(args, state, kwargs), control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete the snapshots that neither this run needs nor one that goes on from the new checkpoint."""
        self._record_if_stopped(args, state, control, kwargs)
        assert self.snapshots is not None
        self.snapshots.prune(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the end of a run that an evaluation stopped."""
        self._record_if_stopped(args, state, control, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the end of a run, if nobody has by now, as where it was stopped after its last epoch had ended."""
        # With load_best_model_at_end the model is by now another one.
        if self._tried != state.global_step and not args.load_best_model_at_end:
            self._record(args, state, kwargs)  # the trackers have closed their files
        self._trainer = None

    def _record_if_stopped(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, kwargs: Mapping[str, Any]
    ) -> None:
        """Evaluate, record and log, if the run was stopped after its last step had ended, as by an evaluation."""
        if control.should_training_stop and self._tried != state.global_step:
            log(self._trainer, self._record(args, state, kwargs), control)

    def _record(self, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> dict[str, float]:
        assert self.snapshots is not None
        model, step = model_of(kwargs), state.global_step
        self._tried = step
        try:
            values, logs = on_every_rank(
                lambda: within_memory(lambda: evaluated(model, self.tasks, self.metric, self.batch_tokens), self._halve)
            )
        except Exception as failure:
            if self.snapshots.last_step is None:
                raise  # a mistake in the set-up; later on a run must not end because one evaluation did
            logger.warning("the tasks were not evaluated after step %d: %s: %s", step, type(failure).__name__, failure)
            return {}
        self.snapshots.record(model, step, values)
        if args.save_strategy == "no":
            self.snapshots.prune(step)  # without checkpoints nobody can go on from an earlier step
        return logs

    def _halve(self) -> int | None:
        longest = max(task.max_length for task in self.tasks.values())
        if self.batch_tokens <= longest:
            return None
        self.batch_tokens //= 2
        return max(1, self.batch_tokens // longest)
