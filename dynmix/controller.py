"""The loop of a run: at each stage boundary measure, propose, publish, save a snapshot, write a row.

It owns the order of these steps and what happens when one of them fails: the previous weights stay, and the journal
says why. It must not know the framework that trains; an adapter tells it when a step ended. The work is done one
optimizer step before the boundary, because loaders fetch a batch ahead in the main process. Which samples a stage gets
does not depend on that, since a stage starts at a declared position.

What it joins, by module:

    timetable     when stages begin and end, in steps and in positions
    measurement   how the domains' text moves the tasks, at a boundary; `in_run`: in the last steps before it
    sampling      how every sequence of the corpus does, for mixers that regroup it
    decider       the mixer: what it is shown, and whether its answer is a mixture within the bounds of `budget`
    ahead         which domains the published stage will read again, or use up
    record        the journal's row, and the same figures for trackers; `run_folder`: where it and all files go
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from dynmix.ahead import Ahead
from dynmix.budget import EpochBudget
from dynmix.dataset_state import check_ranks, stages_of
from dynmix.decider import Decider, Evidence
from dynmix.in_run import InRun, InRunInfluence
from dynmix.influence.curvature import EKFAC, Curvature
from dynmix.influence.isolation import unwrap
from dynmix.influence.layers import LayerFilter
from dynmix.influence.memory import PeakMemory
from dynmix.influence.storage import Offload
from dynmix.measurement import Measurement, Probes
from dynmix.mixers.base import Mixer, Proposal, within
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.options import whole
from dynmix.mixture.stream import Mixture, MixtureStream
from dynmix.observation import Influence, Weights
from dynmix.ranks import from_rank_0, is_rank_0, on_every_rank
from dynmix.record import Losses, Recorder, losses_of
from dynmix.run_folder import RunFolder
from dynmix.sampling import Sampler
from dynmix.shown import Bar
from dynmix.timetable import Timetable
from dynmix.training_loss import detach_earlier

logger = logging.getLogger("dynmix")


@dataclass
class _Measured(Evidence):
    """What a boundary measured, for the decision and for the journal.

    Attributes:
        probes: the positions that the domains were measured on.
        loss: of the tasks.
        before: seconds that measuring took before the boundary.
    """

    probes: Probes | None = None
    loss: Losses | None = None
    before: float = 0.0


class MixtureController:
    """Measures, proposes, publishes and journals at each stage boundary of one run.

    Args:
        dataset: the mixture that is trained on, with a single stage; its weights are the prior of the first decision.
        tasks: name -> batches, examples or a token store (see `dynmix.batches.as_batches`).
        mixer: decides the weights: a `dynmix.mixers.Mixer`, the name of one (`dynmix mixers` lists them), or a mapping
            with its `name` and arguments.
        stage_steps: optimizer steps per stage, at least 2.
        max_stages: most stages the run may have, at least 2: the last one lasts to the end of the run, and nothing is
            measured to decide another. None: no limit.
        guards: sets, in the form of `tasks`, that a mixture is not optimised for but must not make worse. "domains":
            one such row, called "held-out", the mean over the domains of their own text (rows that the coming stage
            does not train on); None: none. Measured for mixers that use them; the losses of guards given by name are
            always journaled.
        reference: the reference model for mixers that need `reference_loss`: a causal LM, or the path of one.
        curvature: the curvature of the influence, fitted anew at each boundary or as rarely as it says; None:
            `EKFAC()`, or `DataInf()` where the whole corpus is scored.
        probe_sequences: sequences of each domain that the influence is measured on at each boundary.
        curvature_sequences: sequences that the curvature is fitted on, split over the domains as the weights are; a
            curvature's own `factor_tokens` replaces it.
        task_sequences: most sequences of a task that are used, evenly spread over it; None: all. (Tasks given as
            batches are used whole.) Of "domains" as many are used, over all domains together.
        sample_sequences: size in sequences of the samples drawn for mixers that need `measure`.
        micro_batch: sequences per forward pass of a measurement.
        max_epochs: how often a domain's sequences may be seen over the whole run, for all domains or by name; gives
            the mixer its upper bounds. None: the dataset's `max_epochs`, which is the better place for it: there it
            holds to the sample.
        output: folder for `config.json`, `journal.jsonl` and `snapshots/`. None writes nothing, and is refused with
            anything that keeps files: mixers that regroup the corpus, `in_run`, a curvature's `ema` and
            `refresh_every`.
        keep: how many of the newest snapshots are kept; 0 saves none.
        loss_every: measure the tasks' losses for the journal at every so many boundaries, if they do not come with an
            influence; raise it for the short stages that mixers which learn from the training loss prefer.
        layers: which linear layers are measured, as in `group_influence`; None: all. Where the whole corpus is scored,
            a regular expression; None: `dynmix.influence.sample.last_layers`.
        in_run: let the training's own backward passes measure the domains, in the last steps of each stage; None: they
            are measured at the boundary, in passes of their own. With `in_run` the journal's task losses are those at
            the boundary, and the influence is measured against the tasks as they were when the window began.
        offload, layer_groups, rank: ways to use less memory for an influence at a boundary, see `group_influence`.

    Raises:
        ValueError: impossible arguments, by name, before anything is trained.
    """

    def __init__(
        self,
        dataset: Mixture,
        tasks: Mapping[str, Any],
        mixer: Mixer | str | Mapping[str, Any],
        *,
        stage_steps: int,
        max_stages: int | None = None,
        guards: Mapping[str, Any] | Literal["domains"] | None = "domains",
        reference: nn.Module | str | os.PathLike[str] | None = None,
        curvature: Curvature | None = None,
        probe_sequences: int = 64,
        curvature_sequences: int = 128,
        task_sequences: int | None = 128,
        sample_sequences: int = 512,
        micro_batch: int = 8,
        max_epochs: float | Mapping[str, float] | None = None,
        output: str | Path | None = None,
        keep: int = 2,
        loss_every: int = 1,
        layers: LayerFilter = None,
        in_run: InRun | None = None,
        offload: Offload = None,
        layer_groups: int = 1,
        rank: int | None = None,
    ):
        if not isinstance(dataset, MixtureDataset | MixtureStream):
            raise ValueError(
                f"dataset is a {type(dataset).__name__}: give the MixtureDataset or MixtureStream that is trained on, "
                "itself and not what wraps it"
            )
        self.timetable = Timetable(dataset, stage_steps, max_stages)
        self.keep, self.loss_every = whole("keep", keep), whole("loss_every", loss_every)
        if self.keep < 0:
            raise ValueError(f"keep={self.keep}: at least 0 snapshots")
        if self.loss_every < 1:
            raise ValueError(f"loss_every={self.loss_every}: at least every stage, 1")
        self.decider = Decider(mixer, dataset, reference)
        self.measurement = Measurement(
            dataset,
            tasks,
            curvature or EKFAC(),
            self.decider.needs,
            guards=guards,
            probe_sequences=probe_sequences,
            curvature_sequences=curvature_sequences,
            task_sequences=task_sequences,
            sample_sequences=sample_sequences,
            micro_batch=micro_batch,
            layers=layers,
            offload=offload,
            layer_groups=layer_groups,
            rank=rank,
        )
        self.in_run: InRunInfluence | None = None
        if in_run is not None:
            self.in_run = InRunInfluence(in_run, self.measurement, dataset, self.decider.needs, stage_steps)
        self.sampler: Sampler | None = None
        if "samples" in self.decider.needs:
            self.sampler = Sampler(
                self.decider.random_access(),
                tasks,
                self.measurement.sets,
                self.mixer.sample_plan,
                stage_steps=stage_steps,
                layers=layers,
                curvature=curvature,
                curvature_sequences=curvature_sequences,
                micro_batch=micro_batch,
            )
        self.dataset = dataset
        self.budget = EpochBudget(dataset, max_epochs)
        if isinstance(dataset, MixtureDataset):
            dataset.controlled = True
        self.folder = None if output is None else RunFolder(Path(output))
        self.memory: PeakMemory | None = None  # what a measurement takes, known when the run begins
        self._recorder = Recorder(dataset, self.measurement, self.decider.name)
        self._ahead = Ahead(dataset)
        self.resumed = self._watched = False
        self._window: Mapping[str, Any] | None = None  # of an in-run influence, in the state that was loaded
        self._factors: str | None = None  # the file of the curvature's, if it carries any on
        self._dataset_state: tuple[tuple[int, int | None], dict[str, Any]] | None = None

    @property
    def batch_size(self) -> int:
        """Samples an optimizer step, over all ranks; 0 before the run is planned."""
        return self.timetable.batch_size

    @property
    def total(self) -> int:
        """Samples of the whole run: as planned, or up to where the dataset is exhausted."""
        return self.timetable.total

    def why_over(self, step: int) -> str:
        """Why exhausted data ends the run with `step`, before it is as long as planned; "" if it does not."""
        return self.timetable.why_over(step)

    @property
    def mixer(self) -> Mixer:
        """What decides the weights."""
        return self.decider.mixer

    def write_to(self, output: str | Path) -> None:
        """Set the folder of journal, config and snapshots."""
        self.folder = RunFolder(Path(output))

    def watch(self, model: nn.Module) -> None:
        """Watch this model's training loss from now on, if the mixer learns from it; warn of a cache, once.

        An adapter calls it first in the process that trains, before the loader reads: the dataset may have been made in
        the one that started all ranks.
        """
        if not self._watched:
            self.dataset.detach()
            _warn_of_cache(self.dataset, model)
            detach_earlier(model)
        self._watched = True
        if self.decider.watch is not None:
            self.decider.watch.attach(model)

    # -- the calls of an adapter, in order -----------------------------------------------------------------------------

    def plan(self, *, batch_size: int, max_steps: int | None = None) -> None:
        """Say what a step takes; call it before the loader reads, so that it cannot read past the first boundary.

        Args:
            batch_size: samples an optimizer step takes, over all ranks and accumulation steps.
            max_steps: optimizer steps of the whole run; None: as many as the dataset has samples for.

        Raises:
            ValueError: a run that cannot be carried out as described, or that differs from the one being resumed.
        """
        carried = self.measurement.carried
        in_files = (
            (self.sampler, f"{self.decider.name} keeps checkpoints, scores and groups in files"),
            (carried, f"{self.measurement.curvature}: factors that are carried from stage to stage are kept in files"),
            (self.in_run, "in_run= keeps the tasks' gradients in files"),
        )
        for user, kept in in_files:
            if user is not None and self.folder is None:
                raise ValueError(f"{kept}: pass output=, a folder")
        self.timetable.plan(batch_size, max_steps, resumed=self.resumed)
        if not self.resumed:
            self.budget.check(self.total, self.timetable.boundary)

    def begin(self, model: nn.Module, step: int = 0) -> dict[str, float] | None:
        """Rehearse the measurement and, in a fresh run, open the journal; return what a tracker should log.

        A run that resumes from the very end of a stage, where an earlier run ended, decides the next stage here.

        The rehearsal takes one sequence of each domain and task through the model and lets a copy of the mixer decide
        from them. So a task that does not fit the model, or a mixer that does not fit the domains, raises its error now
        and not at the first boundary.

        Args:
            model: the model that trains, unwrapped or wrapped.
            step: optimizer steps already done.
        """
        with self._recorder.listening():
            self.watch(model)
            check_ranks(self.dataset, self.timetable.state_dict() | {"samples of the run": self.total})
            self._agree_on_folder()
            on_every_rank(lambda: self.measurement.check(model))
            self._rehearse(model)
            return self._resume(model, step) if self.resumed else self._begin_afresh(model, step)

    def step_ended(self, model: nn.Module, step: int) -> dict[str, float] | None:
        """Tell that optimizer step `step` (counted from 1) of `model` ended; return what a tracker should log.

        There is something to log at a boundary, and where a mixer that regroups the corpus has the tasks evaluated;
        else it returns None. If a measurement or a decision fails, nothing is raised and the weights stay. What
        `Mixer.observe` raises at the first step is raised here.
        """
        self.dataset.pulse()
        self._ahead.tell(step * self.batch_size, step)
        self.decider.observe(step, self.batch_size)
        logs: dict[str, float] = {}
        with self._recorder.listening():
            if self.sampler is not None and step % self.sampler.every == 0:
                logs |= self.sampler.evaluate(model, step, self._samples_wanted())
            if self.in_run is not None:
                self.in_run.step_ended(step, self.batch_size)
            if self.timetable.is_due(step):
                logs |= self._decide(model, step)
            if self.in_run is not None:
                self._arm(self.in_run, model, step)
        return logs or None

    def saved(self, step: int) -> None:
        """Tell that a training checkpoint of `step`, from which the run can resume, is on disk."""
        if self.folder is not None:
            self.folder.needed = _files_of(self._factors, None if self.in_run is None else self.in_run.state_dict())
        if self.sampler is not None:
            self.sampler.saved(step, self._samples_wanted())

    def finish(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure the task losses of `model` once more and close the journal; return what a tracker should log.

        `step`: optimizer steps done. Failures are logged, not raised.
        """
        self._look_away()
        loss, error = None, None
        seconds: dict[str, float] = {}
        try:
            with _timed(seconds, "measure"), self._recorder.listening():
                loss = self.measurement.losses(model)
        except Exception as failure:  # the trained model is about to be saved: nothing here is worth losing it
            error = _words(failure)
            logger.warning("the final task losses could not be measured: %s", error)
        self.resumed = False  # what comes after is another run
        end = min(step * self.batch_size, self.total)
        message = self.why_over(step)
        if message:
            logger.warning("the run ends after step %d: %s", step, message)
        return self._recorder.write(
            self.folder,
            "final",
            step=step,
            position=end,
            loss=loss,
            again=self._ahead.behind(end),
            error=error,
            message=message,
            seconds=seconds,
        )

    # -- the beginning -------------------------------------------------------------------------------------------------

    def _agree_on_folder(self) -> None:
        """Have a folder on all ranks, if rank 0 has one: it writes, but a sharded model is gathered by all of them."""
        path = from_rank_0(None if self.folder is None else self.folder.path)
        if path is None:
            self.folder = None
        elif self.folder is None:
            self.write_to(path)

    def _rehearse(self, model: nn.Module) -> None:
        found = Evidence()
        if self.decider.measures:
            found.influence, found.drawn = self.measurement.rehearse(model)
            if self.in_run is None:
                self._say_memory(model)
        if (sampler := self.sampler) is not None and not self.resumed:
            domains = on_every_rank(self.measurement.scored_of_each)  # before a sharded model's passes, which all share
            found.samples = on_every_rank(lambda: sampler.rehearse(model, domains))
        schedule = self.dataset.schedule
        last = schedule.starts[-1]
        # The run's last stage may be shorter than others, and what is left of the domains no more than it takes.
        upper = self.budget.upper(last, max(1, min(self.timetable.stage_samples, self.total - last)))
        on_every_rank(lambda: self.decider.rehearse(found, schedule.weights_at(last), upper))

    def _say_memory(self, model: nn.Module) -> None:
        try:
            self.memory = self.measurement.peak_memory(model)
        except Exception as failure:  # it is only an estimate
            logger.warning("what a measurement will take of memory is not known: %s", _words(failure))
            return
        if is_rank_0():
            Bar.write(f"dynmix: a measurement takes about {self.memory}")

    def _begin_afresh(self, model: nn.Module, step: int) -> dict[str, float]:
        """Begin the files of a fresh run, and write the row of its first stage."""
        if (folder := self.folder) is not None:  # on all ranks or on none
            on_every_rank(lambda: folder.begin(self._describe(model)))
            if self.sampler is not None:
                self.sampler.begin(folder.path, 0)
                if not self._samples_wanted():
                    logger.warning(
                        "%s asks for the corpus to be scored at no boundary of this run, so its mixture stays as it is:"
                        " let it ask earlier (AutoMixer's after=), or make stages shorter",
                        self.decider.name,
                    )
        seconds: dict[str, float] = {}
        with _timed(seconds, "measure"):
            loss = self.measurement.losses(model)
        again = self._ahead.look(0, self.total)
        logs = self._recorder.write(
            self.folder, "stage", step=step, position=0, loss=loss, again=again, seconds=seconds
        )
        self._ahead.warn()
        return logs

    def _resume(self, model: nn.Module, step: int) -> dict[str, float] | None:
        """Go on in the middle of a stage, or decide the next one if that is due."""
        self.timetable.check_step(step)
        if (folder := self.folder) is not None:
            # Not as the state is loaded: the folder is left alone where the run is then refused.
            on_every_rank(lambda: folder.rewind(self.dataset.schedule.num_stages))
            if self.sampler is not None:
                self.sampler.begin(folder.path, step, self._samples_wanted())
            if self.in_run is not None and self._window is not None:
                self.in_run.resume(model, folder, self._window, step, self._window_from(int(self._window["began"])))
        self._ahead = Ahead(self.dataset)
        self._ahead.look(step * self.batch_size, self.total)
        return self._decide(model, step) if self.timetable.is_due(step) else None

    def _describe(self, model: nn.Module) -> dict[str, Any]:
        return {
            "mixer": self.mixer.describe(),
            **self.measurement.describe(),
            "in_run": None if self.in_run is None else repr(self.in_run.options),
            **self.timetable.state_dict(),
            "samples": self.total,
            "max_epochs": self.budget.max_epochs,
            "peak_memory": None if self.memory is None else asdict(self.memory) | {"total": self.memory.total},
            "model": type(unwrap(model)).__name__,
            "dataset": stages_of(self.dataset),
        }

    # -- a boundary ----------------------------------------------------------------------------------------------------

    def _decide(self, model: nn.Module, step: int) -> dict[str, float]:
        """Decide the coming stage, publish it, save what goes on from it and write its row."""
        schedule, stage = self.dataset.schedule, self.dataset.schedule.num_stages
        start, following = self.timetable.boundary, self.timetable.next_end
        samples = min(following, self.total) - start  # of it, if the data lasts
        prior, upper = schedule.weights_at(start - 1), self.budget.upper(start, samples)
        seconds: dict[str, float] = {}
        found, error = _Measured(), None
        try:
            with _timed(seconds, "measure"):
                self._measure(model, step, range(start, following), prior, found)
            with _timed(seconds, "propose"):
                proposal, cdf = self.decider.decide(
                    found,
                    prior,
                    upper,
                    step=step,
                    steps=self.timetable.stage_steps,
                    bound=lambda sizes: self.budget.entering(sizes, samples),
                )
        except Exception as failure:  # a run of weeks must not end because one measurement did
            error = _words(failure)
            proposal, cdf = self._kept(prior, upper)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

        # Rank 0 decides: float sums may differ between machines, a mixture must not.
        own, (cdf, proposal, error) = error, from_rank_0((cdf, proposal, error))
        if own and not error:
            logger.warning("rank 0 decides stage %d, which another rank could not: %s", stage, own)
        if proposal.groups:
            try:
                self._let_in(proposal)
            except Exception as failure:
                error = _words(failure)
                proposal, cdf = self._kept(schedule.weights_at(start - 1), upper)
            prior = schedule.weights_at(start - 1)  # names those that entered
        if error:
            logger.warning("stage %d keeps the weights of the one before: %s", stage, error)

        self.dataset.publish(cdf, start, following if following < self.total else None)
        self._save_factors(stage)
        if found.probes is not None:
            # As it is published the data may be exhausted within the stage, or before it.
            self.measurement.warn_of_repeated(found.probes, start, max(start, min(start + samples, self.total)))
        seconds["measure"] += found.before
        if self.folder is not None and self.keep:
            facts = {"stage": stage, "step": step, "samples": step * self.batch_size}
            with _timed(seconds, "snapshot"):
                self.folder.save_snapshot(model, stage, facts, self.keep)
        return self._recorder.write(
            self.folder,
            "stage",
            step=step,
            position=start,
            loss=found.loss,
            again=self._ahead.look(start, self.total),
            influence=found.influence,
            proposal=proposal,
            prior=prior,
            error=error,
            seconds=seconds,
        )

    def _measure(self, model: nn.Module, step: int, ahead: range, prior: Weights, found: _Measured) -> None:
        """Measure what the mixer needs to decide the stage at positions `ahead`, into `found`, which survives an error.

        What measures the tasks also yields their losses; if nothing does, they are measured for the journal alone.
        """
        needs, stage = self.decider.needs, self.dataset.schedule.num_stages
        found.probes = None if self.in_run is None else self.in_run.probes
        in_run = None if self.in_run is None else self.in_run.influence(model)
        if in_run is not None:
            found.influence, found.before = in_run
        elif self.decider.measures:
            found.probes = self.measurement.probes(ahead.start, len(ahead), prior)
            if needs & {"influence", "measure"}:
                found.influence, found.drawn = self.measurement.influence(model, found.probes, prior)
        if found.influence is not None:
            _check_finite(found.influence)
        if found.probes and "gradient" in needs:
            found.gradient = self.measurement.gradient(model, found.probes)
            found.influence = found.influence or found.gradient
            _check_finite(found.gradient)
        if self.sampler is not None and self.mixer.wants_samples(stage, prior):
            scores = self.sampler.scores(model, step, (self.total - ahead.start) * self.dataset.sequence_length)
            found.samples = replace(scores, max_epochs=self.budget.of_entering)
        if found.influence is not None and in_run is None:
            found.loss = losses_of(found.influence)
        elif stage % self.loss_every == 0:
            found.loss = self.measurement.losses(model)

    def _kept(self, prior: Weights, upper: Weights) -> tuple[Proposal, np.ndarray]:
        """Return the weights of the stage that ends, inside their bounds, as a proposal and as it is published."""
        proposal = Proposal(within(prior, upper), solver="prior", message="the weights were kept")
        return proposal, self.decider.published(proposal, upper)

    def _let_in(self, proposal: Proposal) -> None:
        if self.folder is None:
            raise ValueError("domains that enter a run are kept in files: pass output=, a folder")
        if isinstance(self.dataset, MixtureStream):
            raise ValueError("domains that enter a run are rows of others, and a MixtureStream has no rows")
        self.dataset.extend(proposal.groups, self.folder.groups, agree=on_every_rank)

    def _arm(self, in_run: InRunInfluence, model: nn.Module, step: int) -> None:
        """Open the window of an in-run influence, if it is time: it ends as the next stage is decided."""
        stage = self.dataset.schedule.num_stages
        begins = self.timetable.boundary - (in_run.options.window + 1) * self.batch_size
        if self.folder is None or step * self.batch_size != begins or self.timetable.boundary >= self.total:
            return
        in_run.arm(model, self.folder, stage, self.keep, step, self._window_from(step))
        self._save_factors(stage)

    def _save_factors(self, stage: int) -> None:
        """Save what the curvature carries on from this stage, if it does."""
        if self.measurement.carried is not None and self.folder is not None:
            self._factors = self.folder.save_factors(self.measurement.carried, stage, self.keep)

    def _window_from(self, step: int) -> range:
        """Positions from the end of a step to the end of the stage that is to be decided next."""
        return range(step * self.batch_size, self.timetable.next_end)

    def _samples_wanted(self) -> bool:
        """Whether the mixer will ask for scores at a boundary still ahead, or would if the run went on."""
        weights = self.dataset.schedule.stages[-1].weights
        return any(self.mixer.wants_samples(number, weights) for number in self.timetable.boundaries_ahead())

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able: the dataset's stages and fingerprints, what a step is, what the mixer learnt."""
        stages = self.dataset.schedule.generation, self.dataset.schedule.end
        if self._dataset_state is None or self._dataset_state[0] != stages:
            self._dataset_state = stages, stages_of(self.dataset)  # asked for after every step
        return {
            **self.timetable.state_dict(),
            "dataset": self._dataset_state[1],
            "mixer": self.decider.state_dict(),
            "curvature": self._factors,
            "in_run": None if self.in_run is None else self.in_run.state_dict(),
            "shrunk_to": self.measurement.shrunk_to,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`; as the run begins, rows of the journal after it are dropped, to be written again.

        Raises:
            ValueError: the state is of other data or of other stages, with what changed, or it is damaged.
        """
        self._look_away()
        try:
            self.timetable.check(state)
            groups = self.folder.groups if self.folder is not None and self.folder.groups.is_dir() else None
            self.dataset.load_state_dict(state["dataset"], views=groups)
            self.decider.load_state_dict(state["mixer"])
            self._factors, self._window, sequences = state["curvature"], state["in_run"], state["shrunk_to"]
            needed = _files_of(self._factors, self._window)
        except (KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"this state is damaged: {type(problem).__name__}: {problem}") from problem
        if sequences is not None:
            self.measurement.shrink(sequences)
        if self.measurement.carried is not None and self.folder is not None:
            self.measurement.carried.load(None if self._factors is None else self.folder.factors / self._factors)
        self.timetable.load_state_dict(state)
        self.resumed, self._dataset_state = True, None
        if self.folder is not None:
            self.folder.needed = needed

    def _look_away(self) -> None:
        """Forget what was seen of a step that nobody ended, as one that was interrupted in this process."""
        if self.decider.watch is not None:
            self.decider.watch.detach()
        if self.in_run is not None:
            self.in_run.close()


def _files_of(factors: str | None, window: Mapping[str, Any] | None) -> set[str]:
    """Names of the files that a state goes on with."""
    return {name for name in (factors, window and window["file"]) if name}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    clock = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - clock


def _warn_of_cache(dataset: Mixture, model: nn.Module) -> None:
    config = getattr(unwrap(model), "config", None)
    if getattr(dataset, "boundaries", None) == "position_ids" and getattr(config, "use_cache", False):
        logger.warning(
            "model.config.use_cache is on: with a cache transformers does not keep the documents of a sequence apart by"
            " position_ids; set model.config.use_cache = False"
        )


def _words(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


def _check_finite(influence: Influence) -> None:
    if bad := influence.not_finite:
        raise ArithmeticError(f"the influence on {', '.join(bad)} is not finite")
