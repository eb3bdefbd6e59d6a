"""A mixer as the loop sees it: made by name, shown what it needs, and checked before it is believed.

Knows mixers, and what watches the training loss for them; not when they are asked, nor how anything is measured.
"""

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from dynmix.drawn import DrawnMixtures
from dynmix.mixers.base import NEEDS, Mixer, Proposal, Run, within
from dynmix.mixers.registry import make_mixer
from dynmix.mixers.simplex import normalized
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.stream import Mixture, MixtureStream
from dynmix.mixture.weights import integer_cdf
from dynmix.observation import Influence, Observation, Weights
from dynmix.ranks import on_every_rank
from dynmix.scores import SampleScores
from dynmix.training_loss import TrainingLoss

logger = logging.getLogger("dynmix")


@dataclass
class Evidence:
    """What was measured for a decision; None if it is not needed, or failed.

    Attributes:
        influence, gradient: of every domain on every task, with the curvature and with the identity.
        drawn: measures a mixture, for mixers that need `measure`.
        samples: every sequence's influence, for mixers that regroup the data.
    """

    influence: Influence | None = None
    gradient: Influence | None = None
    drawn: DrawnMixtures | None = None
    samples: SampleScores | None = None


class Decider:
    """A mixer in a run. It is started, and if it returns weights, the dataset's first stage gets them.

    Args: as in `dynmix.controller.MixtureController`.

    Raises:
        ValueError: an unknown mixer, an unknown need, a missing reference model.
    """

    def __init__(
        self,
        mixer: Mixer | str | Mapping[str, Any],
        dataset: Mixture,
        reference: nn.Module | str | os.PathLike[str] | None,
    ):
        self.mixer, self.dataset = make_mixer(mixer), dataset
        self.name = type(self.mixer).__name__
        needs = self.mixer.needs
        self.needs = frozenset({needs} if isinstance(needs, str) else needs)
        if unknown := sorted(self.needs - NEEDS):
            raise ValueError(f"{self.name} needs {unknown}: what can be measured is {sorted(NEEDS)}")
        if "reference_loss" in self.needs and reference is None:
            raise ValueError(
                f"{self.name} compares with a reference model, trained beforehand on the same tokens: pass reference=, "
                "a model or the path of one"
            )
        if isinstance(dataset, MixtureStream):
            self._check_stream(dataset)
        self.watch: TrainingLoss | None = None
        if self.needs & {"loss", "reference_loss"}:
            self.watch = TrainingLoss(self.random_access(), reference if "reference_loss" in self.needs else None)
        self._observed = False
        self._first = dataset.schedule.weights_at(dataset.schedule.starts[0])
        given = self._start()
        if given is not None:
            dataset.begin(integer_cdf(normalized(given, dataset.domains)))

    def _start(self) -> Weights | None:
        dataset, length, schedule = self.dataset, self.dataset.sequence_length, self.dataset.schedule
        tokens = {name: size * length for name, size in dataset.sizes.items()}
        if not schedule.starts[0]:  # else the state of a long run has left it out, and it is as this run was made
            self._first = schedule.weights_at(0)
        first = dict.fromkeys(dataset.domains, 0.0) | self._first
        found = self.mixer.start(Run(tokens, len(dataset) * length, first, dataset.gone))
        self._started = dataset.domains
        return found

    def _follow(self) -> None:
        """Tell the mixer of domains that joined since it was started, as a run that resumes does: it is the same."""
        if self.dataset.domains != self._started:
            learnt = self._as_saved(self.mixer)
            self._start()
            self.mixer.load_state_dict(learnt)

    @property
    def measures(self) -> bool:
        """Whether the mixer needs something that is measured on probes at a boundary."""
        return bool(self.needs & {"influence", "gradient", "measure"})

    def random_access(self) -> MixtureDataset:
        """Return the dataset, if rows of it can be looked up. Raises ValueError."""
        if isinstance(self.dataset, MixtureStream):
            raise ValueError(
                f"{self.name} needs {sorted(self.needs)}, for which samples are looked up again, and a MixtureStream "
                "gives each of them once: write token stores (dynmix prepare) and pass a MixtureDataset"
            )
        return self.dataset

    def _check_stream(self, stream: MixtureStream) -> None:
        if not stream.sized:
            raise ValueError(
                "this MixtureStream does not know how long its domains are: pass sizes=, the sequences of one pass "
                "over each (an estimate will do), which epochs and upper bounds go by"
            )
        if self.measures and not all(map(stream.probes, stream.domains)):
            raise ValueError(
                f"{self.name} measures the domains, and this MixtureStream has kept no sequences aside for that: pass "
                "probe_sequences=, twice those of the controller"
            )

    def rehearse(self, found: Evidence, prior: Weights, upper: Weights) -> None:
        """Send a copy through a checkpoint and let it decide; raises whatever that raises."""
        understudy = copy.deepcopy(self.mixer)
        understudy.load_state_dict(self._as_saved(understudy))
        if found.influence is None or found.influence.finite:
            if "gradient" in self.needs:
                found = replace(found, gradient=found.influence)
            with _quiet(logging.getLogger("dynmix.mixers")):  # so few sequences would cause warnings
                self._decide(understudy, found, prior, upper, step=0, steps=1)
            understudy.load_state_dict(self._as_saved(understudy))  # a decision may put something new into the state

    def _as_saved(self, mixer: Mixer) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(json.dumps(mixer.state_dict()))
        except (TypeError, ValueError) as problem:
            raise ValueError(
                f"{self.name}.state_dict() has to go through JSON, but {problem}: turn arrays into lists"
            ) from problem
        return state

    def observe(self, step: int, batch_size: int) -> None:
        """Show the losses of the step that ended. A failure at the first one is a mistake in the set-up, and raises.

        Every rank calls it; where the first one fails on one of them, all raise.
        """
        if (watch := self.watch) is None:
            return
        if not self._observed:
            on_every_rank(lambda: self._observe(watch.take(step, batch_size)))
            self._observed = True
            return
        try:
            self._observe(watch.take(step, batch_size))
        except Exception as failure:
            logger.warning("step %d taught the mixer nothing: %s: %s", step, type(failure).__name__, failure)

    def _observe(self, seen: Observation | None) -> None:
        if seen is None and not self._observed:
            raise ValueError(
                f"{self.name} needs the training loss of each step, but no forward pass of the model in training mode "
                "was seen: give the controller the model that the loop calls"
            )
        if seen is not None:
            self._follow()
            self.mixer.observe(seen)
            if not self._observed:
                self._as_saved(self.mixer)  # now, and not at the first checkpoint

    def decide(
        self,
        found: Evidence,
        prior: Weights,
        upper: Weights,
        *,
        step: int,
        steps: int,
        bound: Callable[[Mapping[str, int]], Weights] | None = None,
    ) -> tuple[Proposal, np.ndarray]:
        """Return the proposal for the next stage, and the integers that it is published as.

        Weights of domains that enter are moved inside `bound`, which the mixer could not know.

        Args:
            found: what was measured at this boundary.
            prior, upper: as in `Mixer.propose`.
            step: optimizer steps done.
            steps: of them, since the stage began.
            bound: gives the largest weights of domains that would enter, by their numbers of sequences.

        Raises:
            ValueError: an answer that is not a mixture of the domains inside the bounds; or whatever the mixer raises.
        """
        self._follow()
        proposal, cdf = self._decide(self.mixer, found, prior, upper, step=step, steps=steps)
        if proposal.groups:
            given = dict.fromkeys(proposal.groups, 0.0) | proposal.weights
            sizes = {name: len(rows) for name, (_, rows) in proposal.groups.items()}
            limits = None if bound is None else bound(sizes)
            proposal = replace(proposal, weights=within(given, limits))
            cdf = self.published(proposal, upper)
        return proposal, cdf

    def _decide(
        self, mixer: Mixer, found: Evidence, prior: Weights, upper: Weights, *, step: int, steps: int
    ) -> tuple[Proposal, np.ndarray]:
        if found.gradient is not None:
            mixer.observe(Observation(step, gradient=found.gradient, steps=steps))
        more: dict[str, Any] = {"measure": found.drawn} if "measure" in self.needs else {}
        if "samples" in self.needs:
            more["samples"] = found.samples
        proposal = mixer.propose(found.influence if "influence" in self.needs else None, prior, upper, **more)
        if not isinstance(proposal, Proposal):
            raise ValueError(f"{self.name}.propose returned {type(proposal).__name__}, not a Proposal")
        measured, decided = found.influence, proposal.decided_on
        if decided and (not measured or (decided.tasks, decided.domains) != (measured.tasks, measured.domains)):
            raise ValueError(
                f"{self.name} decided on the influence of {list(decided.domains)} on {list(decided.tasks)}, which was"
                " not measured: give decided_on the rows and columns of the influence that propose was given, or None"
            )
        return proposal, self.published(proposal, upper)

    def published(self, proposal: Proposal, upper: Weights) -> np.ndarray:
        """Return the integers that a proposal is published as; raise ValueError if it is not a mixture of the domains.

        Domains that enter with it come after the others.
        """
        domains, given = (*self.dataset.domains, *proposal.groups), proposal.weights
        if proposal.groups:
            given = dict.fromkeys(domains, 0.0) | given
        weights = normalized(given, domains)
        for name, weight in zip(domains, weights.tolist(), strict=True):
            if weight > upper.get(name, 1.0) + 1e-6:
                raise ValueError(
                    f"{self.name} gave {name!r} a weight of {weight:.4g}, above its bound {upper[name]:.4g}"
                )
        return integer_cdf(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the mixer's name and what it has learnt, JSON-able."""
        return {"name": self.name, "state": copy.deepcopy(self.mixer.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`, if it is this mixer's; otherwise the mixer starts afresh, with a warning.

        The dataset's own state is loaded first; if that has other domains than were listed, the mixer is told.
        """
        if self.dataset.domains != self._started or self.dataset.schedule.joined:
            self._start()
        if state["name"] == self.name:
            self.mixer.load_state_dict(state["state"])
        else:
            logger.warning("the checkpoint's mixer is %s: %s starts afresh", state["name"], self.name)


@contextmanager
def _quiet(log: logging.Logger) -> Iterator[None]:
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
