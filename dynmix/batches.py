"""What users hand over as a task, or as a domain's probe rows, made into batches that a model takes.

Knows tensors and token stores; no model, no mixture. Everything is materialised on the CPU once: a validation set is
read at every boundary, and iterating a user's DataLoader again would draw from the random state of the run.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynmix.mixture.dataset import PackedSequences
from dynmix.mixture.store import TokenStore

Batch = dict[str, Tensor]


def as_batches(source: Any, *, name: str, sequence_length: int, micro_batch: int) -> list[Batch]:
    """Return `source` as a list of batches with `input_ids` of shape [sequences, tokens].

    Args:
        source: an iterable of batches (dicts whose `input_ids` are 2-D: a list, a DataLoader), a sequence of examples
            (dicts whose `input_ids` are 1-D, of any lengths: a `datasets.Dataset`), a `TokenStore` or a store's path,
            which is cut into rows of `sequence_length` tokens.
        name: what an error calls it.
        sequence_length: tokens a row cut from a store.
        micro_batch: sequences a batch made from examples or rows.

    Raises:
        ValueError: nothing in it, or items that are no dicts with `input_ids` of one or two dimensions.
    """
    if isinstance(source, str | os.PathLike):
        source = TokenStore.open(Path(source))
    if isinstance(source, TokenStore):
        source = PackedSequences(source, sequence_length)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        # A Sequence without __iter__ is fine for Python's iter(), so only what is neither ends here.
        if isinstance(source, Mapping) or not hasattr(source, "__getitem__"):
            raise ValueError(f"{name}: expected batches, examples or a token store, got {type(source).__name__}")
        source = [source[i] for i in range(len(source))]
    batches: list[Batch] = []
    examples: list[Mapping[str, Any]] = []
    for number, item in enumerate(source):
        if not isinstance(item, Mapping) or "input_ids" not in item:
            raise ValueError(f"{name}: item {number} is no dict with 'input_ids' but {type(item).__name__}")
        ids = torch.as_tensor(item["input_ids"])
        if ids.ndim == 2 and ids.numel():
            batches.append({key: torch.as_tensor(value) for key, value in item.items() if _is_numeric(value)})
        elif ids.ndim == 1 and ids.numel():
            examples.append(item)
        else:
            raise ValueError(f"{name}: item {number} has input_ids of shape {tuple(ids.shape)}: 1-D or 2-D, not empty")
    batches += [collate(examples[i : i + micro_batch]) for i in range(0, len(examples), micro_batch)]
    if not batches:
        raise ValueError(f"{name}: it is empty; give at least one sequence")
    return batches


def collate(examples: Sequence[Mapping[str, Any]]) -> Batch:
    """Return one batch of examples padded on the right: `input_ids`, `labels` (-100 on padding), `attention_mask`."""
    ids = [torch.as_tensor(example["input_ids"]) for example in examples]
    labels = [torch.as_tensor(example.get("labels", example["input_ids"])) for example in examples]
    masks = [
        torch.as_tensor(example.get("attention_mask", torch.ones_like(i)))
        for example, i in zip(examples, ids, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad(ids, True), "labels": pad(labels, True, -100), "attention_mask": pad(masks, True)}
    if bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    else:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, Sequence) and not isinstance(value, str))
