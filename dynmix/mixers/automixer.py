"""AutoMixer: checkpoints as data mixers. The corpus is regrouped by the tasks that its sequences help, and reweighted.

During the first stages the tasks are evaluated and the checkpoints in which they peak are kept. At the boundary, each
task's checkpoint scores every sequence of the corpus by its influence on that task; groups of sequences, one per task,
take the raw domains' place, with weights by influence density. This module decides from scores; who measures them and
how is not known here.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dynmix.mixers.base import Mixer, Proposal, Run, within
from dynmix.mixers.regroup import Blend, Group, blending, group_weights, regroup
from dynmix.observation import Influence, Weights
from dynmix.scores import Metric, SamplePlan, SampleScores

logger = logging.getLogger("dynmix.mixers")

PREFIX = "group:"
"""Of the domains that enter the run, so that they are told from domains and tasks of the same name."""


class AutoMixer(Mixer):
    """Regroups the corpus at a stage boundary by sample influence from the tasks' peak checkpoints (arXiv 2506.21910).

        MixtureCallback(dataset, tasks=tasks, mixer=AutoMixer(), stage_steps=2000)

    The domains before the boundary are the dataset's, with its weights; after it they are `group:<task>`, and
    `group:rest` of what helps no task, whose weight is 0 unless the others cannot hold the run within `max_epochs`.
    The groups are views: no token is copied. Domains that joined the run before are in no group.

    Args:
        after: stages after which the corpus is scored and regrouped. Where a run goes on from there with groups in
            place, or nothing helps any task, the weights stay.
        keep, blend, budget: share of a group that is kept, weight of early and late checkpoints, and most tokens of a
            group, as in `dynmix.mixers.regroup.regroup`.
        max_epochs: how often a group may be seen in the rest of the run, unless the run itself has a lower limit, one
            number for all domains; the excess goes to the other groups, `rest` last. Where all of them are too small, a
            warning says so and all are seen alike: more often, or as often as the run's limit lets them, and the raw
            domains, in the proportions that they had, take what is left. What was read of the sequences before, as rows
            of their raw domains, does not count, and limits by name are those of the domains they name.
        every, metric, min_delta, checkpoints: how the tasks are evaluated and which checkpoints score, as in
            `dynmix.scores.SamplePlan`.

    Raises:
        ValueError: arguments out of range; as the run is made, a domain whose name begins with `group:`.
    """

    needs = frozenset({"samples"})

    def __init__(
        self,
        *,
        after: int = 1,
        keep: float = 0.5,
        blend: Blend = "step",
        budget: int | Mapping[str, int] | None = None,
        max_epochs: float | None = 4.0,
        every: int | None = None,
        metric: Metric | Mapping[str, Metric] = "loss",
        min_delta: float = 0.0,
        checkpoints: Literal["peak", "last"] | int = "peak",
    ):
        if after < 1:
            raise ValueError(f"after={after}: at least 1 stage")
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: a share of a group's tokens, above 0 and at most 1")
        if max_epochs is not None and not max_epochs > 0:
            raise ValueError(f"max_epochs={max_epochs}: above 0, or None")
        blending([], blend)
        self.after, self.keep, self.blend, self.budget, self.max_epochs = after, keep, blend, budget, max_epochs
        self.sample_plan = SamplePlan(every, metric, min_delta, checkpoints)

    def start(self, run: Run) -> None:
        """Refuse a first domain that is called as a group is.

        Raises:
            ValueError: there is one.
        """
        # Groups that entered have no weight in the first stage.
        if taken := [name for name, weight in run.weights.items() if weight and name.startswith(PREFIX)]:
            raise ValueError(f"domain {taken[0]!r}: AutoMixer calls its own groups {PREFIX}...; give it another name")

    def wants_samples(self, boundary: int, prior: Weights) -> bool:
        """Once, after `after` stages; again at later boundaries only where that came to nothing."""
        return boundary >= self.after and not any(name.startswith(PREFIX) for name in prior)

    def propose(
        self,
        influence: Influence | None,
        prior: Weights,
        upper: Weights | None = None,
        *,
        samples: SampleScores | None = None,
    ) -> Proposal:
        """Return the groups and their weights, or the prior where there are no scores. See `Mixer.propose`.

        Raises:
            ValueError: as `regroup` does: no finite score.
        """
        if samples is None:
            return Proposal(_staying(prior, upper or {}), message="the mixture stays: the corpus was not scored here")
        groups = regroup(samples, keep=self.keep, blend=self.blend, budget=self.budget)
        bound, share = self._bound(groups, samples)
        weights = group_weights(groups, max_epochs=bound, tokens=samples.tokens_left)
        if weights is None:
            return Proposal(within(prior, upper), solver="prior", message="no group has positive joint influence")
        entering = {}
        for group in groups:
            members = group.members[samples.row[group.members].argsort(kind="stable")]
            members = members[samples.domain[members].argsort(kind="stable")]  # in the order of the stores
            entering[PREFIX + group.name] = samples.domain[members], samples.row[members]
        weights = {name: share * weight for name, weight in weights.items()}
        raw = {name: (1 - share) * weight for name, weight in within(prior, upper).items()} if share < 1 else {}
        return Proposal(
            raw | {PREFIX + name: weight for name, weight in weights.items()},
            message=_words(groups, weights, samples),
            groups=entering,
        )

    def _bound(self, groups: Sequence[Group], samples: SampleScores) -> tuple[float | None, float]:
        """Return how often a group may be seen, and the share of the rest of the run that the groups can hold.

        The first is how often all are seen alike where they are too small for the run.
        """
        tokens = samples.tokens_left
        limits = [limit for limit in (self.max_epochs, samples.max_epochs) if limit is not None]
        if not limits or tokens is None:
            return None, 1.0
        needed = tokens / sum(group.tokens for group in groups)
        share = 1.0 if samples.max_epochs is None else min(1.0, samples.max_epochs / needed)
        if needed > min(limits):
            logger.warning(
                "the groups are too small for the %d tokens that are left: %s; raise keep, or train for fewer steps",
                tokens,
                f"within the run's max_epochs={samples.max_epochs:g} they hold {share:.0%}, the raw domains the rest"
                if share < 1
                else f"they are seen {needed:.1f} times, not {min(limits):g} at most",
            )
        return max(min(limits), needed * (1 + 1e-9)), share

    def describe(self) -> dict[str, Any]:
        """Return the configuration, JSON-able."""
        own = super().describe()
        plan = own.pop("sample_plan")
        return {**own, **vars(plan)}


def _staying(prior: Weights, upper: Weights) -> dict[str, float]:
    """The prior inside its bounds; as long as the groups hold it, raw domains that they took the place of get nothing.

    What the others cannot hold would go to all domains of weight 0.
    """
    room = sum(min(1.0, upper.get(name, 1.0)) for name in prior if name.startswith(PREFIX))
    replaced = [name for name, weight in prior.items() if not weight and not name.startswith(PREFIX)]
    return within(prior, {**upper, **dict.fromkeys(replaced, 0.0)} if room >= 1 - 1e-12 else upper)


def _words(groups: list[Group], weights: Weights, samples: SampleScores) -> str:
    by: dict[str, list[str]] = {}
    for column in samples.columns:
        by.setdefault(column.task, []).append(column.checkpoint)
    parts = [
        f"{group.name} {weights[group.name]:.3f} ({len(group.members):,} sequences"
        + (f" by {', '.join(by[group.name])}" if group.name in by else "")
        + ")"
        for group in groups
    ]
    return f"{len(samples.row):,} sequences regrouped: " + ", ".join(parts)
