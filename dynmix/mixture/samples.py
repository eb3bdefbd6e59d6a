"""The items of one request, which `default_collate` turns into a batch without copying a token.

Items are views on the rows of a batch that was gathered as a whole. Whoever looks at them finds a list of dicts of
tensors; but `torch.utils.data.default_collate` looks at the type of the first alone, and is given the batch itself.
Knows tensors; nothing of what they hold.
"""

from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from dynmix.mixture.sequences import Ints


class Sample(dict[str, Any]):
    """An item: a dict, of a type of its own so that `default_collate` hands it to `_collated`."""


class _First(Sample):
    """The first row of a batch as an item, which holds something when it is first asked: mostly its type alone is."""

    def __init__(self, batch: dict[str, Tensor], domain: Ints) -> None:
        super().__init__()
        # Not the list that it is in: what refers to each other is freed late.
        self._batch, self._domain, self._made = batch, domain, False

    def _make(self) -> None:
        if not self._made:
            self._made = True
            super().update({name: value[0] for name, value in self._batch.items()}, domain=self._domain[0].item())

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return dict, (list(self.items()),)


class Samples(list[Sample]):
    """The rows of a batch as a list of items, made when one is looked at; pickled and copied as an ordinary list.

    Args:
        batch: tensors of one first dimension; an item holds a view on its row of each.
        domain: of each row, int64[n]; an item has its own as an int, and a batch a tensor.
    """

    def __init__(self, batch: dict[str, Tensor], domain: Ints) -> None:
        super().__init__()
        self._batch, self._domain, self._made = batch, domain, False
        self._first: _First | None = None  # if it was asked for alone

    def batch(self) -> dict[str, Tensor] | None:
        """The batch itself, or None where an item was looked at, which may hold something else since."""
        if self._made or (self._first is not None and self._first._made):
            return None
        return {**self._batch, "domain": torch.from_numpy(self._domain.copy())}

    def any_label(self, label: int) -> bool:
        """Whether some label was this one when the items were made."""
        return bool((self._batch["labels"] == label).any())

    def _make(self) -> None:
        if not self._made:
            self._made = True
            names = (*self._batch, "domain")
            columns = [value.unbind() for value in self._batch.values()]
            items = [Sample(zip(names, row, strict=True)) for row in zip(*columns, self._domain.tolist(), strict=True)]
            if self._first is not None:
                items[0] = self._first
            super().extend(items)

    def __len__(self) -> int:
        return super().__len__() if self._made else len(self._domain)

    def __getitem__(self, index: Any) -> Any:
        if not self._made and index.__class__ is int and index == 0 and len(self._domain):
            if self._first is None:
                self._first = _First(self._batch, self._domain)
            return self._first
        self._make()
        return super().__getitem__(index)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return list, (list(self),)

    def __radd__(self, other: list[Any]) -> list[Any]:  # list + list reads the items without asking for them
        return [*other, *self]


def _made_first(base: type, name: str) -> Callable[..., Any]:
    method = getattr(base, name)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        self._make()
        return method(self, *args, **options)

    call.__name__ = name
    return call


_NOT_ASKING = {"__class_getitem__", "__getattribute__", "__init__", "__new__", "__sizeof__", "fromkeys"}
for _class, _base in ((Samples, list), (_First, dict)):
    for _name in vars(_base):
        if callable(getattr(_base, _name)) and _name not in _NOT_ASKING and _name not in vars(_class):
            setattr(_class, _name, _made_first(_base, _name))


def _collated(items: list[Sample], *, collate_fn_map: Any = None) -> dict[str, Any]:
    if isinstance(items, Samples) and (batch := items.batch()) is not None:
        return batch
    return {key: collate([item[key] for item in items], collate_fn_map=collate_fn_map) for key in items[0]}


default_collate_fn_map[Sample] = default_collate_fn_map[_First] = _collated
