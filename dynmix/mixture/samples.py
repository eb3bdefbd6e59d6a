"""The items of one request, which `default_collate` turns into a batch without copying a token.

Items are views on the rows of a batch that was gathered as a whole. Whoever looks at them finds a list of dicts of
tensors. But `torch.utils.data.default_collate(samples)` looks at the type of `samples[0]` alone, and calls with all of
`samples` what is registered for it: `_collated`, which returns the batch itself. So the list and its first dict are
empty until anything else is done with them, and are then filled before it is done. Knows tensors; nothing of what they
hold.
"""

from collections.abc import Callable
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from dynmix.mixture.sequences import Ints

T = TypeVar("T")

_NO_LOOKS = {"__class_getitem__", "__getattribute__", "__init__", "__new__", "__sizeof__", "fromkeys"}


def _filled_first(base: type) -> Callable[[type[T]], type[T]]:
    """Have what a class inherits of `base` call its `_fill` first.

    There is no one method to override: each of those of `list` and `dict` reads in C what they hold.
    """

    def decorated(filled: type[T]) -> type[T]:
        for name in vars(base):
            if callable(getattr(base, name)) and name not in _NO_LOOKS and name not in vars(filled):
                setattr(filled, name, _filling(base, name))
        return filled

    return decorated


def _filling(base: type, name: str) -> Callable[..., Any]:
    method = getattr(base, name)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        self._fill()
        return method(self, *args, **options)

    call.__name__ = name
    return call


class Sample(dict[str, Any]):
    """An item: a dict, of a type of its own so that `default_collate` hands it to `_collated`."""


@_filled_first(dict)
class _First(Sample):
    """The first row of a batch as an item, of which mostly the type alone is asked."""

    def __init__(self, batch: dict[str, Tensor], domain: Ints) -> None:
        super().__init__()
        # Not the list that it is in: what refers to each other is freed late.
        self._batch, self._domain, self._filled = batch, domain, False

    def _fill(self) -> None:
        if not self._filled:
            self._filled = True
            super().update({name: value[0] for name, value in self._batch.items()}, domain=self._domain[0].item())

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return dict, (list(self.items()),)


@_filled_first(list)
class Samples(list[Sample]):
    """The rows of a batch as a list of items, filled when they are looked at; pickled and copied as an ordinary list.

    An item holds a view on its row of each tensor of `batch`, and the number of its domain as an int.
    """

    def __init__(self, batch: dict[str, Tensor], domain: Ints) -> None:
        super().__init__()
        self._batch, self._domain, self._filled = batch, domain, False
        self._first: _First | None = None  # if it was asked for alone

    def batch(self) -> dict[str, Tensor] | None:
        """The batch itself, or None where an item was looked at, which may hold something else since."""
        if self._filled or (self._first is not None and self._first._filled):
            return None
        return {**self._batch, "domain": torch.from_numpy(self._domain.copy())}

    def any_label(self, label: int) -> bool:
        """Whether some label was this one when the items were made."""
        return bool((self._batch["labels"] == label).any())

    def _fill(self) -> None:
        if not self._filled:
            self._filled = True
            names = (*self._batch, "domain")
            columns = [value.unbind() for value in self._batch.values()]
            items = [Sample(zip(names, row, strict=True)) for row in zip(*columns, self._domain.tolist(), strict=True)]
            if self._first is not None:
                items[0] = self._first
            super().extend(items)

    def __len__(self) -> int:
        return super().__len__() if self._filled else len(self._domain)

    def __getitem__(self, index: Any) -> Any:
        if not self._filled and index.__class__ is int and index == 0 and len(self._domain):
            if self._first is None:
                self._first = _First(self._batch, self._domain)
            return self._first
        self._fill()
        return super().__getitem__(index)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return list, (list(self),)

    def __radd__(self, other: list[Any]) -> list[Any]:  # list + list reads the items without asking for them
        return [*other, *self]


def _collated(items: list[Sample], *, collate_fn_map: Any = None) -> dict[str, Any]:
    if isinstance(items, Samples) and (batch := items.batch()) is not None:
        return batch
    return {key: collate([item[key] for item in items], collate_fn_map=collate_fn_map) for key in items[0]}


default_collate_fn_map[Sample] = default_collate_fn_map[_First] = _collated
