"""Domains that join a dataset while it is read: views on rows of its first domains, by index files that it names.

A `Domain` of this kind has as `source` the path of its index `file` and the `hash` of the numbers in it. Knows files
and views; nothing of stages or of when a domain joins.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy.typing as npt

from dynmix.mixture.index import Numbers, digest, numbered, write_numbers
from dynmix.mixture.roster import Domain
from dynmix.mixture.sequences import Sequences
from dynmix.mixture.view import RowView

_LONGEST = 200  # of an index file's name, where file systems take 255 bytes


def numbered_domains(
    domains: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]], parts: Sequence[Sequences], folder: Path
) -> list[tuple[Domain, Numbers]]:
    """The domains of an `extend` and their numbers, checked; nothing is written."""
    sizes, found = [len(rows) for rows in parts], []
    for name, (part, row) in domains.items():
        stem = quote(str(name), safe=" ")
        if len(stem) > _LONGEST:
            raise ValueError(f"domain {name!r}: its name makes a file name of {len(stem)} characters; shorten it")
        try:
            numbers = numbered(sizes, part, row, "domain number", "row")
        except ValueError as error:
            raise ValueError(f"domain {name!r}: {error}") from error
        source = {"file": str(folder.absolute() / f"{stem}.npy"), "hash": digest(numbers)}
        found.append((Domain(name, len(numbers), source), numbers))
    return found


def written(domain: Domain, numbers: Numbers, parts: Sequence[Sequences]) -> RowView:
    """The domain's view, with its index in its file."""
    write_numbers(Path(domain.source["file"]), numbers)
    return view(domain, parts)


def view(domain: Domain, parts: Sequence[Sequences]) -> RowView:
    """The domain's view, its index checked against its hash.

    Raises:
        ValueError: the file is missing, damaged or changed; the message says what to do.
    """
    try:
        return RowView.open(domain.source["file"], parts, domain.source["hash"])
    except ValueError as error:
        raise ValueError(
            f"the index of domain {domain.name!r}, which joined the run, cannot be used: {error}; put the file back,"
            " or give load_state_dict the folder where it is as `views`"
        ) from error


def opened(
    state: Mapping[str, Any], parts: Sequence[Sequences], folder: str | os.PathLike[str] | None
) -> tuple[dict[str, Any], dict[str, RowView]]:
    """A schedule's state with its index files in `folder` (None: where it says), and the views by their hash."""
    names, sources = state["names"], state.get("joined", [])
    if folder is not None:
        sources = [{**at, "file": str(Path(folder).absolute() / Path(at["file"]).name)} for at in sources]
    late = zip(names[len(names) - len(sources) :], sources, strict=True)
    views = {source["hash"]: view(Domain(name, 0, source), parts) for name, source in late}
    return {**state, **({"joined": sources} if sources else {})}, views
