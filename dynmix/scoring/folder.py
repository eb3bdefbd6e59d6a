"""The folder of a scoring: what was asked for, the shards that are done, and all of them read back.

    scoring.json                        what was asked for, with fingerprints of data, tasks and checkpoints
    parts/<checkpoint>/00012.parquet    a shard scored by one checkpoint, until all have scored it
    scores-00012.parquet                a shard: id, domain, tokens, score/<task>/<checkpoint>..., loss/<checkpoint>...

Every file is written beside and renamed, so any number of processes may work in one folder and be killed at any time.
Knows parquet; no model and no tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dynmix.scores import Column, SampleScores
from dynmix.shown import Bar

Config = Mapping[str, Any]

_KEY = b"dynmix.scoring"


class OtherConfiguration(ValueError):  # noqa: N818
    """A folder has scores of other data, tasks, checkpoints or settings than those that are asked for."""


class ScoreFolder:
    """A folder of scores of one configuration.

    Attributes:
        path: the folder.
        config: what is in `scoring.json`.
        shards: how many there are, done or not.

    Raises:
        ValueError: there is no `scoring.json`, or it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        file = self.path / "scoring.json"
        try:
            self.config: Config = json.loads(file.read_text(encoding="utf-8"))
            samples = sum(domain["samples"] for domain in self.config["domains"])
            self.shards = -(-samples // self.config["shard_samples"])
            self._checkpoints = [checkpoint["name"] for checkpoint in self.config["checkpoints"]]
            self._digest = _digest(self.config)
        except FileNotFoundError as problem:
            raise ValueError(f"{file}: no such file; {self.path} is no folder of scores") from problem
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(f"{file} is damaged ({problem!r}): score anew, into another folder") from problem

    @classmethod
    def begin(cls, path: str | os.PathLike[str], config: Config) -> ScoreFolder:
        """Make the folder, or go on in it.

        Raises:
            OtherConfiguration: it has the scores of another one; the message says what differs.
            ValueError: it has scores without a `scoring.json`, or with a damaged one.
        """
        folder, file = Path(path), Path(path) / "scoring.json"
        # Scores first: they are written after scoring.json, so who sees them sees that too, beside other processes.
        scored = next((one for names in ("scores-*", "parts/*/*") for one in folder.glob(f"{names}.parquet")), None)
        there = file.exists()
        if scored and not there:
            raise ValueError(f"{scored} is there without {file.name}: give an empty folder")
        found = _differences(cls(path).config, config) if there else []
        if found and scored:
            raise OtherConfiguration(
                f"{path} has scores of another configuration: {'; '.join(found[:5])}. Give another folder (--out), or"
                " remove this one's scores (--overwrite, dynmix.scoring.discard)"
            )
        if found or not there:
            _write(file, json.dumps(config, indent=1).encode(), beside=folder / "parts")
        return cls(path)

    def done(self, checkpoint: str, shard: int) -> bool:
        """Whether this checkpoint has scored this shard."""
        return self._part(checkpoint, shard).exists() or self._whole(shard).exists()

    def write(self, checkpoint: str, shard: int, table: pa.Table) -> None:
        """Keep a shard's scores by one checkpoint, and make a whole of the parts if they are all there."""
        self._keep(self._part(checkpoint, shard), table)
        self.join([shard])

    def join(self, shards: Iterable[int]) -> None:
        """Make a whole of the parts of each of these shards that has them all; without a trace where they are not."""
        for shard in shards:
            parts = [self._part(checkpoint, shard) for checkpoint in self._checkpoints]
            if not self._whole(shard).exists() and all(part.exists() for part in parts):
                try:
                    tables = [self._read(part) for part in parts]
                except FileNotFoundError:  # another process was as quick
                    continue
                whole = tables[0]
                for table in tables[1:]:
                    for name in table.column_names[3:]:
                        whole = whole.append_column(name, table[name])
                order = sorted(whole.column_names[3:], key=lambda name: name.startswith("loss/"))
                self._keep(self._whole(shard), whole.select([*whole.column_names[:3], *order]))
            if self._whole(shard).exists():
                for part in parts:
                    part.unlink(missing_ok=True)

    @property
    def missing(self) -> list[int]:
        """Shards that not every checkpoint has scored."""
        return [shard for shard in range(self.shards) if not self._whole(shard).exists()]

    def tidy(self) -> None:
        """Remove what processes that were killed have left, if every shard is whole."""
        if not self.missing:
            shutil.rmtree(self.path / "parts", ignore_errors=True)

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """The shards in order, with these columns.

        Raises:
            ValueError: shards are missing, or one is damaged or of another configuration.
        """
        if missing := self.missing:
            some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise ValueError(
                f"{self.path}: {len(missing)} of {self.shards} shards are missing ({some}); run the same scoring again,"
                " it goes on where it stopped"
            )
        for shard in range(self.shards):
            yield self._read(self._whole(shard), columns)

    def _part(self, checkpoint: str, shard: int) -> Path:
        return self.path / "parts" / checkpoint / f"{shard:05d}.parquet"

    def _whole(self, shard: int) -> Path:
        return self.path / f"scores-{shard:05d}.parquet"

    def _keep(self, file: Path, table: pa.Table) -> None:
        content = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({_KEY: self._digest}), content, write_page_checksum=True)
        _write(file, content.getvalue(), beside=self.path / "parts")

    def _read(self, file: Path, columns: list[str] | None = None) -> pa.Table:
        try:
            table = pq.read_table(file, columns=columns, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as problem:
            if isinstance(problem, FileNotFoundError) or getattr(problem, "errno", None):
                raise  # of the disk: what Arrow says of a damaged page is an OSError too, without a number
            raise ValueError(f"{file} is damaged ({problem}): remove it and run the same scoring again") from problem
        if (table.schema.metadata or {}).get(_KEY) != self._digest:
            raise ValueError(f"{file} is of another configuration than scoring.json: remove it and score again")
        return table


def read_scores(out: str | os.PathLike[str]) -> SampleScores:
    """All scores of a folder, in the order of the corpus and of the configuration; float32.

    Documents without any token are left out: nobody can train on them. Memory: 4 bytes a score and 20 a sample.

    Raises:
        ValueError: no folder of scores, or shards are missing or damaged.
    """
    folder = ScoreFolder(out)
    columns = [
        (f"score/{task}/{checkpoint['name']}", Column(task, checkpoint["name"], checkpoint["step"]))
        for checkpoint in folder.config["checkpoints"]
        for task in checkpoint["tasks"]
    ]
    return _frame(folder, columns)


def read_losses(out: str | os.PathLike[str], task: str = "loss") -> SampleScores:
    """As `read_scores`, the samples' losses under each checkpoint, nats per token, in columns of this pseudo-task."""
    folder = ScoreFolder(out)
    columns = [(f"loss/{one['name']}", Column(task, one["name"], one["step"])) for one in folder.config["checkpoints"]]
    return _frame(folder, columns)


def discard(out: str | os.PathLike[str]) -> None:
    """Remove the scores in a folder, finished or not, and nothing else; no process may be at work in it."""
    folder = Path(out)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    for file in folder.glob("scores-*.parquet"):
        file.unlink()
    (folder / "scoring.json").unlink(missing_ok=True)


def _frame(folder: ScoreFolder, columns: list[tuple[str, Column]]) -> SampleScores:
    names = [domain["name"] for domain in folder.config["domains"]]
    n = sum(domain["samples"] for domain in folder.config["domains"])
    domain, row, tokens = np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n, np.int64)
    scores = np.empty((n, len(columns)), np.float32)
    start = 0
    tables = folder.tables(["id", "domain", "tokens", *(name for name, _ in columns)])
    for table in Bar(tables, total=folder.shards, desc="reading scores", unit="file"):
        here = slice(start, start := start + len(table))
        coded = table["domain"].combine_chunks()
        number = np.array([names.index(name) for name in coded.dictionary.to_pylist()], np.int32)
        domain[here] = number[coded.indices.to_numpy()]
        row[here], tokens[here] = table["id"].to_numpy(), table["tokens"].to_numpy()
        for i, (name, _) in enumerate(columns):
            scores[here, i] = table[name].to_numpy()
    return frame(tuple(names), domain, row, tokens, tuple(column for _, column in columns), scores)


