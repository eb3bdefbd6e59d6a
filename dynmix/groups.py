"""Groups of a regrouped corpus on disk, and as the domains of a run: views on the stores, with their weights.

    groups.json      the weights, and the stores that the groups are of
    groups.parquet   group, domain, id (sequence or document number), tokens and joint influence, the best first

Knows files, stores and views; nothing of how the groups were made.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dynmix.mixers.regroup import Group
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import DocumentView, RowView
from dynmix.scores import SampleScores
from dynmix.scoring.corpus import Unit
from dynmix.shown import Bar
from dynmix.whole_file import whole_file, write_json

_ROWS = 1 << 20  # samples written at once: seconds of work


def write_groups(
    folder: str | os.PathLike[str],
    groups: Sequence[Group],
    weights: Mapping[str, float],
    scores: SampleScores,
    stores: Mapping[str, str | os.PathLike[str]],
    *,
    unit: Unit,
    sequence_length: int,
) -> None:
    """Write groups so that `open_groups` finds them; each file is there whole or not at all, `groups.json` last.

    Args:
        folder: where to.
        groups, weights: as `regroup` and `group_weights` return them.
        scores: what was regrouped.
        stores: the token store of each of the scores' domains.
        unit, sequence_length: what a sample is, as it was scored.

    Raises:
        ValueError: a domain without a store.
    """
    if missing := [name for name in scores.domains if name not in stores]:
        raise ValueError(f"there is no store for domain {missing[0]!r}: there are {sorted(stores)}")
    folder = Path(folder)
    members = np.concatenate([group.members for group in groups])
    numbers = np.repeat(np.arange(len(groups), dtype=np.int32), [len(group.members) for group in groups])
    domains = scores.domain[members].astype(np.int32)
    table = pa.table(
        {
            "group": pa.DictionaryArray.from_arrays(numbers, [group.name for group in groups]),
            "domain": pa.DictionaryArray.from_arrays(domains, list(scores.domains)),
            "id": scores.row[members].astype(np.int64),
            "tokens": scores.tokens[members].astype(np.int64),
            "influence": np.concatenate([np.where(np.isfinite(g.joint), g.joint, np.nan) for g in groups]),
        }
    )
    facts = {
        "unit": unit,
        "sequence_length": sequence_length,
        "weights": dict(weights),
        "tokens": {group.name: group.tokens for group in groups},
        "stores": {
            name: {"path": str(Path(stores[name]).absolute()), "fingerprint": TokenStore.open(stores[name]).fingerprint}
            for name in scores.domains
        },
    }
    (folder / "groups.json").unlink(missing_ok=True)  # it would be of other groups
    with (
        whole_file(folder / "groups.parquet") as beside,
        pq.ParquetWriter(beside, table.schema, write_page_checksum=True) as file,
    ):
        for start in Bar(range(0, len(table), _ROWS), desc="writing groups", unit="part"):
            file.write_table(table.slice(start, _ROWS))
    write_json(folder / "groups.json", facts)


def open_groups(
    folder: str | os.PathLike[str], stores: str | os.PathLike[str] | None = None
) -> tuple[dict[str, RowView | DocumentView], dict[str, float]]:
    """Return the groups that have weight as domains of a `MixtureDataset`, and their weights.

        domains, weights = open_groups("groups")
        dataset = MixtureDataset(domains, weights, num_samples=100_000, sequence_length=2048)

    Groups of documents may be packed to any `sequence_length`; those of sequences have the one that was scored.

    Args:
        folder: what `dynmix regroup` wrote.
        stores: folder of the token stores, if they are not where they were.

    Raises:
        ValueError: no groups in `folder`, or damaged ones, or a store that is missing or changed.
    """
    file = Path(folder) / "groups.json"
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        table = pq.read_table(Path(folder) / "groups.parquet", page_checksum_verification=True)
    except FileNotFoundError as problem:
        raise ValueError(f"{problem.filename or problem}: no such file; write groups with dynmix regroup") from problem
    except (ValueError, OSError) as problem:  # what JSON and Arrow raise names no file, or not what to do
        if getattr(problem, "errno", None):
            raise  # of the disk: Arrow's OSError of a damaged page has no number
        raise ValueError(f"{folder}: its groups are damaged ({problem}); write them anew: dynmix regroup") from problem
    opened = []
    for name, known in facts["stores"].items():
        store = TokenStore.open(Path(known["path"]) if stores is None else Path(stores) / Path(known["path"]).name)
        if store.fingerprint != known["fingerprint"]:
            raise ValueError(f"{store.path}: not the store of domain {name!r} that was regrouped; score it anew")
        opened.append(store)
    part = table["domain"].combine_chunks()
    order = [list(facts["stores"]).index(name) for name in part.dictionary.to_pylist()]
    domain, row = np.array(order)[part.indices.to_numpy()], table["id"].to_numpy()
    group = table["group"].combine_chunks()
    found: dict[str, RowView | DocumentView] = {}
    for number, name in enumerate(group.dictionary.to_pylist()):
        if not facts["weights"][name]:
            continue
        own = np.flatnonzero(group.indices.to_numpy() == number)
        own = own[np.lexsort((row[own], domain[own]))]  # neighbours on disk stay neighbours
        if facts["unit"] == "document":
            found[name] = DocumentView(opened, domain[own], row[own])
        else:
            # A store knows where its documents end, for a dataset that is to keep them apart.
            packed = [PackedSequences(store, facts["sequence_length"], each_document=True) for store in opened]
            found[name] = RowView(packed, domain[own], row[own])
    return found, {name: facts["weights"][name] for name in found}
