"""The mixture as a `torch.utils.data.IterableDataset`, for domains that can only be read from their beginning on.

The schedule decides which domain stands at a position, as in `MixtureDataset`; the sample is the next one from the
domain's source. This module must not know of models, optimizers or how weights are chosen.
"""

import os
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.domain_stream import DomainReader, Encoder, KeptAside, TokenizerOrFunction, kept_aside
from dynmix.mixture.items import Items, ItemSource, PassEnded, check_shared, check_source
from dynmix.mixture.options import whole
from dynmix.mixture.progress import Progress
from dynmix.mixture.read_ahead import ReadAhead
from dynmix.mixture.schedule import Ints, MixtureSchedule, schedule_of
from dynmix.mixture.sequences import Item
from dynmix.mixture.steered import Steered
from dynmix.mixture.weights import matched

_STAGES = 32  # after so many a state is made anew, which takes time, and is asked for after every batch
UNKNOWN = 1 << 40  # rows of a domain of unknown size: domains and counts of positions do not depend on it
_WAITING = (
    " A measurement or an evaluation may be under way. If nothing is, the loader has read further than the optimizer"
    " steps say: pass the loader's batch_size to MixtureStream, what a step takes to MixtureHook, and call its step()"
    " once an optimizer step"
)

WhenExhausted = Literal["repeat", "stop"]


