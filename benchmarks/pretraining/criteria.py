"""What a run is judged by: examples of tasks and held-out text that no mixer has seen.

Knows tasks and a model; not how it was trained.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from .corpus import Corpus
from .settings import Budget

PAIRS = "blimp"  # whose accuracy moves at this size; other choices stay at chance


@dataclass(frozen=True)
class Split:
    """What mixers are told of, and what they are not."""

    optimised: tuple[str, ...]  # tasks whose measured half mixers see
    unseen_tasks: tuple[str, ...]
    domains: tuple[str, ...]  # that are trained on
    unseen_domains: tuple[str, ...]

    @classmethod
    def of(cls, corpus: Corpus, tasks: tuple[str, ...]) -> "Split":
        """All of a corpus, with these tasks kept from the mixers."""
        if unknown := sorted({*tasks} - {*corpus.tasks}):
            raise SystemExit(
                f"{unknown} are no tasks of {corpus.root}, which has {corpus.tasks}: name others with --unseen-tasks, "
                '"" for none'
            )
        optimised = tuple(name for name in corpus.tasks if name not in tasks)
        if not optimised:
            raise SystemExit(f"{corpus.root} has no task to optimise: add one, or take it out of --unseen-tasks")
        return cls(
            optimised,
            tuple(name for name in corpus.tasks if name in tasks),
            tuple(corpus.domains),
            tuple(name for name in corpus.texts if name not in corpus.domains),
        )


class Judges:
    """The evaluations of a run."""

    def __init__(self, corpus: Corpus, split: Split, budget: Budget) -> None:
        self.split = split
        names = (*split.optimised, *split.unseen_tasks)
        self.tasks = {name: corpus.task(name, "judged", budget.examples, choices=name == PAIRS) for name in names}
        self.few = {name: corpus.task(name, "judged", budget.curve_examples, choices=False) for name in names}
        self.texts = {name: corpus.text(name, budget.characters) for name in corpus.texts}

    def final(self, model: nn.Module) -> dict[str, Any]:
        """Everything: set -> loss (nats a token), bits (a byte) and accuracy where it is asked for."""
        found = {}
        for name, task in (self.tasks | {f"text/{name}": text for name, text in self.texts.items()}).items():
            score = task.evaluate(model)
            found[name] = {"loss": score.loss, "bits": score.bits_per_byte, "accuracy": score.accuracy}
        return found

    def quick(self, model: nn.Module) -> dict[str, float]:
        """Task -> loss on a few examples, for the curve."""
        return {name: task.evaluate(model).loss for name, task in self.few.items()}
