"""Pieces to workers in the order of reading, shards to stores as they get complete, and the first thing that is wrong.

Knows inputs by their pieces alone. Holds a few pieces at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
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
    """Inputs whose stores are written together: of a domain or a few small ones, or all where a field says the domain.

    Attributes:
        number: of the group.
        inputs: by number among all inputs.
        domains: of the inputs, by number; none where a field says them.
    """

    number: int
    inputs: dict[int, Input]
    domains: dict[int, str]
    shards: list[Path] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)
    waiting: int = 1  # for pieces, and to have been cut to the end
    order: int = 0  # of its stores

    @property
    def size(self) -> int:
        """Bytes of the inputs."""
        return sum(each.size for each in self.inputs.values())


@dataclass
class _Task:
    """A piece or a group's stores, at work somewhere; `order` is that of reading."""

    order: int
    inputs: dict[int, str]
    then: Callable[[Any], None]


class Pipeline:
    """Pieces to workers in order, a few ahead; each group's stores as soon as its pieces are done."""

    def __init__(self, groups: list[Group], work: Work, pool: Workers, bar: Bar, job: Job) -> None:
        self.groups, self.work, self.pool, self.bar, self.job = groups, work, pool, bar, job
        self.facts: dict[int, Json] = {}
        self._tasks: dict[Future[Any], _Task] = {}
        self._failures: dict[int, tuple[Exception, dict[int, str]]] = {}
        self._order = 0
        self._names: Names | None = None
        if job.fields.domain is not None:
            self._names = Names(job.fields.domain, bool(job.held_out), work.existing)

    def run(self) -> Json:
        """Do everything; return the facts of the stores, by name in order.

        Of several things that are wrong, the first in the order of the inputs is raised, whoever met it first.
        """
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
        for number, each in group.inputs.items():
            domain = group.domains.get(number, "")
            self.bar.reading(domain or Path(each.name).name)
            try:
                for index, piece in enumerate(each.pieces(self.job.fields, self.work.piece)):
                    shard = self.work.shard(number, index)
                    group.shards.append(shard)
                    self._order += 1
                    if shard.exists() and (found := read_summary(shard)) is not None:
                        self.bar.found(piece.size, found.tokens)
                        self._arrived(group, self._order, found)
                        continue
                    while len(self._tasks) > self.pool.count and not self._failures:
                        self._collect()
                    if self._failures:
                        return
                    self.bar.working()
                    group.waiting += 1
                    task = self.pool.submit(f"it read {each.name}", tokenise, piece, domain, shard)
                    then = partial(self._read_piece, group, self._order, piece.size)
                    self._tasks[task] = _Task(self._order, {number: each.name}, then)
            except (PrepareError, OSError) as error:
                self._failures[self._order + 1] = error, {number: each.name}
                return
        self._order += 1
        group.order = self._order
        self._one_less(group)

    def _collect(self) -> None:
        for future in wait(self._tasks, return_when=FIRST_COMPLETED).done:
            task = self._tasks.pop(future)
            try:
                task.then(future.result())
            except Exception as error:
                self._failures[task.order] = error, task.inputs

    def _read_piece(self, group: Group, order: int, size: int, summary: Summary) -> None:
        self.bar.done(size, summary.tokens)
        self._arrived(group, order, summary)
        self._one_less(group)

    def _arrived(self, group: Group, order: int, summary: Summary) -> None:
        group.summary.add(summary)
        try:
            if self._names is not None:
                self._names.add({*summary.documents, *summary.empty})
        except PrepareError as error:
            self._failures[order] = error, {}
            group.waiting += 1  # for ever: its stores are not written

    def _one_less(self, group: Group) -> None:
        group.waiting -= 1
        if group.waiting:
            return
        for number, each in group.inputs.items():
            try:
                each.check()
            except (PrepareError, OSError) as problem:
                self._failures[group.order] = problem, {number: each.name}
                return
        documents, empty = group.summary.documents, group.summary.empty
        which = list(dict.fromkeys(group.domains.values())) or sorted({*documents, *empty}) or [""]
        for domain in which:
            if not documents[domain]:
                files = {n: each.name for n, each in group.inputs.items() if group.domains.get(n, domain) == domain}
                what = f"all {empty[domain]} documents are empty" if empty[domain] else "no documents"
                error = PrepareError(f"domain {domain!r}: {what} in {', '.join(files.values())}")
                self._failures[group.order] = error, files
                return
            _log.info("%s: %d documents, and %d empty ones skipped", domain, documents[domain], empty[domain])
        sides = (False, True) if self.job.held_out else (False,)
        stores = [_name(self.job, domain, side) for domain in which for side in sides]
        drop_from_manifest(self.work.output, stores)
        task = self.pool.submit(
            f"it wrote the stores of {which[0]} and {len(which) - 1} more",
            make_stores,
            group.shards,
            self.work.output,
            self.work.scratch(group.number),
        )
        self._tasks[task] = _Task(group.order, {}, partial(self._finish, group))

    def _finish(self, group: Group, facts: Json) -> None:
        self.work.finish(group.number, group.shards, facts)
        self.facts[group.number] = facts


def _warn_of_sides(facts: Json) -> None:
    """Small domains may have all their documents on one side."""
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