class MixtureStream(Steered, IterableDataset[Item]):
    """A mixture of sources that have no random access, by the same schedule as `MixtureDataset`.

        stream = MixtureStream(
            {"web": load_dataset(..., streaming=True), "code": read_code},  # read_code(): yields strings or dicts
            {"web": 0.7, "code": 0.3},
            num_samples=1_000_000, sequence_length=2048, batch_size=8, tokenizer=tokenizer,
        )
        loader = StatefulDataLoader(stream, batch_size=8, num_workers=2)  # of torchdata, to resume without re-reading

    Items are {"input_ids": LongTensor[sequence_length], "labels": the same, "domain": int}. Sources yield mappings with
    `input_ids` of any length, mappings with a text, or strings. They are put end to end and cut; nothing is dropped,
    and items of `sequence_length` tokens stay whole. Items with padding, or labels other than their ids, are refused.

    What it guarantees:

    - The domain of each position is the schedule's, whatever the ranks and workers: batch b of a loader holds the same
      domains as when `MixtureDataset` is read in order. New weights take effect at their declared position; a worker
      that reads ahead waits for a stage that is not published yet.
    - The same sources, seed, stages, ranks and workers give the same samples.
    - A state resumes exactly with the numbers of ranks and workers it was taken with, and is refused with others.
      Sources with `state_dict` and `load_state_dict` resume from their own state; others, and HF datasets with a
      shuffle buffer (which no state includes) or of `datasets` before 4.8.5 (whose states were not exact), are read
      again up to where they were left, and the log says so.

    What it cannot do is keep the samples when the number of ranks or workers changes, since each reads its own share of
    every domain. If you need that, write token stores (`dynmix prepare`) and use `MixtureDataset`.

    Sources must yield the same items in the same order on every rank each time they are opened (for the same epoch).
    They are split here: each of n readers keeps every n-th item and skips the others. A function with the parameters
    `shard` and `num_shards`, and an HF dataset without `take` and `skip` whose number of shards is a multiple of the
    readers, yield only their part, which saves reading the rest.

    Loaders: torch's `DataLoader` and torchdata's `StatefulDataLoader` on each rank, with `rank` and `world_size`. The
    Trainer and accelerate split batches themselves: `world_size=1`. They resume by reading everything again up to that
    point (`ignore_data_skip=False`), which is exact but takes time.

    Args:
        domains: name -> iterable of items, or a function that makes one (called with `epoch`, `shard` and `num_shards`
            if it has those parameters). A bare generator can be read only once and is refused. `set_epoch` of an
            iterable is called before each pass. HF datasets are copied, so they may be read elsewhere meanwhile; other
            iterables with a state may not.
        weights: of the first stage: "uniform", or name -> weight.
        num_samples: length of the stream in sequences, over all ranks.
        sequence_length: tokens of a sequence.
        seed: of the order of domains, as in `MixtureSchedule`.
        block: as in `MixtureSchedule`: best the global batch size in sequences.
        batch_size: the loader's; needed with several workers or ranks, which take batches in turn. Under accelerate
            with `dispatch_batches=False`, times the number of processes.
        rank: of this process, among those with a loader of their own.
        world_size: number of those processes; None: one. It must be given if torch.distributed has several.
        tokenizer: for text: of transformers (its EOS is put after each text), its path, or a function from text to ids.
        text_field: key of the text.
        sizes: name -> sequences of one pass, an estimate will do; `MixtureController` needs them for epochs and
            `max_epochs`.
        probe_sequences: how many sequences of each domain are read now, from its start, and never trained on, for
            `MixtureController` to measure the domain on: at least its own `probe_sequences`, better twice that.
        when_exhausted: what happens when a domain ends. "repeat": it starts again, and the log says so; "stop": the
            stream ends there (for one rank and at most one worker, since others would go on).

    Attributes:
        schedule: the `MixtureSchedule` of this stream.
        sequence_length: tokens of a sequence.

    Raises:
        ValueError: bad weights, numbers or sources; while reading: an empty source, an item without tokens, more
            readers than `batch_size` and `world_size` allow for.
        Undecided: for a position whose stage is not published: in the main process at once, in a worker after half an
            hour without a sign of life from the main process.
    """

    def __init__(
        self,
        domains: Mapping[str, ItemSource],
        weights: Literal["uniform"] | Mapping[str, float] = "uniform",
        *,
        num_samples: int,
        sequence_length: int,
        seed: int = 0,
        block: int = 256,
        batch_size: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        tokenizer: TokenizerOrFunction = None,
        text_field: str = "text",
        sizes: Mapping[str, int] | None = None,
        probe_sequences: int = 0,
        when_exhausted: WhenExhausted = "repeat",
    ) -> None:
        if not isinstance(domains, Mapping):
            raise ValueError(f"domains is a {type(domains).__name__}: give a mapping from name to source")
        if not domains:
            raise ValueError("domains is empty: a mixture needs at least one")
        self.num_samples = whole("num_samples", num_samples, 1)
        self.sequence_length = whole("sequence_length", sequence_length, 1)
        self.batch_size = None if batch_size is None else whole("batch_size", batch_size, 1)
        self.world_size = None if world_size is None else whole("world_size", world_size, 1)
        probe_sequences = whole("probe_sequences", probe_sequences or 0, 0)
        if when_exhausted not in get_args(WhenExhausted):
            raise ValueError(f"when_exhausted={when_exhausted!r}: give one of {get_args(WhenExhausted)}")
        if isinstance(weights, str):
            if weights != "uniform":
                raise ValueError(f'weights={weights!r}: give "uniform" or a mapping from name to weight')
            weights = {name: 1 / len(domains) for name in domains}
        for name, source in domains.items():
            check_source(name, source)
        check_shared(domains)
        self._sources = tuple(domains.values())
        self.schedule = MixtureSchedule(
            matched(weights, tuple(domains), "weights"),
            dict.fromkeys(domains, UNKNOWN) if sizes is None else sizes,
            seed=whole("seed", seed),
            block=whole("block", block),
        )
        self.rank, self.sized, self._policy = rank, sizes is not None, when_exhausted
        self._place()
        self._encode = Encoder(tokenizer, text_field)
        self._progress = Progress()
        self._reading: _Reading | None = None
        self._resume: dict[str, Any] | None = None
        self._stages: tuple[tuple[int, int | None, int], dict[str, Any]] | None = None
        self._probes: tuple[KeptAside, ...] = ()
        if probe_sequences:
            self._probes = tuple(
                kept_aside(name, source, self._encode, sequence_length, probe_sequences)
                for name, source in domains.items()
            )

    def __len__(self) -> int:
        return self.num_samples

    def detach(self) -> None:
        """As in `Steered`."""
        super().detach()
        self._stages = None

    def __getstate__(self) -> dict[str, Any]:
        # A process reads for itself, and a copy's schedule counts generations of its own.
        return {**self.__dict__, "_reading": None, "_stages": None}

    def __iter__(self) -> Iterator[Item]:
        resume, self._resume = self._resume, None
        self._reading = _Reading(self, self._place(), resume)
        return self._reading

    @property
    def gone(self) -> tuple[str, ...]:
        """Always empty: a state of other domains than those listed is refused."""
        return ()

    def sequence(self, domain: str, row: int) -> Item:
        """Probe sequence `row` of a domain, as an item. Raises KeyError or IndexError if there is none."""
        if domain not in self.domains:
            raise KeyError(f"no domain {domain!r}: there are {list(self.domains)}")
        if not 0 <= row < self.probes(domain):
            raise IndexError(
                f"domain {domain!r} of this MixtureStream has {self.probes(domain)} probe sequences, number {row} is"
                " not among them: pass probe_sequences=, a few dozen, so that the domain can be measured"
            )
        number = self.domains.index(domain)
        return _item(self._probes[number].rows[row].copy(), number)

    def probes(self, domain: str) -> int:
        """How many probe sequences a domain has."""
        return len(self._probes[self.domains.index(domain)].rows) if self._probes else 0

    @property
    def read_size(self) -> int:
        """The loader's batch size in this process; 0 if it was not given, and before the loader reads."""
        return self.batch_size or 0 if self.read_until else 0

    def state_dict(self) -> dict[str, Any]:
        """The stages, and under "reading" where this process is in its sources (None before it reads).

        JSON-able, if the states of the sources are. With workers the main process reads nothing: `StatefulDataLoader`
        gathers their states, and this one has only the stages: all of them, as it may be read from the start again. If
        there are very many, a state of where a process is leaves out the oldest, which are behind it.
        """
        reading = self._reading.state_dict() if self._reading is not None else self._resume
        position = 0 if reading is None else _Place(*reading["place"]).position(reading["taken"])
        starts = self.schedule.starts
        first = max(0, bisect_right(starts, position) - 1) // _STAGES * _STAGES
        now = self.schedule.generation, self.schedule.end, first
        if self._stages is None or self._stages[0] != now:
            self._stages = now, self.schedule.state_dict(since=starts[first])
        return {"schedule": self._stages[1], "sequence_length": self.sequence_length, "reading": reading}

    def load_state_dict(self, state: Mapping[str, Any], views: object = None) -> None:
        """Resume from `state`; call it before reading. A state without "reading" restores the stages only.

        `views`, an argument of `MixtureDataset`, is ignored: no domain joins a stream.

        Stages that were published after those of the state stay, as long as nothing was read since.

        Raises:
            ValueError: the state is of another mixture; in a worker: of stages that the main process does not have.
        """
        schedule = schedule_of(state)
        if found := self.differences(state):
            raise ValueError("this state belongs to another mixture: " + "; ".join(found))
        if not self._is_of_worker(schedule):
            if self.read_until or not self.schedule.continues(schedule):
                self.schedule.load_state_dict(schedule)
            self._progress.forget()
            if state.get("reading") is not None or (self._reading is not None and self._reading.begun):
                self._reading = None  # or what a loader has made of its own state by now goes on
        self._resume = state.get("reading")

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """In words, what of a state's mixture is not as it is here; none if the state can be loaded."""
        return self.schedule.differences(state["schedule"]) + self._other_length(state)

    def _place(self) -> "_Place":
        """Which batches are this process's."""
        there = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size is None and there > 1:
            raise ValueError(
                f"there are {there} processes: pass rank= and world_size= where each has a loader of its own, or"
                " world_size=1 where the loader splits the batches (the Trainer, accelerate)"
            )
        world, rank, worker = self.world_size or 1, self.rank or 0, get_worker_info()
        if not 0 <= rank < world or (self.rank is None and world > 1):
            raise ValueError(f"rank={self.rank} is not in [0, {world}), the ranks of world_size={world}")
        workers = 1 if worker is None else worker.num_workers
        if self.batch_size is None and world * workers > 1:
            raise ValueError(
                f"{world * workers} readers take batches in turn: pass batch_size=, what the loader was given"
            )
        if self._policy == "stop" and world * workers > 1:
            raise ValueError(
                'when_exhausted="stop" takes one rank and at most one worker, as others would go on: "repeat"'
            )
        size = self.batch_size or 1
        if world > 1 and self.num_samples % (size * world):
            raise ValueError(
                f"num_samples={self.num_samples} is no multiple of batch_size x world_size = {size * world}: ranks"
                " would end at different steps"
            )
        return _Place(rank + world * (0 if worker is None else worker.id), world * workers, size)


