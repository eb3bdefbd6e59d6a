"""What is to be prepared: files and data sets by domain, each cut into pieces.

Where an input is cut depends on the input alone, so that the same pieces come of it whoever reads them. Compressed text
has to be read from its start: it is unpacked here, by one reader, and carried in its pieces. Nothing else is read here
but what the cutting takes.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from dynmix.mixture.folders import files_in
from dynmix.mixture.prepare.names import is_utf8
from dynmix.mixture.prepare.pieces import (
    Fields,
    FileLines,
    FileParagraphs,
    ParquetRows,
    Piece,
    PrepareError,
    TableRows,
    TextLines,
    check_columns,
    damage,
)

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
SMALLEST, LARGEST = 1 << 19, 1 << 23  # bytes of a piece: about a second of work, or some, which a kill costs a worker
_GROUP_BYTES = 1 << 26  # of a row group that is one piece; to reach the rows of a part, those before it are decoded
_BATCH_BYTES, _BATCH_ROWS = 1 << 21, 2048
_LINE_BYTES = 1 << 30  # a longer document is taken for another kind of file, before it fills the memory
_BLOCK = 1 << 20

PathLike: TypeAlias = "str | os.PathLike[str]"
TextSource: TypeAlias = "PathLike | Dataset"
Inputs: TypeAlias = "TextSource | Iterable[PathLike] | Mapping[str, TextSource | Iterable[PathLike]]"


@dataclass(frozen=True)
class File:
    """A file of one of `SUFFIXES`."""

    path: Path

    @property
    def name(self) -> str:
        """The path as given, for errors and the manifest."""
        return str(self.path)

    @cached_property
    def stamp(self) -> list[int]:
        """Bytes, and time of the last change; JSON-able, as is that of `DatasetRows`."""
        facts = self.path.stat()
        return [facts.st_size, facts.st_mtime_ns]

    @property
    def size(self) -> int:
        """Bytes, compressed as it is, of which its pieces' are parts."""
        return self.stamp[0]

    def check(self) -> None:
        """Raises PrepareError if it may have changed while its pieces were read.

        What was appended may be missing; after any other change the store might hold both the old and the new.
        """
        before, now = self.stamp, File(self.path).stamp
        if now != before and now[0] <= before[0]:
            raise PrepareError(f"{self.name}: it was changed while it was read; give the same command again")
        if now != before:
            _log.warning("%s: it grew while it was read: what was appended may be missing from the store", self.name)

    def pieces(self, fields: Fields, size: int) -> Iterator[Piece]:
        """Cut it, about every `size` bytes of text. Raises PrepareError if it is damaged or without the text field."""
        if self.path.suffix == ".parquet":
            return _cut_parquet(self, fields, size)
        return _cut_stream(self, size) if self.path.suffix in (".gz", ".zst") else _cut_plain(self, size)


@dataclass(frozen=True)
class DatasetRows:
    """An HF `datasets.Dataset`, in memory or on disk; as `File`."""

    name: str
    dataset: Any

    @property
    def stamp(self) -> list[Any]:
        """Rows, and what `datasets` knows the content by."""
        return [len(self.dataset), self.dataset._fingerprint]

    @property
    def size(self) -> int:
        """Bytes of the table."""
        return int(self.dataset.data.nbytes)

    def check(self) -> None:
        """A table is not written to."""

    def pieces(self, fields: Fields, size: int) -> Iterator[Piece]:
        """Cut it."""
        check_columns(self.name, self.dataset.features.arrow_schema, fields.text)
        table = self.dataset.select_columns(fields.columns(self.dataset.column_names)).with_format("arrow")
        parts, first, done = list[pa.Table](), 0, 0
        for start in range(0, len(table), 256):
            parts.append(table[start : start + 256])
            try:
                parts[-1].validate(full=True)  # what is damaged would end the process, not the call
            except pa.ArrowException as error:
                raise PrepareError(f"{self.name}, after row {start}: damaged: {error}") from error
            stop = first + sum(map(len, parts))
            if sum(part.nbytes for part in parts) >= size or stop == len(table):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, parts[0].schema) as stream:
                    for part in parts:
                        stream.write_table(part)
                done, before = self.size * stop // len(table), done
                yield TableRows(self.name, done - before, first + 1, sink.getvalue().to_pybytes())
                parts, first = [], stop


Input: TypeAlias = File | DatasetRows


