"""Mixtures that follow from the sizes of the domains, or from what the user says, and not from the model.

They are what a dynamic mixer has to beat. Knows token counts and names; nothing that was measured.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynmix.mixers.base import Mixer, Proposal, Run, within
from dynmix.mixers.simplex import mixture
from dynmix.observation import Array, Influence, Weights


class Static(Mixer):
    """Keeps the weights it is given, moved inside the bounds where they are above them.

    Args:
        observe: have the influence measured at every boundary all the same, for the journal.
    """

    def __init__(self, observe: bool = False):
        self.needs = frozenset({"influence"}) if observe else frozenset()

    def propose(self, influence: Influence | None, prior: Weights, upper: Weights | None = None) -> Proposal:
        """Return `prior`, inside `upper`. See `Mixer.propose`."""
        moved = within(prior, upper)
        cut = any(prior[name] > bound for name, bound in (upper or {}).items())
        return Proposal(moved if cut else dict(prior), message="static mixture")  # uncut: bit for bit, not renormalised

    def describe(self) -> dict[str, Any]:
        """Return the configuration, JSON-able."""
        return {"name": "Static", "observe": bool(self.needs)}


class _Planned(Mixer):
    """Weights that `_plan` draws up from the run when it starts, and every stage has."""

    _weights: dict[str, float] | None = None  # None until the run has started

    @abstractmethod
    def _plan(self, run: Run) -> dict[str, float]:
        """Return the weights for this run."""

    def start(self, run: Run) -> dict[str, float]:
        """Return the weights, for the first stage. See `Mixer.start`."""
        self._weights = self._plan(run)
        return dict(self._weights)

    def propose(self, influence: Influence | None, prior: Weights, upper: Weights | None = None) -> Proposal:
        """Return the weights of `start` inside `upper`; the prior if no run was started. See `Mixer.propose`."""
        return Proposal(within(prior if self._weights is None else self._weights, upper), message="static mixture")


class Natural(_Planned):
    """Weights in proportion to the tokens of each domain: every domain is used up at the same time."""

    def _plan(self, run: Run) -> dict[str, float]:
        return _proportional(run.tokens, 1.0)


class Uniform(_Planned):
    """The same weight for every domain."""

    def _plan(self, run: Run) -> dict[str, float]:
        return dict.fromkeys(run.tokens, 1 / len(run.tokens))


class Temperature(_Planned):
    """Weights in proportion to tokens^(1/tau), the temperature sampling of multilingual pretraining.

    1 is `Natural`, infinity is `Uniform`. Source: tau as in Arivazhagan et al. 2019 (arXiv 1907.05019), who use 5; as
    an exponent alpha = 1/tau in Conneau and Lample 2019 (arXiv 1901.07291, Section 3.1).

    Args:
        tau: the temperature, above 0. Default 1/0.3: the exponent of 0.3 of XLM-R (arXiv 1911.02116).

    Raises:
        ValueError: tau not above 0.
    """

    def __init__(self, tau: float = 1 / 0.3):
        if not tau > 0:
            raise ValueError(f"tau={tau}: a temperature is above 0")
        self.tau = float(tau)

    def _plan(self, run: Run) -> dict[str, float]:
        return _proportional(run.tokens, 1 / self.tau)


class UniMax(_Planned):
    """As uniform as it goes with no domain read more than `max_epochs` times (Chung et al. 2023, arXiv 2304.09151).

    Algorithm 1: from the smallest domain up, each gets an equal share of the budget that is left, or `max_epochs` times
    its tokens if that is less. Where all domains together hold less than the budget, the caps themselves are the
    proportions.

    Args:
        max_epochs: how often a domain may be read (the paper's N).
        budget: tokens to plan for; default those that the run trains on.

    Raises:
        ValueError: a setting not above 0.
    """

    def __init__(self, max_epochs: float = 4, budget: int | None = None):
        for name, value in {"max_epochs": max_epochs, "budget": budget}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be above 0")
        self.max_epochs, self.budget = max_epochs, budget

    def _plan(self, run: Run) -> dict[str, float]:
        left = float(self.budget or run.total_tokens)
        shares = {}
        for rank, name in enumerate(sorted(run.tokens, key=run.tokens.__getitem__)):
            shares[name] = min(left / (len(run.tokens) - rank), run.tokens[name] * self.max_epochs)
            left -= shares[name]
        total = sum(shares.values())
        return {name: shares[name] / total for name in run.tokens}


class Staged(_Planned):
    """A list of mixtures, one per stage; the last one stays. What is done by hand: a curriculum of fixed weights.

    Args:
        stages: domain -> weight for every stage; each sums to 1.

    Raises:
        ValueError: no stages, weights that are no mixture, stages of different domains; from `start`, domains that are
            not the run's.
    """

    def __init__(self, stages: Sequence[Weights]):
        if isinstance(stages, Mapping) or not stages:
            raise ValueError("stages: a list of at least one mapping from domain to weight")
        self.stages = [mixture(stage, stages[0], f"stage {k}") for k, stage in enumerate(stages)]
        self._mixtures = self.stages  # of all domains that the run has
        self._done = 0

    def _plan(self, run: Run) -> dict[str, float]:
        self._mixtures = [_given(stage, run, type(self).__name__) for stage in self.stages]
        self._done = 0
        return self._mixtures[0]

    def propose(self, influence: Influence | None, prior: Weights, upper: Weights | None = None) -> Proposal:
        """Return the next stage's weights inside `upper`. See `Mixer.propose`."""
        stage = min(self._done + 1, len(self.stages) - 1)
        proposal = Proposal(within(self._mixtures[stage], upper), message=f"{stage + 1} of {len(self.stages)} mixtures")
        self._done += 1
        return proposal

    def state_dict(self) -> dict[str, Any]:
        """Return how many stages are done."""
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._done = int(state["done"])


class Fixed(_Planned):
    """The weights that the user gives, in every stage.

    Args:
        weights: domain -> weight; sums to 1.

    Raises:
        ValueError: weights that are no mixture; from `start`, domains that are not the run's.
    """

    def __init__(self, weights: Weights):
        self.weights = mixture(weights, weights, "weights")

    def _plan(self, run: Run) -> dict[str, float]:
        return _given(self.weights, run, "Fixed")


def _proportional(tokens: Mapping[str, int], exponent: float) -> dict[str, float]:
    sizes: Array = np.array(list(tokens.values()), dtype=np.float64)
    shares = (sizes / sizes.max()) ** exponent  # of the largest: no overflow for exponents above 1
    return dict(zip(tokens, (shares / shares.sum()).tolist(), strict=True))


def _given(weights: Weights, run: Run, what: str) -> dict[str, float]:
    """Return the weights that a user gives in the order of the run's domains, of those that are gone 0."""
    return mixture(dict.fromkeys(run.gone, 0.0) | dict(weights), run.tokens, what)
