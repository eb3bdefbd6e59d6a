"""The adapter for any training loop: one call after each optimizer step.

Knows nothing of the loop but the model and that a step ended; everything a boundary does is the controller's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dynmix.controller import MixtureController
from dynmix.mixers.base import Mixer
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.stream import Mixture
from dynmix.ranks import Ranks, is_rank_0, on_every_rank


class MixtureHook:
    """Decides the mixture of a `MixtureDataset` anew every `stage_steps` optimizer steps of your loop.

        hook = MixtureHook(model, dataset, tasks=tasks, mixer=TiKMiXD(), stage_steps=500)
        for batch in DataLoader(dataset, batch_size=32, sampler=range(hook.position, len(dataset))):
            ...
            optimizer.step()
            optimizer.zero_grad()
            hook.step()
        hook.finish()

    Each of several ranks reads `range(hook.position + rank, len(dataset) // ranks * ranks, ranks)`, as many samples as
    every other, and all of them call `step`, `finish` and `load_state_dict`, in which they work together; the state is
    the same on all, so that one may save it. A run may resume with other ranks, workers, batches and accumulation, as
    long as a step takes the same number of samples. If the dataset's `max_epochs` ends the stream before the run, the
    loader ends with the last whole step.

    A `MixtureStream` is read by torchdata's `StatefulDataLoader`, whose state goes beside the hook's.

    Args:
        model: the model that trains, wrapped or not.
        dataset: what the loop's loader reads, in order (without shuffling: the dataset is shuffled already).
        tasks: name -> batches, examples or a token store: what the mixture is optimised for.
        mixer: decides the weights: a mixer, the name of one, or a mapping with its `name` and arguments.
        stage_steps: optimizer steps per stage.
        batch_size: samples an optimizer step takes over all ranks and accumulation steps. None: the loader's batch
            times the number of ranks, which is right without gradient accumulation.
        max_steps: optimizer steps of the run; None: as many as the dataset has samples for.
        output: folder for journal, config and snapshots; None writes nothing (and is refused with AutoMixer, `in_run`
            and curvatures that are carried from stage to stage, which keep files).
        options: further arguments of `dynmix.controller.MixtureController`.

    Raises:
        ValueError: impossible arguments, at once; a batch size that does not match the loader, as soon as it shows.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Mixture,
        tasks: Mapping[str, Any],
        mixer: Mixer | str | Mapping[str, Any],
        stage_steps: int,
        *,
        batch_size: int | None = None,
        max_steps: int | None = None,
        output: str | Path | None = None,
        **options: Any,
    ):
        self.model, self.dataset, self.max_steps = model, dataset, max_steps
        self.controller = MixtureController(dataset, tasks, mixer, stage_steps=stage_steps, output=output, **options)
        self.controller.watch(model)  # before the first step, which ends when it is too late
        self.batch_size = batch_size
        self.steps = 0
        self._begun = self._checked = self._finished = False
        self._logs: dict[str, float] | None = None  # of a stage that was decided as a state was loaded
        self._saving: int | None = None  # step of a state that was asked for, and is on the disk by the next step
        if batch_size is not None:
            self.controller.plan(batch_size=batch_size, max_steps=max_steps)

    @property
    def position(self) -> int:
        """Samples consumed: where the loader starts, as `sampler=range(hook.position, len(dataset))`."""
        return self.steps * (self.batch_size or 0)

    def step(self) -> dict[str, float] | None:
        """Call after each optimizer step.

        Returns:
            What a tracker should log, key -> number, after the first step and whenever a stage was decided or AutoMixer
            had the tasks evaluated; else None.

        Raises:
            ValueError: it is not known what a step takes, or the loader has read something else; the run is finished;
                whatever the rehearsal of the measurement refuses at the first step.
        """
        if self._finished:
            raise ValueError(
                f"a step after finish(), which closed the run of {self.steps} steps: load a state to go on from there, "
                "or make dataset, hook and loader anew for another run"
            )
        if self._saving is not None:
            self.controller.saved(self._saving)
            self._saving = None
        self.steps += 1
        logs, self._logs = self._logs if self._begun else self._begin(), None
        batch_size = self.batch_size
        assert batch_size is not None
        if not self._checked:
            on_every_rank(lambda: self._check_reading(batch_size))
        check_read(
            self.dataset,
            self.steps,
            batch_size,
            "call hook.step() once an optimizer step, let the loader of a resumed run start with "
            "sampler=range(hook.position, len(dataset)), or correct batch_size",
        )
        return {**(logs or {}), **(self.controller.step_ended(self.model, self.steps) or {})} or None

    def finish(self) -> dict[str, float]:
        """Close the journal with the final task losses; returns what a tracker should log.

        Nothing is done where no step was taken, as in a loop that failed before, or where it is closed already.
        """
        if self._finished or not self._begun:
            return {}
        self._finished = True
        return self.controller.finish(self.model, self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able; keep it in your own checkpoint.

        In a checkpoint of `torch.distributed.checkpoint` the hook itself may stand, beside the model's state.

        By the next step it counts as saved: snapshots that a mixer kept for an earlier state, and that neither this one
        nor the run so far needs, are then deleted.
        """
        self._saving = self.steps if self._begun else None
        # In one string: torch.distributed.checkpoint would leave out the keys that a fresh run does not have yet.
        return {"steps": self.steps, "controller": json.dumps(self.controller.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`: call it after loading the model, before the loader reads, which starts at `position`.

        If the run had ended with a stage, the next one is decided here, with the model as it is.
        """
        if not state["steps"]:
            return
        on_every_rank(lambda: self._load(state))
        self._begun, self._finished = True, False
        self._logs = self.controller.begin(self.model, self.steps)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(json.loads(state["controller"]))
        self._saving = None
        self.steps = int(state["steps"])
        self.batch_size = self.controller.batch_size
        self.controller.plan(batch_size=self.batch_size, max_steps=self.max_steps)

    def _begin(self) -> dict[str, float] | None:
        on_every_rank(self._plan)
        self._begun = True
        return self.controller.begin(self.model, self.steps)

    def _plan(self) -> None:
        if self.batch_size is None:
            if not self.dataset.read_size:
                raise ValueError(
                    "nothing was read through a DataLoader before this step: pass batch_size to MixtureHook"
                )
            self.batch_size = self.dataset.read_size * Ranks(shared=True).size
            self.controller.plan(batch_size=self.batch_size, max_steps=self.max_steps)
        self._check_reading(self.batch_size)

    def _check_reading(self, batch_size: int) -> None:
        self._checked = True
        read, ranks = self.dataset.read_size, Ranks(shared=True).size
        # The last request before the end may be a short one.
        if read and self.dataset.read_until < len(self.dataset) and batch_size % (read * ranks):
            raise ValueError(
                f"batch_size={batch_size}, but the loader reads {read} samples at once, for one of {ranks} ranks: pass "
                "what an optimizer step takes over all ranks and accumulation steps, keep it when a run goes on with "
                "other ranks or batches, and set accelerate's split_batches to False where dispatch_batches is True, "
                "as then it reads for all ranks at once"
            )
        if read and isinstance(self.dataset, MixtureDataset) and self.dataset.read_until < len(self.dataset):
            check_micro_batch(self.dataset, self.dataset.read_span)


def check_micro_batch(dataset: MixtureDataset, sequences: int) -> None:
    """Raise ValueError if micro-batches drawn from so many consecutive sequences would mix domains, and must not.

    Where several ranks take samples in turn, the consecutive sequences are those of all of them.
    """
    if dataset.homogeneous > 1 and dataset.homogeneous % sequences:
        raise ValueError(
            f"micro-batches of {sequences} sequences would hold several domains, as homogeneous={dataset.homogeneous} "
            "of one stand in a row: pass MixtureDataset the sequences of a micro-batch (those of all ranks, where they "
            "take samples in turn), or a multiple of them"
        )


def check_read(dataset: Mixture, steps: int, batch_size: int, remedy: str) -> None:
    """Raise ValueError on rank 0 if its loader has read less than so many steps take, so that steps are not positions.

    Rank 0 speaks for all: where accelerate sends what process 0 reads (`dispatch_batches`), the others read nothing, or
    their workers some batches ahead and no more.

    One step of grace: a rank whose share comes first in a step has not read up to the step's end. Of a short last step
    it may have no share, or samples from the stream's start again. A dataset read through a wrapper shows nothing.
    """
    if not is_rank_0():
        return
    short = (steps - 1) * batch_size < len(dataset) < steps * batch_size
    if 0 < dataset.read_until < (steps - 1 - short) * batch_size:
        if dataset.read_until >= len(dataset):
            remedy = "that is all of it; for a second pass raise num_samples, each domain is reshuffled on its own"
        raise ValueError(
            f"{steps} steps of {batch_size} samples, but the loader has read only up to sample {dataset.read_until}: "
            f"{remedy}"
        )
