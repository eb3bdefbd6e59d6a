"""The files in a folder or glob, links followed. Knows nothing of what is in them."""

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import NoReturn


def files_in(path: str) -> list[str]:
    """The files in a folder at any depth, each real folder's once, in no order; of a file, itself.

    Links are followed, after what is there without them: one that leads back to where it is adds nothing. Folders whose
    names begin with `.` or `_` are passed over. Raises OSError for one that cannot be read: its files would be missing
    silently.
    """
    if not os.path.isdir(path):
        return [path]
    found, seen, tops = list[str](), set[str](), deque([path])
    while tops:
        for folder, inner, names in os.walk(tops.popleft(), onerror=_refuse):
            real = os.path.realpath(folder)
            inner[:] = sorted(name for name in inner if name[0] not in "._") if real not in seen else []
            tops += [link for name in inner if os.path.islink(link := os.path.join(folder, name))]
            found += [os.path.join(folder, name) for name in names] if real not in seen else []
            seen.add(real)
    return found


def _refuse(error: OSError) -> NoReturn:
    raise error


def matching(*patterns: str) -> list[str]:
    """The files that globs match, and those in the folders they match, each real folder's once; `**` is any depth."""
    real, called = cache(os.path.realpath), dict[str, str]()
    names = [os.path.split(file) for pattern in patterns for file in _matching(pattern.rstrip("/").split("/"))]
    return list(dict.fromkeys(os.path.join(called.setdefault(real(top), top), name) for top, name in names))


def _matching(parts: Sequence[str]) -> Iterator[str]:
    if "**" not in parts:
        for name in sorted(glob.glob("/".join(parts))):
            yield from files_in(name)
        return
    first = parts.index("**")  # from where on `glob` would go round and round, where a link leads back
    for top in sorted(glob.glob("/".join([*parts[:first], ""]))) if first else [""]:
        for file in files_in(top or "."):
            path = os.path.relpath(file, top or ".")
            if _matches(path.split("/"), parts[first:]):
                yield os.path.join(top, path)


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a pattern matches a path, or a folder that it is in."""
    if not pattern or not path:
        return not pattern
    if pattern[0] == "**":
        return any(_matches(path[start:], pattern[1:]) for start in range(len(path) + 1))
    return fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
