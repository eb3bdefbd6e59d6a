"""What a domain may be given as, and how it becomes documents, and those rows.

Knows every kind of source, and what to tell the user of what is none; nothing of schedules.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
from torch.utils.data import IterableDataset

from dynmix.mixture.arrow import dataset_documents
from dynmix.mixture.documents import Documents, JoinedDocuments, check_ids, check_vocabulary, spread
from dynmix.mixture.files import TOKEN_SUFFIXES, open_path
from dynmix.mixture.flat import FlatTokens
from dynmix.mixture.folders import files_in, matching
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.sequences import Rows, Sequences, token_ids
from dynmix.mixture.store import StoreError, with_room
from dynmix.mixture.text import Tokenizer, check_stores, leaves, load, tokenised, vocabulary_size
from dynmix.mixture.view import RowView

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("dynmix.mixture")

Part: TypeAlias = "Documents | Dataset | str | os.PathLike[str]"
Source: TypeAlias = "Part | Sequence[Part] | Sequences"

_LOOKED_AT = 64  # items of a sequence, which may be made as they are asked for

_KINDS = (
    "give a token store, a path, folder or glob of token files, a datasets.Dataset, a view, or a sequence of dicts with"
    " input_ids of one length"
)


def open_documents(
    source: Source,
    *,
    tokenizer: Tokenizer | None = None,
    text_field: str = "text",
    eos_token_id: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Documents | Sequences:
    """Open what a domain was given as.

    Documents come of

    - documents that are open (`TokenStore`, `FlatTokens`, `DocumentView`...), which stay as they are;
    - a path, folder or glob of token files, here or remote (`dynmix.mixture.files.open_path`);
    - an HF `Dataset`, or the folder where `save_to_disk` put it, or a folder or glob of such. Rows of `input_ids`, of
      any lengths, are documents in its Arrow memory. Text is tokenised, once: a mixture has to know how many tokens
      there are before it draws the first, and where each is. The store that comes of it stays in `cache_dir`, by the
      dataset's fingerprint and the tokenizer, for every process and every later run. A large corpus is better made a
      store by `dynmix prepare`;
    - a list of these, end to end.

    Any other sequence is returned as it is: its items are to be dicts with `input_ids` of one length.

    Args:
        source: one of these.
        tokenizer: of transformers, or its path or hub name; for text. Where there is one, sources with token ids that
            it does not have are refused, by up to 2^26 of their tokens.
        text_field: column of the text.
        eos_token_id: ends each document of flat files that are given by path.
        cache_dir: folder for copies of remote files and for tokenised text, best one that all processes of a run see;
            None: `$DYNMIX_CACHE`, or else `~/.cache/dynmix`.
        storage_options: for remote files, as in `dynmix.mixture.remote.download`.

    Raises:
        ValueError: it is none of these, or damaged; the message says what it is and what to do.
    """
    vocab_size = None if tokenizer is None else vocabulary_size(tokenizer)

    def opened(part: Any) -> Any:
        if isinstance(part, str | os.PathLike):
            if saved := _saved_in(part):
                parts = [opened(_saved_dataset(folder)) for folder in saved]
                return parts[0] if len(parts) == 1 else _joined(parts)
            options: Any = {"cache_dir": cache_dir, "storage_options": storage_options}
            return open_path(part, vocab_size=vocab_size, eos_token_id=eos_token_id, **options)
        return _of_dataset(part, tokenizer, text_field, cache_dir) if _is_dataset(part) else part

    found: Documents | Sequences = opened(source)
    if isinstance(source, list | tuple) and source and all(map(_is_part, source)):
        found = _joined([opened(part) for part in source])
    _check_random_access(found, "the source")
    if vocab_size is not None and isinstance(found, Documents):
        check_vocabulary(found, repr(found), vocab_size)
    return found


def open_domains(
    domains: Mapping[str, Source],
    sequence_length: int | None,
    *,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> dict[str, Sequences]:
    """`as_sequences` of each domain, and a check of their stores against the tokenizer, by manifests and by ids."""
    found = {
        name: as_sequences(name, data, sequence_length, tokenizer=tokenizer, **options)
        for name, data in domains.items()
    }
    if tokenizer is not None:
        check_stores([each.store for rows in found.values() for each in _packed(rows)], tokenizer)
        # Documents are checked as they are opened. Of what was packed before, many domains may be views on one store.
        for store, name in {each.store: name for name, data in domains.items() for each in _packed(data)}.items():
            check_vocabulary(store, f"domain {name!r}: {store!r}", vocabulary_size(tokenizer))
    return found


def as_sequences(
    name: str,
    data: Source,
    sequence_length: int | None,
    *,
    tokenizer: Tokenizer | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **packing: Any,
) -> Sequences:
    """A domain as rows, whatever it was given as; `packing` is of documents, as in `PackedSequences`.

    No `sequence_length` is needed of sequences, and of datasets whose rows have one length.

    Raises:
        ValueError: it cannot be opened, has not one row, or is to be cut where documents end and does not say where;
            in words for the domain.
    """
    _check_random_access(data, f"domain {name!r}")
    apart = packing.get("each_document") or packing.get("packing") == "best_fit"
    try:
        # Where documents end in a flat file takes a pass over it.
        end = load(tokenizer).eos_token_id if apart and tokenizer is not None else None
        opened = open_documents(data, tokenizer=tokenizer, eos_token_id=end, cache_dir=cache_dir)
        if apart and isinstance(opened, Documents):
            _check_borders(opened)
        if packing.get("each_document"):
            _check_apart(opened)
    except ValueError as error:
        raise StoreError(f"domain {name!r}: {error}") from error
    tokens = "none"
    if isinstance(opened, Documents):
        if sequence_length is None and _is_dataset(data):
            sequence_length = _common_length(opened)
        if sequence_length is None:
            raise ValueError(f"sequence_length is missing: domain {name!r} is documents, to be cut into sequences")
        tokens = f"{opened.num_tokens} tokens, of {sequence_length}"
        opened = PackedSequences(opened, sequence_length, **packing)
    if not len(opened):
        raise ValueError(f"domain {name!r} has not one whole sequence ({tokens}): give it more text, or leave it out")
    if not isinstance(opened, Rows):
        size = None if tokenizer is None else vocabulary_size(tokenizer)
        for row in spread(len(opened), 1, 1 if size is None else _LOOKED_AT).tolist():
            check_ids(token_ids(opened, row, f"domain {name!r}"), f"domain {name!r}", size)
    return opened


def _check_borders(documents: Documents) -> None:
    for each in leaves([documents]):
        if isinstance(each, FlatTokens) and not each.has_borders:
            raise ValueError(
                f"{each!r} does not say where its documents end, which boundaries and best_fit need: give"
                " FlatTokens(path, eos_token_id=...), or a path and tokenizer= with an EOS"
            )
        if isinstance(each, FlatTokens) and len(each) == 1:
            logger.warning("%r is one document: the token that was to end its documents is not in it", each)


def _check_apart(rows: Any) -> None:
    for each in _packed(rows):
        if not each.each_document:
            raise ValueError(
                f"its sequences were packed without boundaries, and do not say where documents end ({each!r}): give the"
                " documents instead, or sequences of a dataset with boundaries"
            )


def _packed(rows: Any) -> list[PackedSequences]:
    """What rows are that were packed before, through views at any depth."""
    if isinstance(rows, RowView):
        return [each for part in rows.parts for each in _packed(part)]
    return [rows] if isinstance(rows, PackedSequences) else []


def _is_part(source: Any) -> bool:
    return isinstance(source, str | os.PathLike | Documents) or _is_dataset(source)


def _is_dataset(source: Any) -> bool:
    module = sys.modules.get("datasets")  # who has a dataset has imported it
    return module is not None and isinstance(source, getattr(module, "Dataset", ()))


def _joined(parts: Sequence[Any]) -> Any:
    if rows := [part for part in parts if not isinstance(part, Documents)]:
        raise ValueError(f"{rows[0]!r} has padding, labels or a transform, and such rows are not joined")
    return JoinedDocuments(parts)


def _saved_in(path: str | os.PathLike[str]) -> list[str]:
    """Folders where `save_to_disk` put datasets, sorted, in a local folder or glob that has no token files."""
    text = os.path.expanduser(path)
    names = files_in(text) if os.path.isdir(text) else matching(text) if glob.has_magic(text) else []
    if any(name.endswith(TOKEN_SUFFIXES) for name in names):
        return []
    saved = ("dataset_dict.json", "dataset_info.json", "state.json")
    splits, infos, states = ({os.path.dirname(name) for name in names if name.endswith(f"/{end}")} for end in saved)
    if splits:
        raise StoreError(f"{min(splits)} is a DatasetDict: give the folder of one of its splits, which is in it")
    return sorted(infos & states)


def _saved_dataset(folder: str) -> Dataset:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise StoreError(f"{folder} is a dataset of HF datasets, to read it: pip install datasets") from error
    try:
        return with_room(Path(folder), lambda: Dataset.load_from_disk(folder))
    except StoreError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise StoreError(f"{folder} is a damaged or incomplete dataset: {error}; save it anew") from error


def _of_dataset(
    dataset: Dataset, tokenizer: Tokenizer | None, text_field: str, cache_dir: str | os.PathLike[str] | None
) -> Documents | Dataset:
    if dataset.format["type"] == "custom":  # set_transform: its items are what the user's function makes of a row
        return dataset
    if "input_ids" in dataset.column_names:
        _check_whole(dataset)
        return dataset if _is_padded(dataset) or _has_labels(dataset) else dataset_documents(dataset)
    if text_field not in dataset.column_names:
        kinds = {name: getattr(feature, "dtype", type(feature).__name__) for name, feature in dataset.features.items()}
        columns = ", ".join(f"{name!r} ({kind})" for name, kind in kinds.items()) or "none"
        raise ValueError(
            f"a dataset with neither input_ids nor {text_field!r}: its columns are {columns}; rename the one that is"
            " meant with rename_column"
        )
    if tokenizer is None:
        raise ValueError(f"a dataset with {text_field!r} and no input_ids: give tokenizer=, to tokenise it")
    return tokenised(dataset, tokenizer, text_field, cache_dir)


def _check_whole(dataset: Dataset) -> None:
    """Raise ValueError for lists that do not lie one behind the other: reading such may crash the process."""
    columns = [name for name in ("input_ids", "labels", "attention_mask") if name in dataset.column_names]
    try:
        dataset.data.select(columns).validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(f"a damaged dataset: {error}; save it anew") from error


def _has_labels(dataset: Dataset) -> bool:
    """Whether there are `labels` other than the ids: such rows stay as they are, too."""
    if "labels" not in dataset.column_names:
        return False
    try:
        batches = dataset.data.select(["input_ids", "labels"]).to_batches(max_chunksize=4096)
        return not all(ids.equals(labels.cast(ids.type)) for ids, labels in (batch.columns for batch in batches))
    except pa.ArrowException:  # no lists of integers, or negative ones where ids are not
        return True


def _is_padded(dataset: Dataset) -> bool:
    """Whether some `attention_mask` is 0: such rows stay as they are, with their masks."""
    if "attention_mask" not in dataset.column_names:
        return False
    chunks = dataset.data.column("attention_mask").chunks
    return any(chunk.null_count < len(chunk) and not np.asarray(chunk.flatten()).all() for chunk in chunks)


def _common_length(documents: Documents) -> int | None:
    lengths = np.diff(documents.starts(np.arange(len(documents) + 1)))
    return int(lengths[0]) if len(lengths) and (lengths == lengths[0]).all() else None


def _check_random_access(source: Any, where: str) -> None:
    kind = type(source).__name__
    if isinstance(source, Mapping):
        raise ValueError(
            f"{where} is a {kind} of {list(source)[:8]}: give one of these, or each as a domain of its own"
        )
    is_stream = isinstance(source, IterableDataset | Iterator) or (
        (callable(source) or hasattr(source, "__iter__")) and not hasattr(source, "__getitem__")
    )
    if is_stream:
        raise ValueError(
            f"{where} is a {kind}, which has no random access: read it through MixtureStream, or save it as token"
            " stores (dynmix prepare)"
        )
    is_sequence = hasattr(source, "__getitem__") and hasattr(source, "__len__") and getattr(source, "ndim", 1) > 0
    if not is_sequence and not isinstance(source, os.PathLike):
        raise ValueError(f"{where} is a {kind}: {_KINDS}")
