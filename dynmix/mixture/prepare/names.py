"""Names of stores: what a domain's value is called as a file, and that no two are called the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable

from dynmix.mixture.prepare.pieces import PrepareError

HELD_OUT = ".valid"
_MOST_DOMAINS = 50_000  # of a field; more are no domains, and each is two files
_MOST_BYTES = 160  # of a name: file systems take 255 with what is put behind it


def store_name(name: str, held_out: bool) -> str:
    """Name of the store of a domain's documents, or of those held out."""
    return name + HELD_OUT if held_out else name


def safe_name(value: str) -> str:
    """`value` as a file name that every system takes, and that is not passed over where a folder of stores is read.

    Other characters than letters, digits and `.+-_` become `_`. What then begins with `.` or `_`, or is long, is cut
    and told apart by a hash.
    """
    name = re.sub(r"\.(?=(bin|idx)$)", "_", re.sub(r"[^\w.+-]", "_", value))
    seen = name.lstrip("._")
    if name == seen and len(name.encode()) <= _MOST_BYTES:
        return name
    short = seen.encode()[: _MOST_BYTES - 9].decode(errors="ignore") or "domain"
    return f"{short}-{hashlib.blake2b(value.encode(), digest_size=4).hexdigest()}"


def check_names(domains: Iterable[str], held_out: bool) -> None:
    """Raises PrepareError for names that no store can have, and for one that is another's held-out part."""
    names = list(domains)
    for name in names:
        if not isinstance(name, str):
            raise PrepareError(f"domain {name!r}: a {type(name).__name__}; names are strings")
        if {"\0", "/"} & {*name} or name in (".", "..") or not is_utf8(name):
            raise PrepareError(f"domain {name!r}: no name of a file in the output folder; rename it")
        if name.endswith((".bin", ".idx")) or not name:
            raise PrepareError(f"domain {name!r}: a store's files are called so; rename it")
        if held_out and name + HELD_OUT in names:
            raise PrepareError(f"domain {name + HELD_OUT!r} is also what is held out of {name!r}: rename one")


def is_utf8(name: str) -> bool:
    """Whether a name is text, and not bytes that could not be decoded."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


class Names:
    """Domains by the value of `field`, refused where two values make one name, or that of a store that is `taken`."""

    def __init__(self, field: str, held_out: bool, taken: Collection[str]) -> None:
        self.field, self.held_out, self.taken = field, held_out, set(taken)
        self._values: dict[str, str] = {}

    def add(self, values: Iterable[str]) -> None:
        """Take up the values of documents. Raises PrepareError for a name that is taken."""
        for value in sorted(values):
            name = safe_name(value)
            if self._values.get(name, value) != value:
                raise PrepareError(
                    f"field {self.field!r}: the values {self._values[name]!r} and {value!r} are both domain {name!r}: "
                    "rename one in the data"
                )
            if name in self._values:
                continue
            for store in (name, store_name(name, True)):
                if store in self.taken:
                    raise PrepareError(
                        f"field {self.field!r}, value {value!r}: a store {store!r} is there already; remove it or pass "
                        "overwrite (--overwrite)"
                    )
            self._values[name] = value
            if len(self._values) > _MOST_DOMAINS:
                raise PrepareError(
                    f"field {self.field!r} has over {_MOST_DOMAINS:,} values, such as {value!r}: each would be a "
                    "domain; name a field that says where documents are from"
                )
            near = [name + HELD_OUT, name.removesuffix(HELD_OUT)] if self.held_out else []
            if other := next((each for each in near if each in self._values and each != name), None):
                check_names((name, other), True)
