"""What influence is compared with: perplexity and n-gram resemblance, as scores in the same frame.

Knows losses that were scored beside, and token ids; no gradients.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dynmix.mixture.sequences import Ints
from dynmix.scores import Column, SampleScores
from dynmix.scoring.corpus import Corpus, Domains, Tokens, Unit
from dynmix.scoring.folder import frame, read_losses
from dynmix.scoring.job import Examples

_CHUNK = 4096  # samples read at once


def perplexity_scores(out: str | os.PathLike[str], checkpoint: str | None = None) -> SampleScores:
    """Low perplexity is good: minus each sample's loss, nats per token, for the one pseudo-task "perplexity".

    Args:
        out: folder of a scoring, which has the losses.
        checkpoint: whose losses; None: the last one's, by steps.

    Raises:
        ValueError: as `read_scores`; a checkpoint that did not score.
    """
    losses = read_losses(out, "perplexity")
    known = {column.checkpoint: column for column in losses.columns}
    name = max(losses.columns, key=lambda column: column.step).checkpoint if checkpoint is None else checkpoint
    if name not in known:
        raise ValueError(f"checkpoint {name!r} scored nothing in {out}; there are {list(known)}")
    chosen = losses.of([known[name]])
    return replace(chosen, scores=-chosen.scores)


def ngram_scores(
    domains: Domains,
    tasks: Mapping[str, Examples],
    *,
    unit: Unit = "sequence",
    sequence_length: int | None = None,
    n: Sequence[int] = (1, 2),
    buckets: int = 10_000,
) -> SampleScores:
    """How much more a sample's n-grams are those of a task than those of the corpus: a column a task, at step 1.

    The importance weights of DSIR (Xie et al. 2023, arXiv 2302.03169), log p_task - log p_corpus under bags of hashed
    n-grams, here of token ids and divided by the sample's tokens, so that long samples compare with short ones. Both
    bags are of whole sequences, contexts of examples included; no n-gram reaches over the end of one. Every bucket
    counts one n-gram more than were seen (Laplace's rule, the authors' option for small targets). Two passes over the
    corpus; 8 bytes a bucket and task, and a chunk of the corpus, are held beside the scores.

    Args:
        domains: as in `Corpus`.
        tasks: name -> examples with 1-D `input_ids`.
        unit: as in `Corpus`.
        sequence_length: as in `Corpus`; documents are taken whole, and do not need it.
        n: lengths of n-grams.
        buckets: that n-grams are hashed into.

    Raises:
        ValueError: as `Corpus`; no tasks, one without tokens; no lengths; no bucket.
    """
    if not tasks or not n or min(n) < 1 or buckets < 1:
        raise ValueError(f"{len(tasks)} tasks, n={tuple(n)}, buckets={buckets}: give at least one of each, from 1")
    corpus = Corpus(domains, unit, sequence_length or (2 if unit == "document" else None))

    def bag(samples: Sequence[Tokens]) -> NDArray[np.int64]:
        return np.bincount(np.concatenate([h for h, _ in _hashed(samples, n, buckets)]), minlength=buckets)

    raw = sum((bag(samples) for _, samples in _chunks(corpus)), np.zeros(buckets, np.int64))
    advantage = np.empty((len(tasks), buckets))
    for i, (name, examples) in enumerate(tasks.items()):
        counts = bag([np.asarray(examples[k]["input_ids"]) for k in range(len(examples))])
        if not counts.any():
            raise ValueError(f"tasks[{name!r}] has no token: give at least one example with input_ids [tokens]")
        advantage[i] = np.log((counts + 1) / (counts.sum() + buckets)) - np.log((raw + 1) / (raw.sum() + buckets))
    scores = np.empty((len(corpus), len(tasks)), np.float32)
    tokens = np.empty(len(corpus), np.int64)
    for start, samples in _chunks(corpus):
        lengths = np.array([len(sample) for sample in samples], np.int64)
        sums = np.zeros((len(tasks), len(samples)))
        for hashes, owners in _hashed(samples, n, buckets):
            for total, own in zip(sums, advantage, strict=True):
                total += np.bincount(owners, weights=own[hashes], minlength=len(samples))
        scores[start : start + len(samples)] = (sums / np.maximum(lengths, 1)).T
        tokens[start : start + len(samples)] = corpus.lengths(start, start + len(samples))
    domain, row = corpus.where(0, len(corpus))
    return frame(corpus.names, domain, row, tokens, tuple(Column(task, "ngram", 1) for task in tasks), scores)


def _chunks(corpus: Corpus) -> Iterator[tuple[int, list[Tokens]]]:
    for start in range(0, len(corpus), _CHUNK):
        yield start, corpus.read(start, min(start + _CHUNK, len(corpus)))


def _hashed(samples: Sequence[Tokens], n: Sequence[int], buckets: int) -> Iterator[tuple[Ints, Ints]]:
    """For each length of n-grams: the bucket of every n-gram, and the number of the sample that it is in."""
    owners = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
    tokens = np.concatenate([*samples, np.empty(0, np.int64)]).astype(np.uint64)
    for length in n:
        count = max(0, len(tokens) - length + 1)
        mixed = np.full(count, length, np.uint64)
        for offset in range(length):
            mixed = _mix(mixed + tokens[offset : offset + count])
        inside = owners[:count] == owners[length - 1 : length - 1 + count]
        yield (mixed[inside] % np.uint64(buckets)).astype(np.int64), owners[:count][inside]


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, after its increment: every bit of x reaches every bit of the result."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
