"""Remote token files as local copies: fsspec finds and fetches them, and memory maps need them whole.

Knows files and where they are copied to; nothing of what is in them.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock

from dynmix.mixture.store import StoreError
from dynmix.shown import Bar
from dynmix.whole_file import whole_file

# What file systems call the version of a file, the most reliable first.
_VERSIONS = (
    "ETag", "etag", "md5Hash", "md5Checksum", "content_md5", "md5", "crc32c", "blob_id", "sha", "hex", "content_hash",
    "CRC", "generation", "version_id", "LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified",
    "modify", "modifiedTime", "modificationTime", "last_write_time", "created",
)  # fmt: skip
_MANIFEST = "manifest.json"  # of `dynmix prepare`
# Of storage options: they say who asks, and not where a file is.
_CREDENTIALS = re.compile("key|secret|token|pass|credential|anon|auth|cookie|sas", re.IGNORECASE)


def is_remote(path: str) -> bool:
    """Whether a path has a protocol that is not the local one; with `::` in it, one that is not here."""
    if "://" in path or "::" not in path:
        return "://" in path and not path.startswith("file://")
    here = os.path.expanduser(path)
    folder = os.path.dirname(re.split(r"[*?[]", here)[0])
    names = [f"{here}{end}" for end in ("", ".idx", ".bin")]
    near = "::" in folder and os.path.isdir(folder)
    return not (near or any(os.path.exists(name) or glob.glob(name) for name in names))


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """`cache_dir`; None: `$DYNMIX_CACHE`, or else `~/.cache/dynmix`."""
    given = os.environ.get("DYNMIX_CACHE", "~/.cache/dynmix") if cache_dir is None else cache_dir
    return Path(os.path.abspath(Path(given).expanduser()))


@contextlib.contextmanager
def one_at_a_time(folder: Path, key: str) -> Iterator[None]:
    """Held by one process of all that share `folder`: the others wait, and find what it made."""
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "locks" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.lock"):
        yield


def download(
    url: str,
    choose: Callable[[list[str], str], list[str]],
    cache_dir: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Local copies of the chosen files of a remote file, folder or glob, in the order of `choose`.

    A copy is made once, and again when the remote file changed its size or version (ETag, checksum or time). It is that
    of one place: of the host or archive that the url names, and of the storage options but for credentials. It gets its
    name when it is whole. All files are copied before the first is read: a bucket takes its size on the disk.

    Args:
        url: with the protocol; what fsspec knows, and the packages for it that are installed.
        choose: of the files' paths and `url`, those to open; a `.bin` comes with its `.idx`, and both with a manifest.
        cache_dir: folder of copies, for all processes of a machine or of several; None: see `cache_folder`.
        storage_options: for fsspec's file system, as `{"anon": True}`; it also reads its own configuration
            (`~/.config/fsspec`, `FSSPEC_S3_...`).

    Raises:
        StoreError: the protocol's package is missing, nothing is there, no access, a download that broke off or does
            not fit on the disk.
    """
    from fsspec.core import url_to_fs

    folder = cache_folder(cache_dir)
    try:
        system, path = url_to_fs(url, **(storage_options or {}))
        files = _listed(system, path)
    except (ImportError, ValueError) as error:  # a package of the protocol that is missing, an unknown protocol
        raise StoreError(f"{url} cannot be reached: {error}") from error
    except Exception as error:  # every file system has errors of its own
        raise StoreError(f"{url} cannot be listed: {type(error).__name__}: {error}") from error
    if not files:
        raise StoreError(f"{url}: no such file or folder, or nothing in it")
    chosen = choose(list(files), path)
    wanted = [name for first in chosen for name in ([f"{first[:-4]}.bin"] if first.endswith(".idx") else []) + [first]]
    if f"{path}.bin" in chosen:  # a flat file is asked for by its whole name
        wanted.append(f"{path}.idx")
    if missing := [name for name in wanted if name not in files]:
        raise StoreError(f"{url}: {missing[0]} is missing, a store is both files")
    wanted += sorted(_manifests(chosen) & files.keys())
    files = {name: _with_version(system, url, name, files[name]) for name in wanted}
    copies = {name: _copy(folder, url, system, name) for name in wanted}
    with one_at_a_time(folder, url):
        for name in chosen:
            if name.endswith(".bin"):  # a flat file, which a store may have been before
                copies[name].with_suffix(".idx").unlink(missing_ok=True)
        stale = {name: copy for name, copy in copies.items() if not _is_current(copy, files[name])}
        _check_room(folder, url, sum(int(files[name].get("size") or 0) for name in stale))
        for name, copy in stale.items():
            _fetch(system, name, copy, files[name])
    return [copies[name] for name in chosen]


