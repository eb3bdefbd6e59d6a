"""How documents become sequences, and what items tell of them: the options of `MixtureDataset`, checked and compared.

Knows tokenizers; no data.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from dynmix.mixture.boundaries import Boundaries
from dynmix.mixture.packing import Packing
from dynmix.mixture.text import Tokenizer, load

BosTokenId: TypeAlias = int | Literal["auto"] | None


class SequenceOptions(NamedTuple):
    """How documents become sequences and items, as `MixtureDataset` is told."""

    packing: Packing = "concat"
    boundaries: Boundaries | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    ignore_token_ids: tuple[int, ...] = ()
    bos_is_default: bool = False  # it is the tokenizer's, for documents that have none

    @classmethod
    def checked(
        cls,
        packing: Packing,
        boundaries: Boundaries | None,
        bos_token_id: BosTokenId,
        pad_token_id: int | None,
        ignore_token_ids: Sequence[int],
        tokenizer: "Tokenizer | None",
    ) -> "SequenceOptions":
        """The options; raises ValueError for values that there are not, or that would do nothing."""
        if is_default := bos_token_id == "auto":
            bos_token_id = None if tokenizer is None else _added_bos(tokenizer)
        if isinstance(bos_token_id, str):
            raise ValueError(f'bos_token_id={bos_token_id!r}: a token id, "auto" or None')
        if packing not in get_args(Packing):
            raise ValueError(f'packing={packing!r}: "concat" or "best_fit"')
        if boundaries is not None and boundaries not in get_args(Boundaries):
            raise ValueError(f'boundaries={boundaries!r}: None, "position_ids" or "mask"')
        if pad_token_id is not None and packing == "concat":
            raise ValueError(
                f"pad_token_id={pad_token_id}: packing='concat' leaves nothing to pad. To mask the labels of an id that"
                " is in the data, use ignore_token_ids"
            )
        if isinstance(ignore_token_ids, str) or not hasattr(ignore_token_ids, "__iter__"):
            raise ValueError(f"ignore_token_ids={ignore_token_ids!r}: give a list of token ids")
        bos = None if bos_token_id is None else _token_id("bos_token_id", bos_token_id)
        pad = None if pad_token_id is None else _token_id("pad_token_id", pad_token_id)
        ignored = tuple(_token_id("ignore_token_ids", token) for token in ignore_token_ids)
        return cls(packing, boundaries, bos, pad, ignored, is_default)

    @property
    def chosen(self) -> dict[str, Any]:
        """Options that differ from their defaults, JSON-able."""
        return {name: value for name, value in self._stated().items() if value != _DEFAULTS[name]}

    def _stated(self) -> dict[str, Any]:
        found = self._asdict() | {"ignore_token_ids": list(self.ignore_token_ids)}
        return {name: value for name, value in found.items() if name != "bos_is_default"}

    @property
    def of_packing(self) -> dict[str, Any]:
        """Arguments of `PackedSequences`."""
        return {
            "packing": self.packing,
            "bos_token_id": self.bos_token_id,
            "each_document": self.boundaries is not None,
            "pad_token_id": self.pad_token_id or 0,
            "bos_where_missing": self.bos_is_default,
        }

    def differences(self, chosen: Mapping[str, Any]) -> list[str]:
        """In words, what differs from what was `chosen` when a state was made."""
        then, now = _DEFAULTS | dict(chosen), self._stated()
        return [f"{name} was {then[name]!r} and is {now[name]!r}" for name in now if then[name] != now[name]]


def whole(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int. Raises ValueError, naming the argument, for what is no whole number, or below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: give a whole number, an int") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return number


def _token_id(name: str, value: Any) -> int:
    if (token := whole(name, value)) < 0:
        raise ValueError(f"{name} has {token}: token ids are not negative")
    return token


def _added_bos(tokenizer: "Tokenizer") -> int | None:
    """The BOS that a tokenizer puts in front of a text by itself; None where it puts none."""
    loaded = load(tokenizer)
    with_added, bare = (loaded("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    bos: int | None = loaded.bos_token_id
    return bos if with_added[:1] == [bos] and bare[:1] != [bos] else None


_DEFAULTS = SequenceOptions()._stated()
