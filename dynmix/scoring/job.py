"""What is to be scored, by what and how, and the scoring of one shard: the same in one process and in many.

Everything that a score depends on is here, so wherever and whenever a shard is scored, it gets the same scores. Knows
models, tasks and the corpus; no files of scores, no progress and no cluster.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from dynmix.batches import Batch, by_length, collate
from dynmix.influence.batch import has_positions, next_token_labels
from dynmix.influence.curvature import Curvature
from dynmix.influence.isolation import unwrap
from dynmix.influence.layers import Layers
from dynmix.influence.sample import SampleScorer
from dynmix.scoring.corpus import Corpus, windows
from dynmix.scoring.cost import flops_per_token
from dynmix.scoring.sources import Source, check_sources
from dynmix.snapshot import load_model

Load = Callable[[Path], nn.Module]

Examples = Sequence[Mapping[str, Any]]
"""A task: dicts with `input_ids` [tokens] and, if not all are scored, `labels`; a `dynmix.tasks.Task` is one."""


@dataclass(frozen=True)
class Job:
    """All that a scoring depends on: the arguments of `dynmix.scoring.score_corpus` that change its scores.

    Raises:
        ValueError: numbers below 1, sources and tasks that do not fit.
    """

    corpus: Corpus
    tasks: dict[str, list[Batch]]
    sources: tuple[Source, ...]
    curvature: Curvature
    curvature_sequences: int
    layers: str | None
    batch_tokens: int
    shard_samples: int

    def __post_init__(self) -> None:
        for name in ("curvature_sequences", "batch_tokens", "shard_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        Layers(self.layers)  # says now what is no regular expression
        check_sources(self.sources, self.tasks)

    def config(self) -> dict[str, Any]:
        """The job as JSON-able values, with fingerprints of data, tasks and checkpoints."""
        corpus, facts = self.corpus, ("name", "samples", "tokens", "fingerprint")
        domains = zip(corpus.names, corpus.sizes.tolist(), corpus.tokens.tolist(), corpus.fingerprints, strict=True)
        return {
            "unit": corpus.unit,
            "sequence_length": corpus.sequence_length,
            "layers": self.layers,
            "curvature": repr(self.curvature),
            "curvature_sequences": self.curvature_sequences,
            "batch_tokens": self.batch_tokens,
            "shard_samples": self.shard_samples,
            "domains": [dict(zip(facts, domain, strict=True)) for domain in domains],
            "tasks": [
                {
                    "name": name,
                    "sequences": sum(len(batch["input_ids"]) for batch in batches),
                    "fingerprint": _batches_hash(batches),
                }
                for name, batches in self.tasks.items()
            ],
            "checkpoints": [
                {
                    "name": source.name,
                    "step": source.step,
                    "tasks": list(source.tasks),
                    "path": str(source.path),
                    "fingerprint": source.fingerprint,
                }
                for source in self.sources
            ],
        }

    def bounds(self, shard: int) -> tuple[int, int]:
        """First sample of a shard, and one past its last."""
        start = shard * self.shard_samples
        return start, min(start + self.shard_samples, len(self.corpus))

    def tokens(self, shard: int) -> int:
        """About how many tokens a shard has: of documents, by their domains' means."""
        domains, counts = np.unique(self.corpus.where(*self.bounds(shard))[0], return_counts=True)
        return round(float((counts * self.corpus.tokens[domains] / self.corpus.sizes[domains]).sum()))


