"""Pieces of raw input, each read by one worker: bytes of jsonl or text, lines of a compressed file, rows of a table.

A piece knows where its records are and says so in errors; what becomes of their values is not known here. Its records
are numbered from 1; `where` turns such a number into the line or row of the whole input.
"""

from __future__ import annotations

import codecs
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

Record = tuple[int, Any, Any]  # number within the piece, from 1; value of the text field; value of the domain field

_BLOCK = 1 << 20


class PrepareError(ValueError):
    """Raw input that cannot become token stores; the message names the file and, where there is one, the line."""


def damage(error: Exception) -> str:
    """What ended the reading of a file, in words."""
    if "too much memory" in str(error):  # zstd's own words
        return "packed over a larger window than the 128 MiB that are read: unpack it with `zstd -d --long=31`"
    return f"damaged or truncated: {error}"


@dataclass(frozen=True)
class Fields:
    """Names of the fields that are read; `domain` may be a path of names joined by dots."""

    text: str
    domain: str | None = None

    def columns(self, names: Iterable[str]) -> list[str]:
        """Those of a table's columns that hold them."""
        roots = [] if self.domain is None else [self.domain, self.domain.split(".")[0]]
        return [self.text, *[name for name in roots if name in names and name != self.text][:1]]

    def domain_of(self, record: Mapping[str, Any]) -> Any:
        """Value of the domain field, None where a record has none."""
        if self.domain is None:
            return None
        if self.domain in record:
            return record[self.domain]
        value: Any = record
        for name in self.domain.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Piece(ABC):
    """Part of an input."""

    path: str  # of the input, for errors
    size: int  # its part of the input's bytes

    @abstractmethod
    def records(self, fields: Fields) -> Iterator[Record]:
        """The records, in order; raises PrepareError for one that is not UTF-8, no object or without the text field."""

    @abstractmethod
    def where(self, number: int) -> str:
        """Line or row of the input that is record `number` of this piece, for errors."""

    def bad(self, number: int, what: str) -> PrepareError:
        """The error that record `number` is."""
        return PrepareError(f"{self.path}, {self.where(number)}: {what}")


