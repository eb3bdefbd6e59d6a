"""The mixture as a map-style `torch.utils.data.Dataset`: item g is the sequence at position g of the training stream.

Because items are pure functions of their position, any loader that reads positions in order (a DataLoader with or
without workers, the Trainer, accelerate's and DistributedSampler's shards) trains on the declared mixture. This module
must not know of models, optimizers or how weights are chosen.
"""

import logging
import multiprocessing
import operator
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from dynmix.mixture import late
from dynmix.mixture.roster import Domain
from dynmix.mixture.schedule import Ints, MixtureSchedule, Undecided, Weights, matched
from dynmix.mixture.sequences import Item, Rows, Sequences, common_length, content_hash, gather
from dynmix.mixture.shared import SharedArray
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import DocumentView, RowView

logger = logging.getLogger("dynmix.mixture")

Documents = TypeVar("Documents", TokenStore, DocumentView)

_READ_AHEAD = 4096  # positions assigned at once; a call has a fixed cost, and the next request wants the next ones
_POLL_SECONDS = 0.005
_REMEDY = (
    " A shuffled loader mixes the stages; use shuffle=False (DataLoader, DistributedSampler) or"
    ' train_sampling_strategy="sequential" (Trainer)'
)
_WARN_SECONDS, _GIVE_UP_SECONDS = 30.0, 1800.0  # without a sign of life from the main process
_WAITING = (
    " A measurement or an evaluation may be under way. If nothing is, the loader has read further than the optimizer"
    " steps say: do not shuffle, with gradient accumulation pass batch_size to MixtureHook, and call its step() once an"
    " optimizer step"
)
_SLOTS = 1024  # of the reading counters, one a worker


class PackedSequences(Rows, Generic[Documents]):
    """Documents as equal sequences: end to end, cut every `sequence_length` tokens, the rest dropped.

    Item i is {"input_ids": LongTensor[sequence_length]}.

    Args:
        store: the documents, a token store or a view; they are not separated by what they do not contain themselves.
        sequence_length: tokens of a sequence, >= 1.
    """

    def __init__(self, store: Documents, sequence_length: int) -> None:
        if operator.index(sequence_length) < 1:
            raise ValueError(f"sequence_length must be at least 1, not {sequence_length}")
        self.store: Documents = store
        self.sequence_length = operator.index(sequence_length)

    def __len__(self) -> int:
        return self.store.num_tokens // self.sequence_length

    def __repr__(self) -> str:
        return f"PackedSequences({self.store!r}, {self.sequence_length})"

    @property
    def fingerprint(self) -> str:
        """The store's."""
        return self.store.fingerprint

    def gather(self, rows: Ints) -> Ints:
        """Token ids of many sequences at once, int64[len(rows), sequence_length], straight from the memory maps."""
        if isinstance(self.store, DocumentView):
            return self.store.read(rows * self.sequence_length, self.sequence_length)
        table = self.store.tokens[: len(self) * self.sequence_length].reshape(len(self), self.sequence_length)
        return table[rows].astype(np.int64)


