"""Sample influence of a whole corpus, by one process on all cores or one GPU, or by several that share the shards.

Each checkpoint is loaded once and scores the shards of this process that it has not scored yet. Knows the job, the
folder and a progress bar; what is measured is `dynmix.influence`'s.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dynmix.influence.curvature import Curvature, DataInf
from dynmix.mixture.dataset import MixtureDataset
from dynmix.scoring.corpus import Corpus, Domains, Unit
from dynmix.scoring.cost import describe
from dynmix.scoring.folder import ScoreFolder
from dynmix.scoring.job import Examples, Job, Load, ShardScorer, task_batches
from dynmix.scoring.sources import Source
from dynmix.shown import stderr_console

logger = logging.getLogger(__name__)

_SHARD_TOKENS = 1 << 18  # minutes of work on a CPU


def score_corpus(
    domains: Domains | MixtureDataset,
    tasks: Mapping[str, Examples],
    checkpoints: Sequence[Source],
    out: str | os.PathLike[str],
    *,
    unit: Unit = "sequence",
    sequence_length: int | None = None,
    layers: str | None = None,
    curvature: Curvature | None = None,
    curvature_sequences: int = 128,
    batch_tokens: int = 8192,
    shard_samples: int | None = None,
    load: Load | None = None,
    device: str | None = None,
    threads: int | None = None,
    part: tuple[int, int] = (0, 1),
    actors: int = 0,
    actor_resources: Mapping[str, float] | None = None,
    progress: bool = True,
    tick: Callable[[], object] | None = None,
) -> None:
    """Score every sample of a corpus for the tasks, as `sample_influence` does, into parquet files in the folder `out`.

    It goes on where an earlier call with the same arguments stopped, killed or not, and the scores are then the same,
    bit for bit. `dynmix.scoring.read_scores` reads them. Processes that work side by side need not know of each other:
    each takes a `part`, and a shard is whole when all checkpoints have scored it, whoever comes last.

    Args:
        domains: the raw corpus, as in `Corpus`.
        tasks: name -> examples, dicts with 1-D `input_ids` and `labels`, as a `dynmix.tasks.Task` is.
        checkpoints: which checkpoint scores for which tasks; `peak_sources` and `all_sources` make them.
        out: folder of the scores, best on the same disk for all processes.
        unit: what a sample is: a "sequence" (row of the packed tokens) or a "document".
        sequence_length: tokens of a row, and of the consecutive windows that a document is read in.
        layers: regular expression on names of linear layers and embeddings; None: the output's vocabulary matrix and
            the last transformer block.
        curvature: `DataInf()` if not given.
        curvature_sequences: so many sequences, evenly spread over the tokens of the corpus, fit the curvature.
        batch_tokens: tokens of a forward and backward pass, padding included.
        shard_samples: samples a file; a process that is killed loses at most a shard's work. None: as many as have
            about 262,144 tokens.
        load: gives the model of a path, put where it is to run; None: a transformers model from safetensors.
        device: None: a GPU if there is one (with `load`: where that put it).
        threads: of torch on the CPU; None: as they are. Another number may change the last bits.
        part: (rank, world): this process does every world-th shard, from the rank-th on.
        actors: so many processes of a Ray cluster score, and not this one; 0: this one. They read stores, checkpoints
            and `out` by path; the scores are the same as without.
        actor_resources: what each of them takes, as arguments of Ray: {"num_gpus": 1}; None: a GPU if the cluster has
            any, else a core.
        progress: show cost and progress on stderr; otherwise the cost goes to the log.
        tick: called after each batch; of actors, after each shard.

    Raises:
        OtherConfiguration: `out` has scores of other arguments; the message says which. It is a ValueError.
        ValueError: bad arguments, before anything is written; a checkpoint that does not load, or that
            cannot read tasks or corpus.
        ImportError: `actors` without Ray.
    """
    rank, world = part
    if not 0 <= rank < world:
        raise ValueError(f"part={part}: (rank, world) with 0 <= rank < world")
    if actors < 0 or (actors and world > 1):
        raise ValueError(f"actors={actors}, part={part}: 0 or more actors, and with actors no part of your own")
    _check_device(device, here=not actors)
    corpus = Corpus(domains, unit, sequence_length)
    if shard_samples is None:
        shard_samples = max(1, _SHARD_TOKENS * len(corpus) // max(1, int(corpus.tokens.sum())))
    batches = {name: task_batches(name, examples, batch_tokens) for name, examples in tasks.items()}
    curvature = DataInf() if curvature is None else curvature
    job = Job(corpus, batches, tuple(checkpoints), curvature, curvature_sequences, layers, batch_tokens, shard_samples)
    folder = ScoreFolder.begin(out, job.config())
    mine = range(rank, folder.shards, world)
    folder.join(mine)
    shards = {source: [s for s in mine if not folder.done(source.name, s)] for source in job.sources}
    tokens = sum(sum(map(job.tokens, todo)) for todo in shards.values())
    with threads_set(threads), TokenBar(tokens, progress) as bar:
        bar.begin(sum(1 for todo in shards.values() if todo))

        def seen(source: Source, tokens: int) -> None:
            bar.add(source.name, tokens)
            if tick is not None:
                tick()

        if actors and any(shards.values()):
            from dynmix.scoring.ray import score_on_ray

            for done in score_on_ray(
                job, folder, shards, actors=actors, resources=actor_resources, load=load, device=device
            ):
                if done.speed:
                    bar.announce(done.flops_per_token, done.speed * actors)
                seen(done.source, done.tokens)
            folder.join(mine)
        else:
            for source in [source for source in job.sources if shards[source]]:
                scorer = ShardScorer(job, source, load, device)
                bar.announce(scorer.flops_per_token, scorer.speed)
                for shard in shards[source]:
                    if not folder.done(source.name, shard):  # by another process, meanwhile
                        folder.write(source.name, shard, scorer.score(shard, partial(seen, source)))
                del scorer  # before the next one is loaded
    folder.tidy()


class TokenBar(Progress):
    """One bar on stderr for the tokens of all checkpoints, their rate and the time left; above it the cost."""

    def __init__(self, tokens: int, visible: bool) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=stderr_console(),
            disable=not visible or not tokens,
        )
        self._tokens, self._visible, self._announced = tokens, visible, False
        self._bar = self.add_task("preparing", total=tokens, rate="")

    def begin(self, checkpoints: int) -> None:
        """Say how much there is to do; what it costs is known when a model is loaded."""
        if checkpoints:
            self._say(f"{self._tokens:,} tokens to score, over {checkpoints} checkpoints")

    def announce(self, flops_per_token: float, speed: float) -> None:
        """Say what all of it will cost; the first time only."""
        if not self._announced:
            self._announced = True
            self._say(describe(self._tokens, flops_per_token, speed))

    def _say(self, line: str) -> None:
        if self._visible:
            self.console.print(line, highlight=False)
        else:
            logger.info(line)

    def add(self, name: str, tokens: int) -> None:
        """So many more tokens are done, by the checkpoint of this name."""
        bar = self.tasks[0]
        done = bar.completed + tokens
        rate = f"{done:,.0f} tokens, {done / max(bar.elapsed or 0.0, 1e-3):,.0f}/s"
        self.update(self._bar, description=name, advance=tokens, rate=rate)


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Torch's threads inside; as they were afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_device(device: str | None, here: bool) -> None:
    try:
        chosen = torch.device(device or "cpu")
        if here:
            torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"device={device!r} is none, or not on this machine: {problem}") from problem
