"""The mixture as a map-style `torch.utils.data.Dataset`: item g is the sequence at position g of the training stream.

Because items are pure functions of their position, any loader that reads positions in order (a DataLoader with or
without workers, the Trainer, accelerate's and DistributedSampler's shards) trains on the declared mixture. This module
must not know of models, optimizers or how weights are chosen.
"""

import logging
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, SupportsFloat

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from dynmix.mixture import accounting, late
from dynmix.mixture.accounting import Remaining, first_epochs, in_words
from dynmix.mixture.boundaries import IGNORED, Boundaries, check_collate
from dynmix.mixture.index import Numbers
from dynmix.mixture.limits import Exhausted, MaxEpochs, Policy
from dynmix.mixture.options import BosTokenId, SequenceOptions, whole
from dynmix.mixture.packed import last_shares
from dynmix.mixture.packing import PackedSequences, Packing
from dynmix.mixture.progress import Progress
from dynmix.mixture.read_ahead import ReadAhead
from dynmix.mixture.reading import InOrder
from dynmix.mixture.roster import JoinedDomain
from dynmix.mixture.rows import Tables, as_items, direct, parts_of, tables_of
from dynmix.mixture.samples import Samples
from dynmix.mixture.schedule import Ints, MixtureSchedule, Undecided, domains_of, schedule_of
from dynmix.mixture.sequences import Item, Rows, Sequences, common_length, content_hash, is_padded
from dynmix.mixture.sources import Source, open_domains
from dynmix.mixture.steered import Steered
from dynmix.mixture.text import Tokenizer
from dynmix.mixture.weights import Weights, matched

logger = logging.getLogger("dynmix.mixture")

_TOO_FAR = (
    "the loader has read further than the optimizer steps say: do not shuffle, read ahead in a DataLoader's workers and"
    " not in a thread, with gradient accumulation pass batch_size to MixtureHook, and call its step() once an optimizer"
    " step"
)
_WAITING = f" A measurement or an evaluation may be under way. If nothing is, {_TOO_FAR}"

_Joining = tuple[Sequence[JoinedDomain], Mapping[str, Sequences]]  # domains, and rows by the hash of their content