class MixtureDataset(Dataset[Item]):
    """Position g of the stream as {"input_ids": LongTensor[sequence_length], "labels": the same, "domain": int}.

    Read it in order: `DataLoader(dataset, shuffle=False)`, `train_sampling_strategy="sequential"`. For token stores
    `num_workers=0` is fastest. A worker that is asked for an undecided position waits for its stage; the main process,
    which would wait for itself, raises `Undecided`.

    Args:
        domains: name -> token store, path of one, view (`DocumentView`, `RowView`), or any sequence of dicts with
            `input_ids` of one length.
        weights: of the first stage: "natural" (proportional to tokens), "uniform", or name -> weight.
        num_samples: length of the stream in sequences.
        sequence_length: tokens of a sequence; needed to cut token stores.
        seed: of the order, as in `MixtureSchedule`.
        block: as in `MixtureSchedule`: best the global batch size in sequences.

    Attributes:
        schedule: the `MixtureSchedule` of this stream.
        sequence_length: tokens of a sequence.

    Raises:
        ValueError: a domain without a whole sequence, sequences of different lengths, bad weights or numbers.
    """

    def __init__(
        self,
        domains: Mapping[str, TokenStore | DocumentView | str | os.PathLike[str] | Sequences],
        weights: Literal["natural", "uniform"] | Mapping[str, float] = "natural",
        *,
        num_samples: int,
        sequence_length: int | None = None,
        seed: int = 0,
        block: int = 256,
    ) -> None:
        if not domains:
            raise ValueError("domains is empty: a mixture needs at least one")
        if operator.index(num_samples) < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        self.num_samples = operator.index(num_samples)
        self._first = tuple(as_sequences(name, data, sequence_length) for name, data in domains.items())
        self._views: dict[str, RowView] = {}  # of the domains that joined, by the hash of their index
        names = {f"domain {name!r}": sequences for name, sequences in zip(domains, self._first, strict=True)}
        self.sequence_length = common_length(names, sequence_length)
        sizes = {name: len(sequences) for name, sequences in zip(domains, self._first, strict=True)}
        if isinstance(weights, str):
            if weights not in ("natural", "uniform"):
                raise ValueError(f'weights={weights!r}: give "natural", "uniform" or a mapping from name to weight')
            parts = {name: size if weights == "natural" else 1 for name, size in sizes.items()}
            weights = {name: part / sum(parts.values()) for name, part in parts.items()}
        weights = dict(zip(sizes, matched(weights, tuple(sizes), "weights"), strict=True))
        self.schedule = MixtureSchedule(weights, sizes, seed=seed, block=block)
        # Cell 0: length of the last request; 1: pulse of the main process; 2: end of what it has read; 3 + w: of what
        # worker w has.
        self._reads = SharedArray((3 + _SLOTS,))
        self._lowest, self._last = self.num_samples, -1
        self._steps_back: deque[bool] = deque(maxlen=8)
        self._ahead = _Ahead(-1, 0, *self.schedule.assign(0, 0)[:2])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}}  # a process opens those that it meets

    def __len__(self) -> int:
        return self.num_samples

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in order; `domain` of an item is an index into it."""
        return self.schedule.names

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> sequences of the domain."""
        return self.schedule.sizes

    def __getitem__(self, position: int) -> Item:
        """Item at `position`, in any order and without a trace: for looking, not for training."""
        position = operator.index(position)
        if not 0 <= position < self.num_samples:
            raise IndexError(f"position {position} is not in [0, {self.num_samples})")
        self._wait_until_decided(position, position + 1)
        return self._items([range(position, position + 1)])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Items of one request of a loader, which must ask for them in reading order.

        Raises:
            ValueError: the positions are not equally spaced and ascending (but for one wrap from the end to the start).
            IndexError: a position outside the stream.
            Undecided: for a position whose stage is not published: in the main process at once, in a worker after half
                an hour without a sign of life from the main process.
            RuntimeError: in a worker, when its parent process ended while it waited.
        """
        if not len(positions):
            return []
        runs = self._reading_order(np.asarray(positions, np.int64))
        self._check_passes(int(positions[0]))
        stop = max(run[-1] for run in runs) + 1
        self._wait_until_decided(0, stop)
        # Noted before the stages are looked at: who publishes sees either the note, or is seen.
        self._note_read(len(positions), stop)
        return self._items(runs)

    def sequence(self, domain: str, row: int) -> Item:
        """Sequence `row` of a domain, as an item, wherever in the stream it stands."""
        if domain not in self.sizes:
            raise KeyError(f"no domain {domain!r}: there are {list(self.domains)}")
        if not 0 <= operator.index(row) < self.sizes[domain]:
            raise IndexError(f"row {row} of domain {domain!r} is not in [0, {self.sizes[domain]})")
        return self._rows(np.array([self.domains.index(domain)]), np.array([row]))[0]

    @property
    def sequences(self) -> dict[str, Sequences]:
        """Name -> sequences of each of the first domains, whose rows those of `extend` are."""
        return dict(zip(self.domains, self._first, strict=False))

    def begin(self, weights: Weights) -> None:
        """`schedule.begin`, refused where the loader has read already. Raises ValueError."""
        if self.read_until:
            raise ValueError(f"the loader has read {self.read_until} samples: the weights of the first stage stay")
        self.schedule.begin(weights)

    def publish(self, weights: Weights, start: int, end: int | None = None) -> None:
        """`schedule.publish`, refused where the loader has read already: those samples were of the stage before.

        Raises:
            ValueError: also when `start` is below `read_until`.
        """
        if start < self.read_until:
            raise ValueError(
                f"start={start}: position already read by the loader, which is at {self.read_until}; declare where a"
                f" stage ends before it is read (schedule.hold(end)), or publish from {self.read_until} on"
            )
        self.schedule.publish(weights, start, end)

    def extend(
        self, domains: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]], folder: str | os.PathLike[str]
    ) -> None:
        """Add domains that are views on the rows of the first ones, behind those there are; no token is copied.

        Their weight is 0, and no position changes its sample, until a stage is published that gives them some. Worker
        processes that run already see them then. Every rank calls this with the same arguments and a folder that is
        its own or shared; where it is shared by several machines, one rank first.

        Args:
            domains: name -> (number of one of the first domains, row of it), int[n] each.
            folder: where each index is kept, as `<name>.npy`; to be kept as long as the stream, and its states.

        Raises:
            ValueError: a name that is taken, no rows, a domain or row that is not there, more domains than there is
                room for (`roster.MAX_JOINED`). Nothing is changed then.
        """
        new = late.numbered_domains(domains, self._first, Path(folder))
        joining = [domain for domain, _ in new]
        self.schedule.check_new(joining)
        self._views |= {domain.source["hash"]: late.written(domain, numbers, self._first) for domain, numbers in new}
        self.schedule.extend(joining)

    @property
    def read_until(self) -> int:
        """One more than the highest position that a loader read here or in a worker; 0 before, and after loading."""
        return int(self._reads.array[2:].max())

    @property
    def read_size(self) -> int:
        """Positions in the last request of a loader, its batch size in this process; 0 before, and after loading."""
        return int(self._reads.array[0])

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hash of the content of each of the first domains: its index, its length, its first and last sequence."""
        parts = self.sequences.items()
        return {name: content_hash(rows, self.sequence_length, f"domain {name!r}") for name, rows in parts}

    def state_dict(self) -> dict[str, Any]:
        """Everything the stream depends on, as JSON-able values: the schedule's state and the domains' fingerprint."""
        return {
            "schedule": self.schedule.state_dict(),
            "sequence_length": self.sequence_length,
            "fingerprint": dict(self.fingerprint),
        }

    def load_state_dict(self, state: Mapping[str, Any], views: str | os.PathLike[str] | None = None) -> None:
        """Continue the stream of a state made by `state_dict`; to be called before a loader reads on.

        Domains that joined are those of the state from then on, and no others.

        Args:
            state: the state.
            views: folder of the index files of domains that joined; None: where they were when the state was made.

        Raises:
            ValueError: the state is of other data, or an index file is missing or changed; the message says what, and
                nothing was loaded.
        """
        found = self.schedule.differences(state["schedule"])
        if state["sequence_length"] != self.sequence_length:
            found.append(f"sequence_length was {state['sequence_length']} and is {self.sequence_length}")
        elif not found:
            changed = [name for name, content in self.fingerprint.items() if state["fingerprint"][name] != content]
            found += [f"domain {name!r} has as many rows, but their content changed" for name in changed]
        if found:
            raise ValueError("this state belongs to other data: " + "; ".join(found))
        schedule, opened = late.opened(state["schedule"], self._first, views)
        self.schedule.load_state_dict(schedule)
        self._views = opened
        self._reads.array[:] = 0

    def _reading_order(self, positions: Ints) -> list[range]:
        """The request as one ascending range, or two where it wraps from the stream's end to its start."""
        if (outside := positions[(positions < 0) | (positions >= self.num_samples)]).size:
            raise IndexError(f"position {outside[0]} is not in [0, {self.num_samples})")
        steps = np.diff(positions)
        stride = int(steps[0]) % self.num_samples if steps.size else 1
        wraps = np.flatnonzero(steps < 0)
        # Samplers that pad to equal shards go on from the start; more than half the stream is no stride, but a shuffle.
        wrapped = len(wraps) == 1 and 2 * stride <= self.num_samples
        if stride == 0 or ((steps - stride) % self.num_samples).any() or (len(wraps) and not wrapped):
            raise ValueError(f"positions are not read in order: {positions[:8].tolist()}...{_REMEDY}")
        parts = np.split(positions, wraps + 1)
        return [range(int(part[0]), int(part[-1]) + 1, stride) for part in parts]

    def _check_passes(self, first: int) -> None:
        # Within a request a shuffle shows at once, but a request may hold a single position. One step back may be a new
        # pass (which starts where the earliest did) or a second loader; step after step of them is a shuffle.
        self._lowest = min(self._lowest, first)
        back = self._lowest < first < self._last
        self._steps_back.append(back)
        self._last = first
        if back and sum(self._steps_back) >= 3:
            raise ValueError(f"positions are not read in order: requests go back and forth, now to {first}.{_REMEDY}")

    def _wait_until_decided(self, start: int, stop: int) -> None:
        parent = multiprocessing.parent_process()
        pulse, since, patience = -1, time.monotonic(), _WARN_SECONDS
        while get_worker_info() is not None and (end := self.schedule.end) is not None and end < stop:
            if parent is not None and not parent.is_alive():
                raise RuntimeError(f"the parent process ended before it published the stage of position {end}")
            if pulse != (pulse := int(self._reads.array[1])):
                since, patience = time.monotonic(), _WARN_SECONDS
            waited = time.monotonic() - since
            if waited > _GIVE_UP_SECONDS:
                raise Undecided(f"position {end} was not decided within {waited:.0f} s.{_WAITING}")
            if waited > patience:
                logger.warning("waiting for the stage of position %d for %.0f s.%s", end, waited, _WAITING)
                patience *= 4
            time.sleep(_POLL_SECONDS)
        self.schedule.check_decided(start, stop)

    def pulse(self) -> None:
        """Say that the main process is at work: a worker that waits for a stage is then patient with it."""
        self._reads.array[1] += 1

    def _note_read(self, size: int, stop: int) -> None:
        worker = get_worker_info()
        # A cell for each writer, because nothing here makes "take the maximum" one step between processes.
        cell = 2 if worker is None else 3 + worker.id % _SLOTS
        reads = self._reads.array
        reads[cell] = max(int(reads[cell]), stop)
        reads[0] = size

    def _items(self, runs: Sequence[range]) -> list[Item]:
        found = [self._assigned(run) for run in runs]
        domain, row = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return self._rows(domain, row)

    def _assigned(self, run: range) -> tuple[Ints, Ints]:
        start, stop = run[0], run[-1] + 1
        ahead = self._ahead
        if ahead.generation != self.schedule.generation or not ahead.start <= start <= stop <= ahead.stop:
            generation, end = self.schedule.generation, self.schedule.end
            last = min(start + _READ_AHEAD, self.num_samples, self.num_samples if end is None else end)
            domain, row, _ = self.schedule.assign(start, max(stop, last))
            self._ahead = ahead = _Ahead(generation, start, domain, row)
        part = slice(start - ahead.start, stop - ahead.start, run.step)
        return ahead.domain[part], ahead.row[part]

    def _rows(self, domain: Ints, row: Ints) -> list[Item]:
        ids = np.empty((len(domain), self.sequence_length), np.int64)
        for number in np.unique(domain).tolist():
            here = np.flatnonzero(domain == number)
            ids[here] = self._gather(number, row[here])
        inputs = torch.from_numpy(ids)
        # Labels of their own: a transform that masks them in place must not mask the inputs.
        pairs = zip(inputs.unbind(), inputs.clone().unbind(), domain.tolist(), strict=True)
        return [{"input_ids": tokens, "labels": labels, "domain": number} for tokens, labels, number in pairs]

    def _gather(self, number: int, rows: Ints) -> Ints:
        first = number < len(self._first)
        sequences = self._first[number] if first else self._view(self.schedule.joined[number - len(self._first)])
        return gather(sequences, rows, self.sequence_length, f"domain {self.domains[number]!r}")

    def _view(self, domain: Domain) -> RowView:
        if domain.source["hash"] not in self._views:
            self._views[domain.source["hash"]] = late.view(domain, self._first)
        return self._views[domain.source["hash"]]


class _Ahead(NamedTuple):
    """Assignments of the positions from `start` on, computed under one generation of the schedule."""

    generation: int
    start: int
    domain: Ints
    row: Ints

    @property
    def stop(self) -> int:
        return self.start + len(self.domain)


def as_sequences(name: str, data: Any, sequence_length: int | None) -> Sequences:
    """A domain as rows, whatever it was given as; raises ValueError where it has none, in words for the domain."""
    if isinstance(data, str | os.PathLike):
        data = TokenStore.open(data)
    tokens = "none"
    if isinstance(data, TokenStore | DocumentView):
        if sequence_length is None:
            raise ValueError(f"sequence_length is missing: domain {name!r} is a token store, to be cut into sequences")
        tokens = f"{data.num_tokens} tokens, of {sequence_length}"
        data = PackedSequences(data, sequence_length)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ValueError(
            f"domain {name!r} is a {type(data).__name__}: give a TokenStore, its path, a view, or a sequence of dicts"
            " with input_ids"
        )
    if not len(data):
        raise ValueError(f"domain {name!r} has not one whole sequence ({tokens}): give it more text, or leave it out")
    sequences: Sequences = data
    return sequences
