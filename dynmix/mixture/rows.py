"""Rows of many domains as the items of one request.

Knows sequences and what items tell of their documents; nothing of positions or of how a domain's rows are numbered.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dynmix.mixture.boundaries import block_mask, mask_labels, position_ids
from dynmix.mixture.options import SequenceOptions
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.samples import Samples
from dynmix.mixture.sequences import PADDING, Ints, Rows, Sequences, documents, gather, labels


class Tables(NamedTuple):
    """Rows of domains that all lie in memory as they are, one behind the other."""

    dtype: np.dtype[np.integer]
    tokens: list[memoryview]  # of each domain


class Part(NamedTuple):
    """The rows of a request that are of one domain."""

    here: Ints  # which of the request's
    sequences: Any  # `Rows`, or the items by row
    rows: Ints
    where: str  # in errors


def tables_of(domains: Sequence[Sequences]) -> Tables:
    """Rows of all domains; none if those of one do not lie in memory, or are of another type than the others'."""
    found = [rows.table for rows in domains if isinstance(rows, PackedSequences) and rows.table is not None]
    if len(found) < len(domains) or len({table.dtype for table in found}) > 1:
        found = []
    return Tables(found[0].dtype if found else np.dtype(np.int64), [table.reshape(-1).data for table in found])


def direct(tables: Tables, length: int, domain: Ints, row: Ints) -> npt.NDArray[np.integer] | None:
    """Tokens of rows of `length`, [n, length].

    A slice for each is less work than a call for each domain, and bytes are joined with less than arrays. None where
    a domain is none of the tables', or an id is one that whoever reads it is to complain of.
    """
    numbers, starts, stops = domain.tolist(), (row * length).tolist(), (row * length + length).tolist()
    if not numbers or max(numbers) >= len(tables.tokens):
        return None
    rows = b"".join([tables.tokens[n][start:stop] for n, start, stop in zip(numbers, starts, stops, strict=True)])
    found = np.frombuffer(rows, tables.dtype).reshape(len(numbers), length)
    return None if found.dtype.kind == "i" and found.min() < 0 else found


def parts_of(sequences: Callable[[int], Any], names: Sequence[str], domain: Ints, row: Ints) -> list[Part]:
    """The rows of a request, domain by domain; `sequences` gives those of a domain by its number."""
    found = []
    for number in np.unique(domain).tolist():
        here, own = np.flatnonzero(domain == number), sequences(number)
        if not isinstance(own, Rows):  # an item may be tokenised as it is asked for: once is enough
            own = {each: own[each] for each in row[here].tolist()}
        found.append(Part(here, own, row[here], f"domain {names[number]!r}"))
    return found


def as_items(
    domain: Ints,
    length: int,
    tokens: npt.NDArray[np.integer] | None,
    parts: Sequence[Part],
    options: SequenceOptions | None,
) -> Samples:
    """Items of the rows of a request; `domain` is the number of each one's.

    `parts` are read where `tokens` were not found as they are, and with `options`, for labels and documents.
    """
    # Inputs and labels as one piece of memory, which the allocator keeps for the next request: two would go back to the
    # system each time, and to fill fresh pages takes longer than all else here. Labels are their own, because a
    # transform that masks them in place must not mask the inputs.
    both = np.empty((2, len(domain), length), np.int64)
    both[:] = _read(gather, parts, both[0].shape) if tokens is None else tokens
    batch = {"input_ids": torch.from_numpy(both[0]), "labels": torch.from_numpy(both[1])}
    if options is not None:
        for here, sequences, rows, where in parts:
            both[1, here] = labels(sequences, rows, both[0, here], where)
        owners = _read(documents, parts, both[0].shape)
        if options.boundaries is None:
            _check_begins(owners, parts)
        mask_labels(both[1], owners, options.ignore_token_ids, apart=options.boundaries is not None)
        if options.boundaries is not None:
            batch["position_ids"] = torch.from_numpy(position_ids(owners))
        if options.boundaries == "mask":
            batch["attention_mask"] = block_mask(owners)
    return Samples(batch, domain)


def _check_begins(owners: Ints, parts: Sequence[Part]) -> None:
    """Raise ValueError for padding in front of a text, where nothing keeps the model from reading it as the text's."""
    for here, _, rows, where in parts:
        begun = owners[here] != PADDING  # a row of nothing but padding has no text to mislead
        if (padded := ~begun[:, 0] & begun.any(axis=1)).any():
            raise ValueError(
                f"sequence {rows[padded][0]} of {where} begins with padding (attention_mask 0), which the text behind"
                ' it would attend to: pad at the end, or pass boundaries="position_ids"'
            )


def _read(read: Callable[[Sequences, Ints, int, str], Ints], parts: Sequence[Part], shape: tuple[int, ...]) -> Ints:
    """What `read` says of rows of one domain, for rows of many, int64[n, sequence_length]."""
    found = np.empty(shape, np.int64)
    for here, sequences, rows, where in parts:
        found[here] = read(sequences, rows, shape[1], where)
    return found
