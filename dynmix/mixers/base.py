"""What a mixer is: measurements and a prior in, weights out.

Knows arrays and names only: no torch, no model, no dataset. To write your own, subclass `Mixer`, name in `needs` what
has to be measured for it, and implement `propose`; everything else has a default. The shortest useful one:

    class Greedy(Mixer):
        '''Half of what is sampled stays as it was; the other half goes to the domain that helps the tasks most.'''

        needs = frozenset({"influence"})

        def propose(self, influence, prior, upper=None):
            best = influence.domains[influence.scores.mean(axis=0).argmax()]
            wanted = {name: 0.5 * weight + 0.5 * (name == best) for name, weight in prior.items()}
            return Proposal(within(wanted, upper), message=f"{best} helps most")

    MixtureCallback(dataset, tasks=tasks, mixer=Greedy(), stage_steps=500)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynmix.mixers.simplex import cap, normalized
from dynmix.observation import Array, Influence, Observation, Weights
from dynmix.scores import SamplePlan

Ints = NDArray[np.integer]

NEEDS = frozenset({"loss", "reference_loss", "gradient", "influence", "guards", "measure", "samples"})


@dataclass(frozen=True)
class Run:
    """What a mixer may know of the run before it starts.

    Attributes:
        tokens: domain -> number of its tokens, in the dataset's order.
        total_tokens: most tokens that the run trains on, over all domains.
        weights: domain -> weight in the first stage, as given to the dataset.
        gone: domains of a resumed state that the run does not list any more, so that they cannot be drawn.
    """

    tokens: Mapping[str, int]
    total_tokens: int
    weights: Weights
    gone: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proposal:
    """The weights for the next stage and why.

    Attributes:
        weights: domain -> share of the sequences, sums to 1.
        solver: what produced the weights, if there is a choice; `"prior"` if the prior was kept.
        message: the decision in words, for the journal and the log.
        predicted_gain: task -> predicted decrease of its loss (nats per token) against staying at the prior.
        predicted_gain_standard_error: its standard error from the influence's, entries taken as independent.
        multipliers: constraint -> Lagrange multiplier, of those that bind (above 0). A constraint is a task's or a
            guard's name (row-scaled: what the objective would gain if that row's floor were lower by its largest
            influence), or `"upper:<domain>"`, `"lower:<domain>"`, `"max_change:<domain>"` for a bound on a weight.
        decided_on: the influence that decided, if not the one given but an average with earlier ones.
        groups: new domains that enter with the next stage: name -> (numbers of domains, rows of them), int[n_sequences]
            each, as the dataset had them when the run began. `weights` need not name the domains that get none.

    Raises ValueError if solver or message are not text, or gains and multipliers not numbers by name.
    """

    weights: dict[str, float]
    solver: str = ""
    message: str = ""
    predicted_gain: dict[str, float] = field(default_factory=dict)
    predicted_gain_standard_error: dict[str, float] = field(default_factory=dict)
    multipliers: dict[str, float] = field(default_factory=dict)
    decided_on: Influence | None = field(default=None, compare=False)
    groups: dict[str, tuple[Ints, Ints]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("solver", "message"):
            if not isinstance(words := getattr(self, name), str):
                raise ValueError(f"{name}={words!r}: a str, which the journal takes")
        for name in ("predicted_gain", "predicted_gain_standard_error", "multipliers"):
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, {str(key): float(value) for key, value in given.items()})
            except (AttributeError, TypeError, ValueError) as problem:
                raise ValueError(f"{name}={given!r}: a dict of numbers by name, which the journal takes") from problem


class Mixer(ABC):
    """Decides the weights of the next stage. A run calls, in this order:

    `start` once, before anything is read; `observe` after each optimizer step if `needs` has `loss`, and at each stage
    boundary if it has `gradient`; `propose` at each boundary; `state_dict` whenever the run saves a checkpoint.

    Attributes:
        needs: what must be measured, a subset of
            `"loss"`: `observe` gets each step's training loss, by domain;
            `"reference_loss"`: also that of a reference model on the same tokens (the controller's `reference=`);
            `"gradient"`: `observe` gets, at a boundary, the products of the domains' gradients with the tasks';
            `"influence"`: `propose` gets the group influence;
            `"guards"`: influence (or gradient) has the guards' rows too, named in `influence.guards`;
            `"measure"`: `propose` gets one more keyword argument, `measure`: a callable from weights (domain -> weight)
            to the influence of an actually drawn sample of that mixture, float64[n_rows] in the order of
            `influence.tasks`; write `def propose(self, influence, prior, upper=None, *, measure=None)`;
            `"samples"`: tasks are evaluated and the checkpoints where they peak are kept, as `sample_plan` says. At the
            boundaries of `wants_samples`, `propose` gets the influence of every sequence of the dataset as one more
            keyword argument, `samples`: a `dynmix.scores.SampleScores`; at others None.
            What is not named is not measured.
        sample_plan: how the corpus is scored, with `"samples"` in `needs`.

    `Proposal`, `Run` and `within` are in `dynmix.mixers`, `Influence` and `Observation` in `dynmix.observation`.
    """

    needs: Set[str] = frozenset()
    sample_plan: SamplePlan = SamplePlan()

    def wants_samples(self, boundary: int, prior: Weights) -> bool:
        """Whether to score the corpus at this boundary, 1 being the end of the first stage; by default at each."""
        return True

    def start(self, run: Run) -> Weights | None:
        """Prepare for a run; return the weights of its first stage, or None to keep the dataset's.

        Called again when a run is resumed, before `load_state_dict`; what it returns is then ignored. If the state has
        other domains than this run lists, it is called a second time, with those of both. Where domains join while the
        run goes on, it is called with all of them, and `load_state_dict` with the state from just before.
        """
        return None

    def observe(self, observation: Observation) -> None:
        """Take in what `needs` asks for. Must be cheap: with `loss` it is called after every step.

        An error ends the run if it occurs at the first step, as it is then a mistake in the set-up; later it is logged.
        """
        return None

    @abstractmethod
    def propose(self, influence: Influence | None, prior: Weights, upper: Weights | None = None) -> Proposal:
        """Return weights for the next stage.

        If it raises, the weights stay as they are, and the error is written to the log and the journal.

        Args:
            influence: what was measured; None if `needs` does not ask for it.
            prior: the weights of the stage that is ending.
            upper: domain -> largest weight, from what is left of a domain under `max_epochs`; None: no bounds. They
                must be respected: `within` moves any weights inside them.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `observe` and `propose` have changed, for a run that resumes.

        It goes through JSON: numbers, strings, lists and dicts with string keys, no arrays (`.tolist()` them).
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises ValueError for a state that is not of this mixer."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, but was given {sorted(state)}")

    def describe(self) -> dict[str, Any]:
        """Return the configuration for the run's `config.json`: by default all public attributes."""
        return {"name": type(self).__name__} | {k: v for k, v in vars(self).items() if not k.startswith("_")}


