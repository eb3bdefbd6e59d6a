"""Best-fit packing: which documents, or pieces of them, share a sequence, so that none is cut that need not be.

After Ding et al. 2024, "Fewer truncations improve language modeling" (arXiv 2404.10830). Knows documents by their
lengths alone, and nothing of their tokens, of domains or of datasets.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from dynmix.mixture.documents import Documents, Ints, enumerated
from dynmix.mixture.shared import SharedArray, shared


def best_fit(lengths: Ints, size: int) -> tuple[Ints, int]:
    """Pack items into bins by best-fit decreasing: each, longest first, goes where it leaves the least room.

    Items of one length are placed together, and so are bins with one room: a bin with room r takes r // length of them
    in a row, because what is left of it stays the best fit. A bin meets a length only while its room is at least that
    and leaves it with less than half, so there are O(n_lengths log size) steps in all, each on whole arrays.

    Returns the bin of each item, of 1 to `size`, and the number of bins, which are numbered as they are opened.
    """
    bin_of = np.empty(len(lengths), np.int64)
    narrow = lengths.astype(np.min_scalar_type(size))
    by_length = np.argsort(size - narrow, kind="stable")
    cuts = np.flatnonzero(np.diff(narrow[by_length])) + 1
    rooms: list[int] = []  # that open bins have, ascending
    bins_with: defaultdict[int, list[Ints]] = defaultdict(list)
    count = 0

    def leave(bins: Ints, room: int) -> None:
        if len(bins) and room:
            if not bins_with[room]:
                insort(rooms, room)
            bins_with[room].append(bins)

    for items in np.split(by_length, cuts):
        while len(items):
            length = int(lengths[items[0]])
            at = bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else size
            each = room // length
            needed = -(-len(items) // each)
            if at < len(rooms):
                bins = bins_with[room].pop()
                if not bins_with[room]:
                    del rooms[at]
                leave(bins[needed:], room)
                bins = bins[:needed]
            else:
                bins, count = np.arange(count, count + needed), count + needed
            placed, items = items[: len(bins) * each], items[len(bins) * each :]
            bin_of[placed] = np.repeat(bins, each)[: len(placed)]
            in_last = len(placed) - (len(bins) - 1) * each
            leave(bins[:-1], room - each * length)
            leave(bins[-1:], room - in_last * length)
    return bin_of, count


class Layout(NamedTuple):
    """Sequence r holds pieces rows[r] to rows[r + 1]; piece p is tokens starts[p] to starts[p] + lengths[p].

    Tokens are counted through all documents end to end. Unsigned integers as wide as they need to be: 10 to 14 bytes a
    document; worker processes share them.
    """

    starts: SharedArray
    lengths: SharedArray
    rows: SharedArray


def lay_out(documents: Documents, size: int, lead: int = 0) -> Layout:
    """The best-fit packing of documents into sequences of `size` tokens; always the same for the same lengths.

    A document that is longer than a sequence is cut into whole sequences first, and what remains is packed as a
    document of its own. Pieces stand in a sequence in the order of their documents; documents without tokens in none.
    Each piece takes `lead` more tokens than its own, for a BOS in front of it.
    """
    room = size - lead
    bounds = documents.starts(np.arange(len(documents) + 1))
    lengths = np.diff(bounds)
    whole = lengths // room  # of each document: pieces that fill a sequence
    document, number = enumerated(whole)
    first = bounds[document] + number * room
    lengths -= whole * room
    some = np.flatnonzero(lengths)
    rest, starts = lengths[some], (bounds[:-1] + whole * room)[some]
    bin_of, count = best_fit(rest + lead, size)
    order = np.argsort(bin_of, kind="stable")
    ends = np.cumsum(np.bincount(bin_of, minlength=count))
    n = len(first)
    return Layout(
        _narrow(np.concatenate([first, starts[order]]), documents.num_tokens),
        _narrow(np.concatenate([np.full(n, room), rest[order]]), size),
        _narrow(np.concatenate([np.arange(n + 1), n + ends]), n + len(rest)),
    )


def _narrow(values: Ints, top: int) -> SharedArray:
    return shared(values.astype(np.min_scalar_type(top)))
