"""The scoring of a corpus over a cluster: shards as a Ray Data stream through a pool of actors.

An actor holds one checkpoint's model and preconditioned gradients, scores the shards that it is given by number, and
writes each itself to the shared folder; only small summaries come back. So whatever is killed, the folder has what was
done, and Ray starts lost actors again. Knows jobs, folders and Ray; not how a shard is scored.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynmix.scoring.folder import ScoreFolder
from dynmix.scoring.job import Job, Load, ShardScorer
from dynmix.scoring.sources import Source

_BLOCKS = 10_000  # of the stream at most: Ray keeps track of each


@dataclass(frozen=True)
class Scored:
    """One checkpoint has scored one shard: its tokens; an actor's FLOPs a token and tokens a second, 0 if unknown."""

    source: Source
    tokens: int
    flops_per_token: float
    speed: float


def score_on_ray(
    job: Job,
    folder: ScoreFolder,
    shards: Mapping[Source, Sequence[int]],
    *,
    actors: int,
    resources: Mapping[str, float] | None,
    load: Load | None,
    device: str | None,
) -> Iterator[Scored]:
    """Score these shards and write them to the folder, which every node must see under the same path.

    Connects to the cluster as `ray.init()` does (`RAY_ADDRESS`), unless that has been called. Yields in the order in
    which shards are done. The stores and checkpoints are read by path on every node. Arguments as in `score_corpus`;
    `shards` are their numbers, by source.

    Raises:
        ImportError: Ray is not installed.
        ValueError: as `ShardScorer` does, in an actor.
        RuntimeError: anything else was raised in an actor, in whose words it is, with where.
    """
    try:
        import ray
        import ray.data
    except ImportError as problem:
        raise ImportError("scoring over a cluster needs Ray: pip install 'dynmix[ray]'") from problem
    if not ray.is_initialized():
        ray.init()
    if resources is None:
        resources = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    # A worker of a cluster has not the driver's working directory, which relative paths are from.
    sources = tuple(replace(source, path=Path(source.path).absolute()) for source in job.sources)
    # Checkpoint by checkpoint, so that an actor, which is given them in order, loads each about once.
    items = [{"source": i, "shard": shard} for i, source in enumerate(job.sources) for shard in shards[source]]
    stream = ray.data.from_items(items, override_num_blocks=min(len(items), _BLOCKS)).map_batches(
        _Actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(items))),
        fn_constructor_args=(replace(job, sources=sources), folder.path.absolute(), load, device),
        **resources,
    )
    stream.context.enable_progress_bars = False
    for block in stream.iter_batches(batch_size=None):
        for i, tokens, flops, speed, error, failure in zip(*(block[key].tolist() for key in _SUMMARY), strict=True):
            if error:  # as a value, because Ray keeps neither type nor message of what an actor raises
                raise ValueError(error)
            if failure:
                raise RuntimeError(f"an actor failed: {failure}")
            yield Scored(job.sources[i], tokens, flops, speed)


_SUMMARY = ("source", "tokens", "flops_per_token", "speed", "error", "failure")


class _Actor:
    """What Ray Data calls: a batch is the numbers of one source and one shard."""

    def __init__(self, job: Job, folder: Path, load: Load | None, device: str | None) -> None:
        self._job, self._folder, self._load, self._device = job, ScoreFolder(folder), load, device
        self._source: Source | None = None
        self._scorer: ShardScorer | None = None
        self._facts = (0.0, 0.0)

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        source, shard = self._job.sources[int(batch["source"][0])], int(batch["shard"][0])
        error = failure = ""
        try:
            if not self._folder.done(source.name, shard):  # else an actor wrote it, and died before it could say so
                scorer = self._prepared(source)
                self._folder.write(source.name, shard, scorer.score(shard))
        except ValueError as problem:
            error = str(problem)
        except Exception as problem:
            failure = f"{type(problem).__name__}: {problem}\n{traceback.format_exc()}"
        facts = (int(batch["source"][0]), self._job.tokens(shard), *self._facts, error, failure)
        return {name: np.array([fact]) for name, fact in zip(_SUMMARY, facts, strict=True)}

    def _prepared(self, source: Source) -> ShardScorer:
        if self._scorer is None or self._source != source:
            self._scorer = None  # before the next one is loaded
            scorer = ShardScorer(self._job, source, self._load, self._device)
            self._facts = scorer.flops_per_token, scorer.speed
            self._source, self._scorer = source, scorer
        return self._scorer
