"""Pieces to workers in the order of reading, shards to stores as they get complete, and the first thing that is wrong.

Knows inputs by their pieces alone. Holds a few pieces at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from dynmix.mixture.prepare.inputs import Input
from dynmix.mixture.prepare.manifest import Json, drop_from_manifest
from dynmix.mixture.prepare.names import HELD_OUT, Names, safe_name, store_name
from dynmix.mixture.prepare.pieces import PrepareError
from dynmix.mixture.prepare.progress import Bar
from dynmix.mixture.prepare.shards import Summary, read_summary, write_stores
from dynmix.mixture.prepare.tokenise import Job, tokenise
from dynmix.mixture.prepare.work import Work
from dynmix.mixture.prepare.workers import Workers

_log = logging.getLogger(__name__)


@dataclass
class Group:
    """Inputs whose stores are written together: of a domain, of small ones, or of all where a field says the domain."""

    number: int
    inputs: dict[int, Input]  # by number among all inputs
    domains: dict[int, str]  # of the inputs, by number; none where a field says them
    shards: list[Path] = field(default_factory=list)  # of its pieces, as far as they are cut
    summary: Summary = field(default_factory=Summary)  # of the pieces that are done
    at_work: int = 0  # pieces that are cut and not done
    place: int | None = None  # of its stores in the order of reading, once all its pieces are cut
    refused: bool = False  # a name of its domains is, so that its stores are not written

    @property
    def size(self) -> int:
        """Bytes of the inputs."""
        return sum(each.size for each in self.inputs.values())


@dataclass
class _Task:
    """A piece or a group's stores, at work somewhere."""

    place: int
    inputs: dict[int, str]
    then: Callable[[Any], None]


_Failure = tuple[Exception, dict[int, str]]  # what is wrong, and in which inputs, names by number


class Pipeline:
    """Pieces to workers in order, a few ahead; each group's stores as soon as its pieces are done.

    Whatever can fail has a place in the order of reading: a piece takes the next one when it is cut, or cannot be, and
    a group's stores the one behind its last piece. After a failure no more pieces are handed out, but what is at work
    is waited for, and of all failures the one with the first place is raised. All before it had been handed out by
    then, so it is the same one however many workers there are.
    """

    def __init__(self, groups: list[Group], work: Work, pool: Workers, bar: Bar, job: Job) -> None:
        self.groups, self.work, self.pool, self.bar, self.job = groups, work, pool, bar, job
        self.facts: dict[int, Json] = {}
        self._tasks: dict[Future[Any], _Task] = {}
        self._places = count()
        self._failures: dict[int, _Failure] = {}  # by place
        self._names: Names | None = None
        if job.fields.domain is not None:
            self._names = Names(job.fields.domain, bool(job.held_out), work.existing)

    def run(self) -> Json:
        """Do everything; return the facts of the stores, by name in order. Or raise the first failure."""
        for group in self.groups:
            if (facts := self.work.finished(group.number)) is not None and self._holds(group, facts):
                self.facts[group.number] = facts
                self.bar.found(group.size, sum(each["tokens"] for each in facts.values()))
            elif not self._failures:
                self._read(group)
        while self._tasks:
            self._collect()
        if self._failures:
            error, inputs = self._failures[min(self._failures)]
            if inputs and isinstance(error, PrepareError):
                self.work.forget(inputs)
            raise error
        found = {name: each for group in self.groups for name, each in self.facts[group.number].items()}
        if self.job.held_out:
            _warn_of_sides(found)
        return found

    def _holds(self, group: Group, facts: Json) -> bool:
        """Whether what was finished is of these domains, and has not been removed since."""
        # A file that had to be corrected has another size, and small domains may be in other groups then.
        same = not group.domains or {each["domain"] for each in facts.values()} == {*group.domains.values()}
        return same and all((self.work.output / f"{name}{end}").exists() for name in facts for end in (".bin", ".idx"))

    def _read(self, group: Group) -> None:
        """Cut the inputs into pieces and hand them out, unless something is wrong, here or elsewhere."""
        for number, each in group.inputs.items():
            domain = group.domains.get(number, "")
            self.bar.reading(domain or Path(each.name).name)
            try:
                for index, piece in enumerate(each.pieces(self.job.fields, self.work.piece)):
                    place, shard = next(self._places), self.work.shard(number, index)
                    group.shards.append(shard)
                    if shard.exists() and (found := read_summary(shard)) is not None:
                        self.bar.found(piece.size, found.tokens)
                        self._add(group, place, found)
                        continue
                    while len(self._tasks) > self.pool.count and not self._failures:
                        self._collect()
                    if self._failures:
                        return
                    self.bar.working()
                    group.at_work += 1
                    task = self.pool.submit(f"it read {each.name}", tokenise, piece, domain, shard)
                    then = partial(self._tokenised, group, place, piece.size)
                    self._tasks[task] = _Task(place, {number: each.name}, then)
            except (PrepareError, OSError) as error:
                self._failures[next(self._places)] = error, {number: each.name}
                return
        group.place = next(self._places)
        self._write_if_complete(group)

    def _collect(self) -> None:
        """Wait until something that is at work is done, and go on with it."""
        for future in wait(self._tasks, return_when=FIRST_COMPLETED).done:
            task = self._tasks.pop(future)
            try:
                task.then(future.result())
            except Exception as error:
                self._failures[task.place] = error, task.inputs

    def _tokenised(self, group: Group, place: int, size: int, summary: Summary) -> None:
        """A piece is done."""
        self.bar.done(size, summary.tokens)
        group.at_work -= 1
        self._add(group, place, summary)
        self._write_if_complete(group)

    def _add(self, group: Group, place: int, summary: Summary) -> None:
        """Count a piece that is done, now or by an earlier call."""
        group.summary.add(summary)
        try:
            if self._names is not None:
                self._names.add({*summary.documents, *summary.empty})
        except PrepareError as error:
            self._failures[place] = error, {}
            group.refused = True

    def _write_if_complete(self, group: Group) -> None:
        """Have the stores written once all pieces are cut and done."""
        if group.place is None or group.at_work or group.refused:
            return
        summary = group.summary
        domains = list(dict.fromkeys(group.domains.values())) or sorted({*summary.documents, *summary.empty}) or [""]
        if (failure := _why_not(group, domains)) is not None:
            self._failures[group.place] = failure
            return
        sides = (False, True) if self.job.held_out else (False,)
        drop_from_manifest(self.work.output, [_name(self.job, domain, side) for domain in domains for side in sides])
        task = self.pool.submit(
            f"it wrote the stores of {domains[0]} and {len(domains) - 1} more",
            make_stores,
            group.shards,
            self.work.output,
            self.work.scratch(group.number),
        )
        self._tasks[task] = _Task(group.place, {}, partial(self._finish, group))

    def _finish(self, group: Group, facts: Json) -> None:
        self.work.finish(group.number, group.shards, facts)
        self.facts[group.number] = facts