def frame(
    names: tuple[str, ...],
    domain: np.ndarray[Any, Any],
    row: np.ndarray[Any, Any],
    tokens: np.ndarray[Any, Any],
    columns: tuple[Column, ...],
    scores: np.ndarray[Any, Any],
) -> SampleScores:
    """`SampleScores` of the samples that have tokens."""
    if not (some := tokens > 0).all():
        domain, row, tokens, scores = domain[some], row[some], tokens[some], scores[some]
    return SampleScores(names, domain, row, tokens, columns, scores)


def _write(file: Path, content: bytes | pa.Buffer, beside: Path) -> None:
    """Write a file into a folder beside and rename it: whole or absent, however many processes write the same.

    Another process may tidy up meanwhile, and folders vanish between any two lines; it does so once, at its end.
    """
    for attempt in range(100):
        try:
            beside.mkdir(parents=True, exist_ok=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = beside / f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
            try:
                with open(draft, "xb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(draft, file)
            finally:
                draft.unlink(missing_ok=True)  # half of it would keep a full disk full, and more so with every try
            return
        except (FileExistsError, FileNotFoundError):  # mkdir says the first if what was there has gone again
            if attempt == 99:
                raise


def _digest(config: Config) -> bytes:
    return hashlib.blake2b(json.dumps(_flat(config)).encode(), digest_size=16).hexdigest().encode()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by dotted names, but for paths: what was moved is still the same."""
    if isinstance(value, Mapping):
        # A domain, a task or a checkpoint of this name is no path: `_named` has it under its name.
        items = [(str(key), item) for key, item in value.items() if key != "path" or isinstance(item, Mapping)]
    elif isinstance(value, list):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {name: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{name}.{key}" if name else key).items()}


def _named(config: Config) -> dict[str, Any]:
    """With lists of named things as their names in order, and each thing under its own, for people."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list):
            found[key] = ", ".join(item["name"] for item in value)
            value = {item["name"]: item for item in value}
            key = key.removesuffix("s")
        found[key] = value
    return found


def _differences(before: Config, now: Config) -> list[str]:
    old, new = _flat(_named(before)), _flat(_named(now))
    return [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