@dataclass(frozen=True)
class FileLines(Piece):
    """Bytes [start, start + size) of a plain file, whole lines."""

    start: int

    def records(self, fields: Fields) -> Iterator[Record]:
        """The records, in order."""
        return _parse(self, self._lines(), fields)

    def where(self, number: int) -> str:
        """Counts the lines before the piece, which only an error asks for."""
        with open(self.path, "rb") as file:
            sizes = [*[_BLOCK] * (self.start // _BLOCK), self.start % _BLOCK]
            before = sum(file.read(size).count(b"\n") for size in sizes)
        return f"line {number + before}"

    def _lines(self) -> Iterator[bytes]:
        with open(self.path, "rb", buffering=_BLOCK) as file:
            # The mark says how text is encoded, and is none.
            marked = not self.start and file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
            skipped = len(codecs.BOM_UTF8) if marked else 0
            file.seek(self.start + skipped)
            left = self.size - skipped
            while left > 0:
                line = file.readline()
                if not line:
                    raise EOFError(f"{left} bytes fewer than before: the file is being changed")
                left -= len(line)
                yield line


@dataclass(frozen=True)
class FileParagraphs(FileLines):
    """Bytes of a file of plain text, whole paragraphs: each is a document, and ends at a blank line."""

    def records(self, fields: Fields) -> Iterator[Record]:
        """The paragraphs, in order, without the line's end behind them; none has a domain field."""
        lines: list[bytes] = []
        for number, line in enumerate(chain(self._lines(), [b"\n"]), 1):
            if not line.isspace():
                lines.append(line)
            elif lines:
                first, text = number - len(lines), b"".join(lines)
                if b"\0" in text:
                    raise PrepareError(
                        f"{self.path}, the text from {self.where(first)} on: it has NUL bytes, as UTF-16 and damaged "
                        "files have; write it anew in UTF-8"
                    )
                try:
                    yield first, text.decode().rstrip("\r\n"), None
                except UnicodeDecodeError as error:
                    raise PrepareError(
                        f"{self.path}, the text from {self.where(first)} on: not UTF-8: {error}"
                    ) from error
                lines = []


@dataclass(frozen=True)
class _Numbered(Piece):
    """A piece that knows its first line or row, `first`, without a look at what is before it."""

    unit: ClassVar[str] = "row"
    first: int

    def where(self, number: int) -> str:
        return f"{self.unit} {self.first + number - 1}"


@dataclass(frozen=True)
class TextLines(_Numbered):
    """Whole lines of a compressed file, from line `first` on."""

    unit = "line"
    text: bytes

    def records(self, fields: Fields) -> Iterator[Record]:
        """The records, in order."""
        text = self.text.removeprefix(codecs.BOM_UTF8) if self.first == 1 else self.text
        return _parse(self, io.BytesIO(text), fields)


@dataclass(frozen=True)
class ParquetRows(_Numbered):
    """Rows [start, stop) of some row groups, from row `first` of the file on, read `batch` at a time."""

    groups: tuple[int, ...]
    start: int
    stop: int
    batch: int

    def records(self, fields: Fields) -> Iterator[Record]:
        """The records, in order."""
        # What has a checksum is held against it; Spark writes them, and Arrow only where asked.
        with pq.ParquetFile(self.path, buffer_size=_BLOCK, page_checksum_verification=True) as file:
            columns = fields.columns(file.schema_arrow.names)
            at = 0
            rows = file.iter_batches(self.batch, row_groups=list(self.groups), columns=columns, use_threads=False)
            for batch in rows:
                wanted = batch.slice(min(len(batch), max(0, self.start - at)), self.stop - max(at, self.start))
                yield from _rows(self, wanted, max(0, at - self.start), fields)
                at += len(batch)
                if at >= self.stop:
                    break


@dataclass(frozen=True)
class TableRows(_Numbered):
    """Rows of a data set as an Arrow stream, from row `first` of it on."""

    table: bytes

    def records(self, fields: Fields) -> Iterator[Record]:
        """The records, in order."""
        done = 0
        for batch in pa.ipc.open_stream(self.table):
            yield from _rows(self, batch, done, fields)
            done += len(batch)


def _parse(piece: Piece, lines: Iterable[bytes], fields: Fields) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise piece.bad(number, f"not UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            if line.isspace():
                continue
            raise piece.bad(number, f"not JSON, one object a line: {error}") from error
        if not isinstance(record, dict):
            raise piece.bad(number, f"a JSON {type(record).__name__}, want one object a line")
        if fields.text not in record:
            raise piece.bad(number, _no_field(fields.text, record))
        yield number, record[fields.text], fields.domain_of(record)


def _rows(piece: Piece, batch: pa.RecordBatch, done: int, fields: Fields) -> Iterator[Record]:
    texts = batch.column(fields.text)
    others = {name: batch.column(name) for name in fields.columns(batch.schema.names)[1:]}
    for i in range(len(batch)):
        try:
            text = texts[i].as_py()
            record = {name: column[i].as_py() for name, column in others.items()}
        except UnicodeDecodeError as error:
            raise piece.bad(done + i + 1, f"not UTF-8: {error}") from error
        yield done + i + 1, text, fields.domain_of(record)


def check_columns(path: str, schema: pa.Schema, text: str) -> None:
    """Raises PrepareError for a table without a column `text` of strings."""
    if text not in schema.names:
        raise PrepareError(f"{path}: {_no_field(text, schema.names)}")
    if (there := schema.names.count(text)) > 1:
        raise PrepareError(f"{path}: {there} fields {text!r}; rename all but one")
    kind = schema.field(text).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise PrepareError(f"{path}: field {text!r} is {kind}, not a string")


def _no_field(text: str, names: Iterable[str]) -> str:
    there = ", ".join(map(repr, names)) or "none"
    return f"no field {text!r}; there are {there}: name the one that holds the text with text_field (--text-field)"