def piece_size(total: int) -> int:
    """Bytes of text of a piece, where all inputs have `total`."""
    return min(LARGEST, max(SMALLEST, total // 4096))


def find_domains(inputs: Inputs, output: Path, by_field: bool = False) -> dict[str, list[Input]]:
    """Inputs by domain, as `prepare` says, or `by_field` by where they are; nothing is read yet.

    Raises:
        PrepareError: no input, an unknown suffix, an empty folder, two inputs with one domain name, one not in UTF-8, a
            folder that `output` is in.
    """
    domains: dict[str, list[Input]] = {}
    sources: dict[str, Any] = {}

    def add(name: str, source: Any, found: list[Input]) -> None:
        if name in domains:
            raise PrepareError(f"{sources[name]} and {source} are both domain {name!r}: rename one")
        domains[name], sources[name] = found, source

    if isinstance(inputs, Mapping):
        for name, source in inputs.items():
            if isinstance(source, Mapping):
                kind = type(source).__name__
                raise PrepareError(f"inputs[{name!r}]: a {kind} of {list(source)[:8]}: give one of these, or a list")
            single = isinstance(source, str | os.PathLike) or _is_dataset(source)
            entries = [source] if single else list(source)
            for entry in entries:
                _check_outside(output, entry)
            found = [each for i, entry in enumerate(entries) for each in _all_inputs(f"{name}[{i}]", entry)]
            add(name, f"inputs[{name!r}]", found)
    elif _is_dataset(inputs):
        if not by_field:
            raise PrepareError('a data set has no name: give {"its domain": data set}, or domain_from')
        add("inputs", inputs, _all_inputs("inputs", inputs))
    else:
        for entry in map(Path, [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)):
            if not entry.exists():
                raise PrepareError(f"{entry}: no such file or folder")
            _check_outside(output, entry)
            for path in _visible(entry) if entry.is_dir() and not _is_saved(entry) else [entry]:
                name = path.name if path.is_dir() else path.name.removesuffix(_suffix(path))
                add(str(path) if by_field else name, path, _all_inputs(name, path))
    if not any(domains.values()):
        raise PrepareError("inputs: no files given")
    if empty := [name for name, found in domains.items() if not found]:
        raise PrepareError(f"{sources[empty[0]]}: no files given; leave the domain out, or correct its paths")
    if bad := [each.name for found in domains.values() for each in found if not is_utf8(each.name)]:
        raise PrepareError(f"{bad[0]!r}: the name is not UTF-8, and has to be written to the manifest; rename it")
    return domains


def _all_inputs(name: str, source: Any) -> list[Input]:
    """A data set (in memory it is called `name`), a file, or all files of a folder."""
    if _is_dataset(source):
        if not hasattr(source, "__len__") or not hasattr(source, "select_columns"):
            raise PrepareError(f"{name}: a {type(source).__name__} cannot be read from any row on; save it")
        if source.format["type"] == "custom":  # the table is read here, without what the transform makes of it
            raise PrepareError(f"{name}: a data set with a transform, which is not applied here: apply it with map")
        return [DatasetRows(name, source)]
    path = Path(source)
    if not path.exists():
        raise PrepareError(f"{path}: no such file or folder")
    if path.is_dir() and _is_saved(path):
        return [DatasetRows(str(path), _load_saved(path))]
    paths = _visible(path, deep=True) if path.is_dir() else [path]
    if other := [each for each in paths if not each.is_file()]:  # a pipe would be waited for
        raise PrepareError(f"{other[0]}: no file, but a link to nothing, a pipe or the like; remove it")
    return [File(each) for each in paths if _suffix(each)]


def _check_outside(output: Path, source: Any) -> None:
    """Raise PrepareError if stores would lie in an input folder: they would be read with it the next time."""
    if _is_dataset(source) or not os.path.isdir(source):
        return
    folder, within = os.path.realpath(source), Path(os.path.realpath(output))
    if within.is_relative_to(folder) and not any(name[0] in "._" for name in within.relative_to(folder).parts):
        raise PrepareError(
            f"{output}: it is in the input folder {source}, and what is written to it would be read as input the next"
            " time; give a folder outside of it, or one in it whose name begins with `_` (--output)"
        )


def _is_dataset(source: Any) -> bool:
    return type(source).__module__.split(".")[0] == "datasets" and not isinstance(source, Mapping)


def _is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote it."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _load_saved(folder: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise PrepareError(f"{folder}: a data set saved by HF datasets, to read it: pip install datasets") from error
    try:
        return load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise PrepareError(f"{folder}: a damaged or incomplete data set: {error}; save it anew") from error


def _visible(folder: Path, deep: bool = False) -> list[Path]:
    """What is in `folder`, sorted, without `.hidden` and `_marker` names; `deep`: the files at any depth.

    Links are followed; a link to the folder itself is nothing new. `dataset_dict.json` only says of a saved
    `DatasetDict` what its folders are.
    """
    paths = map(Path, files_in(str(folder))) if deep else folder.iterdir()
    found = sorted(p for p in paths if p.name[0] not in "._" and p.name != "dataset_dict.json")
    if not deep:
        found = [p for p in found if os.path.realpath(p) != os.path.realpath(folder)]
    if not found:
        raise PrepareError(f"{folder}: an empty folder")
    return found


def _suffix(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.endswith(suffix) and path.name != suffix:
            return suffix
    raise PrepareError(f"{path}: unknown suffix; known are {', '.join(SUFFIXES)}")


def _cut_plain(file: File, piece: int) -> Iterator[Piece]:
    """Pieces end with a line; those of plain text with a blank one."""
    start, is_text = 0, file.path.suffix == ".txt"
    kind, words = (FileParagraphs, ("paragraph", "blank lines")) if is_text else (FileLines, ())
    with open(file.path, "rb", buffering=_BLOCK) as lines:
        while start < file.size:
            lines.seek(min(start + piece, file.size) - 1)
            ended = False
            while part := lines.readline(_BLOCK):
                begun, ended = ended, part.endswith(b"\n")
                # A part of a line may be blank where the line is not.
                if ended and (not is_text or (begun and part.isspace())):
                    break
                _check_line(file.name, f"after byte {start}", lines.tell() - start - piece, *words)
            stop = lines.tell()
            yield kind(file.name, stop - start, start)
            start = stop


def _cut_stream(file: File, piece: int) -> Iterator[Piece]:
    number, parts = 1, list[bytes]()
    try:
        with open(file.path, "rb", buffering=0) as raw:
            stream, taken = _decompress(raw, file.path), 0
            while block := stream.read(piece):
                end = block.rfind(b"\n") + 1
                if end:
                    text, taken, before = b"".join([*parts, block[:end]]), raw.tell(), taken
                    yield TextLines(file.name, taken - before, number, text)
                    number, parts = number + text.count(b"\n"), []
                parts.append(block[end:])
                _check_line(file.name, f"line {number}", sum(map(len, parts)))
            if text := b"".join(parts):
                yield TextLines(file.name, file.size - taken, number, text)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise PrepareError(f"{file.name}, after line {number - 1}: {damage(error)}") from error


def _decompress(file: IO[bytes], path: Path) -> IO[bytes]:
    """Every member of a .gz and every frame of a .zst, to the end; an error, not an end, where one is cut short."""
    if path.stat().st_size == 0:
        raise EOFError("0 bytes")
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BLOCK)
    stream: Any = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return io.BufferedReader(stream, _BLOCK)


def _check_line(name: str, where: str, size: int, kind: str = "line", wanted: str = "one JSON object a line") -> None:
    if size > _LINE_BYTES:
        raise PrepareError(f"{name}, {where}: a {kind} of over {_LINE_BYTES:,} bytes; want {wanted}")


def _cut_parquet(file: File, fields: Fields, piece: int) -> Iterator[Piece]:
    try:
        with pq.ParquetFile(file.path) as table:
            check_columns(file.name, table.schema_arrow, fields.text)
            facts = table.metadata
            column = [facts.schema.column(i).path for i in range(len(facts.schema))].index(fields.text)
            groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
            if (there := sum(group.num_rows for group in groups)) != facts.num_rows:
                raise pa.ArrowInvalid(f"{facts.num_rows} rows, of which its groups have {there}")
    except PrepareError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise PrepareError(f"{file.name}, after row 0: damaged or truncated: {error}") from error
    rows = [group.num_rows for group in groups]
    sizes = [group.column(column).total_uncompressed_size for group in groups]
    first = group = done = 0
    while group < len(groups):
        stop, size = group + 1, sizes[group]
        while stop < len(groups) and size + sizes[stop] <= piece:
            stop, size = stop + 1, size + sizes[stop]
        count = sum(rows[group:stop])
        batch = max(1, min(_BATCH_ROWS, count * _BATCH_BYTES // max(size, 1)))
        step = max(1, count // max(1, size // _GROUP_BYTES))
        for start in range(0, count, step):
            part = min(step, count - start)
            done, before = file.size * (first + start + part) // facts.num_rows, done
            yield ParquetRows(
                file.name, done - before, first + start + 1, tuple(range(group, stop)), start, start + part, batch
            )
        first, group = first + count, stop
