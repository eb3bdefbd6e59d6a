"""Files of a task's examples: what a record is, and what is wrong with one that is none. Knows text; no tokens."""

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One example as text: `gold` follows `context`, and is one of `choices` if there are any; `where` it was read."""

    where: str
    context: str
    gold: str
    choices: tuple[str, ...] = ()


def read_records(path: Path) -> list[Record]:
    """Return the examples of a `.jsonl` or `.jsonl.gz` file, one JSON object a line; blank lines are passed over.

    A record is `{"context": str, "gold": str, "choices": list[str] or null}`, or `{"text": str}`, which is all gold.

    Raises:
        ValueError: a record that is not so, with file, line and field; a file that is damaged.
        OSError: it cannot be read.
    """
    number, records = 0, []
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    records.append(_record(line, f"{path}, line {number}"))
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise ValueError(f"{path}, after line {number}: damaged or truncated: {problem}") from problem
    return records


def _record(line: bytes, where: str) -> Record:
    try:
        fields = json.loads(line)
    except ValueError as problem:
        raise ValueError(f"{where}: not JSON, one object a line: {problem}") from problem
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: a JSON {type(fields).__name__}, not an object")
    if "gold" not in fields and "text" in fields:
        return Record(where, "", _string(fields["text"], "text", where))
    if missing := [name for name in ("context", "gold") if name not in fields]:
        raise ValueError(f"{where}: no field {missing[0]!r}; there are {', '.join(map(repr, fields)) or 'none'}")
    context = _string(fields["context"], "context", where, empty=True)
    gold = _string(fields["gold"], "gold", where)
    given = fields.get("choices")
    if given is None:
        return Record(where, context, gold)
    if not isinstance(given, list):
        raise ValueError(f"{where}: field 'choices' is {type(given).__name__}, not a list of strings or null")
    choices = tuple(dict.fromkeys(_string(choice, "choices", where) for choice in given))
    if len(choices) < 2:
        raise ValueError(f"{where}: field 'choices' has {len(choices)} different texts: give at least 2, or null")
    if gold not in choices:
        raise ValueError(f"{where}: field 'gold' {gold!r} is none of the 'choices' {list(choices)}")
    return Record(where, context, gold, choices)


def _string(value: Any, field: str, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} holds {'null' if value is None else type(value).__name__}, no text")
    if not value and not empty:
        raise ValueError(f"{where}: field {field!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as problem:  # a lone surrogate, which JSON can escape, is no text
        raise ValueError(f"{where}: field {field!r} is not UTF-8: {problem}") from problem
    return value
