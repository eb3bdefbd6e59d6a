"""What a mixer is: influence and a prior in, weights out.

Knows arrays and names only: no torch, no model, no dataset. A mixer of one's own is any object with the two members
of `Mixer`; see `Static` for the shortest one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dynmix.mixers.problem import Array
from dynmix.mixers.simplex import cap, normalized
from dynmix.observation import Influence


@dataclass(frozen=True)
class Proposal:
    """The weights for the next stage and why.

    Attributes:
        weights: domain -> share of the sequences, sums to 1.
        solver: what produced the weights; `"prior"` when they are the prior's, kept.
        message: the decision in words, for the journal and the log.
        predicted_gain: task -> predicted decrease of its loss (nats per token) against staying at the prior.
        predicted_gain_standard_error: its standard error from the influence's, entries taken as independent.
        multipliers: task -> Lagrange multiplier of its Pareto constraint (row-scaled); above zero: it binds.
    """

    weights: dict[str, float]
    solver: str = "static"
    message: str = ""
    predicted_gain: dict[str, float] = field(default_factory=dict)
    predicted_gain_standard_error: dict[str, float] = field(default_factory=dict)
    multipliers: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Mixer(Protocol):
    """Decides the weights of the next stage.

    `needs` names what has to be measured before `propose` is called: `{"influence"}` or nothing.
    """

    @property
    def needs(self) -> frozenset[str]:
        """What the controller must measure: a subset of `{"influence"}`."""

    def propose(
        self,
        influence: Influence | None,
        prior: Mapping[str, float],
        upper: Mapping[str, float] | None = None,
    ) -> Proposal:
        """Return weights for the next stage.

        Args:
            influence: what was measured; None when `needs` does not ask for it.
            prior: the weights of the stage that ends, which the proposal may not do worse than.
            upper: domain -> largest weight, from what is left of a domain under `max_epochs`; default no bound.
        """


def prior_and_bounds(
    domains: tuple[str, ...], prior: Mapping[str, float], *uppers: Mapping[str, float] | None
) -> tuple[Array, Array]:
    """Return (prior inside the bounds, the smallest of the upper bounds), float64[n_domains] in the order of `domains`.

    A prior above a bound is moved inside by water-filling: what is cut goes to the others in proportion.

    Raises:
        ValueError: unknown or missing names, bounds below 0, or bounds that leave no mixture.
    """
    upper = np.ones(len(domains))
    for bounds in uppers:
        for name, bound in (bounds or {}).items():
            if name not in domains:
                raise ValueError(f"upper: no domain {name!r}; the domains are {list(domains)}")
            if not bound >= 0:
                raise ValueError(f"upper[{name!r}]={bound}: a bound is a weight of at least 0")
            upper[domains.index(name)] = min(upper[domains.index(name)], bound)
    return cap(normalized(prior, domains), upper), upper


class Static:
    """Keeps the weights it is given: the baseline every dynamic mixture is compared with.

    Args:
        observe: measure the influence at each boundary all the same, for the journal and the report.
    """

    def __init__(self, observe: bool = False):
        self.needs = frozenset({"influence"}) if observe else frozenset[str]()

    def propose(
        self, influence: Influence | None, prior: Mapping[str, float], upper: Mapping[str, float] | None = None
    ) -> Proposal:
        """Return the prior, inside the bounds."""
        weights, _ = prior_and_bounds(tuple(prior), prior, upper)
        return Proposal(dict(zip(prior, weights.tolist(), strict=True)), message="static mixture")

    def describe(self) -> dict[str, Any]:
        """Return the configuration, JSON-able."""
        return {"name": "Static", "observe": bool(self.needs)}
