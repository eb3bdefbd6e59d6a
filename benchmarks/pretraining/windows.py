"""What a mixture is worth from one checkpoint on: short training windows beside each other, and what influence says.

A run on the natural mixture is kept at several steps with its optimizer's state. A window goes on from such a
checkpoint for some steps with other data and the tasks are evaluated at its end; everything else is the same. Shared by
the benchmarks of fidelity and of the paper's claims.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils.data import DataLoader

from dynmix import (
    EKFAC,
    KFAC,
    AdamDiagonal,
    DataInf,
    GaussNewton,
    Identity,
    Influence,
    Layers,
    MixtureDataset,
    group_influence,
)
from dynmix.batches import as_batches

from .corpus import Corpus
from .kept import check_settings, kept
from .training import Size, Training, warm_up

Array = NDArray[np.float64]
Batch = dict[str, Tensor]

BLOCKS = Layers(head=False)
CURVATURES = ("EKFAC:1", "EKFAC:0.1", "EKFAC:10", "KFAC:1", "KFAC:0.1", "AdamDiagonal", "DataInf", "Identity")


@dataclass(frozen=True)
class Settings:
    """What all windows of a folder have in common."""

    size: Size = field(default_factory=lambda: Size(batch=16))
    steps: int = 120  # of the run up to the last checkpoint
    warm_up: int = 24  # of these, while the learning rate rises
    checkpoints: int = 3  # of it, evenly spread
    window: int = 12  # steps
    examples: int = 48  # of each task
    probes: int = 32  # sequences of each domain that the influence is measured on
    curvature_sequences: int = 128  # of the natural mixture
    seed: int = 0


class Windows:
    """Checkpoints, windows and influences of one run, each kept in a folder as soon as it is there."""

    def __init__(self, corpus: Corpus, folder: Path, settings: Settings, device: str) -> None:
        check_settings(folder, asdict(settings) | {"corpus": corpus.facts})
        self.corpus, self.folder, self.settings, self.device = corpus, folder, settings, device
        self.tasks = {name: corpus.task(name, "measured", settings.examples, choices=False) for name in corpus.tasks}

    @property
    def natural(self) -> dict[str, float]:
        """Domain -> its weight in the natural mixture."""
        return self._dataset("natural", 1, 0).schedule.weights_at(0)

    # -- the run -----------------------------------------------------------------------------------------------------

    def checkpoint(self, number: int = -1) -> Training:
        """The training at a checkpoint, the last by default; trained on the natural mixture if it is not there."""
        s = self.settings
        steps = [s.steps * (k + 1) // s.checkpoints for k in range(s.checkpoints)]
        wanted = steps[number]
        training = self._fresh()
        if not self._file(wanted).exists():
            done = [n for n in range(wanted) if self._file(n).exists()]
            if done:
                training.load(self._file(done[-1]))
            batches = self._read(self._dataset("natural", s.steps, s.seed), training.steps)
            for _ in track(range(training.steps, wanted), f"checkpoint of step {wanted}"):
                training.step(next(batches))
                if training.steps in steps or training.steps % 50 == 0:
                    training.save(self._file(training.steps))
        training.load(self._file(wanted))
        return training

    def _file(self, step: int) -> Path:
        return self.folder / f"checkpoints/{step:06d}.pt"

    def _fresh(self) -> Training:
        s = self.settings
        return Training(s.size, len(self.corpus.tokenizer), s.seed, self.device, warm_up(s.warm_up))

    # -- windows -----------------------------------------------------------------------------------------------------

    def base(self, seed: int) -> dict[str, float]:
        """Task -> loss after a window on the natural mixture, nats a token."""
        return self._window(f"base-{seed}", lambda: self._read(self._dataset("natural", self.settings.window, seed)))

    def raised(self, domain: str, share: float, seed: int) -> dict[str, float]:
        """Likewise with `share` of each batch of `base(seed)` replaced by sequences of one domain."""
        count = round(share * self.settings.size.batch)

        def batches() -> Iterator[Batch]:
            others = self._read(self._dataset("natural", self.settings.window, seed))
            own = self._read(self._dataset({domain: 1.0}, self.settings.window, seed + 500))
            for batch, new in zip(others, own, strict=True):
                # The places in a batch are permuted: the first ones are no kind of their own.
                batch["input_ids"][:count], batch["labels"][:count] = new["input_ids"][:count], new["labels"][:count]
                yield batch

        return self._window(f"raised-{domain}-{share:g}-{seed}", batches)

    def mixed(self, name: str, weights: Mapping[str, float], seed: int) -> dict[str, float]:
        """Likewise on any mixture, in the order of `base(seed)` as far as the weights agree."""
        return self._window(f"{name}-{seed}", lambda: self._read(self._dataset(weights, self.settings.window, seed)))

    def _window(self, name: str, batches: Callable[[], Iterator[Batch]]) -> dict[str, float]:
        def train() -> dict[str, float]:
            training = self.checkpoint()
            for batch in track(batches(), name, self.settings.window, transient=True):
                training.step(batch)
            return {task: own.evaluate(training.model).loss for task, own in self.tasks.items()}

        return dict(kept(self.folder / f"windows/{name}.json", train))

    def _dataset(self, weights: Any, steps: int, seed: int) -> MixtureDataset:
        if isinstance(weights, Mapping):  # domains of no weight stay listed: the others keep their order
            weights = {name: weights.get(name, 0.0) for name in self.corpus.domains}
        return self.settings.size.dataset(self.corpus.stores, weights, steps, seed)

    def _read(self, dataset: MixtureDataset, start: int = 0) -> Iterator[Batch]:
        batch = self.settings.size.batch
        return iter(DataLoader(dataset, batch_size=batch, sampler=range(start * batch, len(dataset))))

    # -- influence ---------------------------------------------------------------------------------------------------

    def sequences(self, weights: Any, count: int, seed: int) -> list[Batch]:
        """So many sequences of a mixture, in batches."""
        dataset = self._dataset(weights, -(-count // self.settings.size.batch), seed)
        return as_batches(
            [dataset[i] for i in range(count)], name="probes", sequence_length=self.settings.size.length, micro_batch=16
        )

    def probes(self, count: int, seed: int) -> dict[str, list[Batch]]:
        """Domain -> so many of its sequences."""
        return {name: self.sequences({name: 1.0}, count, seed) for name in self.corpus.domains}

    def task_batches(self) -> dict[str, list[Batch]]:
        """Task -> its examples."""
        return {
            name: as_batches(task, name=name, sequence_length=self.settings.size.length, micro_batch=16)
            for name, task in self.tasks.items()
        }

    def influence(
        self, curvature: str, *, checkpoint: int = -1, probes: int | None = None, seed: int = 1, blocks: bool = False
    ) -> tuple[Influence, float]:
        """The group influence at a checkpoint, and the processor seconds it took."""
        s = self.settings
        count = probes or s.probes
        name = f"{curvature}{'-blocks' if blocks else ''}-{checkpoint % s.checkpoints}-{count}-{seed}"

        def measure() -> dict[str, Any]:
            training = self.checkpoint(checkpoint)
            sets = self.probes(count, 1000 + seed)
            # What a product with the exact matrix reads again and again has to be small.
            fit_on = self.sequences("natural", 32 if curvature == "GaussNewton" else s.curvature_sequences, 2000 + seed)
            start = time.process_time()
            found = group_influence(
                training.model,
                sets,
                self.task_batches(),
                curvature_maker(curvature)(training),
                curvature_batches=fit_on,
                layers=BLOCKS if blocks else None,
            )
            return {"influence": found.to_dict(), "seconds": time.process_time() - start}

        found = kept(self.folder / f"influence/{name}.json", measure)
        return Influence.from_dict(found["influence"]), found["seconds"]

    def gains(self, scores: Array, weights: Mapping[str, float], domains: list[str]) -> Array:
        """Predicted decrease of the tasks' losses for a mixture in the natural one's place, float64[n_tasks]."""
        natural = self.natural
        change = np.array([weights.get(name, 0.0) - natural[name] for name in domains])
        return np.asarray(scores @ change, dtype=np.float64)


def agreement(a: Array, b: Array, measure: Callable[..., Any] = spearmanr) -> float:
    """Mean correlation of a task's row with its other one, by ranks unless another measure is given."""
    return float(np.mean([measure(x, y).statistic for x, y in zip(a, b, strict=True)]))


def curvature_maker(name: str) -> Callable[[Training], Any]:
    """Makes a curvature of this name, its damping after a colon; `AdamDiagonal` is that of the training's optimizer.

    Exits where there is none of the name.
    """
    kind, colon, damping = name.partition(":")
    damped: dict[str, Callable[..., Any]] = {"EKFAC": EKFAC, "KFAC": KFAC}
    others: dict[str, Callable[[Training], Any]] = {
        "AdamDiagonal": lambda training: AdamDiagonal(training.optimizer),
        "DataInf": lambda _: DataInf(),
        "Identity": lambda _: Identity(),
        "GaussNewton": lambda _: GaussNewton(tolerance=0.05, iterations=8, probes=2),
    }
    if name in others:
        return others[name]
    if kind not in damped:
        known = ", ".join((*damped, *others))
        raise SystemExit(f"no curvature {name!r}: there are {known}, EKFAC and KFAC also with :damping")
    try:
        own = {"damping": float(damping)} if colon else {}
        damped[kind](**own)
    except ValueError as problem:
        raise SystemExit(f"curvature {name!r}: {problem}") from None
    return lambda _: damped[kind](**own)