def within(weights: Weights, upper: Weights | None) -> dict[str, float]:
    """Return `weights` moved inside the bounds: what is cut goes to the other domains in proportion (water-filling).

    Raises:
        ValueError: weights that are no mixture, bounds of unknown domains or below 0, bounds that leave no mixture.
    """
    domains = tuple(weights)
    moved = cap(normalized(weights, domains), bounds(domains, upper))
    return dict(zip(weights, moved.tolist(), strict=True))


def bounds(domains: Sequence[str], *given: Weights | None, lower: bool = False) -> Array:
    """Return the tightest of the upper (or lower) bounds, float64[n_domains]; 1 (or 0) where there is none.

    Raises:
        ValueError: a bound of an unknown domain, or one that is negative or no number.
    """
    what = "lower" if lower else "upper"
    number = {name: i for i, name in enumerate(domains)}
    tightest = np.zeros(len(domains)) if lower else np.ones(len(domains))
    for name, bound in (item for mapping in given for item in (mapping or {}).items()):
        if name not in number:
            raise ValueError(f"{what}: no domain {name!r}; the domains are {list(domains)}")
        if not bound >= 0:
            raise ValueError(f"{what}[{name!r}]={bound}: a bound is a weight of at least 0")
        i = number[name]
        tightest[i] = max(tightest[i], bound) if lower else min(tightest[i], bound)
    return tightest