class ShardScorer:
    """One of a job's checkpoints, loaded (`load` and `device` as in `score_corpus`) and prepared: it scores shards.

    Raises:
        ValueError: the model cannot read the tasks or the corpus, a layer that it does not have, or nothing to fit the
            curvature on.
    """

    def __init__(self, job: Job, source: Source, load: Load | None = None, device: str | None = None) -> None:
        self._job, self._source, self._given = job, source, load is not None
        if device is None and load is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = (load or load_model)(source.path)
        self.model = model if device is None else model.to(device)
        fitted_on = job.corpus.spread(job.curvature_sequences)
        if not fitted_on:
            raise ValueError(
                "the corpus has no sequence with a token to score: give documents of at least 2 tokens, or labels that"
                " are not all -100"
            )
        sizes = np.array([len(item["input_ids"]) for item in fitted_on], np.int64)
        curvature_batches = [collate([fitted_on[i] for i in rows]) for rows in by_length(sizes, job.batch_tokens)]
        tasks = {name: job.tasks[name] for name in source.tasks}
        for name, batches in tasks.items():
            for batch in batches:
                self._check(batch, f"task {name!r}")
        for batch in curvature_batches:
            self._check(batch, "the corpus")
        self._probe = [curvature_batches[0], curvature_batches[-1]]
        try:
            self.scorer = SampleScorer(model, tasks, curvature_batches, curvature=job.curvature, layers=job.layers)
        except ValueError as problem:  # it knows of one model, and not which of several it is
            raise ValueError(f"checkpoint {source.name!r}: {problem}") from problem

    @property
    def flops_per_token(self) -> float:
        """At least so many, as `dynmix.scoring.cost` counts."""
        length = self._job.corpus.sequence_length
        return flops_per_token(self.model, self.scorer.layers, len(self.scorer.tasks), length)

    @property
    def speed(self) -> float:
        """Tokens a second, measured now on two batches from all over the corpus, the first to warm up."""
        for batch in self._probe:
            start = time.perf_counter()
            self.scorer(batch)
            seconds = time.perf_counter() - start
        return batch["input_ids"].numel() / seconds

    def score(self, shard: int, tick: Callable[[int], object] = lambda tokens: None) -> pa.Table:
        """Columns id, domain, tokens, score/<task>/<checkpoint>..., loss/<checkpoint>; a row per sample.

        A row of the corpus is scored as the item that training gets of it, and by the labels that it has there.
        A document of several windows has their means, weighted by scored tokens: the influence and the loss of its mean
        loss per token, each window on its own. NaN where there is no token to score. After each batch `tick` is called
        with the number of its tokens.
        """
        corpus, (start, stop) = self._job.corpus, self._job.bounds(shard)
        lengths = corpus.lengths(start, stop)
        owners, offsets = windows(lengths, corpus.sequence_length)
        sizes = np.minimum(lengths[owners] - offsets, corpus.sequence_length)
        sums = np.zeros((len(lengths), len(self.scorer.tasks)))
        nats, scored = np.zeros(len(lengths)), np.zeros(len(lengths))
        for rows in by_length(sizes, self._job.batch_tokens):
            batch = collate(corpus.items(start + owners[rows], offsets[rows]))
            self._check(batch, "the corpus")
            measured, of = self.scorer(batch), owners[rows]
            np.add.at(sums, of, measured.scores * measured.tokens[:, None])
            np.add.at(nats, of, measured.loss * measured.tokens)
            np.add.at(scored, of, measured.tokens)
            tick(int(sizes[rows].sum()))
        domain, row = corpus.where(start, stop)
        with np.errstate(invalid="ignore"):
            scores, losses = (sums / scored[:, None]).astype(np.float32), (nats / scored).astype(np.float32)
        name = self._source.name
        return pa.table(
            {
                "id": row,
                "domain": pa.DictionaryArray.from_arrays(domain.astype(np.int32), list(corpus.names)),
                "tokens": lengths,
                **{f"score/{task}/{name}": scores[:, i] for i, task in enumerate(self.scorer.tasks)},
                f"loss/{name}": losses,
            }
        )

    def _check(self, batch: Batch, what: str) -> None:
        """Raise ValueError if the model cannot read the batch; on a GPU it would not say why."""
        config, ids = getattr(unwrap(self.model), "config", None), batch["input_ids"]
        limit, vocabulary = (getattr(config, key, None) for key in ("max_position_embeddings", "vocab_size"))
        # A model that is given may be trained on longer sequences than it was made for, if it computes positions.
        if limit and ids.shape[1] > limit and (not self._given or has_positions(unwrap(self.model), limit)):
            raise ValueError(
                f"{what} has a sequence of {ids.shape[1]} tokens, checkpoint {self._source.name!r} takes {limit} at"
                " most (max_position_embeddings): give a smaller sequence_length, and make tasks with that max_length"
            )
        if vocabulary and (largest := int(ids.max())) >= vocabulary:
            raise ValueError(
                f"{what} has token {largest}, the vocabulary of checkpoint {self._source.name!r} has {vocabulary}: "
                "tokenise with the model's own tokenizer"
            )


def task_batches(name: str, examples: Examples, batch_tokens: int) -> list[Batch]:
    """A task's examples, the longest first, in padded batches.

    Raises:
        ValueError: no examples, one that is no dict with 1-D `input_ids`, or none with a token to score.
    """
    items = [examples[i] for i in range(len(examples))]
    for number, item in enumerate(items):
        if not isinstance(item, Mapping) or np.ndim(item.get("input_ids", 0)) != 1:
            raise ValueError(f"tasks[{name!r}]: example {number} is no dict with input_ids [tokens]")
    lengths = np.array([len(item["input_ids"]) for item in items], np.int64)
    if not lengths.any():
        raise ValueError(f"tasks[{name!r}] is empty: give at least one example, a dict with input_ids [tokens]")
    kept = np.flatnonzero(lengths)
    batches = [collate([items[kept[i]] for i in rows]) for rows in by_length(lengths[kept], batch_tokens)]
    if not any((next_token_labels(batch) != -100).any() for batch in batches):
        raise ValueError(f"tasks[{name!r}] has no token to score: every label is -100 or first of its sequence")
    return batches


def _batches_hash(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        for key in ("input_ids", "labels", "attention_mask"):
            if key in batch:
                digest.update(f"{key} {tuple(batch[key].shape)}\n".encode())
                digest.update(batch[key].numpy().astype("<i8").tobytes())
    return digest.hexdigest()