def _listed(system: Any, path: str) -> dict[str, Mapping[str, Any]]:
    """Path -> info of all files that `path` may mean, with both files of a store and the manifest beside them."""
    from fsspec.core import has_magic

    system.invalidate_cache()  # another run may have listed it, in this process, before it changed
    if has_magic(path) and not system.exists(path):
        found = dict(system.glob(path, detail=True))
        for name in [name for name, info in found.items() if info["type"] == "directory"]:
            found |= system.find(name, detail=True)
    # `isdir` of http reads the whole file.
    elif path.endswith((".bin", ".idx", ".npy")) and system.isfile(path):
        found = {path: system.info(path)}
    elif system.isdir(path):
        found = dict(system.find(path, detail=True))
    else:
        found = {path: system.info(path)} if system.isfile(path) else {}
    stems = [name[:-4] for name in found if name.endswith((".bin", ".idx"))] or ([] if found else [path])
    for other in (f"{stem}{end}" for stem in stems for end in (".bin", ".idx")):
        if other not in found and system.isfile(other):
            found[other] = system.info(other)
    found |= {name: system.info(name) for name in _manifests(found) - found.keys() if system.isfile(name)}
    return {name: info for name, info in found.items() if info["type"] == "file"}


def _manifests(names: Iterable[str]) -> set[str]:
    """Where the manifests of the stores among `names` would be, by which their tokenizer is known."""
    return {os.path.join(os.path.dirname(name), _MANIFEST) for name in names if name.endswith(".idx")}


def _with_version(system: Any, url: str, name: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is told of a file: some file systems, as of http, tell no more than its name in a listing."""
    if info.get("size") is not None:
        return info
    try:
        return dict(system.info(name))
    except Exception as error:  # every file system has errors of its own
        raise StoreError(f"{url}: {name} cannot be reached: {type(error).__name__}: {error}") from error


def _copy(folder: Path, url: str, system: Any, name: str) -> Path:
    parts = [quote(part, safe=" ") for part in name.split("/") if part]
    if any(part in (".", "..") for part in parts):
        raise StoreError(f"{url}: the path {name} has {'..'!r} in it")
    protocol = system.protocol if isinstance(system.protocol, str) else system.protocol[0]
    # Few file systems have the host in their paths, and none the archive that a path is in: both are options to them.
    where = json.dumps(_where(system.storage_options), sort_keys=True)
    place = f"{quote(protocol, safe='')}-{hashlib.blake2b(where.encode(), digest_size=8).hexdigest()}"
    return folder.joinpath("remote", place, *parts)


def _where(options: Any) -> Any:
    """What of a file system's options says where its files are, JSON-able."""
    if isinstance(options, Mapping):
        return {str(key): _where(value) for key, value in options.items() if not _CREDENTIALS.search(str(key))}
    if isinstance(options, list | tuple):
        return [_where(value) for value in options]
    # Of an object only its type is the same in every process.
    return options if isinstance(options, str | int | float | None) else type(options).__qualname__


def _version(info: Mapping[str, Any]) -> dict[str, str]:
    found = {key: info[key] for key in ("size", *_VERSIONS) if info.get(key) is not None}
    # Some file systems tell a time in a listing as a number, and of one file as a datetime.
    return {key: str(value.timestamp() if isinstance(value, datetime) else value) for key, value in found.items()}


def _note(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.json")


def _is_current(copy: Path, info: Mapping[str, Any]) -> bool:
    try:
        noted, now = json.loads(_note(copy).read_text(encoding="utf-8")), _version(info)
        was = noted["remote"]
        # A listing and a look at one file need not tell the same, so the best that both tell decides.
        best = next((key for key in _VERSIONS if key in was and key in now), None)
        same = was.get("size") == now.get("size") and (was[best] == now[best] if best else was == now)
        return bool(same and copy.stat().st_size == noted["bytes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _check_room(folder: Path, url: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"{url}: {needed:,} bytes are to be copied, and {folder} has {free:,} left: give a cache_dir that has room"
        )


def _fetch(system: Any, name: str, copy: Path, info: Mapping[str, Any]) -> None:
    from fsspec.callbacks import TqdmCallback

    bar = TqdmCallback({"desc": name, "unit": "B", "unit_scale": True, "disable": None, "delay": 0}, tqdm_cls=Bar)
    try:
        with whole_file(copy, shared=True) as beside:
            system.get_file(name, str(beside), callback=bar)
            size, expected = beside.stat().st_size, info.get("size")
            if expected is not None and size != expected:
                raise EOFError(f"{size} bytes came, of {expected}")
            _note(copy).unlink(missing_ok=True)  # it is of the copy before
    except Exception as error:  # every file system has errors of its own
        raise StoreError(
            f"the download of {name} broke off: {type(error).__name__}: {error}; start again, and what is whole is not"
            " copied again"
        ) from error
    with whole_file(_note(copy), shared=True) as note:
        note.write_text(json.dumps({"remote": _version(info), "bytes": size}))
