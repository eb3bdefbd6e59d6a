"""One source without random access as items without end, pass after pass, of which each reader takes its share.

Knows how such sources are opened, split, left and found again; nothing of what their items hold.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from torch.utils.data._utils import worker as torch_worker

from dynmix.shown import Bar

logger = logging.getLogger("dynmix.mixture")

ItemSource = Iterable[Any] | Callable[..., Iterable[Any]]


class PassEnded(Exception):  # noqa: N818 (the end of the data is no error)
    """A source that is to be read once has ended."""


class Items:
    """Items of a source; when a pass over it ends, the next one begins.

    Items are numbered through all passes, and a reader takes each `readers`-th of them: that is right for every source
    and has every reader read all of it. A source that can give a part alone is asked for it: a function with the
    parameters `shard` and `num_shards`, or an HF dataset whose shards can be dealt out evenly.

    Args:
        name: of the domain.
        source: an iterable that can be iterated anew, or a function that makes one; it may have the parameters `epoch`,
            `shard` and `num_shards`. An iterable with `set_epoch` is told the number of each pass.
        reader, readers: number of this reader, from 0, and how many there are.
        once: raise `PassEnded` when the first pass ends.
        state: of `state_dict`, to go on from.

    Raises:
        ValueError: a source that can be read only once, or cannot be read; later, one without a single item.
    """

    def __init__(
        self,
        name: str,
        source: ItemSource,
        reader: int = 0,
        readers: int = 1,
        *,
        once: bool = False,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check_source(name, source)
        self.name, self._source, self._reader, self._readers, self._once = name, source, reader, readers, once
        state = state or {"epoch": 0, "seen": 0, "number": 0, "source": None}
        self.epoch: int = state["epoch"]
        self._seen: int = state["seen"]  # items of this pass that went by
        self._number: int = state["number"]  # of all passes
        self._left_at = state["source"]  # state of the source when it was left, until an item goes by
        self._stateful: Any = None  # what was opened, if it can say where it is
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> "Items":
        return self

    def __next__(self) -> Any:
        while True:
            try:
                iterator = self._open() if self._iterator is None else self._iterator
                with _in_no_worker():
                    item = next(iterator)
            except StopIteration:
                self._end_pass()
                continue
            self._seen, self._number, self._left_at = self._seen + 1, self._number + 1, None
            if self._splits_itself or (self._number - 1) % self._readers == self._reader:
                return item

    def state_dict(self) -> dict[str, Any]:
        """Where this reader is, JSON-able if the source's own state is."""
        asked = self._stateful is not None and self._left_at is None and self._seen
        # A copy: many sources give what they go on to change.
        found = copy.deepcopy(self._stateful.state_dict()) if asked else self._left_at
        return {"epoch": self.epoch, "seen": self._seen, "number": self._number, "source": found}

    def _open(self) -> Iterator[Any]:
        made, self._splits_itself = self._made()
        made = _own(made)  # or whoever reads the source next would begin where this reader left it
        if hasattr(made, "set_epoch"):
            made.set_epoch(self.epoch)
        self._stateful = made if _has_state(made) else None
        if self._left_at is not None:
            if self._stateful is None:
                raise ValueError(f"the source of domain {self.name!r} had a state when it was left, and has none now")
            made.load_state_dict(copy.deepcopy(self._left_at))
        with _in_no_worker():
            iterator: Iterator[Any] = iter(made)
        self._iterator = iterator
        if self._seen and self._left_at is None:
            self._skip(iterator, self._seen)
        return iterator

    def _made(self) -> tuple[Any, bool]:
        if not isinstance(self._source, Iterable):
            given = {"epoch": self.epoch, "shard": self._reader, "num_shards": self._readers}
            taken = {key: value for key, value in given.items() if key in _parameters(self._source)}
            return self._source(**taken), "shard" in taken
        source: Any = self._source
        if self._readers == 1 or not hasattr(source, "num_shards") or source.num_shards % self._readers:
            return source, False
        if any(type(part).__name__ in ("TakeExamplesIterable", "SkipExamplesIterable") for part in _parts(source)):
            # Its parts leave out so many items of each one's own shards, and not the first ones: a text that was held
            # out in this way would be trained on.
            if self._reader == 0 and not self.epoch:
                logger.warning(
                    "domain %r has .take or .skip, which counts from its start on: each of the %d readers reads all of"
                    " it; to read a part each, leave items out with .filter",
                    self.name,
                    self._readers,
                )
            return source, False
        return source.shard(num_shards=self._readers, index=self._reader, contiguous=False), True

    def _skip(self, iterator: Iterator[Any], count: int) -> None:
        logger.info("domain %r keeps no state: skipping the %d items that were read before", self.name, count)
        for _ in Bar(range(count), desc=f"skipping {self.name}", unit="item"):
            with _in_no_worker():
                if next(iterator, self) is self:
                    raise ValueError(
                        f"domain {self.name!r} ended before the item it was left at, number {count}: the source gives"
                        " other items than it did"
                    )

    def _end_pass(self) -> None:
        part = f" in part {self._reader} of {self._readers}" if self._splits_itself else ""
        if not self._seen and self.epoch:
            raise ValueError(
                f"domain {self.name!r} gave no item{part} in pass {self.epoch + 1}, and did before: it can be read only"
                " once; give the function that makes it, or an iterable"
            )
        if not self._seen:
            raise ValueError(f"domain {self.name!r} is empty: its source gave no item{part}")
        if self._once:
            raise PassEnded(self.name)
        self._iterator, self._left_at, self._seen, self.epoch = None, None, 0, self.epoch + 1
        if self._reader == 0:
            level = logging.WARNING if self.epoch == 1 else logging.INFO
            logger.log(level, "domain %r ended%s and starts again: this is epoch %d", self.name, part, self.epoch + 1)


