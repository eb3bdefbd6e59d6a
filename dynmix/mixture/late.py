"""Domains that join a dataset while it is read, and those of a state that the run which loads it does not list.

The domains of a run are the *first* ones, with which it began, and behind them those that *joined*; a domain's number
is its place in that order. A run that goes on from a state has the state's domains under their numbers, but *lists*
domains of its own, known by their names. What the run lists and the state has not, joins. What the state has and the
run neither lists nor finds is *gone*, if the state's last stage does not draw it: its rows count, and cannot be read.

What joins is told by the `source` of its `JoinedDomain`: the `hash` of its content, and the `file` of an index
(`dynmix.mixture.index`) on the rows of the first domains, of which it is a view, or the `path` of its data, which has
none if it is in memory. Opened rows are kept by that hash, since after another state a name may stand for others.

Knows files, views and rows; nothing of stages or of when a domain joins.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from dynmix.mixture.documents import Documents
from dynmix.mixture.index import Numbers, digest, numbered, write_numbers
from dynmix.mixture.roster import JoinedDomain
from dynmix.mixture.sequences import Ints, Rows, Sequences, content_hash
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import RowView

_DATA = (Mapping, str, os.PathLike, Documents)  # of which a pair is data that stands end to end, and no view

_LONGEST = 200  # of an index file's name, where file systems take 255 bytes


class Gone(Rows):
    """The rows of a domain that a run does not list any more: how many there were, and an error where one is read."""

    def __init__(self, name: str, rows: int, sequence_length: int, content: str) -> None:
        self.name, self._rows, self.sequence_length, self._content = name, rows, sequence_length, content

    def __len__(self) -> int:
        return self._rows

    @property
    def fingerprint(self) -> str:
        """The hash that its state had of its content."""
        return self._content

    def gather(self, rows: Ints) -> Ints:
        """Raises ValueError."""
        raise ValueError(
            f"domain {self.name!r} is in the state that was loaded, and not among the domains of this MixtureDataset:"
            " list it again to read it"
        )


def is_view(data: Any) -> bool:
    """Whether a domain was given as a view: a pair of vectors, the domain and the row of each of its rows."""
    return isinstance(data, tuple) and len(data) == 2 and not any(isinstance(part, _DATA) for part in data)


def joined_views(
    domains: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]], parts: Sequence[Sequences], folder: Path
) -> list[tuple[JoinedDomain, Numbers]]:
    """The domains of an `extend` that are views, and their numbers, checked; nothing is written."""
    sizes, found = [len(rows) for rows in parts], []
    for name, (part, row) in domains.items():
        stem = quote(str(name), safe=" ")
        if len(stem) > _LONGEST:
            raise ValueError(f"domain {name!r}: its name makes a file name of {len(stem)} characters; shorten it")
        try:
            numbers = numbered(sizes, part, row, "domain number", "row")
        except ValueError as error:
            raise ValueError(f"domain {name!r}: {error}") from error
        _check_there(name, np.asarray(part), parts)
        source = {"file": str(folder.absolute() / f"{stem}.npy"), "hash": digest(numbers)}
        found.append((JoinedDomain(name, len(numbers), source), numbers))
    return found


def written(domain: JoinedDomain, numbers: Numbers, parts: Sequence[Sequences]) -> RowView:
    """The domain's view, with its index in its file."""
    write_numbers(Path(domain.source["file"]), numbers)
    return view(domain, parts)


def view(domain: JoinedDomain, parts: Sequence[Sequences]) -> RowView:
    """The domain's view. Raises ValueError, saying what to do, if its index is missing, damaged or changed."""
    try:
        return RowView.open(domain.source["file"], parts, domain.source["hash"])
    except ValueError as error:
        raise ValueError(
            f"the index of domain {domain.name!r}, which joined the run, cannot be used: {error}; put the file back,"
            " or give load_state_dict the folder where it is as `views`"
        ) from error


