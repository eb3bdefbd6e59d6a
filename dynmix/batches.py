"""What users hand over as a task, or as a domain's probe rows, made into batches that a model takes.

Knows tensors and token stores; no model, no mixture. Everything is materialised once: a validation set is read at
every boundary, and iterating a user's DataLoader again would draw from the random state of the run.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynmix.influence.batch import next_token_labels
from dynmix.influence.probes import spread_rows
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.sequences import Ints
from dynmix.mixture.store import TokenStore

logger = logging.getLogger("dynmix")

Batch = dict[str, Tensor]

_IDS = ("input_ids", "labels")
_INPUTS = (*_IDS, "attention_mask", "position_ids")


def as_batches(
    source: Any, *, name: str, sequence_length: int, micro_batch: int, sequences: int | None = None
) -> list[Batch]:
    """Return `source` as a list of batches with `input_ids` of shape [sequences, tokens].

    Args:
        source: an iterable of batches (dicts whose `input_ids` are 2-D: a list, a DataLoader), a sequence of examples
            (dicts whose `input_ids` are 1-D, of any lengths: a `datasets.Dataset`), each of which is read whole, a
            `TokenStore` or a store's path, which is cut into rows of `sequence_length` tokens.
        name: what an error calls it.
        sequence_length: tokens per row cut from a store.
        micro_batch: sequences per batch made from examples or rows.
        sequences: how many examples or rows are taken at most, evenly spread over all; None: all. Batches that are
            given as such are taken as they are.

    Raises:
        ValueError: nothing in it, or items that are no dicts with `input_ids` of one or two dimensions.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_file() and path.suffix not in (".bin", ".idx") and not Path(f"{path}.idx").is_file():
            raise ValueError(
                f"{name}: {path} is no token store (.idx with .bin): a file of questions or text is read by "
                "Task.from_jsonl(path, tokenizer), and `dynmix prepare` makes stores of text"
            )
        try:
            source = TokenStore.open(path)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from problem
    if isinstance(source, TokenStore):
        source = PackedSequences(source, sequence_length)
        if not len(source):
            raise ValueError(
                f"{name}: {source.store.path} has {len(source.store.tokens)} tokens, not one sequence of "
                f"{sequence_length}; give more text"
            )
        if sequences is not None and len(source) > sequences:
            source = [source[row] for row in spread_rows(len(source), sequences)]
    if isinstance(source, Mapping) or not (isinstance(source, Iterable) or hasattr(source, "__getitem__")):
        raise ValueError(f"{name}: expected batches, examples or a token store, got {type(source).__name__}")
    if not isinstance(source, Iterable):  # as a torch Dataset, which has __getitem__ and __len__
        source = [source[i] for i in range(len(source))]
    batches: list[Batch] = []
    examples: list[Mapping[str, Any]] = []
    for number, item in enumerate(source):
        if not isinstance(item, Mapping) or item.get("input_ids") is None:
            has = f" of {sorted(item)}" if isinstance(item, Mapping) else ""
            raise ValueError(f"{name}: item {number} is no dict with 'input_ids' but a {type(item).__name__}{has}")
        found = {key: torch.as_tensor(item[key]) for key in _INPUTS if item.get(key) is not None}
        # Of a store or a memory map they are unsigned, which torch hardly computes with. Masks are as the model wants.
        found |= {key: ids.long() for key, ids in found.items() if key in _IDS and not ids.is_floating_point()}
        _check_item(found, f"{name}: item {number}")
        ids = found["input_ids"]
        if ids.ndim == 2 and ids.numel():
            batches.append(found)
        elif ids.ndim == 1 and ids.numel():
            examples.append(found)
        else:
            raise ValueError(f"{name}: item {number} has input_ids of shape {tuple(ids.shape)}: 1-D or 2-D, not empty")
    if sequences is not None and len(examples) > sequences:
        logger.info("%s: %d of its %d sequences are used, evenly spread", name, sequences, len(examples))
        examples = [examples[i] for i in spread_rows(len(examples), sequences)]
    _warn_of_documents(examples, sequence_length, name)
    batches += [collate(examples[i : i + micro_batch]) for i in range(0, len(examples), micro_batch)]
    if not batches:
        raise ValueError(f"{name}: it is empty; give at least one sequence")
    return batches


