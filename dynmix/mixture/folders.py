"""The files in a folder, links followed. Knows nothing of what is in them."""

import os
from collections import deque


def files_in(path: str) -> list[str]:
    """The files in a folder at any depth, each real folder's once, in no order; of a file, itself.

    Links are followed, after what is there without them: one that leads back to where it is adds nothing. Folders whose
    names begin with `.` or `_` are passed over.
    """
    if not os.path.isdir(path):
        return [path]
    found, seen, tops = list[str](), set[str](), deque([path])
    while tops:
        for folder, inner, names in os.walk(tops.popleft()):
            real = os.path.realpath(folder)
            inner[:] = sorted(name for name in inner if name[0] not in "._") if real not in seen else []
            tops += [link for name in inner if os.path.islink(link := os.path.join(folder, name))]
            found += [os.path.join(folder, name) for name in names] if real not in seen else []
            seen.add(real)
    return found