def _why_not(group: Group, domains: list[str]) -> _Failure | None:
    """Why a group that was read gets no stores, if so: an input has changed, or a domain is empty."""
    for number, each in group.inputs.items():
        try:
            each.check()
        except (PrepareError, OSError) as problem:
            return problem, {number: each.name}
    documents, empty = group.summary.documents, group.summary.empty
    for domain in domains:
        if not documents[domain]:
            files = {n: each.name for n, each in group.inputs.items() if group.domains.get(n, domain) == domain}
            what = f"all {empty[domain]} documents are empty" if empty[domain] else "no documents"
            return PrepareError(f"domain {domain!r}: {what} in {', '.join(files.values())}"), files
        _log.info("%s: %d documents, and %d empty ones skipped", domain, documents[domain], empty[domain])
    return None


def _warn_of_sides(facts: Json) -> None:
    """Say which domains have all their documents on one side, as small ones may."""
    domains = {name.removesuffix(HELD_OUT) if each["held_out"] else name for name, each in facts.items()}
    for held_out, what in ((True, "nothing was held out of"), (False, "everything was held out of")):
        if bare := sorted(name for name in domains if store_name(name, held_out) not in facts):
            more = f" and {len(bare) - 5} more" if len(bare) > 5 else ""
            _log.warning("%s the small domains %s%s", what, ", ".join(bare[:5]), more)


def _name(job: Job, domain: str, held_out: bool) -> str:
    return store_name(domain if job.fields.domain is None else safe_name(domain), held_out)


def make_stores(job: Job, shards: list[Path], output: Path, scratch: Path) -> Json:
    """Write a group's stores; return the facts of each by name."""
    facts = write_stores(shards, output, partial(_name, job), scratch)
    return facts if job.fields.domain is None else dict(sorted(facts.items()))
