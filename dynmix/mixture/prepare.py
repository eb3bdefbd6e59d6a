"""Raw text to token stores: jsonl (plain, .gz, .zst) and parquet files, one store a domain.

Everything is streamed: memory is a batch of documents, whatever the size of the input. This module must not know of
mixtures or models; tasks are prepared in the same way as domains.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dynmix.mixture.store import UINT16_LIMIT, TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
_BATCH_DOCUMENTS = 2048
_BATCH_CHARACTERS = 1 << 21

_Record = tuple[int, Any]  # line or row number from 1, value of the text field


class PrepareError(ValueError):
    """Raw input that cannot become token stores; the message names the file and, where there is one, the line."""


def prepare(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase,
    *,
    text_field: str = "text",
    append_eos: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, TokenStore]:
    """Tokenise files into one store a domain, `output/<domain>.bin` and `.idx`; returns the opened stores by domain.

    A file is a domain named as the file without its suffix. In a folder each file is a domain and each sub-folder is
    one domain of all its files in sorted order; names that begin with `.` or `_` are passed over.

    Tokens are uint16 or int32 by the tokenizer's largest id. No special token is added but its EOS after each document
    (`append_eos`); documents of the empty string are skipped and counted in the log. A store appears under its name
    only when it is whole. Bars on stderr (`progress`) show the bytes read, the tokens so far, their rate and the time
    left.

    Raises:
        PrepareError: no input, an unknown suffix, two inputs with one domain name, an existing store without
            `overwrite`, a record that is not an object with a string in `text_field`, a damaged or truncated file,
            or a domain without documents.
    """
    folder = Path(output)
    domains = _find_domains([inputs] if isinstance(inputs, str | os.PathLike) else list(inputs))
    existing = [f for d in domains for f in (folder / f"{d}.bin", folder / f"{d}.idx") if f.exists()]
    if existing and not overwrite:
        raise PrepareError(
            f"{', '.join(map(str, existing))}: there already; remove them or pass overwrite (--overwrite)"
        )
    tok = _load_tokenizer(tokenizer)
    eos = tok.eos_token_id if append_eos else None
    if append_eos and eos is None:
        _log.warning("the tokenizer has no EOS token: documents are stored without one")
    dtype = np.uint16 if max(tok.get_vocab().values()) + 1 < UINT16_LIMIT else np.int32
    encode = _encoder(tok)
    stores = {}
    with _bars(progress) as bars:
        tasks = {d: bars.add_task(d, total=_total(files), start=False, tokens="") for d, files in domains.items()}
        for domain, files in domains.items():
            documents = _tokenise(_texts(domain, files, text_field, bars, tasks[domain]), encode, eos)
            stores[domain] = TokenStore.write(folder / domain, _shown(documents, bars, tasks[domain]), dtype=dtype)
    return stores


def _find_domains(inputs: list[str | os.PathLike[str]]) -> dict[str, list[Path]]:
    domains: dict[str, list[Path]] = {}
    sources: dict[str, Path] = {}

    def add(name: str, source: Path, files: list[Path]) -> None:
        if name in domains:
            raise PrepareError(f"{sources[name]} and {source} are both domain {name!r}: rename one")
        domains[name], sources[name] = files, source

    for entry in map(Path, inputs):
        if not entry.exists():
            raise PrepareError(f"{entry}: no such file or folder")
        for path in _visible(entry) if entry.is_dir() else [entry]:
            if path.is_dir():
                add(path.name, path, [f for f in _visible(path, deep=True) if _suffix(f)])
            else:
                add(path.name.removesuffix(_suffix(path)), path, [path])
    if not domains:
        raise PrepareError("inputs: no files given")
    return domains


def _visible(folder: Path, deep: bool = False) -> list[Path]:
    """What is in `folder`, sorted, without `.hidden` and `_marker` names; `deep`: the files at any depth."""
    paths = folder.rglob("*") if deep else folder.iterdir()
    found = [p for p in paths if not any(part[0] in "._" for part in p.relative_to(folder).parts)]
    found = sorted(p for p in found if not (deep and p.is_dir()))
    if not found:
        raise PrepareError(f"{folder}: an empty folder")
    return found


def _suffix(path: Path) -> str:
    for suffix in _SUFFIXES:
        if path.name.endswith(suffix) and path.name != suffix:
            return suffix
    raise PrepareError(f"{path}: unknown suffix; known are {', '.join(_SUFFIXES)}")


def _total(files: list[Path]) -> int:
    return sum(f.stat().st_size for f in files)


def _load_tokenizer(tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if not isinstance(tokenizer, str | os.PathLike):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise PrepareError(f"tokenizer={str(tokenizer)!r}: not a folder or hub name of a tokenizer: {error}") from error
    return loaded


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    if not tokenizer.is_fast:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # A copy, as a tokenizer.json often carries a truncation length, and the caller's object must stay as it is.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _tokenise(
    texts: Iterator[str], encode: Callable[[list[str]], list[list[int]]], eos: int | None
) -> Iterator[list[int]]:
    end = [] if eos is None else [eos]
    for batch in _batches(texts):
        for ids in encode(batch):
            yield ids + end


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _texts(domain: str, files: list[Path], field: str, bars: Progress, task: TaskID) -> Iterator[str]:
    """The non-empty documents of all files, each checked to be a string that UTF-8 can hold."""
    found = empty = 0
    for path in files:
        number, unit = 0, "row" if path.suffix == ".parquet" else "line"
        records = _read_parquet if path.suffix == ".parquet" else _read_lines
        try:
            for number, value in records(path, field, bars, task):
                if not isinstance(value, str):
                    kind = "null" if value is None else type(value).__name__
                    raise PrepareError(f"{path}, {unit} {number}: field {field!r} is {kind}, not a string")
                found += 1
                if value:
                    if not value.isascii():
                        value.encode()  # a lone surrogate, which JSON can escape, is no text
                    yield value
                else:
                    empty += 1
        except UnicodeError as error:
            raise PrepareError(f"{path}, {unit} {number}: not UTF-8: {error}") from error
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise PrepareError(f"{path}, after {unit} {number}: damaged or truncated: {error}") from error
    if found == empty:
        what = f"all {empty} documents are empty" if empty else "no documents"
        raise PrepareError(f"domain {domain!r}: {what} in {', '.join(map(str, files))}")
    _log.info("%s: %d documents, and %d empty ones skipped", domain, found - empty, empty)


def _read_lines(path: Path, field: str, bars: Progress, task: TaskID) -> Iterator[_Record]:
    with open(path, "rb", buffering=0) as raw:
        counted = bars.wrap_file(raw, task_id=task)
        for number, line in enumerate(_decompress(counted, path), 1):
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise PrepareError(f"{path}, line {number}: not UTF-8: {error}") from error
            except (ValueError, RecursionError) as error:
                if line.isspace():
                    continue
                raise PrepareError(f"{path}, line {number}: not JSON, one object a line: {error}") from error
            if not isinstance(record, dict):
                raise PrepareError(f"{path}, line {number}: a JSON {type(record).__name__}, want one object a line")
            if field not in record:
                raise PrepareError(f"{path}, line {number}: no field {field!r}; there are {_names(record)}")
            yield number, record[field]


def _decompress(file: IO[bytes], path: Path) -> IO[bytes]:
    """Every member of a .gz and every frame of a .zst, to the end; an error, not an end, where one is cut short."""
    stream: Any = file
    if path.suffix in (".gz", ".zst") and path.stat().st_size == 0:
        raise EOFError("0 bytes")
    if path.suffix == ".gz":
        stream = gzip.GzipFile(fileobj=file)
    elif path.suffix == ".zst":
        stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return io.BufferedReader(stream, 1 << 20)


def _read_parquet(path: Path, field: str, bars: Progress, task: TaskID) -> Iterator[_Record]:
    size = path.stat().st_size
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if field not in schema.names:
            raise PrepareError(f"{path}: no field {field!r}; there are {_names(schema.names)}")
        kind = schema.field(field).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if kind not in (pa.string(), pa.large_string(), pa.string_view()):
            raise PrepareError(f"{path}: field {field!r} is {kind}, not a string")
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH_DOCUMENTS, columns=[field]):
            for value in batch.column(0):
                number += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise PrepareError(f"{path}, row {number}: not UTF-8: {error}") from error
                yield number, text
            bars.advance(task, size * len(batch) / file.metadata.num_rows)


def _names(fields: Iterable[str]) -> str:
    return ", ".join(map(repr, fields)) or "none"


def _bars(visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not visible,
    )


def _shown(documents: Iterable[list[int]], bars: Progress, task: TaskID) -> Iterator[list[int]]:
    """`documents`, with their tokens counted on the bar of `task` a few times a second."""
    bars.start_task(task)
    start = shown = time.perf_counter()
    tokens = 0
    for document in documents:
        tokens += len(document)
        yield document
        if (now := time.perf_counter()) - shown > 0.2:
            shown = now
            bars.update(task, tokens=_rate(tokens, now - start))
    bars.update(task, tokens=_rate(tokens, time.perf_counter() - start))


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens, {tokens / max(seconds, 1e-9):,.0f}/s"
