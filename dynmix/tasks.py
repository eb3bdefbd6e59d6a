"""Validation sets that are both an objective of influence and an evaluation.

Knows examples, tokenizers and models; no mixture, no curvature and no trainer. As a sequence of examples a
`Task` goes wherever the package takes one; `Task.evaluate` scores a model on it.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Self, overload

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynmix.batches import Batch, by_length, collate
from dynmix.influence.batch import next_token_labels, next_token_logits
from dynmix.influence.isolation import isolated, unwrap
from dynmix.influence.probes import spread_rows
from dynmix.influence.sets import mean_and_error
from dynmix.scores import Metric
from dynmix.task_records import Record as Record  # part of this module's names
from dynmix.task_records import read_records

TIE = 1e-6
"""Log-likelihoods that differ by less, relative to the best, are equal: float32 does not tell them apart."""


@dataclass(frozen=True)
class TaskScore:
    """How well a model does on a task; the standard errors are over its examples, infinite for a single one.

    Attributes:
        loss: nats per gold token, over all of them.
        bits_per_byte: bits per UTF-8 byte of the gold texts, over all of them: comparable between tokenizers.
        accuracy: share of the examples with choices whose gold is the likeliest one; None if there are none.
        loss_standard_error, bits_per_byte_standard_error, accuracy_standard_error: of these, in their units.
        examples: how many the task has.
    """

    loss: float
    loss_standard_error: float
    bits_per_byte: float
    bits_per_byte_standard_error: float
    accuracy: float | None
    accuracy_standard_error: float | None
    examples: int

    def metric(self, name: Metric) -> float:
        """Return one of the figures by name; raise ValueError for an accuracy that the task does not have."""
        value = {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "accuracy": self.accuracy}[name]
        if value is None:
            raise ValueError("a task without choices has no accuracy: use metric='loss' or 'bits_per_byte'")
        return value


class _Piece(NamedTuple):
    """A sequence for the model, and how many tokens at its end are scored."""

    ids: Tensor  # int64[tokens]
    scored: int

    def example(self) -> dict[str, Tensor]:
        labels = self.ids.clone()
        labels[: -self.scored] = -100
        return {"input_ids": self.ids, "labels": labels}


class Task(Sequence[dict[str, Tensor]]):
    """A sequence of examples {"input_ids": int64[tokens], "labels": -100 but on the gold tokens}, which can evaluate.

    An example is what the model reads at once: a gold text that is longer than `max_length` gives several.

    Texts become tokens as in lm-evaluation-harness: a gold's or choice's tokens are those of context and text together
    beyond those of the context; white space that ends the context is counted to the text, where tokenizers put it. An
    empty context is the tokenizer's BOS or EOS token; no other special token is added.

    Args:
        name: of the task, for errors.
        records: its examples, at least one.
        tokenizer: of the models that will be scored.
        max_length: tokens of a sequence at most. Of longer ones the context is cut from the left; a gold or choice that
            alone is too long is scored in consecutive pieces, each after one token of what stands before it.
        metric: how accuracy compares choices: "choice" by log-likelihood per UTF-8 byte, "pair" by log-likelihood;
            "auto": "pair" if every record that has choices has two of them and no context (as BLiMP's minimal pairs).

    Raises:
        ValueError: no records, a text that adds no token to its context, an empty context where the tokenizer has
            neither BOS nor EOS, `metric` without any choices, `max_length` below 2.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        metric: Literal["auto", "choice", "pair"] = "auto",
    ):
        if not records:
            raise ValueError(f"task {name!r} is empty: give at least one example")
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: at least 2, a token to score and one before it")
        if metric not in ("auto", "choice", "pair"):
            raise ValueError(f"metric={metric!r}: 'auto', 'choice' or 'pair'")
        chosen = [record for record in records if record.choices]
        if metric != "auto" and not chosen:
            raise ValueError(f"metric={metric!r}: no example of task {name!r} has choices")
        if metric == "auto":
            pairs = all(len(record.choices) == 2 and not record.context for record in chosen)
            metric = "pair" if pairs else "choice"
        self.name, self.records, self.max_length, self.has_choices = name, tuple(records), max_length, bool(chosen)
        self._per_byte = metric == "choice"
        self._tokenizer = tokenizer
        self._gold = self._encode([(record, record.gold) for record in self.records])
        self._examples = [piece.example() for text in self._gold for piece in text]

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str],
        *,
        name: str | None = None,
        max_length: int = 1024,
        limit: int | None = None,
        metric: Literal["auto", "choice", "pair"] = "auto",
    ) -> Self:
        """Read a `.jsonl` or `.jsonl.gz` file of examples, one JSON object a line.

        A record is `{"context": str, "gold": str, "choices": list[str] or null}`, where gold and choices begin with
        the space that separates them from the context, or a document `{"text": str}`, which is all gold. Other fields
        are passed over.

        Args:
            path: the file.
            tokenizer: a transformers tokenizer, or the folder or name of one.
            name: of the task; None: the file's name without its suffix.
            max_length: as in `Task`.
            limit: so many examples are taken, evenly spread over the file; None: all.
            metric: as in `Task`.

        Raises:
            ValueError: as in `Task`, and for a record that is not as above, with file, line and field.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit}: at least 1 example")
        path = Path(path)
        if isinstance(tokenizer, str | os.PathLike):
            try:
                tokenizer = AutoTokenizer.from_pretrained(tokenizer)
            except (OSError, ValueError) as problem:
                raise ValueError(f"tokenizer={str(tokenizer)!r}: no folder or name of a tokenizer: {problem}") from None
        records = read_records(path)
        if not records:
            raise ValueError(f"{path}: no examples in it")
        records = [records[i] for i in spread_rows(len(records), limit)]
        stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
        return cls(name or stem, records, tokenizer, max_length=max_length, metric=metric)

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        return self._examples[index]

    def __repr__(self) -> str:
        return f"Task({self.name!r}, examples={len(self.records)}, sequences={len(self)})"

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that a score of this task depends on, beside the model."""
        digest = hashlib.blake2b(repr((self.max_length, self._per_byte)).encode(), digest_size=16)
        for record, text in zip(self.records, self._gold, strict=True):
            tokens = [(piece.ids.tolist(), piece.scored) for piece in text]
            digest.update(json.dumps([record.context, record.gold, record.choices, tokens]).encode())
        return digest.hexdigest()

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if the model cannot read this task: sequences too long, tokens it does not have."""
        config = getattr(unwrap(model), "config", None)
        pieces = [piece for text in (*self._gold, *self._others) for piece in text]
        limit = getattr(config, "max_position_embeddings", None)
        if limit and (longest := max(len(piece.ids) for piece in pieces)) > limit:
            raise ValueError(
                f"task {self.name!r} has a sequence of {longest} tokens, the model takes {limit} at most "
                f"(max_position_embeddings): make the task with max_length={limit}"
            )
        vocabulary = getattr(config, "vocab_size", None)
        if vocabulary and (largest := max(int(piece.ids.max()) for piece in pieces)) >= vocabulary:
            raise ValueError(
                f"task {self.name!r} has token {largest}, the model's vocabulary has {vocabulary}: make the task with "
                "the model's own tokenizer"
            )

    def evaluate(self, model: nn.Module, *, batch_tokens: int = 8192) -> TaskScore:
        """Score a causal LM, in eval mode and without leaving a trace in it.

        Args:
            model: of transformers, or any module whose forward returns logits [B, T, V]; also wrapped. In a sharded run
                every process must call this.
            batch_tokens: tokens of a forward pass, padding included (one sequence at least). Its logits take at most
                batch_tokens x vocabulary x 4 bytes, twice.

        Raises:
            ValueError: as `check`; or `batch_tokens` below 1.
        """
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens}: at least 1")
        self.check(model)
        texts = [*self._gold, *self._others]
        pieces = [piece for text in texts for piece in text]
        owners = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        nats = np.bincount(owners, weights=_nats(unwrap(model), pieces, batch_tokens)).astype(np.float64)
        tokens = np.bincount(owners, weights=[piece.scored for piece in pieces]).astype(np.float64)
        n = len(self.records)
        gold_bytes = np.array([len(record.gold.encode()) for record in self.records], dtype=np.float64)
        loss, loss_error = mean_and_error(nats[:n], tokens[:n])
        bits, bits_error = mean_and_error(nats[:n] / math.log(2), gold_bytes)
        accuracy, accuracy_error = self._accuracy(nats) if self.has_choices else (None, None)
        return TaskScore(loss, loss_error, bits, bits_error, accuracy, accuracy_error, n)

    def _accuracy(self, nats: NDArray[np.float64]) -> tuple[float, float]:
        """Return accuracy and standard error; `nats` is of the gold texts, then of `_others`. Ties share the credit."""
        credits, following = [], len(self.records)
        for i, record in enumerate(self.records):
            if not record.choices:
                continue
            wrong = [choice for choice in record.choices if choice != record.gold]
            own = np.array([-nats[i], *-nats[following : following + len(wrong)]])
            following += len(wrong)
            if self._per_byte:
                own /= [len(choice.encode()) for choice in (record.gold, *wrong)]
            best = own.max()
            likeliest = own >= best - TIE * abs(best)
            credits.append(likeliest[0] / likeliest.sum() if not np.isnan(best) else math.nan)
        return mean_and_error(np.array(credits), np.ones(len(credits)))

    @cached_property
    def _others(self) -> list[list[_Piece]]:
        """The choices that are not gold, record by record."""
        return self._encode([(record, c) for record in self.records for c in record.choices if c != record.gold])

    def _encode(self, texts: Sequence[tuple[Record, str]]) -> list[list[_Piece]]:
        if not texts:
            return []
        contexts = [record.context.rstrip() for record, _ in texts]
        wholes = [record.context + text for record, text in texts]
        # In one call, and each context once: the choices of a record share it.
        strings = list(dict.fromkeys(contexts + wholes))
        encoded = self._tokenizer(
            strings, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False,
            verbose=False,
        )["input_ids"]  # fmt: skip
        ids: dict[str, list[int]] = dict(zip(strings, encoded, strict=True))
        return [
            self._pieces(record, ids[context], ids[whole])
            for (record, _), context, whole in zip(texts, contexts, wholes, strict=True)
        ]

    def _pieces(self, record: Record, context: list[int], whole: list[int]) -> list[_Piece]:
        scored = len(whole) - len(context)
        if scored < 1:
            raise ValueError(
                f"{record.where}: its gold or one of its choices adds no token to the context: begin it with a space"
            )
        if not context:
            whole = [self._prefix(record), *whole]
        room = self.max_length - 1
        if scored <= room:
            return [_Piece(torch.tensor(whole[-self.max_length :]), scored)]
        starts = range(len(whole) - scored, len(whole), room)
        return [_Piece(torch.tensor(part := whole[start - 1 : start + room]), len(part) - 1) for start in starts]

    def _prefix(self, record: Record) -> int:
        tokenizer = self._tokenizer
        prefix: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix is None:
            raise ValueError(
                f"{record.where}: an empty context needs a token in front of the gold, and the tokenizer has neither "
                "BOS nor EOS: set tokenizer.bos_token"
            )
        return prefix


def _nats(model: nn.Module, pieces: Sequence[_Piece], batch_tokens: int) -> NDArray[np.float64]:
    """Return minus the log-likelihood of each piece's scored tokens, in the order given."""
    device = next(model.parameters()).device
    nats = np.empty(len(pieces))
    order = np.argsort([piece.scored for piece in pieces], kind="stable")  # so of one length, as many logits
    lengths = np.array([len(pieces[row].ids) for row in order])
    with isolated(model), torch.no_grad():
        for batch in by_length(lengths, batch_tokens):
            rows = order[batch]
            nats[rows] = _summed_losses(model, collate([pieces[row].example() for row in rows]), device)
    return nats


def _summed_losses(model: nn.Module, batch: Batch, device: torch.device) -> NDArray[np.float64]:
    """As `next_token_loss`, with logits only from the first position on that is scored in any sequence of the batch."""
    labels = next_token_labels(batch)
    first = int((labels != -100).any(dim=0).nonzero()[0])
    kept = labels.shape[1] + 1 - first
    inputs = {key: value.to(device) for key, value in batch.items()}
    # Models that do not know `logits_to_keep` are not given it and return all of them.
    logits = next_token_logits(model, {**inputs, "logits_to_keep": kept})[:, -kept:-1]
    scored = labels[:, first:].to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), scored.flatten(), ignore_index=-100, reduction="none")
    found: NDArray[np.float64] = losses.view(scored.shape).cpu().double().sum(1).numpy()
    return found
