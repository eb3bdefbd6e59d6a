"""Text of an HF `datasets.Dataset` as a token store that is made once and kept.

Knows where such stores are kept and by what they are found again; how text becomes tokens is known to `prepare`.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from dynmix.mixture.documents import Documents, JoinedDocuments
from dynmix.mixture.remote import cache_folder, one_at_a_time
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import DocumentView

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "str | os.PathLike[str] | PreTrainedTokenizerBase"

_STORE = "text"


def tokenised(
    dataset: "Dataset", tokenizer: Tokenizer, text_field: str, cache_dir: str | os.PathLike[str] | None
) -> TokenStore:
    """The documents of a text column, each followed by the tokenizer's EOS; empty ones are left out.

    The store is kept in a folder of `cache_dir` that is named by the dataset's fingerprint and the tokenizer: what
    `Dataset.map` and the like make of a dataset has another fingerprint. One process makes it, the others wait for it.
    Raises ValueError if the column holds something else than text, no row has any, or the tokenizer cannot be used.
    """
    from dynmix.mixture.prepare import prepare
    from dynmix.mixture.prepare.manifest import describe_tokenizer

    loaded = load(tokenizer)
    described = describe_tokenizer(loaded)
    of_tokenizer = [described[name] for name in ("fingerprint", "added", "eos")]
    parts = json.dumps([dataset._fingerprint, len(dataset), text_field, of_tokenizer], sort_keys=True)
    key = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
    folder = cache_folder(cache_dir) / "tokens" / key
    with one_at_a_time(cache_folder(cache_dir), key):
        if not (folder / f"{_STORE}.idx").exists():  # the last of its files to come
            return prepare({_STORE: dataset}, folder, loaded, text_field=text_field, overwrite=True)[_STORE]
    return TokenStore.open(folder / _STORE)


def load(tokenizer: Tokenizer) -> "PreTrainedTokenizerBase":
    """A tokenizer, or that of a folder or hub name. Raises ValueError."""
    if isinstance(tokenizer, str | os.PathLike):
        return _loaded(os.fspath(tokenizer))
    if not all(hasattr(tokenizer, name) for name in ("get_vocab", "eos_token_id")):
        raise ValueError(
            f"tokenizer= is a {type(tokenizer).__name__}: give a tokenizer of transformers, its folder or its hub name;"
            " one of tokenizers as PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    loaded = load(tokenizer)
    return _largest_id(loaded, len(loaded)) + 1


def check_stores(documents: Iterable[Any], tokenizer: Tokenizer) -> None:
    """Raises ValueError for a token store among the documents that was prepared with another tokenizer."""
    from dynmix.mixture.prepare import check_tokenizer

    if stores := list(dict.fromkeys(each for each in leaves(documents) if isinstance(each, TokenStore))):
        check_tokenizer(stores, load(tokenizer))


def leaves(documents: Iterable[Any]) -> Iterable[Any]:
    """What stands in joined documents and views at any depth."""
    for each in documents:
        if isinstance(each, JoinedDocuments | DocumentView):
            parts: tuple[Documents, ...] = each.parts if isinstance(each, JoinedDocuments) else each.stores
            yield from leaves(parts)
        else:
            yield each


@functools.lru_cache(maxsize=4)
def _loaded(path: str) -> "PreTrainedTokenizerBase":
    from dynmix.mixture.prepare.manifest import load_tokenizer

    return load_tokenizer(path)


@functools.lru_cache(maxsize=4)
def _largest_id(tokenizer: "PreTrainedTokenizerBase", size: int) -> int:
    # Kept by size too, as tokens may be added. Every domain asks, and the vocabulary is large.
    return max(tokenizer.get_vocab().values())
