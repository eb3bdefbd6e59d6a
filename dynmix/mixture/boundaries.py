"""What a model is told of the documents in a sequence: labels, positions that restart, masks, lengths.

Knows token ids and the number of each token's document; nothing of where they come from.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from dynmix.mixture.sequences import PADDING, Ints

Boundaries = Literal["position_ids", "mask"]

IGNORED = -100
"""Label of what is not to be learnt: torch's and transformers' `ignore_index`."""

_BLANK = {"labels": IGNORED, "position_ids": 0}


def firsts(documents: Ints) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where a document begins, bool[n, length]; a sequence's first token always does, and so does padding."""
    found = np.ones(documents.shape, bool)
    np.not_equal(documents[:, 1:], documents[:, :-1], out=found[:, 1:])
    return found


def mask_labels(labels: Ints, documents: Ints, ignored: Sequence[int], apart: bool) -> None:
    """Set labels of padding and of `ignored` ids to -100, in place; `labels` and `documents` are int64[n, length].

    If documents are read `apart`, there is nothing to predict the first token of one from: it is -100 too.
    """
    if ignored:
        labels[np.isin(labels, ignored)] = IGNORED
    labels[documents == PADDING] = IGNORED
    if apart:
        labels[firsts(documents)] = IGNORED


def position_ids(documents: Ints) -> Ints:
    """Position of each token within its document, int64[n, length]; padding counts as a document.

    What transformers' models take as such, without an attention mask, to keep the documents of a sequence apart.
    """
    at = np.arange(documents.shape[1])
    begin: Ints = np.maximum.accumulate(np.where(firsts(documents), at, 0), axis=1)
    return at - begin


def block_mask(documents: Ints) -> Tensor:
    """What to add to attention's scores, float32[n, 1, length, length]: -inf to other documents and ahead, else 0."""
    numbers = torch.from_numpy(documents)
    same = numbers[:, :, None] == numbers[:, None, :]
    return torch.zeros(same.shape).masked_fill_(~same.tril_(), -torch.inf)[:, None]


def check_collate(collate_fn: Callable[[Any], Any], item: Mapping[str, Any], boundaries: Boundaries | None) -> None:
    """Raise ValueError if a collate function replaces what an item says of its documents and its labels.

    It is shown the item with no label to learn and with all positions 0, so that whatever it gives else is its own. A
    batch that is no mapping tells nothing.
    """
    flat = {name: torch.full_like(item[name], value) for name, value in _BLANK.items() if name in item}
    try:
        batch = collate_fn([{**item, **flat}, {**item, **flat}])
    except Exception:  # of a batch of the data it will say so itself
        return
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return
    mask = batch.get("attention_mask")
    dimensions = np.ndim(mask) if mask is not None else 0
    found = [
        f"makes its own {name}"
        for name, value in _BLANK.items()
        if name in flat and any(bool((torch.as_tensor(each) != value).any()) for each in batch.get(name, ()))
    ]
    if boundaries is not None:
        lengths = any(name.startswith("cu_seq") for name in batch)
        if dimensions == 2:
            found.append("adds a 2-D attention_mask")
        if boundaries == "mask" and dimensions < 2:
            found.append("drops the attention_mask")
        if boundaries == "position_ids" and "position_ids" not in batch and dimensions < 3 and not lengths:
            found.append("drops the position_ids")
    if found:
        inner = getattr(collate_fn, "data_collator", collate_fn)  # in the Trainer's wrapper
        name = getattr(inner, "__qualname__", type(inner).__name__)
        raise ValueError(
            f"the loader's collate function ({name}) {' and '.join(found)}, so that what the dataset says of documents"
            " and labels would be lost: pass data_collator=transformers.default_data_collator to the Trainer, or"
            " collate_fn=None or dynmix.mixture.boundaries.varlen_collate to a DataLoader. (Trainer has one of its own"
            " where it is given a processing_class, and drops what the model's forward does not take, and SFTTrainer"
            " position_ids too, unless it is given remove_unused_columns=False.)"
        )


def varlen_collate(items: list[Any]) -> dict[str, Any]:
    """`default_collate`, with what variable-length attention kernels need to keep documents apart in a batch of rows.

    Without it transformers' flash attention takes a batch of more than one row for unpacked, and documents see those
    before them in their row. Adds `cu_seq_lens_q`, `cu_seq_lens_k` (int32[documents + 1], where each begins in the rows
    end to end, and the end), `max_length_q` and `max_length_k` (ints) to items with `position_ids`; a transformers
    model hands them on, and the shape of the batch stays.

    Raises:
        ValueError: items without `position_ids`.
    """
    batch: dict[str, Any] = default_collate(items)
    if "position_ids" not in batch:
        raise ValueError('items have no position_ids: make the dataset with boundaries="position_ids"')
    flat = batch["position_ids"].flatten()
    ends = torch.cat([torch.nonzero(flat == 0).flatten(), torch.tensor([len(flat)])]).to(torch.int32)
    longest = int(ends.diff().max())
    return batch | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
