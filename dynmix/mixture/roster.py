"""Names and sizes of a schedule's domains, those included that join while it runs.

What joins is told through shared memory to processes started before. The memory is a log that is only appended to, so
that a reader, whenever it looks, sees whole entries. This module must not know of weights, stages, files or rows.
"""

import json
import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dynmix.mixture.shared import SharedArray

MAX_JOINED = 1024
_ROOM = 16 << 20  # bytes of the log, taken page by page as they are written


class JoinedDomain(NamedTuple):
    """A domain that joins."""

    name: str
    size: int
    source: Mapping[str, str]  # what whoever reads its rows needs to know of it, of no concern here


class Domains(NamedTuple):
    """All domains at one moment; a domain's number is its index."""

    names: tuple[str, ...]
    sizes: dict[str, int]
    rows: npt.NDArray[np.uint64]  # the sizes again, [n_domains]
    joined: tuple[JoinedDomain, ...]


class Roster:
    """The domains of one schedule: the first ones, name -> rows, which stay, and those that joined.

    Only the process that made it may change it. Raises ValueError for a name that is no string, or a size that is no
    number of rows.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.first = {name: operator.index(size) for name, size in sizes.items()}
        if not all(isinstance(name, str) for name in self.first):
            raise ValueError(f"domain names must be strings: {list(self.first)}")
        if bad := [name for name, size in self.first.items() if not 0 <= size < 1 << 62]:
            raise ValueError(f"sizes must be numbers of rows from 0 to 2**62: {bad[0]!r} has {self.first[bad[0]]}")
        # Cell 0: bytes of the log; then the log, a line of JSON an entry.
        self._log = SharedArray((1 + _ROOM // 8,))
        self._seen = 0
        self._now = self._with(())

    @property
    def now(self) -> Domains:
        """The domains, up to the last change that this process can see."""
        used = int(self._log.array[0])
        if used != self._seen:
            joined = self._now.joined
            for line in self._text[self._seen : used].tobytes().splitlines():
                entry = json.loads(line)
                joined = (*joined[: entry["keep"]], *(JoinedDomain(*domain) for domain in entry["add"]))
            self._now, self._seen = self._with(joined), used
        return self._now

    @property
    def capacity(self) -> int:
        """Domains that there is room for, the first ones included."""
        return len(self.first) + MAX_JOINED

    def check(self, domains: Sequence[JoinedDomain], keep: int) -> None:
        """Raise ValueError unless `domains` can take their place behind the first `keep` that joined.

        That is for a name that is taken, a domain without rows, or more domains than there is room for.
        """
        if keep + len(domains) > MAX_JOINED:
            raise ValueError(
                f"{len(domains)} domains cannot join the {keep} that did: there is room for {MAX_JOINED}; let fewer"
                " enter, or start a run that has them as domains from its beginning"
            )
        taken = {*self.first, *(domain.name for domain in self.now.joined[:keep])}
        for name, size, _ in domains:
            if not isinstance(name, str):
                raise ValueError(f"domain names must be strings, not {name!r}")
            if name in taken:
                raise ValueError(f"there is a domain {name!r} already: give the one that joins another name")
            if not 1 <= operator.index(size) < 1 << 62:
                raise ValueError(f"domain {name!r} would join with {size} rows: at least 1, or leave it out")
            taken.add(name)
        if int(self._log.array[0]) + len(_line(keep, domains)) > len(self._text):
            raise ValueError(
                f"the {_ROOM >> 20} MiB for what joins a run are used up: let fewer domains enter, give them shorter"
                " names and a shorter folder, or go on from a state in a new process"
            )

    def put(self, domains: Sequence[JoinedDomain], keep: int) -> None:
        """Put `domains` behind the first `keep` that joined, in place of what is there; raises as `check` does."""
        self.check(domains, keep)
        if self.now.joined == (*self.now.joined[:keep], *domains):
            return
        line, used = _line(keep, domains), int(self._log.array[0])
        self._text[used : used + len(line)] = np.frombuffer(line, np.uint8)
        self._log.array[0] = used + len(line)  # last: who sees this sees the line

    @property
    def _text(self) -> npt.NDArray[np.uint8]:
        return self._log.array[1:].view(np.uint8)

    def _with(self, joined: tuple[JoinedDomain, ...]) -> Domains:
        sizes = {**self.first, **{domain.name: domain.size for domain in joined}}
        return Domains(tuple(sizes), sizes, np.array(list(sizes.values()), np.uint64), joined)


def _line(keep: int, domains: Sequence[JoinedDomain]) -> bytes:
    add = [(name, operator.index(size), dict(source)) for name, size, source in domains]
    return json.dumps({"keep": keep, "add": add}).encode() + b"\n"
