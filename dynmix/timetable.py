"""When the stages of a run begin and end: optimizer steps, turned into positions of the stream.

Knows the dataset's schedule, what a step takes and how long the run is; nothing of what is done at a boundary.
"""

import sys
from collections.abc import Mapping
from typing import Any

from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.options import whole
from dynmix.mixture.stages import MAX_STAGES
from dynmix.mixture.stream import Mixture


class Timetable:
    """The boundaries of one run. What a step takes is known once the run is planned.

    Args:
        dataset: whose schedule has the stages.
        stage_steps, max_stages: as in `dynmix.controller.MixtureController`.

    Attributes:
        batch_size: samples an optimizer step takes, over all ranks; 0 before.

    Raises:
        ValueError: stages too short or too few to decide anything.
    """

    def __init__(self, dataset: Mixture, stage_steps: int, max_stages: int | None):
        stage_steps = whole("stage_steps", stage_steps)
        max_stages = None if max_stages is None else whole("max_stages", max_stages)
        if stage_steps < 2:
            raise ValueError(
                f"stage_steps={stage_steps}: at least 2, since a stage is decided one step before it starts"
            )
        if max_stages is not None and max_stages < 2:
            raise ValueError(f"max_stages={max_stages}: at least 2, since nothing is decided in the first")
        self.dataset, self.stage_steps, self.max_stages = dataset, stage_steps, max_stages
        self.batch_size = 0
        self._planned = 0  # samples of the whole run

    @property
    def stage_samples(self) -> int:
        """Samples of a stage of regular length, which neither the run's end nor `max_stages` changes."""
        return self.stage_steps * self.batch_size

    @property
    def total(self) -> int:
        """Samples of the whole run: as planned, or up to where the dataset is exhausted."""
        ends_at = self.dataset.ends_at if isinstance(self.dataset, MixtureDataset) else self._planned
        return min(self._planned, ends_at)

    @property
    def boundary(self) -> int:
        """Position at which the stage after the last published one starts; beyond any run if there is none."""
        stages = self.dataset.schedule.num_stages
        return sys.maxsize if stages == self.max_stages else stages * self.stage_samples

    @property
    def next_end(self) -> int:
        """Position at which that stage ends, if the run is not over before."""
        last = self.dataset.schedule.num_stages + 1 == self.max_stages
        return self.total if last else self.boundary + self.stage_samples

    def is_due(self, step: int) -> bool:
        """Whether the next stage is to be decided after `step`: one step before it starts, or just as it starts."""
        return self.boundary < self.total and self.boundary in (step * self.batch_size, (step + 1) * self.batch_size)

    def boundaries_ahead(self) -> range:
        """Numbers of the stages still to be decided; at the end of the run, of the next one, as if it went on."""
        number = self.dataset.schedule.num_stages
        left = max(1, -((self.boundary - self.total) // self.stage_samples))
        return range(number, min(number + left, self.max_stages or sys.maxsize))

    def why_over(self, step: int) -> str:
        """Why exhausted data ends the run with `step`, before it is as long as planned; "" if it does not."""
        dry = self.dataset.schedule.exhausted_at
        if dry is None or self.total == self._planned or step * self.batch_size < self.total:
            return ""
        return self.dataset.schedule.why_exhausted(dry)

    def plan(self, batch_size: int, max_steps: int | None, *, resumed: bool) -> None:
        """Set what a step takes and how many there are, and declare where the first stage ends.

        Raises:
            ValueError: a run that cannot be carried out as described, or that differs from the one being resumed.
        """
        schedule, batch_size = self.dataset.schedule, whole("batch_size", batch_size)
        max_steps = None if max_steps is None else whole("max_steps", max_steps)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least 1 sample an optimizer step")
        self._check_same_batch(batch_size)
        self.batch_size = batch_size
        if isinstance(self.dataset, MixtureDataset):
            if batch_size % (group := self.dataset.homogeneous):
                raise ValueError(
                    f"batch_size={batch_size}: a step takes whole groups of the homogeneous={group} samples of one "
                    "domain that stand in a row"
                )
            self.dataset.plan_steps(batch_size)
        self._planned = len(self.dataset) if max_steps is None else min(len(self.dataset), max_steps * batch_size)
        if schedule.num_stages > 1 and not resumed:
            raise ValueError(
                f"the dataset has {schedule.num_stages} stages: pass one with a single, undecided stage; for another "
                "run make that of the one before anew, with its callback or hook"
            )
        steps = -(-self.total // batch_size)
        if not resumed and self.boundary >= self.total:
            dry = schedule.exhausted_at
            raise ValueError(
                f"stage_steps={self.stage_steps}: the run of {steps} steps ends before its first stage does, so that "
                "nothing would ever be decided; make stages shorter"
                + (f" ({schedule.why_exhausted(dry)})" if dry is not None and self.total < self._planned else "")
            )
        stages = -(-self.total // self.stage_samples)
        if min(stages, self.max_stages or stages) > MAX_STAGES:
            raise ValueError(
                f"stage_steps={self.stage_steps}: the run of {steps} steps would have {stages} stages, and a schedule "
                f"takes {MAX_STAGES}: make stages longer, or pass max_stages"
            )
        if self.boundary < self.total:
            if self.dataset.read_until > self.boundary:
                raise ValueError(
                    f"the dataset has been read up to sample {self.dataset.read_until}, past the end of the first "
                    f"stage at {self.boundary}: if a loop's loader reads so far ahead pass batch_size, so that the "
                    "boundary is known before, or raise stage_steps; if it was read to look at it make it anew"
                )
            schedule.hold(self.boundary)

    def check_step(self, step: int) -> None:
        """Raise ValueError if a sample before the end of `step` has no published stage."""
        if self.boundary < step * self.batch_size:
            raise ValueError(
                f"the state is older than step {step}: the stage of sample {self.boundary} is not in it; resume model "
                "and mixture from the same checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what makes steps positions, JSON-able."""
        return {"batch_size": self.batch_size, "stage_steps": self.stage_steps, "max_stages": self.max_stages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the batch size of a state that was checked."""
        self.batch_size = int(state["batch_size"])

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if a controller's state has stages of another length, or inconsistent ones."""
        if state["stage_steps"] != self.stage_steps:
            raise ValueError(
                f"the checkpoint's stages are {state['stage_steps']} steps, stage_steps={self.stage_steps}"
            )
        if state["max_stages"] != self.max_stages:
            raise ValueError(
                f"the checkpoint has max_stages={state['max_stages']}, this run {self.max_stages}: pass that of"
                " the checkpoint, or begin anew"
            )
        batch_size = int(state["batch_size"])
        self._check_same_batch(batch_size)
        stages = state["dataset"]["schedule"]["stages"]
        starts = stages["starts"]
        if starts != [(stages["first"] + k) * self.stage_steps * batch_size for k in range(len(starts))]:
            raise ValueError(f"this state is damaged: its stages start at {starts[:5]}..., which are no stages of it")

    def _check_same_batch(self, batch_size: int) -> None:
        if self.batch_size not in (0, batch_size):
            raise ValueError(
                f"the checkpoint and this run take {sorted((self.batch_size, batch_size))} samples a step: keep "
                "per-device batch x gradient accumulation x processes the same, so that steps stay positions"
            )
