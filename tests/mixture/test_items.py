import json
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data._utils import worker as torch_worker

from dynmix.mixture.items import Items, PassEnded, check_shared

ROWS = 11


def rows(first: int = 0, step: int = 1) -> Iterator[dict[str, Any]]:
    for row in range(first, ROWS, step):
        yield {"row": row}


def parts(shard: int, num_shards: int) -> Iterator[dict[str, Any]]:
    return rows(shard, num_shards)


def shuffled(epoch: int) -> Iterator[dict[str, Any]]:
    return iter([{"row": int(row)} for row in np.random.default_rng(epoch).permutation(ROWS)])


class Stateful:
    """Keeps its own place, as torchdata asks it of datasets."""

    def __init__(self) -> None:
        self.start = self.row = 0
        self.read: list[int] = []  # of all copies

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.row, self.start = self.start, 0
        while self.row < ROWS:
            self.row += 1
            self.read.append(self.row)
            yield {"row": self.row - 1}

    def state_dict(self) -> dict[str, int]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["row"]


class GoesOn(Stateful):
    """Is at one place, whoever begins to read it."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.row < ROWS:
            self.row += 1
            yield {"row": self.row - 1}
        self.row = 0

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.row = state["row"]


def hf(shards: int, shuffle: bool = False) -> Any:
    found = datasets.Dataset.from_dict({"row": range(ROWS)}).to_iterable_dataset(num_shards=shards)
    return found.shuffle(seed=3, buffer_size=4) if shuffle else found


def doubled(shards: int) -> Any:
    return hf(shards).map(lambda batch: {"row": [r for r in batch["row"] for _ in "12"]}, batched=True, batch_size=3)


def without_ends(shards: int) -> Any:
    rows = range(-3, ROWS + 5)
    return datasets.Dataset.from_dict({"row": rows}).to_iterable_dataset(num_shards=shards).skip(3).take(ROWS)


SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: list(rows()),
    "function": lambda: rows,
    "function of a part": lambda: parts,
    "function of the epoch": lambda: shuffled,
    "with a state": Stateful,
    "at one place": GoesOn,
    "function of one with a state": lambda: lambda: Stateful(),
    "hf": lambda: hf(1),
    "hf in shards": lambda: hf(4),
    "hf shuffled": lambda: hf(4, shuffle=True),
    "hf mapped": lambda: doubled(2),
    "hf without ends": lambda: without_ends(4),
}


def taken(items: Items, count: int) -> list[int]:
    return [item["row"] for item in islice(items, count)]


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("readers", [1, 2])
def test_it_goes_on_where_it_was_left(kind: str, readers: int) -> None:
    whole = taken(Items("a", SOURCES[kind](), readers - 1, readers), 50)
    for left in (0, 1, 7, 11, 26, 33):
        items = Items("a", SOURCES[kind](), readers - 1, readers)
        taken(items, left)
        state = json.loads(json.dumps(items.state_dict()))
        resumed = Items("a", SOURCES[kind](), readers - 1, readers, state=state)
        assert resumed.state_dict() == state
        assert taken(resumed, 50 - left) == whole[left:], left


def concatenated() -> Any:
    return datasets.concatenate_datasets([hf(2), doubled(2)])


@pytest.mark.parametrize(
    "make", [lambda: hf(1), lambda: hf(4), lambda: hf(4, shuffle=True), lambda: doubled(2), concatenated]
)
@pytest.mark.parametrize("readers", [1, 2])
def test_who_else_reads_a_dataset_does_not_matter(make: Callable[[], Any], readers: int) -> None:
    whole = taken(Items("a", make(), 0, readers), 60)
    for left in (3, 7, 26, 33, 40):
        source = make()
        items, other = Items("a", source, 0, readers), Items("b", source, 0, readers)
        taken(items, left - 1)
        assert taken(other, left + 5) == whole[: left + 5]
        source.set_epoch(9)
        next(iter(source))
        taken(items, 1)
        state = json.loads(json.dumps(items.state_dict()))
        next(iter(source))
        assert taken(items, 60 - left) == whole[left:], left
        assert taken(Items("a", make(), 0, readers, state=state), 60 - left) == whole[left:], left
        assert source.epoch == 9


def test_an_hf_dataset_that_would_go_on_elsewhere_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, its_own in (("4.8.5", True), ("4.8.4", False)):
        monkeypatch.setattr("dynmix.mixture.items.version", {"datasets": version}.__getitem__)
        items = Items("a", doubled(2), 0, 1)
        taken(items, 7)
        assert (items.state_dict()["source"] is not None) == its_own
    test_it_goes_on_where_it_was_left("hf mapped", 1)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 30))
def test_readers_deal_out_the_passes(size: int, readers: int, left: int) -> None:
    endless = list(range(size)) * 300
    for reader in range(readers):
        items = Items("a", [{"row": row} for row in range(size)], reader, readers)
        assert taken(items, left) == endless[reader::readers][:left]
        again = Items("a", [{"row": row} for row in range(size)], reader, readers, state=items.state_dict())
        assert taken(again, 10) == endless[reader::readers][left : left + 10]


@pytest.mark.parametrize(
    "kind", ["function of a part", "hf in shards", "hf", "hf shuffled", "hf without ends", "with a state"]
)
def test_readers_share_a_pass_without_overlap(kind: str) -> None:
    found: list[int] = []
    for reader in range(2):
        items = Items("a", SOURCES[kind](), reader, 2, once=True)
        try:
            for item in items:
                found.append(item["row"])
        except PassEnded:
            pass
    assert sorted(found) == list(range(ROWS))


def test_a_source_that_can_give_a_part_is_not_read_whole() -> None:
    asked: list[tuple[int, int]] = []

    def source(shard: int, num_shards: int) -> Iterator[dict[str, Any]]:
        asked.append((shard, num_shards))
        return parts(shard, num_shards)

    assert taken(Items("a", source, 2, 3), 3) == [2, 5, 8]
    assert asked == [(2, 3)]
    assert taken(Items("a", hf(4), 1, 2), 3) == taken(Items("a", hf(4).shard(2, 1, contiguous=False)), 3)


def test_a_state_spares_reading_again() -> None:
    first, second = Stateful(), Stateful()
    items = Items("a", first)
    taken(items, 9)
    assert taken(Items("a", second, state=items.state_dict()), 1) == [9]
    assert second.read == [10]


def test_what_has_no_state_is_read_again_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    items = Items("a", rows)
    taken(items, 9)
    with caplog.at_level(logging.INFO, "dynmix.mixture"):
        taken(Items("a", rows, state=items.state_dict()), 1)
    assert "skipping the 9 items" in caplog.text
    with pytest.raises(ValueError, match="other items than it did"):
        next(Items("a", [{"row": 0}], state=items.state_dict()))


class ToldHowFar(Stateful):
    """As a dataset of litdata or Mosaic: how far it was read is for the caller to know."""

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int]:  # type: ignore[override]
        raise AssertionError

    load_state_dict = state_dict  # type: ignore[assignment]


def test_a_state_that_has_to_be_told_how_far_it_is_is_none() -> None:
    items = Items("a", ToldHowFar())
    taken(items, 9)
    assert taken(Items("a", ToldHowFar(), state=items.state_dict()), 1) == [9]


def test_sources_that_split_themselves_among_workers_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    info = torch_worker.WorkerInfo(id=1, num_workers=2, seed=0, dataset=None)
    monkeypatch.setattr(torch_worker, "_worker_info", info)
    assert taken(Items("a", hf(2)), ROWS) == list(range(ROWS))
    assert torch_worker._worker_info is info


def test_a_second_epoch_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    taken(Items("a", rows), 3 * ROWS + 1)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "domain 'a' ended and starts again: this is epoch 2"
    ]


def test_who_read_a_source_before_does_not_matter() -> None:
    for source in (Stateful(), GoesOn()):
        taken(Items("a", source), 4)
        assert taken(Items("a", source), 12) == [*range(ROWS), 0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (rows(), "read only once"),
        (iter([1]), "read only once"),
        ({"row": 1}, "give an iterable"),
        ("folder", "give an iterable"),
        (3, "give an iterable"),
        (lambda shard: [shard], "both `shard` and `num_shards`"),
    ],
)
def test_what_cannot_be_read_again_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Items("a", source)


def test_one_object_with_a_place_is_no_two_domains() -> None:
    one, data, plain = Stateful(), hf(1), [1]
    check_shared({"a": data, "b": data, "c": plain, "d": plain, "e": one, "f": Stateful()})
    with pytest.raises(ValueError, match="domains 'a' and 'c' are one Stateful, .*give each an object of its own"):
        check_shared({"a": one, "b": data, "c": one})


def test_an_empty_source_is_an_error() -> None:
    with pytest.raises(ValueError, match="domain 'a' is empty"):
        next(Items("a", []))
    passes = iter([[{"row": 0}], []])
    spent = Items("a", lambda: next(passes))
    taken(spent, 1)
    with pytest.raises(ValueError, match="'a' gave no item in pass 2, and did before: it can be read only once"):
        next(spent)
    with pytest.raises(ValueError, match="empty: its source gave no item in part 3 of 4"):
        next(Items("a", lambda shard, num_shards: list(range(3))[shard::num_shards], 3, 4))
