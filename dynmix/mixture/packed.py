"""The stages of a schedule as JSON that stays small, however many there are.

A stage takes five characters a domain. Where all of them do not fit, the oldest are left out: what was drawn before
the first one that is kept stands for them. Knows rows of the stage table; nothing of names or of how they are drawn.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynmix.mixture.quota import TOTAL, Ints
from dynmix.mixture.stages import StageRow

_ROOM = 72_000  # characters of weights that a state has
# Newest stages that are kept in any case: the one that is read, and those that are published ahead. So many are kept up
# to the one at `since` too: a loader may have read further than the step that a state is of, into a later stage.
_ALWAYS = 4


class Unpacked(NamedTuple):
    """What a state says of its stages."""

    first: int  # number of the first
    starts: list[int]
    end: int | None  # declared, of the last one
    cdfs: list[Ints]
    drawn: Ints  # the first one's `base`, int64[n_domains]
    owed: Ints  # and its `owed`


def pack(rows: Sequence[StageRow], since: int | None) -> dict[str, Any]:
    """The newest of `rows` that fit, and those that hold at `since` or later and a few before, as JSON-able values."""
    weights: list[str] = []
    room = _ROOM
    for k, row in reversed(list(enumerate(rows))):
        needed = len(rows) - k <= _ALWAYS or (since is not None and rows[k + _ALWAYS].start > since)
        packed = _packed(row.cdf)
        room -= len(packed)
        if room < 0 and not needed:
            break
        weights.append(packed)
    kept = rows[len(rows) - len(weights) :]
    found = {
        "first": kept[0].number,
        "starts": [row.start for row in kept],
        "end": kept[-1].end,
        "weights": weights[::-1],
        **({"drawn": kept[0].base.tolist(), "owed": kept[0].owed.tolist()} if kept[0].number else {}),
    }
    return {**found, "check": _check(found)}


def unpack(stages: Mapping[str, Any], width: int) -> Unpacked:
    """The reverse of `pack`, for `width` domains. Raises ValueError if the state is damaged."""
    given = {key: value for key, value in stages.items() if key != "check"}
    if stages.get("check") != _check(given) or len(given["starts"]) != len(given["weights"]):
        raise ValueError("damaged state: its stages are not what was saved")
    try:
        cdfs = [_unpacked(text, width) for text in given["weights"]]
    except ValueError as error:
        raise ValueError(f"damaged state: {error}") from error
    before = (np.array(given.get(key, []), np.int64) for key in ("drawn", "owed"))
    drawn, owed = (np.pad(each, (0, width - len(each))) for each in before)
    return Unpacked(given["first"], given["starts"], given["end"], cdfs, drawn, owed)


def last_shares(schedule: Mapping[str, Any]) -> dict[str, float]:
    """Name -> weight of every domain in the last stage of a schedule's state. Raises ValueError if it is damaged."""
    cdfs = unpack(schedule["stages"], len(schedule["names"])).cdfs
    if not cdfs:
        raise ValueError("damaged state: it has no stage")
    return dict(zip(schedule["names"], (np.diff(cdfs[-1], prepend=0) / TOTAL).tolist(), strict=True))


def _packed(cdf: Ints) -> str:
    # What follows the last domain that is drawn is 2**32, which takes 33 bits, and need not be written.
    return base64.b85encode(cdf[cdf < TOTAL].astype("<u4").tobytes()).decode()


def _unpacked(text: str, width: int) -> Ints:
    values = np.frombuffer(base64.b85decode(text), "<u4").astype(np.int64)
    if len(values) >= width:
        raise ValueError(f"a stage has the weights of {len(values) + 1} domains, of {width}")
    return np.pad(values, (0, width - len(values)), constant_values=TOTAL)


def _check(found: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=8).hexdigest()
