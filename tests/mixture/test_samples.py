import copy
import json
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from transformers import default_data_collator

from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.samples import Samples
from dynmix.mixture.store import TokenStore

N = 6


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(4 * N).view(N, 4)
    return {"input_ids": ids, "labels": ids.clone()}


def samples() -> Samples:
    return Samples(batch(), np.arange(N) % 3)


def plain() -> list[dict[str, Any]]:
    """The same items as an ordinary list of ordinary dicts."""
    found = batch()
    return [{name: values[row].clone() for name, values in found.items()} | {"domain": row % 3} for row in range(N)]


def as_lists(items: Any) -> Any:
    if isinstance(items, torch.Tensor):
        return items.tolist()
    if isinstance(items, dict):
        return {name: as_lists(value) for name, value in items.items()}
    return [as_lists(item) for item in items] if isinstance(items, list | tuple) else items


def done(items: list[Any], _: Any) -> list[Any]:
    return items


LOOKS: list[Callable[[Any], Any]] = [
    list,
    tuple,
    len,
    bool,
    copy.copy,
    copy.deepcopy,
    lambda items: [*items],
    lambda items: items[0],
    lambda items: items[-1],
    lambda items: items[2:4],
    lambda items: (items[0]["domain"], items[3], len(items)),
    lambda items: list(reversed(items)),
    lambda items: [*enumerate(items)],
    lambda items: [*zip(items, range(N), strict=True)],
    lambda items: operator.add(items, [1]),
    lambda items: operator.add([1], items),
    lambda items: [1, *items],
    lambda items: items * 2,
    lambda items: 2 * items,
    lambda items: [].__iadd__(items),
    lambda items: sorted(items, key=lambda item: -item["domain"]),
    lambda items: items.copy(),
    lambda items: items.pop(),
    lambda items: done(items, items.append(3)),
    lambda items: done(items, operator.setitem(items, 0, 5)),
    lambda items: done(items, operator.delitem(items, slice(1, 3))),
    lambda items: items.__iadd__([1]),
    lambda items: done(items, items.reverse()),
    lambda items: done(items, items.clear()),
    lambda items: 3 in [item["domain"] for item in items],
    lambda items: json.dumps([item["domain"] for item in items]),
    lambda items: dict(items[0]),
    lambda items: {**items[1]},
    lambda items: {**items[0]},
    lambda items: items[0] | {"a": 1},
    lambda items: {"a": 1} | items[0],
    lambda items: {"a": 1}.__ior__(items[0]),
    lambda items: {"a": 1} | dict(items[0].items()),
    lambda items: list(items[0]),
    lambda items: list(reversed(items[0])),
    lambda items: "labels" in items[0],
    lambda items: len(items[0]),
    lambda items: items[0].get("domain"),
    lambda items: items[0].pop("domain"),
    lambda items: copy.copy(items[0]),
    lambda items: pickle.loads(pickle.dumps(items[0])),
    lambda items: json.dumps({k: v for k, v in items[0].items() if k == "domain"}),
    lambda items: (lambda **kw: kw)(**items[0]),
    default_collate,
    default_data_collator,
    lambda items: default_collate(list(items)),
    lambda items: default_collate(items[1:]),
    lambda items: default_collate([{"input_ids": item["input_ids"][:2]} for item in items]),
]


@pytest.mark.parametrize("look", LOOKS)
def test_samples_are_a_list_of_dicts_however_one_looks(look: Any) -> None:
    assert as_lists(look(samples())) == as_lists(look(plain()))


def test_they_are_pickled_as_one() -> None:
    found = pickle.loads(pickle.dumps(samples()))
    assert type(found) is list
    assert as_lists(found) == as_lists(plain())
    assert isinstance(samples(), list)
    assert all(isinstance(item, dict) for item in samples())


def change(items: list[Any], what: str) -> None:
    if what == "in place":
        items[0]["labels"][:2] = -100
    elif what == "first value":
        items[0]["labels"] = items[0]["labels"] + 7
    elif what == "other value":
        items[3]["domain"] = 9
    elif what == "new key":
        items[0]["weight"] = 1.0
        for item in items:
            item["weight"] = 2.0
    elif what == "fewer keys":
        for item in items:
            del item["domain"]
    elif what == "order":
        items.reverse()
    elif what == "fewer":
        del items[2:]


CHANGES = ["in place", "first value", "other value", "new key", "fewer keys", "order", "fewer"]


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_done_to_items_is_in_the_batch(what: str) -> None:
    ours, theirs = samples(), plain()
    change(ours, what)
    change(theirs, what)
    assert as_lists(default_collate(ours)) == as_lists(default_collate(theirs))


def test_a_batch_is_not_copied_and_is_one_like_any_other() -> None:
    given = batch()
    made = default_collate(Samples(given, np.arange(N)))
    assert type(made) is dict
    assert made["input_ids"].data_ptr() == given["input_ids"].data_ptr()
    assert made["domain"].dtype == torch.int64
    made["labels"][:] = -100
    made["more"] = 1
    assert (made["input_ids"] >= 0).all()


class Flipped(Dataset[Any]):
    """A dataset of one's own around ours, which changes items."""

    def __init__(self, dataset: MixtureDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Any:
        item = self.dataset[position]
        return item | {"input_ids": item["input_ids"].flip(0)}


def test_loaders_see_one_stream_through_every_collator(tmp_path: Any) -> None:
    store = TokenStore.write(tmp_path / "a", [np.arange(1000)])
    dataset = MixtureDataset({"a": store, "b": store}, num_samples=50, sequence_length=10)
    expected = [dataset[position] for position in range(50)]
    subset: Any = Subset(dataset, range(50))
    for source, collate in ((dataset, None), (dataset, default_data_collator), (dataset, lambda x: x), (subset, None)):
        batches = list(DataLoader(source, batch_size=8, collate_fn=collate))
        rows = [row for part in batches for row in (part if isinstance(part, list) else part["input_ids"])]
        ids = [row["input_ids"] if isinstance(row, dict) else row for row in rows]
        assert [row.tolist() for row in ids] == [item["input_ids"].tolist() for item in expected]
    for part in DataLoader(Flipped(dataset), batch_size=8):
        assert part["input_ids"].flip(1).equal(part["labels"])
