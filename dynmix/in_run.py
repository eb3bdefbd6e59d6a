"""In-run influence: when it is measured, of what, which part of it a checkpoint holds, and when it is given up.

Knows the dataset, the measurement and the hooks; nothing of what is decided from an influence. A failure here never
ends a run: the stage is then measured at its boundary, as usual.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from dynmix.influence.in_run import ParameterProducts, Seen, TokenProducts
from dynmix.influence.tally import Tally
from dynmix.influence.task_gradients import TaskGradients
from dynmix.measurement import Measurement, Probes
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.stream import Mixture
from dynmix.observation import Influence
from dynmix.ranks import gathered
from dynmix.run_folder import RunFolder
from dynmix.step_samples import StepSamples

logger = logging.getLogger("dynmix")


@dataclass(frozen=True)
class InRun:
    """Measure domains by the training's own backward passes in the last steps of a stage, instead of separate passes.

    Before this window the curvature is fitted and each task's preconditioned gradient is computed; in the window every
    training gradient is multiplied with them. The scores are those along the model's path through the window, in
    training mode, against the tasks as they were at its beginning. The training itself stays the same bit for bit.

    If each micro-batch holds one domain, by `MixtureDataset(homogeneous=...)`, a gradient is used as it reaches its
    parameter: two operations per parameter, task and fold. With `every`, micro-batches may be mixed; each sequence's
    gradient is then computed at every so many steps, which takes about as long as the gradients of the weights.

    Args:
        window: optimizer steps, at most `stage_steps` - 2.
        folds: parts in which each task's gradient is kept, whose spread is the task's share of the standard error; at
            least 2. Memory on the model's device during the window, in gradients of the measured layers in float32:
            folds times the number of tasks and guards, plus four if micro-batches hold one domain. The former are also
            kept in the run's folder, for each of the newest stages.
        every: None for micro-batches of one domain; for mixed ones, how many steps apart the observed ones are.
        least: a domain of which fewer micro-batches (with mixed ones, sequences) than this were seen is also measured
            on its probes, so that every score is finite.

    Raises:
        ValueError: numbers that are too small.
    """

    window: int
    folds: int = 4
    every: int | None = None
    least: int = 8

    def __post_init__(self) -> None:
        for name, value, smallest in (("window", self.window, 1), ("folds", self.folds, 2), ("least", self.least, 2)):
            if value < smallest:
                raise ValueError(f"InRun({name}={value}): at least {smallest}")
        if self.every is not None and not 1 <= self.every <= self.window:
            raise ValueError(f"InRun(every={self.every}): from 1 to window={self.window} steps")


class InRunInfluence:
    """The in-run influence of one run; `measurement` measures its tasks, and the domains that were hardly seen.

    Raises:
        ValueError: a mixer, dataset or stage that it does not go with, with the remedy.
    """

    def __init__(
        self, options: InRun, measurement: Measurement, dataset: Mixture, needs: frozenset[str], stage_steps: int
    ) -> None:
        if "influence" not in needs or (others := needs & {"gradient", "measure", "samples"}):
            asked = f"needs {sorted(others)}" if "influence" in needs else "needs no influence"
            raise ValueError(f"in_run= gives an influence and nothing else, and this mixer {asked}: leave in_run= out")
        if not isinstance(dataset, MixtureDataset):
            raise ValueError("in_run= finds a step's samples by position, which a MixtureStream has not: leave it out")
        if options.window > stage_steps - 2:
            raise ValueError(f"InRun(window={options.window}): at most stage_steps - 2 = {stage_steps - 2} steps")
        if options.every is None and dataset.homogeneous == 1:
            raise ValueError(
                "in_run= needs micro-batches of one domain: MixtureDataset(homogeneous=...), the sequences of one, or "
                "InRun(every=...) for mixed ones"
            )
        self.options, self.measurement, self.dataset = options, measurement, dataset
        self._window: _Window | None = None

    @property
    def probes(self) -> Probes | None:
        """The probes that go with the open window; None if none is open."""
        return None if self._window is None else self._window.probes

    def arm(self, model: nn.Module, folder: RunFolder, stage: int, keep: int, step: int, ahead: range) -> None:
        """Open the window before a stage is decided: measure the tasks, and observe the steps that follow.

        Every process calls this, and the methods below.

        Args:
            model, step: as it is now, and optimizer steps done.
            folder, stage: where the tasks' gradients are kept, and under which number.
            keep: how many of the newest of these files are kept, at least 2: a checkpoint in the window needs its own.
            ahead: positions from here to the end of that stage, none of which should hold a probe.
        """
        clock = time.perf_counter()
        window, problem = None, None
        try:
            prior = self.dataset.schedule.weights_at(ahead.start)
            probes = self._probes(ahead)
            gradients = self.measurement.task_gradients(model, probes, prior, self.options.folds)
            file = folder.save_task_gradients(gradients, stage, keep)
            window = self._built(model, gradients, file, step, probes, ahead)
        except Exception as failure:
            problem = failure
        self._begin(window, problem, step)
        if self._window is not None:
            self._window.seconds += time.perf_counter() - clock

    def resume(self, model: nn.Module, folder: RunFolder, state: Mapping[str, Any], step: int, ahead: range) -> None:
        """Resume the window of a checkpoint. Arguments as in `arm`; `ahead` as it was when the window opened."""
        window, problem = None, None
        try:
            probes = self._probes(ahead)
            gradients = TaskGradients.load(folder.in_run / state["file"])
            window = self._built(model, gradients, state["file"], int(state["began"]), probes, ahead)
            window.tally.load_state_dict(state["seen"])
            window.skipped = int(state["skipped"])
        except Exception as failure:
            problem = failure
        self._begin(window, problem, step)

    def step_ended(self, step: int, batch_size: int) -> None:
        """Count what was seen in the optimizer step that ended."""
        window = self._window
        if window is None:
            return
        if window.watch.active:
            clock = time.perf_counter()
            own, problem = Tally(len(window.tally.table), window.tally.folds), None
            try:
                if seen := window.watch.take():
                    samples = StepSamples(self.dataset, step, batch_size)
                    for micro_batch in seen:
                        self._count(own, micro_batch, samples)
            except Exception as failure:
                problem = failure
            tables, skipped = zip(*self._agreed(problem, (own.table, window.watch.skipped)), strict=True)
            window.tally.table += np.sum(tables, axis=0)
            window.skipped += sum(skipped)
            window.watch.skipped = 0
            window.seconds += time.perf_counter() - clock
        self._look_on(step)

    def influence(self, model: nn.Module) -> tuple[Influence, float] | None:
        """Close the window; return the influence and the seconds that it took; None if no window is open.

        Domains that were hardly seen are also measured on their probes.
        """
        window = self._window
        if window is None:
            return None
        self.close()
        if isinstance(window.watch, ParameterProducts) and (silent := window.watch.silent):
            logger.warning("in-run influence: no gradient reached %s in the window", ", ".join(silent[:8]))
        if window.skipped:
            logger.warning("in-run influence: %d micro-batches were not finite and left out", window.skipped)
        if joined := len(self.dataset.domains) - len(window.tally.table):  # since it was opened
            window.tally.table = np.pad(window.tally.table, ((0, joined), (0, 0)))
            window.probes = self._probes(window.ahead)
        units = dict(zip(self.dataset.domains, window.tally.units.tolist(), strict=True))
        if rare := [name for name in self.measurement.here if units[name] < self.options.least]:
            found = self.measurement.products(model, window.gradients, window.probes, rare)
            for name, (products, tokens) in found.items():
                window.tally.add(self.dataset.domains.index(name), products, tokens)
        influence = window.tally.influence(window.gradients, self.dataset.domains)
        if isinstance(window.watch, TokenProducts):  # else units are micro-batches, and sequences of rare domains
            with np.errstate(invalid="ignore"):  # of a domain that is not here
                influence = replace(influence, scored_tokens=window.tally.tokens / window.tally.units)
        return self.measurement.completed(influence), window.seconds

    def close(self) -> None:
        """Stop observing."""
        if self._window is not None:
            self._window.watch.detach()
        self._window = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return what an open window has seen, JSON-able; None without one."""
        window = self._window
        if window is None:
            return None
        seen, skipped = window.tally.state_dict(), window.skipped
        return {"file": window.file, "began": window.began, "seen": seen, "skipped": skipped}

    # ------------------------------------------------------------------------------------------------------------------

    def _probes(self, ahead: range) -> Probes:
        return self.measurement.probes(ahead.start, len(ahead), self.dataset.schedule.weights_at(ahead.start))

    def _built(
        self, model: nn.Module, gradients: TaskGradients, file: str, began: int, probes: Probes, ahead: range
    ) -> "_Window":
        gradients = gradients.on(model)
        watch = (ParameterProducts if self.options.every is None else TokenProducts)(model, gradients)
        return _Window(gradients, Tally(len(self.dataset.domains), gradients.folds), watch, probes, ahead, file, began)

    def _begin(self, window: "_Window | None", problem: Exception | None, step: int) -> None:
        self._window = window
        self._agreed(problem)
        self._look_on(step)

    def _look_on(self, step: int) -> None:
        """Observe the coming step, if it is its turn."""
        if self._window is not None:
            self._window.watch.active = (step - self._window.began) % (self.options.every or 1) == 0

    def _count(self, own: Tally, seen: Seen, samples: StepSamples) -> None:
        of_sequences = samples.domains(seen.input_ids)
        if self.options.every is not None:
            for (domain, *_), products, tokens in zip(of_sequences, seen.products, seen.tokens, strict=True):
                if tokens:
                    own.add(domain, products[None], tokens[None])
            return
        common = set(of_sequences[0]).intersection(*of_sequences)  # a text may be in several domains
        if not common:
            raise ValueError(
                f"a micro-batch of {len(of_sequences)} sequences holds several domains, and homogeneous="
                f"{self.dataset.homogeneous} of one stand in a row: let each micro-batch be consecutive positions, as "
                "many as homogeneous= or a part of them, or use InRun(every=...)"
            )
        own.add(min(common), seen.products, seen.tokens)

    def _agreed(self, problem: Exception | None, value: Any = None) -> list[Any]:
        """Every rank's value. If one of them has a problem, all of them give up the window."""
        found = gathered((None if problem is None else f"{type(problem).__name__}: {problem}", value))
        if words := [each for each, _ in found if each is not None]:
            self.close()
            logger.warning(
                "no in-run influence for the coming stage, which is measured at its boundary instead: %s", words[0]
            )
        return [each for _, each in found]


@dataclass
class _Window:
    """The last steps of a stage."""

    gradients: TaskGradients
    tally: Tally
    watch: ParameterProducts | TokenProducts
    probes: Probes
    ahead: range  # positions from its beginning to the end of the stage that is decided with it
    file: str  # of the gradients, in the run's folder
    began: int  # optimizer steps done then
    seconds: float = 0.0  # beside the training's own
    skipped: int = 0  # micro-batches that were not finite