Mixture = MixtureDataset | MixtureStream
"""What a controller can steer."""


class _Place(NamedTuple):
    """A reader's place among all, of which each takes a batch in turn."""

    reader: int
    readers: int
    batch_size: int

    def position(self, taken: int) -> int:
        """Position in the stream of the sample that this reader takes after `taken` others."""
        batch, inside = divmod(taken, self.batch_size)
        return (self.reader + self.readers * batch) * self.batch_size + inside

    def batch_end(self, taken: int) -> int:
        """Where the batch of that sample ends."""
        return self.position(taken - taken % self.batch_size) + self.batch_size


class _Reading(Iterator[Item]):
    """One pass of one reader over its positions of the stream."""

    def __init__(self, stream: MixtureStream, place: _Place, state: Mapping[str, Any] | None) -> None:
        if state is not None and state["place"] != list(place):
            raise ValueError(
                f"this state was taken by {_words(state['place'])} and is read by {_words(place)}: resume a"
                " MixtureStream with as many ranks and workers and the same batch_size"
            )
        self._stream, self._place = stream, place
        self._taken: int = 0 if state is None else state["taken"]
        self._left: dict[str, Any] = {} if state is None else dict(state["domains"])  # and not opened yet
        self._opened: dict[int, DomainReader] = {}
        self._ahead = ReadAhead(stream.schedule)
        self.begun = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        stream, position = self._stream, self._place.position(self._taken)
        if position >= stream.num_samples:
            raise StopIteration
        if not self.begun and self._place.readers > 1:
            _check_batch(sys._getframe(1), self._place.batch_size)
        if not self.begun or self._taken % self._place.batch_size == 0:
            # Checked for a whole batch: one that cannot be finished is not begun.
            stop = min(self._place.batch_end(self._taken), stream.num_samples)
            stream._progress.wait(stream.schedule, stop, _WAITING)
            stream.schedule.check_decided(position, stop)
            if not position:
                stream._progress.note_begin(stream.num_samples)
            # Noted before the stages are read: a publisher either sees the note, or its stage is seen here.
            stream._progress.note(self._place.batch_size, stop)
            self.begun = True
        number = int(self._ahead.assigned(range(position, position + 1), stream.__len__)[0][0])
        try:
            sequence = self._reader(number).sequence()
        except PassEnded:
            raise StopIteration from None
        self._taken += 1
        return _item(sequence, number)

    def state_dict(self) -> dict[str, Any]:
        """Where this reader is."""
        names = self._stream.domains
        domains = {names[number]: reader.state_dict() for number, reader in self._opened.items()}
        return {"place": [*map(int, self._place)], "taken": self._taken, "domains": self._left | domains}

    def _reader(self, number: int) -> DomainReader:
        if number not in self._opened:
            stream, name = self._stream, self._stream.domains[number]
            state, place = self._left.pop(name, None), self._place
            items = Items(
                name,
                stream._sources[number],
                place.reader,
                place.readers,
                once=stream._policy == "stop",
                state=None if state is None else state["items"],
            )
            held = stream._probes[number].held if stream._probes else frozenset[bytes]()
            self._opened[number] = DomainReader(
                items, stream._encode, stream.sequence_length, held, place.readers, state
            )
        return self._opened[number]


def _item(tokens: Ints, number: int) -> Item:
    ids = torch.from_numpy(tokens)
    return {"input_ids": ids, "labels": ids.clone(), "domain": number}


def _check_batch(caller: FrameType, batch_size: int) -> None:
    # A DataLoader does not tell a dataset its batch size. With another one, readers would silently deal out samples in
    # an order that the optimizer does not see. If the caller is not torch's fetcher, nothing is known.
    asked = caller.f_locals.get("possibly_batched_index")
    if caller.f_code.co_name == "fetch" and asked is not None and len(asked) != batch_size:
        raise ValueError(
            f"the loader takes {len(asked)} samples at a time and the MixtureStream was given batch_size={batch_size}:"
            " make them the same"
        )


def _words(place: Sequence[int]) -> str:
    return f"reader {place[0]} of {place[1]}, which take {place[2]} samples at a time"