def check_source(name: str, source: Any) -> None:
    """Raise ValueError if this is nothing that can be read again and again."""
    if isinstance(source, Iterator) and not hasattr(source, "state_dict"):
        raise ValueError(
            f"domain {name!r} is a {type(source).__name__}, which can be read only once: give the function that makes"
            " it, or an iterable"
        )
    if isinstance(source, str | bytes | Mapping) or not (isinstance(source, Iterable) or callable(source)):
        raise ValueError(
            f"domain {name!r} is a {type(source).__name__}: give an iterable of items, or a function that makes one"
            " (token stores and their paths go to MixtureDataset)"
        )
    if not isinstance(source, Iterable) and len(_parameters(source) & {"shard", "num_shards"}) == 1:
        raise ValueError(f"domain {name!r}: a function that gives a part takes both `shard` and `num_shards`")


def check_shared(domains: Mapping[str, ItemSource]) -> None:
    """Raise ValueError if one object that keeps its place, for one reader, is given as several domains."""
    owners: dict[int, str] = {}
    for name, source in domains.items():
        first = owners.setdefault(id(source), name)
        if first != name and hasattr(source, "state_dict") and not hasattr(source, "_ex_iterable"):
            raise ValueError(
                f"domains {first!r} and {name!r} are one {type(source).__name__}, which is at one place at a time: give"
                " each an object of its own, or a function that makes one"
            )


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _own(made: Any) -> Any:
    """A copy of an iterable that keeps its place for all who iterate it; others as they are.

    Of an HF dataset all that is iterated is copied, and no data and no functions, which need not be made for that; of
    others only the object itself.
    """
    if not hasattr(made, "_ex_iterable"):
        return copy.copy(made) if _has_state(made) else made
    own = object.__new__(type(made))  # `copy` would give it the very same attributes
    own.__dict__ |= made.__dict__ | {"_ex_iterable": _own_part(made._ex_iterable), "_epoch": int(made._epoch)}
    return own


def _own_part(part: Any) -> Any:
    own = copy.copy(part)
    if hasattr(own, "ex_iterable"):
        own.ex_iterable = _own_part(own.ex_iterable)
    if hasattr(own, "ex_iterables"):
        own.ex_iterables = [_own_part(each) for each in own.ex_iterables]
    return own


def _parts(source: Any) -> Iterator[Any]:
    """The iterables that an HF dataset is made of; None for anything else."""
    parts: list[Any] = [getattr(source, "_ex_iterable", None)]
    while parts:
        yield (part := parts.pop())
        parts += [part.ex_iterable] if hasattr(part, "ex_iterable") else list(getattr(part, "ex_iterables", ()))


def _has_state(opened: Any) -> bool:
    """Whether it says by itself where its next item is.

    The state of an HF dataset does not hold its shuffle buffer, and before 4.8.5 a `.map` in batches went on with other
    items; datasets of litdata and Mosaic have to be told how far they were read.
    """
    if any(type(part).__name__ == "BufferShuffledExamplesIterable" for part in _parts(opened)):
        return False
    if hasattr(opened, "_ex_iterable") and Version(version("datasets")) < Version("4.8.5"):
        return False
    if not (hasattr(opened, "state_dict") and hasattr(opened, "load_state_dict")):
        return False
    parameters = inspect.signature(opened.state_dict).parameters.values()
    return all(
        each.default is not each.empty or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters
    )


@contextmanager
def _in_no_worker() -> Iterator[None]:
    # HF datasets, webdataset and many of one's own give a worker a part only. Readers are split here, once.
    found, torch_worker._worker_info = torch_worker._worker_info, None
    try:
        yield
    finally:
        torch_worker._worker_info = found