def _check_there(name: str, part: Ints, parts: Sequence[Sequences]) -> None:
    """Raise ValueError if the domain `name`, a view, has rows of a part that is gone."""
    if lost := [each.name for number, each in enumerate(parts) if isinstance(each, Gone) and number in part]:
        raise ValueError(
            f"domain {name!r} has rows of {lost}, which are in the state that was loaded, and not among the domains of"
            " this MixtureDataset: list them again"
        )


def joined_domain(name: str, data: Any, rows: Sequences, length: int, *, workers: bool) -> JoinedDomain:
    """A domain of rows of its own: `data` as it was given, `rows` as it was opened.

    Raises ValueError for rows of another `length`, or data that running `workers`, which open it by a path, cannot see.
    """
    source = {"hash": content_hash(rows, length, f"domain {name!r}")}
    if isinstance(data, TokenStore):
        data = data.path
    if isinstance(data, str | os.PathLike):
        source["path"] = os.fspath(data) if "://" in os.fspath(data) else os.path.abspath(os.path.expanduser(data))
    elif workers:
        raise ValueError(
            f"domain {name!r} is in memory, where the loader's worker processes, which run already, do not see it: give"
            " a token store or a path, list it when the dataset is made, or read without workers"
        )
    return JoinedDomain(name, len(rows), source)


def rows_of(
    domain: JoinedDomain,
    parts: Sequence[Sequences],
    listed: Mapping[str, Sequences],
    open_domains: Callable[[Mapping[str, Any], int], dict[str, Sequences]],
    length: int,
    drawn: Mapping[str, float] | None = None,
) -> Sequences:
    """The rows of a domain that joined: a view on `parts`, or what this run lists, or finds at the path.

    A domain that has none of these, or is a view on what is gone, may be `Gone`, if it has no share in `drawn`. Raises
    ValueError, saying what to do, if the rows are not there any more, or are others.
    """
    found = view(domain, parts) if "file" in domain.source else None  # its index must be there, whatever is gone
    try:
        if found is not None:
            _check_there(domain.name, found.where(np.arange(len(found)))[0], parts)
            return found
        if domain.name in listed:
            rows = listed[domain.name]
        elif "path" in domain.source:
            rows = open_domains({domain.name: domain.source["path"]}, length)[domain.name]
        else:
            raise ValueError(
                f"domain {domain.name!r} joined the run, from data in memory: list it among the domains of this"
                " MixtureDataset, behind those the run began with and before its loader starts"
            )
    except ValueError:
        if drawn is None or drawn[domain.name]:
            raise
        return Gone(domain.name, domain.size, length, domain.source["hash"])
    if content_hash(rows, length, f"domain {domain.name!r}") != domain.source["hash"]:
        raise ValueError(f"domain {domain.name!r}, which joined the run, has other content than it had")
    return rows


def relocated(state: Mapping[str, Any], folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    """A schedule's state with its index files in `folder`; None: where it says."""
    if folder is None or "joined" not in state:
        return dict(state)
    where = Path(folder).absolute()
    joined = [{**at, "file": str(where / Path(at["file"]).name)} if "file" in at else at for at in state["joined"]]
    return {**state, "joined": joined}


def unlike(
    then: Mapping[str, int], joined: Sequence[JoinedDomain], listed: Mapping[str, Sequences], drawn: Mapping[str, float]
) -> list[str]:
    """In words, why the domains that a run lists cannot go on from those of a state; none if they can.

    `then` are the state's first domains and their rows, `drawn` shares of all its domains in its last stage.
    """
    order, now = [name for name in then if name in listed], [name for name in listed if name in then]
    found = [] if order == now else [f"the domains' order was {order} and is {now}"]
    sizes = {**then, **{domain.name: domain.size for domain in joined}}
    for name, size in sizes.items():
        if name in listed and len(listed[name]) != size:
            found.append(f"domain {name!r} had {size} rows and has {len(listed[name])}")
    found += [
        f"domain {name!r} is gone, and the last stage of the state draws it: list it, or take it out after a stage is"
        " published that gives it no weight"
        for name in then
        if name not in listed and drawn.get(name)
    ]
    return [*(f"domain {name!r} is new" for name in listed if found and name not in sizes), *found]
