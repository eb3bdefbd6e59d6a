"""Paths, folders and globs of token files, here or remote, as documents.

Token files are Megatron pairs (`.bin` with `.idx`), and flat `.bin` and `.npy` files. What they hold is their classes'
business.
"""

import glob
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dynmix.mixture import remote
from dynmix.mixture.documents import Documents, JoinedDocuments
from dynmix.mixture.flat import FlatTokens
from dynmix.mixture.folders import files_in, matching
from dynmix.mixture.store import StoreError, TokenStore

logger = logging.getLogger("dynmix.mixture")

TOKEN_SUFFIXES = (".bin", ".idx", ".npy")
_HELD_OUT = ".valid"  # ends the names of stores that `dynmix prepare` holds out
_ASKED_FOR = re.compile(rf"{re.escape(_HELD_OUT)}(?!\w)[^/]*/*$")  # by the name at a path's end, and no folder above it
_SPLIT = re.compile(r"(?:^|[._-])(train|val|valid|validation|test)(?=[._-])")  # in names of flat files
_TEXT = (".jsonl", ".json", ".gz", ".zst", ".parquet", ".txt", ".csv")


def open_path(
    path: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    eos_token_id: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Documents:
    """The documents at `path`; of several files those of one after the other, in the order of their paths.

    Args:
        path: a token store with or without `.bin`/`.idx`, a flat file, a folder (all token files in it, at any depth),
            or a glob of files and folders (`**` is any depth). Links in both are followed, and each real folder is
            read once. Both are without names that begin with `.` or `_`, without the held-out stores `*.valid` of
            `dynmix prepare`, if the path does not end with such a name, and without flat files named `val`, `valid`,
            `validation` or `test` beside one named `train`. With a protocol (`s3://`, `gs://`, `hf://`...) all of these
            in what fsspec reaches: copied to `cache_dir` first.
        vocab_size: of flat files, see `FlatTokens`.
        eos_token_id: ends the documents of flat files, see `FlatTokens`.
        cache_dir: for what is remote, see `remote.download`.
        storage_options: for what is remote, see `remote.download`.

    Raises:
        StoreError: nothing there, no token files, one that cannot be opened, a download that failed.
    """
    text = os.fspath(path)
    options = {"vocab_size": vocab_size, "eos_token_id": eos_token_id}
    if remote.is_remote(text):
        return _opened([str(file) for file in remote.download(text, choose, cache_dir, storage_options)], options)
    text = re.sub("//+", "/", os.path.expanduser(text.removeprefix("file://")))
    if os.path.isdir(text):
        return _opened(choose(files_in(text), text), options)
    if glob.has_magic(text) and not any(os.path.exists(f"{text}{end}") for end in ("", ".idx", ".bin")):
        matched = matching(text, f"{text}.idx")
        if not matched and " " in text:
            raise _missing(text)
        pairs = [f"{name[:-4]}{end}" for name in matched for end in (".bin", ".idx") if name.endswith((".bin", ".idx"))]
        return _opened(choose(filter(os.path.isfile, dict.fromkeys(matched + pairs)), text), options)
    return _open(text, options)


def choose(names: Iterable[str], where: str) -> list[str]:
    """Of the files in a folder or glob, one name for each store or flat file, sorted: a store's is that of its `.idx`.

    Raises:
        StoreError: there is none, or stores stand beside a `.bin` without `.idx`, which one of them may have lost.
    """
    names = list(names)
    root = where.rstrip("/") + "/"
    if not all(name.startswith(root) for name in names):  # a glob, or one file
        root = "".join(re.split(r"[*?[]", root[:-1], maxsplit=1)[0].rpartition("/")[:2])
    seen = [name for name in names if not any(part[:1] in "._" for part in name.removeprefix(root).split("/"))]
    indices = {name[:-4] for name in seen if name.endswith(".idx")}
    held_out = {stem for stem in indices if stem.endswith(_HELD_OUT)}
    if held_out and not _ASKED_FOR.search(where):
        logger.warning("%s: left out %d held-out stores, such as %s", where, len(held_out), min(held_out))
        seen = [name for name in seen if name[:-4] not in held_out]
        indices -= held_out
    flat = [name for name in seen if name.endswith((".bin", ".npy")) and name[:-4] not in indices]
    folders = {os.path.dirname(stem) for stem in indices}
    for name in flat:
        if name.endswith(".bin") and os.path.dirname(name) in folders:
            raise StoreError(
                f"{name} has no .idx, and other files beside it have one: copy or write that store anew; or if it is a"
                " flat file, move it to another folder"
            )
    splits = {name: split[1] for name in flat if (split := _SPLIT.search(os.path.basename(name)))}
    trained = {os.path.dirname(name) for name, split in splits.items() if split == "train"}
    if aside := [n for n, split in splits.items() if split != "train" and os.path.dirname(n) in trained]:
        logger.warning("%s: left out %d held-out files, such as %s", where, len(aside), min(aside))
        flat = [name for name in flat if name not in aside]
    if not indices and not flat:
        endings = sorted({os.path.splitext(name)[1] or os.path.basename(name) for name in names})
        there = f"there are {len(names)} others ({', '.join(endings[:8])})" if names else "there is nothing"
        raise StoreError(f"{where}: no token files (.idx with .bin, .bin, .npy), {there}.{_remedy(endings)}")
    return sorted([f"{stem}.idx" for stem in indices] + flat)


def _opened(files: list[str], options: Mapping[str, Any]) -> Documents:
    if len(files) > 1:
        logger.info("%d token files as one domain: %s to %s", len(files), files[0], files[-1])
    parts = [_open(file, options) for file in files]
    return parts[0] if len(parts) == 1 else JoinedDocuments(parts)


def _open(path: str, options: Mapping[str, Any]) -> Documents:
    stem, suffix = os.path.splitext(path)
    stem = stem if suffix in (".bin", ".idx") else path
    if not any(os.path.isfile(name) for name in (path, f"{stem}.idx", f"{stem}.bin")):
        raise _missing(path)
    flat = suffix == ".npy" or (suffix == ".bin" and not os.path.exists(f"{stem}.idx"))
    if flat and os.path.isfile(path):
        return FlatTokens(path, **options)
    if stem == path and not os.path.isfile(f"{path}.idx"):
        if os.path.isfile(path):
            raise StoreError(
                f"{path} is no token file (.idx with .bin, .bin, .npy).{_remedy([suffix])} A flat file of another name"
                " is opened by FlatTokens(path, dtype=...)."
            )
        raise StoreError(
            f"{path}: there is {os.path.basename(path)}.bin and no .idx: if it is a flat file, give {path}.bin; if it"
            " is of a store, copy or write that anew"
        )
    return TokenStore.open(path)


def _missing(path: str) -> StoreError:
    shown = path if len(path) <= 300 else f"{path[:300]}..."
    hint = ""
    if " " in path or "\n" in path:
        hint = " If it is text and no path, give datasets.Dataset.from_dict({'text': [...]}) and tokenizer="
    return StoreError(
        f"{shown}: no such file or folder, seen from {os.getcwd()}; a folder, a flat file, and a store of that name"
        f" (.idx with .bin) were looked for.{hint}"
    )


def _remedy(endings: Iterable[str]) -> str:
    if not set(endings) & set(_TEXT):
        return ""
    return " Text is made a store by `dynmix prepare`, or is a Dataset of datasets.load_dataset with `tokenizer=`."
