"""What a batch is, and the next-token loss of its sequences.

Knows what causal language models take and give; nothing of layers, gradients or curvature.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dynmix.influence.isolation import unwrap

Batch = Mapping[str, Any]
"""What the model takes: `input_ids` [B, T], and `labels`, `attention_mask` [B, T] if there are any; on any device."""

Batches = Iterable[Batch]
"""A list or a DataLoader: something that can be read more than once and gives the same sequences each time."""

Sets = Mapping[str, Batches]
"""Batches by the name of the domain or the task that they are of."""

Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
"""(model, batch) -> (loss of each sequence, summed over its tokens in nats [B]; scored tokens of each [B])."""


def next_token_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, T, V] in float32 at least. Keys that the model's forward does not name ("domain") are left out."""
    inner = unwrap(model)
    name, otherwise = type(inner).__name__, "or outside of a run give a loss="
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        # Its decoder is fed the labels moved by one, so that its logits are those of the token before.
        raise TypeError(
            f"{name} is an encoder-decoder, and the next-token loss is that of a causal LM: take a causal LM, "
            f"{otherwise}"
        )
    accepted = set(inspect.signature(inner.forward).parameters)
    if accepted <= {"args", "kwargs"}:  # a wrapper that hands on what it gets, as PEFT's
        accepted = {"input_ids", "attention_mask", "position_ids"}
    if not accepted & set(batch):
        raise TypeError(
            f"{name}.forward takes {', '.join(sorted(accepted))} and none of a batch's {', '.join(sorted(batch))}: let "
            f"its forward, or that of a module around it, take input_ids and return logits [B, T, V], {otherwise}"
        )
    inputs = {key: value for key, value in batch.items() if key in accepted and key != "labels"}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    output = model(**inputs)
    logits = logits_of(output)
    if logits is None:
        raise TypeError(
            f"{name}.forward returned {type(output).__name__} without logits [B, T, V]: let it return them, alone, as "
            f"output.logits or output['logits'], or first in a tuple, {otherwise}"
        )
    if type(output).__name__ == "MaskedLMOutput":  # of transformers
        raise TypeError(
            f"{name} is a masked LM, whose tokens see those that follow, and the next-token loss is that of a causal "
            f"LM: take a causal LM, {otherwise}"
        )
    ids = inputs.get("input_ids")
    if ids is not None and "logits_to_keep" not in inputs and logits.shape[:2] != ids.shape:
        raise ValueError(
            f"{name}.forward returned logits of {list(logits.shape[:2])} positions for input_ids of {list(ids.shape)}: "
            "let it return one for each token (prompt and p-tuning have some of their own in front, and some models "
            f"keep the last alone without labels), {otherwise}"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def logits_of(output: Any) -> Tensor | None:
    """The logits [B, T, V] in what a causal LM returned, if it returned them: of a tuple first, or after the loss."""
    if isinstance(output, tuple):
        # A loss of None, where there are no labels.
        loss_first = len(output) > 1 and (output[0] is None or (isinstance(output[0], Tensor) and output[0].ndim == 0))
        output = output[1 if loss_first else 0]
    if isinstance(output, Mapping):
        output = output.get("logits")
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.ndim == 3 else None


def next_token_labels(batch: Batch) -> Tensor:
    """Label of each position that has one, already shifted, [B, T-1]; -100 is ignored.

    Without `labels` every token is the label of the position before it, except where `attention_mask` is 0.
    """
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        if "input_ids" not in batch:
            raise ValueError(f"a batch needs `input_ids` or `labels` for the next-token loss, got keys {sorted(batch)}")
        labels = batch["input_ids"]
        if (mask := batch.get("attention_mask")) is not None:
            labels = labels.masked_fill(mask == 0, -100)
    return labels[:, 1:]


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of a causal LM: per sequence its sum over the scored tokens in nats [B], and their number [B]."""
    logits, labels = next_token_logits(model, batch), F.pad(next_token_labels(batch), (0, 1), value=-100)
    # The last position has no label: to score it as ignored spares a copy of all the others' logits.
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape).sum(1), (labels != -100).sum(1)


def token_mask(batch: Batch) -> Tensor:
    """Which tokens are real, bool [B, T]: `attention_mask`, else all of `input_ids`, else one token a sequence.

    With padding on the left the last one of it predicts the first token; what predicts a scored token is real.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        real = torch.as_tensor(mask != 0)
        predicted = batch["labels"] if batch.get("labels") is not None else batch.get("input_ids")
        if predicted is not None and predicted.shape == mask.shape:
            real[:, :-1] |= next_token_labels(batch) != -100
        return real
    if (ids := batch.get("input_ids")) is not None:
        return torch.ones_like(ids, dtype=torch.bool)
    first = next(value for value in batch.values() if isinstance(value, Tensor))
    return torch.ones(len(first), 1, dtype=torch.bool, device=first.device)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors there."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def checked(batch: Batch) -> Batch:
    """The batch, or a TypeError or ValueError that says what a batch is."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch is a dict with `input_ids` of shape [B, T], got {type(batch).__name__}")
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim != 2:
        raise ValueError(f"`input_ids` must have shape [B, T], got {list(ids.shape)}: collate the samples into batches")
    if not any(isinstance(value, Tensor) for value in batch.values()):
        raise TypeError(f"a batch must hold tensors, got keys {sorted(batch)} without any")
    return batch


def check_fits(model: nn.Module, batches: Iterable[Batch], where: str) -> None:
    """Raise ValueError, beginning with `where`, if the model cannot read the batches, as far as its `config` says.

    That is a token outside its vocabulary, or a sequence longer than its table of positions. Models that compute
    positions read longer ones, too.
    """
    config = getattr(unwrap(model), "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    vocabulary, limit = (getattr(config, key, None) for key in ("vocab_size", "max_position_embeddings"))
    vocabulary = vocabulary if isinstance(vocabulary, int) else sys.maxsize
    positions = limit if isinstance(limit, int) and has_positions(unwrap(model), limit) else sys.maxsize
    for batch in batches:
        ids, places = batch["input_ids"], batch.get("position_ids")
        if (largest := int(ids.max())) >= vocabulary:
            raise ValueError(
                f"{where} has token {largest}, the model's vocabulary has {vocabulary}: make it with the model's own "
                "tokenizer"
            )
        if (length := ids.shape[1] if places is None else int(places.max()) + 1) > positions:
            raise ValueError(
                f"{where} has a sequence of {length} tokens, the model takes {positions} at most "
                "(max_position_embeddings): lower sequence_length, or of a Task max_length"
            )


def has_positions(model: nn.Module, limit: int) -> bool:
    """Whether a model has learnt embeddings of so many positions, by what they are called; OPT's has two rows more."""
    tables = (each for name, each in model.named_modules() if re.search("(?<![a-z])(position|pos_emb|wpe)", name))
    return any(isinstance(each, nn.Embedding) and limit <= each.num_embeddings <= limit + 2 for each in tables)


def checked_loss(found: Any, sequences: int) -> tuple[Tensor, Tensor]:
    """What a loss returned, or a TypeError that says what it is to be: a number and a count for each sequence."""
    pair = found if isinstance(found, tuple | list) else (found,)
    if len(pair) == 2 and all(isinstance(x, Tensor) and x.shape == (sequences,) for x in pair):
        return pair[0], pair[1]
    got = ", ".join(f"{type(x).__name__} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in pair)
    raise TypeError(
        f"loss= returned ({got}) for {sequences} sequences: let it return two tensors of shape [{sequences}], the loss"
        " of each sequence summed over its tokens, and how many tokens of it are scored"
    )