def _warn_of_documents(examples: Sequence[Mapping[str, Any]], sequence_length: int, name: str) -> None:
    """Say it where examples are texts that no sequence holds: they cost memory, and nobody trains on such positions.

    An example with labels is a question, as long as who made it wants it.
    """
    lengths = [len(example["input_ids"]) for example in examples if "labels" not in example]
    if (longer := sum(length > sequence_length for length in lengths)) > 0:
        logger.warning(
            "%s: %d of its %d sequences are longer than the %d tokens of a sequence, up to %d, and are read whole: give"
            " documents as a token store (TokenStore.write), which is cut into sequences",
            name,
            longer,
            len(examples),
            sequence_length,
            max(lengths),
        )


def _check_item(item: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError for ids that are no tokens, and for labels of other tokens, which padding would hide."""
    ids = item["input_ids"]
    if ids.numel() and (ids.is_floating_point() or int(ids.min()) < 0):
        raise ValueError(f"{where} has input_ids of {ids.dtype} from {ids.min():g} on: give numbers of tokens, from 0")
    labels, mask = (item.get(key, ids).shape for key in ("labels", "attention_mask"))
    if labels != ids.shape:
        raise ValueError(f"{where} has labels of shape {list(labels)} for input_ids of {list(ids.shape)}: one a token")
    if mask[-1:] != ids.shape[-1:]:
        raise ValueError(f"{where} has an attention_mask of shape {list(mask)} for input_ids of {list(ids.shape)}")


def collate(examples: Sequence[Mapping[str, Any]]) -> Batch:
    """Return one batch of examples padded on the right: `input_ids`, `labels` (-100 on padding), `attention_mask`.

    Examples of packed documents, of one length, keep what holds these apart: `position_ids`, or an `attention_mask` of
    [1, tokens, tokens].
    """
    if "position_ids" in examples[0] or torch.as_tensor(examples[0].get("attention_mask", 0)).ndim > 1:
        names = [name for name in _INPUTS if name in examples[0]]
        return {name: torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in names}
    ids = [torch.as_tensor(example["input_ids"]) for example in examples]
    labels = [torch.as_tensor(example.get("labels", example["input_ids"])) for example in examples]
    masks = [torch.as_tensor(e.get("attention_mask", torch.ones_like(i))) for e, i in zip(examples, ids, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad(ids, True), "labels": pad(labels, True, -100), "attention_mask": pad(masks, True)}
    if bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    else:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def by_length(lengths: Ints, batch_tokens: int) -> Iterator[Ints]:
    """Numbers of the sequences of each batch, the longest first, so that what does not fit into memory shows at once.

    A batch has at most `batch_tokens` tokens, padding included, or a single sequence.
    """
    order, start = np.argsort(-lengths, kind="stable"), 0
    while start < len(order):
        stop = start + max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start:stop]
        start = stop


def split(batches: Iterable[Batch], size: int) -> list[Batch]:
    """Return the batches with those of more than `size` sequences cut into such of at most as many."""
    return [
        {key: x[i : i + size] if len(x) == len(batch["input_ids"]) else x for key, x in batch.items()}
        for batch in batches
        for i in range(0, len(batch["input_ids"]), size)
    ]


def scored_sequence(batches: Iterable[Batch], name: str) -> Batch:
    """Return the first sequence that has a scored token, as a batch of one; raise ValueError if there is none."""
    for batch in batches:
        scored = (next_token_labels(batch) != -100).any(dim=1).nonzero()
        if len(scored):
            row = int(scored[0])
            return {key: value[row : row + 1] for key, value in batch.items()}
    raise ValueError(f"{name}: no sequence has a token to score: every label is -100, masked or first of its sequence")