class MixtureDataset(Steered, Dataset[Item]):
    """Position g of the stream as {"input_ids": LongTensor[sequence_length], "labels": the same, "domain": int}.

    Read it in order: `DataLoader(dataset, shuffle=False)`, `train_sampling_strategy="sequential"`. For token stores
    `num_workers=0` is fastest. A worker that is asked for an undecided position waits for its stage; the main process,
    which would wait for itself, raises `Undecided`.

    A domain that has been read to its end is reshuffled and read again, and the log (`dynmix.mixture`) says where each
    epoch begins. `max_epochs` limits that. If limits end the stream, `len` is its actual length, a loader ends there as
    after any last batch, and positions beyond it raise `Exhausted`.

    With `boundaries`, the documents in a sequence do not attend to each other. An item then also has

    - "position_ids": int64[sequence_length], restarting with each document. Models of transformers keep documents apart
      by them: with eager and sdpa attention as they are, with flash attention for one sequence a batch or with
      `dynmix.mixture.boundaries.varlen_collate`. That takes no 2-D attention mask and no cache: set
      `model.config.use_cache = False`, as the Trainer does;
    - "mask": the same, and `attention_mask`, float32[1, sequence_length, sequence_length], to be added to the attention
      scores, for models that ignore positions. It is large: sequence_length times the ids.

    The label of a document's first token is then -100.

    The collate function must keep what items hold. Several of transformers make labels, positions or a 2-D mask of
    their own: `DataCollatorForLanguageModeling`, `DataCollatorWithFlattening`, and `DataCollatorWithPadding`, which the
    Trainer uses if it is given a `processing_class`. If boundaries or labels of -100 would be lost, the first batch
    that has any raises `ValueError`. Use `transformers.default_data_collator` or `varlen_collate`.

    Args:
        domains: name -> token store, flat file (`FlatTokens`), view (`DocumentView`, `RowView`), HF `Dataset` with
            `input_ids` or text, path, folder or glob of these, local or remote (`s3://`), or a list of several; or any
            sequence of dicts with `input_ids` of one length. See `dynmix.mixture.sources.open_documents`. If such a
            dict has `labels`, the item keeps them; if it has an `attention_mask`, labels are -100 where that is 0;
            one that begins with padding needs `boundaries`.
        weights: of the first stage: "natural" (proportional to tokens), "uniform", or name -> weight.
        num_samples: length of the stream in sequences.
        sequence_length: tokens of a sequence; needed to cut token stores.
        seed: of the order, as in `MixtureSchedule`.
        block: as in `MixtureSchedule`: best the global batch size in sequences.
        max_epochs: how often a domain may be read over the whole run, > 0, for all or by name; None: no limit. It also
            bounds the weights that mixers may propose.
        homogeneous: number of consecutive sequences that come from one domain, so that a micro-batch holds a single
            domain while the proportions over a step stay the same; `block` and the length of every stage are multiples
            of it. With `max_epochs`, the last sequences of a domain that do not fill a group are not read.
        when_exhausted: what happens when a domain has been read `max_epochs` times. "redistribute": from that position
            on the other domains of the stage take its share, in proportion to theirs, and the stream ends when none is
            left; "stop": the stream ends there; "repeat": the domain is read again, and only mixers are bounded. None:
            "redistribute" with `max_epochs`, "repeat" without.
        packing: how documents become sequences, "concat" or "best_fit", as in `PackedSequences`.
        boundaries: see above; None: a sequence is one text, whichever documents it is made of.
        bos_token_id: put in front of each sequence, or with "best_fit" or `boundaries` in front of each document, as in
            `PackedSequences`. "auto": the tokenizer's, if it adds one to a text by itself, for domains whose documents
            do not begin with it already; None: none.
        pad_token_id: for "best_fit" only: the id of padding, whose labels are -100; None: 0.
        ignore_token_ids: ids whose labels are always -100, such as padding that is in the data already.
        tokenizer: of transformers, or its path or hub name, for datasets with text. Stores and files that were made
            with another are refused.
        cache_dir: where tokenised text and copies of remote files are kept; None: `$DYNMIX_CACHE`, or else
            `~/.cache/dynmix`.

    Attributes:
        schedule: the `MixtureSchedule` of this stream.
        sequence_length: tokens of a sequence.
        boundaries: as given.
        homogeneous: as given.
        options: how documents become sequences, and what items say of them.
        masks_labels: whether labels of some items may be -100: of padding, first tokens of documents, or ignored ids.
        controlled: whether a controller publishes the stages; it then also logs what happens in them.

    Raises:
        ValueError: a domain without a whole sequence, sequences of different lengths, bad weights or numbers.
    """

    def __init__(
        self,
        domains: Mapping[str, Source],
        weights: Literal["natural", "uniform"] | Mapping[str, float] = "natural",
        *,
        num_samples: int,
        sequence_length: int | None = None,
        seed: int = 0,
        block: int = 256,
        homogeneous: int = 1,
        max_epochs: MaxEpochs = None,
        when_exhausted: Policy | None = None,
        packing: Packing = "concat",
        boundaries: Boundaries | None = None,
        bos_token_id: BosTokenId = "auto",
        pad_token_id: int | None = None,
        ignore_token_ids: Sequence[int] = (),
        tokenizer: "Tokenizer | None" = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(domains, Mapping):
            raise ValueError(f"domains is a {type(domains).__name__}: give a mapping from name to data")
        if not domains:
            raise ValueError("domains is empty: a mixture needs at least one")
        self.num_samples, seed, block = whole("num_samples", num_samples, 1), whole("seed", seed), whole("block", block)
        sequence_length = None if sequence_length is None else whole("sequence_length", sequence_length, 1)
        self.options = SequenceOptions.checked(
            packing, boundaries, bos_token_id, pad_token_id, ignore_token_ids, tokenizer
        )
        self.boundaries = boundaries
        self._tokenizer, self._cache_dir = tokenizer, cache_dir
        # What is listed stays; the first domains become those of a state that is loaded.
        self._given, self._listed = dict(domains), self._open(domains, sequence_length)
        self._first = tuple(self._listed.values())
        if (packing != "concat" or bos_token_id not in (None, "auto")) and not any(
            isinstance(rows, PackedSequences) for rows in self._first
        ):
            raise ValueError(
                "packing and bos_token_id are of documents that are packed here, and no domain has such: leave them"
                " out, or give the documents as token stores"
            )
        self._contents: dict[str, str] = {}  # hashes of the listed domains
        self._late: dict[str, Sequences] = {}  # of the domains that joined, by the hash of their content
        self._tables: Tables | None = None  # of the first domains, when they are first needed
        self.masks_labels = bool(boundaries or self.options.ignore_token_ids) or any(map(is_padded, self._first))
        named = {f"domain {name!r}": rows for name, rows in self._listed.items()}
        self.sequence_length = common_length(named, sequence_length)
        sizes = {name: len(rows) for name, rows in self._listed.items()}
        if not isinstance(weights, Mapping):
            if not isinstance(weights, str) or weights not in ("natural", "uniform"):
                raise ValueError(f'weights={weights!r}: give "natural", "uniform" or a mapping from name to weight')
            parts = {name: size if weights == "natural" else 1 for name, size in sizes.items()}
            total = sum(parts.values())
            weights = {name: part / total for name, part in parts.items()}
        weights = matched(weights, tuple(sizes), "weights")
        for name, weight in weights.items():
            if not isinstance(weight, SupportsFloat) or not 0 <= float(weight) < float("inf"):
                raise ValueError(f"weights[{name!r}]={weight!r}: a weight is a finite number, at least 0")
        self.homogeneous = whole("homogeneous", homogeneous)
        self.schedule = MixtureSchedule(weights, sizes, seed, block, max_epochs, when_exhausted, self.homogeneous)
        self.controlled = False
        self._collated: Any = None  # by what function, as was checked last
        self._progress, self._reading = Progress(), InOrder(self.num_samples)
        self._ahead = ReadAhead(self.schedule)
        self._stages_loaded: int | None = None  # of the state that was loaded last
        if max_epochs == 0 or (max_epochs is not None and not self.ends_at):
            raise ValueError(f"max_epochs={max_epochs!r}: no sequence may be read at all; 1 is once, None no limit")

    def __getstate__(self) -> dict[str, Any]:
        # Views have files, from which a process opens those that it meets; other data goes with the dataset.
        files = {domain.source["hash"] for domain in self.schedule.joined if "file" in domain.source}
        sent = {key: rows for key, rows in self._late.items() if key not in files}
        return {**self.__dict__, "_late": sent, "_tables": None, "_collated": None}

    def __len__(self) -> int:
        return self.num_samples if self.controlled else self.ends_at

    @property
    def ends_at(self) -> int:
        """First position that is not in the stream, as far as its stages say: `num_samples`, or where it is exhausted.

        In a run that says what a step takes it is exhausted at the end of its last whole step.
        """
        if (dry := self.schedule.exhausted_at) is None:
            return self.num_samples
        return min(self.num_samples, dry - dry % max(1, self._progress.step_size))

    def __getitem__(self, position: int) -> Item:
        """Item at `position`, in any order: for inspection, and for a dataset that wraps this one.

        In the main process it has no side effects; a worker asks for what it reads ahead, which then counts as read.
        """
        position = operator.index(position)
        if not 0 <= position < self.num_samples:
            raise IndexError(f"position {position} is not in [0, {self.num_samples})")
        runs = self._decided([range(position, position + 1)])
        if get_worker_info() is not None:  # before the stages are read, as in `__getitems__`
            self._progress.note_until(position + 1)
        return dict(self._items(runs)[0])

    def __getitems__(self, positions: Sequence[int]) -> Samples:
        """Items of one request of a loader, a list of dicts; requests must come in reading order.

        Raises:
            ValueError: the positions are not equally spaced and ascending (but for one wrap from the end to the start).
            IndexError: a position outside the stream.
            Exhausted: all positions are beyond the stream's end; of a request that crosses it, those before are given.
            Undecided: for a position whose stage is not published: in the main process at once, in a worker after half
                an hour without a sign of life from the main process.
            RuntimeError: in a worker, when its parent process ended while it waited.
        """
        if not len(positions):
            return self._rows(np.empty(0, np.int64), np.empty(0, np.int64))
        runs = self._reading.runs(positions, self.__len__)
        (start, stop), end = _bounds(runs), self.schedule.end
        # What was assigned ahead was decided then; an end may have been declared since.
        if (end is not None and end < stop) or not self._ahead.holds(start, stop):
            runs = self._decided(runs)
            start, stop = _bounds(runs)
        if not runs[0].start:  # and not where a sampler fills its last batch up from the stream's start
            self._progress.note_begin(self.ends_at)
        # Noted before the stages are read: a publisher either sees the note, or its stage is seen here.
        self._progress.note(len(positions), stop, runs[0].step)
        items = self._items(runs)
        for event in self._ahead.events(start, stop):
            if any(event.position in run for run in runs):
                logger.warning("%s", event)
        if self.masks_labels:
            collate = _collate_of_loader(sys._getframe(1))
            if collate is not None and collate is not self._collated and items.any_label(IGNORED):
                self.check_collate(collate)
        return items

    def check_collate(self, collate_fn: Callable[[Any], Any]) -> None:
        """Raise ValueError if a loader's collate function would lose `boundaries`, or labels that are -100.

        Loaders are checked at their first batch; this says so earlier.
        """
        domain = next(name for name, size in self.sizes.items() if size and name not in self.gone)
        with torch.random.fork_rng(devices=[]):
            check_collate(collate_fn, self.sequence(domain, 0), self.boundaries)
        self._collated = collate_fn

    def look(self, start: int, stop: int) -> Samples:
        """Items of positions [start, stop), wherever loaders are: to look at. Raises as `schedule.check_decided`."""
        return self._rows(*self.schedule.assign(start, stop)[:2])

    def sequence(self, domain: str, row: int) -> Item:
        """Sequence `row` of a domain as an item, independent of the stream."""
        if domain not in self.sizes:
            raise KeyError(f"no domain {domain!r}: there are {list(self.domains)}")
        if not 0 <= operator.index(row) < self.sizes[domain]:
            raise IndexError(f"row {row} of domain {domain!r} is not in [0, {self.sizes[domain]})")
        return dict(self._rows(np.array([self.domains.index(domain)]), np.array([row]))[0])

    @property
    def gone(self) -> tuple[str, ...]:
        """Domains of a state that was loaded which this dataset was not given: they cannot be drawn any more."""
        return tuple(rows.name for rows in (*self._first, *self._late.values()) if isinstance(rows, late.Gone))

    @property
    def sequences(self) -> dict[str, Sequences]:
        """Name -> sequences, of the domains that the run began with; the views of `extend` are on their rows."""
        return dict(zip(self.domains, self._first, strict=False))

    def publish(self, weights: Weights, start: int, end: int | None = None) -> None:
        """`schedule.publish`, refused (ValueError) for a `start` below `read_until`; logs what will be read again."""
        super().publish(weights, start, end)
        number, stop = self.schedule.num_stages - 1, min(self.ends_at, self.num_samples if end is None else end)
        again, count = first_epochs(self.schedule, start, stop) if start < stop else ([], 0)
        if again:
            logger.warning("stage %d will read again: %s", number, in_words(again, count))
        if (dry := self.schedule.exhausted_at) is not None and dry < self.num_samples:
            logger.warning("%s", self.schedule.why_exhausted(dry))

    def extend(
        self,
        domains: Mapping[str, "Source | tuple[npt.ArrayLike, npt.ArrayLike]"],
        folder: str | os.PathLike[str] | None = None,
        agree: Callable[[Callable[[], Any]], Any] = lambda ready: ready(),
    ) -> None:
        """Append domains: new data, or views on rows of the first domains, which copy no tokens.

        Their weight is 0, and no sample changes, until a stage is published that gives them weight. Worker processes
        that are already running see them then. Every rank calls this with the same arguments and a folder, its own or a
        shared one; if several machines share it, one rank goes first.

        A state says where a token store or a path is. A run that resumes must list any other data among the domains of
        its `MixtureDataset`, behind those that this one began with.

        Args:
            domains: name -> data, as `MixtureDataset` takes it; or a pair (numbers of first domains, rows of them),
                int[n] each.
            folder: where the index of each view is written, as `<name>.npy`; keep it as long as the stream and its
                states.
            agree: calls what may fail of this, and returns what that returns, before anything is changed:
                `dynmix.ranks.on_every_rank` where ranks go on together, so that all have the domains or none.

        Raises:
            ValueError: a name that is taken, no rows, a domain or row that does not exist, sequences of another length,
                data in memory while workers are running, which would not see it, more than 1,024 domains that joined.
                Nothing is changed then.
        """

        def ready() -> _Joining:
            views: dict[str, Any] = {name: data for name, data in domains.items() if late.is_view(data)}
            if views and folder is None:
                raise ValueError(f"folder is missing, where the index of {next(iter(views))!r} is kept")
            opened = self._open({name: domains[name] for name in domains if name not in views}, self.sequence_length)
            return self._ready(domains, opened, late.joined_views(views, self._first, Path(folder or ".")))

        self._join(*agree(ready))

    def _open(self, domains: Mapping[str, Source], sequence_length: int | None) -> dict[str, Sequences]:
        given = {"tokenizer": self._tokenizer, "cache_dir": self._cache_dir, **self.options.of_packing}
        return open_domains(domains, sequence_length, **given)

    def _ready(
        self, given: Mapping[str, Any], new: Mapping[str, Sequences], views: Sequence[tuple[JoinedDomain, Numbers]] = ()
    ) -> _Joining:
        common_length({f"domain {name!r}": rows for name, rows in new.items()}, self.sequence_length)
        own = [
            late.joined_domain(name, given[name], rows, self.sequence_length, workers=self._progress.by_workers)
            for name, rows in new.items()
        ]
        joining = [*own, *(domain for domain, _ in views)]
        self.schedule.check_new(joining)
        rows = {domain.source["hash"]: new[domain.name] for domain in own}
        return joining, rows | {at.source["hash"]: late.written(at, numbers, self._first) for at, numbers in views}

    def _join(self, joining: Sequence[JoinedDomain], rows: Mapping[str, Sequences]) -> None:
        self._late |= rows
        self.schedule.extend(joining)

    def detach(self) -> None:
        """As in `Steered`."""
        super().detach()
        self._ahead = ReadAhead(self.schedule)

    def remaining(self, position: int | None = None) -> dict[str, Remaining]:
        """Domain -> what is left of it at `position`: sequences and tokens, of its epoch and within `max_epochs`.

        None stands for `read_until`, so what workers have read ahead counts as read.
        """
        at = self.read_until if position is None else position
        return accounting.remaining(self.schedule, at, self.sequence_length)

    def realised(self, position: int | None = None) -> dict[str, int]:
        """Domain -> tokens of it before `position`, padding included, in closed form; None as in `remaining`."""
        drawn = self.schedule.counts(self.read_until if position is None else position).tolist()
        return {name: n * self.sequence_length for name, n in zip(self.domains, drawn, strict=True)}

    @property
    def read_size(self) -> int:
        """Positions in the last request of a loader, its batch size in this process; 0 before, and after loading."""
        return self._progress.read_size

    @property
    def read_span(self) -> int:
        """`read_size`, times the number of ranks if these take the positions in turn."""
        return self._progress.read_span

    def plan_steps(self, samples: int) -> None:
        """Say how many samples an optimizer step takes, so that the stream ends with a whole step."""
        self._progress.plan_steps(samples)
        self.schedule.outdate()

    @property
    def fingerprint(self) -> dict[str, str]:
        """Hash of the content of each of the first domains: their number of rows, fingerprint, first and last row."""
        return {
            name: rows.fingerprint if isinstance(rows, late.Gone) else self._content_of(name)
            for name, rows in self.sequences.items()
        }

    def _content_of(self, name: str) -> str:
        if name not in self._contents:
            self._contents[name] = content_hash(self._listed[name], self.sequence_length, f"domain {name!r}")
        return self._contents[name]

    def state_dict(self) -> dict[str, Any]:
        """Everything the stream depends on, as JSON-able values: the schedule's state and the domains' fingerprint."""
        return {
            "schedule": self.schedule.state_dict(since=self.read_until or None),
            "sequence_length": self.sequence_length,
            "options": self.options.chosen,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any], views: str | os.PathLike[str] | None = None) -> None:
        """Continue the stream of a state made by `state_dict`; to be called before a loader reads on.

        In a worker, where torchdata's `StatefulDataLoader` calls it, nothing changes: stages are the main process's.
        Nor does it where that loader has none, and loads the state that was loaded already as it begins to read: what
        was published or joined since stays.

        From then on the domains are those of the state, with their numbers there. The data of those that joined is
        found where the state says, or among the domains of this dataset. A domain of the state may be missing here if
        the state's last stage does not draw it. A domain that the state does not have joins, with weight 0 until a
        published stage gives it weight.

        Args:
            state: the state.
            views: folder of the index files of domains that joined; None: where they were when the state was made.

        Raises:
            ValueError: the state is of other data, or an index file is missing or changed; the message says what, and
                nothing was loaded. In a worker: of stages that the main process does not have.
        """
        saved = late.relocated(schedule_of(state), views)
        then, joined = domains_of(saved)
        schedule = self.schedule.like(then)
        if found := self._differences(state, saved, schedule):
            raise ValueError("this state belongs to other data: " + "; ".join(found))
        if self._is_of_worker(saved) or self._is_loaded(saved):
            return
        contents, length = state["fingerprint"], self.sequence_length
        first = tuple(
            self._listed[name] if name in self._listed else late.Gone(name, size, length, contents[name])
            for name, size in then.items()
        )
        drawn = last_shares(saved)
        opened = {
            domain.source["hash"]: late.rows_of(domain, first, self._listed, self._open, length, drawn)
            for domain in joined
        }
        if list(then) == list(self.schedule.sizes)[: len(self._first)]:
            self.schedule.load_state_dict(saved, self._listed)  # the same schedule still: workers that run share it
        elif self._progress.by_workers:
            raise ValueError("workers read already, and this state has other domains: load it before the loader starts")
        else:
            schedule.load_state_dict(saved, self._listed)
            self.schedule, self._first, self._tables = schedule, first, None
            self._ahead = ReadAhead(schedule)
        self._late = opened
        self._progress.forget()
        self._reading = InOrder(self.num_samples)  # to read again from there is no step back
        if new := {name: rows for name, rows in self._listed.items() if name not in self.sizes}:
            self._join(*self._ready(self._given, new))
            logger.warning("%s joined: nothing is drawn of it until a stage is published that gives it some", list(new))
        self._stages_loaded = self.schedule.num_stages

    def _is_loaded(self, schedule: Mapping[str, Any]) -> bool:
        """Whether a state of this `schedule` is the one that was loaded last, and nothing was read since."""
        stages = schedule["stages"]["first"] + len(schedule["stages"]["starts"])
        return not self.read_until and stages == self._stages_loaded and self.schedule.continues(schedule)

    def _differences(self, state: Mapping[str, Any], saved: Mapping[str, Any], schedule: MixtureSchedule) -> list[str]:
        """In words, why this dataset cannot go on from a state; none if it can.

        `saved` is its schedule's part, `schedule` one of the state's first domains with the settings of this one.
        """
        then, joined = domains_of(saved)
        found = schedule.differences(saved, self._listed)
        # Where settings differ, stages may be written in another way: they are not looked into.
        found += late.unlike(then, joined, self._listed, {} if found else last_shares(saved))
        found += self._other_length(state) + self.options.differences(state.get("options", {}))
        if "fingerprint" not in state:
            found.append("it is of a MixtureStream, whose sources may hold anything")
        if found:  # contents take long to look at
            return found
        return self._changed(state, [name for name in then if name in self._listed])

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """In words, what of a dataset of another process is not as it is here; none if both are of one stream.

        The content counts of those domains that have a fingerprint; items of others may be made as they are asked for.
        """
        found = self.schedule.differences(state["schedule"], self._listed)
        found += self.options.differences(state["options"]) + self._other_length(state)
        known = [name for name, rows in self._listed.items() if isinstance(rows, Rows) and name in state["fingerprint"]]
        return found or self._changed(state, known)

    def _changed(self, state: Mapping[str, Any], names: Sequence[str]) -> list[str]:
        changed = [name for name in names if self._content_of(name) != state["fingerprint"][name]]
        return [f"domain {name!r} has as many rows, but their content changed" for name in changed]

    def _decided(self, runs: Sequence[range]) -> list[range]:
        """What of a request is in the stream, once its stages are decided; raises as `__getitems__` does."""
        self._progress.wait(self.schedule, max(run.stop for run in runs), _WAITING)
        runs = self._within(runs)
        self._check_decided(*_bounds(runs))
        return runs

    def _check_decided(self, start: int, stop: int) -> None:
        try:
            self.schedule.check_decided(start, stop)
        except Undecided:
            if not self.controlled:
                raise
            # Here the controller publishes: telling the reader to do so would mislead.
            waits = f"the stage of position {self.schedule.end} is not decided yet"
            raise Undecided(f"{waits}: {_TOO_FAR}") from None

    def _within(self, runs: Sequence[range]) -> list[range]:
        """What of a request lies before the position at which the stream is exhausted."""
        end = self.ends_at
        kept = [range(run.start, min(run.stop, end), run.step) for run in runs if run.start < end]
        if not kept:
            reason = self.schedule.why_exhausted(self.schedule.exhausted_at or end)
            if not self.controlled:
                logger.warning("position %d was asked for: %s", runs[0].start, reason)
            raise Exhausted(reason)
        return kept

    def _items(self, runs: Sequence[range]) -> Samples:
        found = [self._ahead.assigned(run, lambda: self.ends_at, events=not self.controlled) for run in runs]
        domain, row = found[0] if len(found) == 1 else map(np.concatenate, zip(*found, strict=True))
        return self._rows(domain, row)

    def _rows(self, domain: Ints, row: Ints) -> Samples:
        if self._tables is None:
            self._tables = tables_of(self._first)
        tokens = direct(self._tables, self.sequence_length, domain, row)
        parts = parts_of(self._sequences_of, self.domains, domain, row) if tokens is None or self.masks_labels else []
        return as_items(domain, self.sequence_length, tokens, parts, self.options if self.masks_labels else None)

    def _sequences_of(self, number: int) -> Sequences:
        if number < len(self._first):
            return self._first[number]
        domain = self.schedule.joined[number - len(self._first)]
        content = domain.source["hash"]
        if content not in self._late:
            self._late[content] = late.rows_of(domain, self._first, self._listed, self._open, self.sequence_length)
        self.masks_labels |= is_padded(self._late[content])
        return self._late[content]


def _bounds(runs: Sequence[range]) -> tuple[int, int]:
    """The first position of one or two runs, and one past their last."""
    first, last = runs[0], runs[-1]
    return min(first[0], last[0]), max(first[-1], last[-1]) + 1


def _collate_of_loader(frame: FrameType | None) -> Callable[[Any], Any] | None:
    """The collate function of the DataLoader whose fetcher called, directly or through a `Subset`; None if none did.

    A loader does not tell a dataset how it collates, and what that loses would be lost silently.
    """
    for _ in range(4):
        if frame is None:
            break
        if frame.f_code.co_name == "fetch":
            found: Callable[[Any], Any] | None = getattr(frame.f_locals.get("self"), "collate_fn", None)
            return found
        frame = frame.f_back
    return None
