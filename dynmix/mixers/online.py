"""What the mixers that learn from the training itself have in common, and the simplest of them.

They take in an observation after each step or at each boundary and keep a few numbers a domain. Knows names and
numbers; not where the losses or gradients come from.
"""

import copy
import logging
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from dynmix.mixers.base import Mixer, Proposal, Run, within
from dynmix.observation import Array, Influence, Observation, Weights

logger = logging.getLogger("dynmix.mixers")

LEAST = 1e-300  # weight of a domain that had one before: without smoothing, exponents of hundreds are not rare


class OnlineMixer(Mixer):
    """Proposes what `_policy` has learnt from the observations so far; the prior while that is nothing.

    The weights of the first stage are the run's own. A subclass lists in `_learnt` the attributes that `observe`
    changes, all of them numbers, strings, lists and dicts, and sets them in `start`.
    """

    _learnt: tuple[str, ...] = ()
    _domains: tuple[str, ...] = ()
    _warned = False

    def start(self, run: Run) -> None:
        """Forget what was learnt, for a run of these domains. See `Mixer.start`."""
        self._domains = tuple(run.weights)

    @abstractmethod
    def _policy(self) -> dict[str, float] | None:
        """Return the weights that were learnt; None if there are none yet."""

    def propose(self, influence: Influence | None, prior: Weights, upper: Weights | None = None) -> Proposal:
        """Return the learnt weights inside `upper`. See `Mixer.propose`."""
        policy = self._policy()
        if policy is None:
            return Proposal(within(prior, upper), solver="prior", message="nothing learnt yet: prior kept")
        return Proposal(within(policy, upper), type(self).__name__, "what the observations so far have taught")

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, JSON-able."""
        return {name.removeprefix("_"): copy.deepcopy(getattr(self, name)) for name in self._learnt}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned. Raises ValueError if a part of it is missing."""
        if missing := [name for name in self._learnt if name.removeprefix("_") not in state]:
            raise ValueError(f"not a state of {type(self).__name__}: no {missing} in {sorted(state)}")
        for name in self._learnt:
            setattr(self, name, copy.deepcopy(state[name.removeprefix("_")]))

    def _usable(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Return the losses that can be learnt from: finite numbers of at least 0."""
        self._check_started()
        usable = {name: float(x) for name, x in losses.items() if math.isfinite(x) and x >= 0}
        if len(usable) < len(losses):
            self._warn_of({name: x for name, x in losses.items() if name not in usable})
        return usable

    def _check_started(self) -> None:
        if not self._domains:
            raise ValueError(f"{type(self).__name__} was not started: call start(run) before observe")

    def _warn_of(self, left_out: Mapping[str, float]) -> None:
        if not self._warned:
            self._warned = True  # once: a run that diverged has them at every step
            logger.warning("%s learns nothing from what is no finite number: %s", type(self).__name__, left_out)


class LossProportional(OnlineMixer):
    """Weights in proportion to each domain's training loss, exponentially averaged over steps.

    No paper proposes it for domains as such. The nearest: Mineiro and Karampatziakis 2013 (arXiv 1306.1840) sample
    single examples in proportion to their loss, and reweight them so that the estimate stays unbiased, which is not
    done here; the code published for ODM has it with perplexity for loss and exploration added (see `ODM`).

    Args:
        smoothing: how much of the average is kept at each step that holds the domain, in [0, 1).

    Raises:
        ValueError: smoothing out of range; from `observe`, if `start` was not called.
    """

    needs = frozenset({"loss"})
    _learnt = ("_loss",)

    def __init__(self, smoothing: float = 0.9):
        self.smoothing = in_range("smoothing", smoothing, 1)

    def start(self, run: Run) -> None:
        """Forget the losses. See `Mixer.start`."""
        super().start(run)
        self._loss: dict[str, float] = {}

    def observe(self, observation: Observation) -> None:
        """Average the losses of a step into those before."""
        for name, loss in self._usable(observation.loss).items():
            before = self._loss.get(name, loss)
            self._loss[name] = self.smoothing * before + (1 - self.smoothing) * loss

    def _policy(self) -> dict[str, float] | None:
        total = sum(self._loss.values())
        if total == 0:
            return None
        unseen = total / len(self._loss)  # a domain that no batch held yet counts as an average one
        shares = {name: self._loss.get(name, unseen) for name in self._domains}
        return {name: share / sum(shares.values()) for name, share in shares.items()}


class Multiplicative(OnlineMixer):
    """Multiplicative weights (exponentiated gradient ascent): what DoReMi and DoGE share.

    Args:
        smoothing: share of the uniform mixture mixed in at each update, in [0, 1].
        average: propose the mean of the weights over all updates, in place of the present ones.
        initial: `"uniform"`, or `"prior"`: the weights of the first stage.
    """

    _learnt: tuple[str, ...] = ("_weights", "_average", "_updates")

    def __init__(self, smoothing: float, average: bool, initial: str):
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing={smoothing}: a share between 0 and 1")
        if initial not in ("uniform", "prior"):
            raise ValueError(f"initial={initial!r}: 'uniform' or 'prior'")
        self.smoothing, self.average, self.initial = float(smoothing), bool(average), initial

    @property
    def mean(self) -> dict[str, float]:
        """Domain -> mean of the weights over all updates so far: what both papers train the main model on."""
        return dict(self._average)

    def start(self, run: Run) -> None:
        """Set the weights to the initial ones. See `Mixer.start`."""
        super().start(run)
        uniform = dict.fromkeys(self._domains, 1 / len(self._domains))
        self._weights = uniform if self.initial == "uniform" else {k: float(w) for k, w in run.weights.items()}
        self._average = dict(self._weights)
        self._updates = 0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; a domain that joined since begins with its share of the uniform mixture.

        Raises ValueError if a part of it is missing.
        """
        super().load_state_dict(state)
        if new := dict.fromkeys((name for name in self._domains if name not in self._weights), 1 / len(self._domains)):
            left = 1 - sum(new.values())
            self._weights, self._average = (
                {name: left * weight for name, weight in each.items()} | new for each in (self._weights, self._average)
            )

    def _ascend(self, exponents: Mapping[str, float]) -> None:
        """Multiply each weight by the exponential of its exponent, renormalise, smooth."""
        w = as_array(self._weights, self._domains)
        with np.errstate(divide="ignore"):  # a weight of 0 stays 0 but for the smoothing
            logs = np.log(w) + as_array(exponents, self._domains)
        moved = np.exp(logs - logs.max())
        moved = (1 - self.smoothing) * moved / moved.sum() + self.smoothing / len(moved)
        # What underflows to 0 could never grow again, whatever is observed later.
        moved = np.where(w > 0, np.maximum(moved, LEAST), moved)
        self._updates += 1
        mean = as_array(self._average, self._domains)
        mean = mean + (moved - mean) / self._updates
        self._weights = dict(zip(self._domains, moved.tolist(), strict=True))
        self._average = dict(zip(self._domains, mean.tolist(), strict=True))

    def _policy(self) -> dict[str, float] | None:
        if self._updates == 0:
            return None
        return self._average if self.average else self._weights


def as_array(values: Mapping[str, float], domains: tuple[str, ...]) -> Array:
    """Return the values as float64[n_domains] in the order of `domains`."""
    return np.array([values[name] for name in domains], dtype=np.float64)


def in_range(name: str, value: float, high: float) -> float:
    """Return value as a float. Raises ValueError unless 0 <= value < high."""
    if not 0 <= value < high:
        raise ValueError(f"{name}={value}: must be at least 0 and below {high}")
    return float(value)
