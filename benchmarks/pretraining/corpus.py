"""A corpus folder as the benchmarks use it: domains as token stores, tasks and held-out text as evaluations.

    domains/<domain>.jsonl.gz       {"text"} a line: what is trained on
    tasks/<task>.jsonl              {"context", "gold", "choices"} a line
    tasks/<domain>.valid.jsonl.gz   {"text"} a line, of the same kind as the domain
    tokenizers/<name>

Knows files; no model and no mixture.
"""

import gzip
import json
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynmix import Task
from dynmix.mixture.prepare import prepare
from dynmix.tasks import Record

Half = Literal["measured", "judged"]
"""The even examples of a task, which mixers see, or the odd ones, which only the evaluation does."""


class Corpus:
    """A corpus and the folder in which its stores are kept.

    Args:
        root: the corpus.
        cache: for the token stores, made when they are first asked for.
        tokenizer: name of one in `root/tokenizers`, or a path or hub name.
        length: tokens of a sequence.
        without: domains that are not trained on.
    """

    def __init__(
        self, root: Path, cache: Path, tokenizer: str = "bpe4096", length: int = 128, without: Collection[str] = ()
    ) -> None:
        own = root / "tokenizers" / tokenizer
        self.root, self.cache, self.length = root, cache, length
        self.tokenizer_name = str(own) if own.exists() else tokenizer
        found = {path.name.removesuffix(".jsonl.gz") for path in (root / "domains").glob("*.jsonl.gz")}
        if not found:
            raise SystemExit(f"{root}/domains has no .jsonl.gz: give a corpus with --corpus")
        if unknown := sorted({*without} - found):
            raise SystemExit(f"{unknown} are no domains of {root}, which has {sorted(found)}")
        self.domains = sorted(found - {*without})
        self.tasks = sorted(path.stem for path in (root / "tasks").glob("*.jsonl"))
        self.texts = sorted(path.name.removesuffix(".valid.jsonl.gz") for path in root.glob("tasks/*.valid.jsonl.gz"))

    @property
    def facts(self) -> dict[str, int]:
        """File -> bytes, of all that is read: what tells two corpora apart, wherever they are."""
        files = [
            *(f"domains/{name}.jsonl.gz" for name in self.domains),
            *(f"tasks/{name}.jsonl" for name in self.tasks),
        ]
        return {name: (self.root / name).stat().st_size for name in files}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.tokenizer_name)
        return tokenizer

    @cached_property
    def stores(self) -> dict[str, Path]:
        """Domain -> token store."""
        folder = self.cache / "stores"
        if missing := [name for name in self.domains if not (folder / f"{name}.idx").exists()]:
            files = {name: self.root / f"domains/{name}.jsonl.gz" for name in missing}
            prepare(files, folder, self.tokenizer_name, workers=1)
        return {name: folder / name for name in self.domains}

    def task(self, name: str, half: Half, limit: int, *, choices: bool = True) -> Task:
        """Up to `limit` examples of a half of a task, evenly spread over it.

        Without `choices` there is no accuracy, and an evaluation reads the gold texts alone: half of them, or less.
        """
        whole = Task.from_jsonl(self.root / f"tasks/{name}.jsonl", self.tokenizer, max_length=self.length)
        records = whole.records[half == "judged" :: 2]
        count = min(limit, len(records))
        chosen = [records[i * len(records) // count] for i in range(count)]
        if not choices:
            chosen = [replace(record, choices=()) for record in chosen]
        return Task(name, chosen, self.tokenizer, max_length=self.length)

    def text(self, domain: str, characters: int) -> Task:
        """Held-out text of a domain: the beginnings of all its documents, so many characters together."""
        path = self.root / f"tasks/{domain}.valid.jsonl.gz"
        with gzip.open(path, "rt") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        share = max(1, characters // len(texts))
        records = [Record(str(path), "", text[:share]) for text in texts if text[:share].strip()]
        return Task(domain, records, self.tokenizer, max_length=self.length)
