"""A corpus folder as the benchmarks use it: domains as token stores, tasks and held-out text as evaluations.

    domains/<domain>.jsonl.gz       {"text"} a line: what is trained on; or a token store, <domain>.bin and .idx
    tasks/<task>.jsonl              {"context", "gold", "choices"} a line, two at least
    tasks/<domain>.valid.jsonl.gz   {"text"} a line, of the same kind as the domain
    tokenizers/<name>

Knows files; no model and no mixture.
"""

import hashlib
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynmix import Task, TokenStore
from dynmix.mixture.prepare import prepare
from dynmix.task_records import Record, read_records

Half = Literal["measured", "judged"]
"""The even examples of a task, which mixers see, or the odd ones, which only the evaluation does."""


class Corpus:
    """A corpus and the folder in which its stores are kept.

    Args:
        root: the corpus.
        cache: for the token stores, made when they are first asked for.
        tokenizer: name of one in `root/tokenizers`, or a path or hub name; None: the only one there, or `bpe4096`.
        length: tokens of a sequence.
        without: domains that are not trained on.
    """

    def __init__(
        self, root: Path, cache: Path, tokenizer: str | None = None, length: int = 128, without: Collection[str] = ()
    ) -> None:
        self.root, self.cache, self.length = root, cache, length
        others = [
            *root.glob("domains/*.jsonl"),
            *root.glob("tasks/*.valid.jsonl"),
            *(path for path in root.glob("tasks/*.jsonl.gz") if not path.name.endswith(".valid.jsonl.gz")),
        ]
        if others:  # left out, or a task whose examples are held-out text, they would change what is compared
            raise SystemExit(
                f"{root} has {sorted(path.name for path in others)}: texts are read from <domain>.jsonl.gz and "
                "<domain>.valid.jsonl.gz, tasks from <task>.jsonl"
            )
        texts = {path.name.removesuffix(".jsonl.gz") for path in (root / "domains").glob("*.jsonl.gz")}
        given = {path.stem for path in (root / "domains").glob("*.idx")}
        if both := sorted(texts & given):
            raise SystemExit(f"{root}/domains has {both} as text and as token stores: keep one of the two")
        found = texts | given
        if not found:
            raise SystemExit(f"{root}/domains has no .jsonl.gz and no token store: give a corpus with --corpus")
        if unknown := sorted({*without} - found):
            raise SystemExit(
                f"{unknown} are no domains of {root}, which has {sorted(found)}: name others with --unseen-domains, "
                '"" for none'
            )
        there = sorted(path.name for path in (root / "tokenizers").glob("*/"))
        name = tokenizer or (there[0] if len(there) == 1 else "bpe4096")
        if tokenizer is None and name not in there:
            raise SystemExit(f"{root}/tokenizers has {there}: put one tokenizer's folder there, or call it bpe4096")
        self.tokenizer_name = str(root / "tokenizers" / name) if name in there else name
        self.domains = sorted(found - {*without})
        self._given = {name: root / "domains" / name for name in self.domains if name in given}
        if len(self.domains) < 2:
            raise SystemExit(
                f"{root} has {self.domains} to train on, of {sorted(found)}: two at least, or there is nothing to mix; "
                "leave some out of --unseen-domains"
            )
        self.tasks = sorted(path.stem for path in (root / "tasks").glob("*.jsonl"))
        self.texts = sorted(path.name.removesuffix(".valid.jsonl.gz") for path in root.glob("tasks/*.valid.jsonl.gz"))

    @cached_property
    def facts(self) -> dict[str, str]:
        """File -> hash of its content, of all that is read: what tells two corpora apart, wherever they are."""
        names = [
            *(f"domains/{name}.jsonl.gz" for name in self.domains if name not in self._given),
            *(f"domains/{name}.{part}" for name in self._given for part in ("idx", "bin")),
            *(f"tasks/{name}.jsonl" for name in self.tasks),
            *(f"tasks/{name}.valid.jsonl.gz" for name in self.texts),
        ]
        tokenizer = Path(self.tokenizer_name)
        files = {name: self.root / name for name in names}
        files |= {f"tokenizer/{path.name}": path for path in sorted(tokenizer.glob("*")) if path.is_file()}
        found = {}
        for name, path in files.items():
            with open(path, "rb") as file:
                found[name] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
        return found if tokenizer.is_dir() else found | {"tokenizer": self.tokenizer_name}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.tokenizer_name)
        return tokenizer

    @cached_property
    def stores(self) -> dict[str, Path]:
        """Domain -> token store; of a text, named by the domain and by what it was made of: another corpus has others.

        Raises ValueError for text that cannot be read, and a store that is none of the tokenizer's.
        """
        for path in self._given.values():
            if (largest := int(TokenStore.open(path).tokens.max())) >= (size := len(self.tokenizer)):
                raise ValueError(f"{path} has token {largest}, the tokenizer {size} tokens: it was made with another")
        folder = self.cache / "stores"
        tokenizer = [item for item in self.facts.items() if item[0].startswith("tokenizer")]
        texts = [name for name in self.domains if name not in self._given]
        made = {name: repr((self.facts[f"domains/{name}.jsonl.gz"], tokenizer)) for name in texts}
        stores = {
            name: f"{name}-{hashlib.blake2b(of.encode(), digest_size=4).hexdigest()}" for name, of in made.items()
        }
        if missing := [name for name in texts if not (folder / f"{stores[name]}.idx").exists()]:
            files = {stores[name]: self.root / f"domains/{name}.jsonl.gz" for name in missing}
            prepare(files, folder, self.tokenizer_name, workers=1)
        return {name: self._given.get(name) or folder / stores[name] for name in self.domains}

    def task(self, name: str, half: Half, limit: int, *, choices: bool = True) -> Task:
        """Up to `limit` examples of a half of a task, evenly spread over it.

        Without `choices` there is no accuracy, and an evaluation reads the gold texts alone: half of them, or less.
        """
        whole = Task.from_jsonl(self.root / f"tasks/{name}.jsonl", self.tokenizer, max_length=self.length)
        records = whole.records[half == "judged" :: 2]
        if not records:
            raise ValueError(f"{self.root}/tasks/{name}.jsonl has one example: two at least, as every other one judges")
        count = min(limit, len(records))
        chosen = [records[i * len(records) // count] for i in range(count)]
        if not choices:
            chosen = [replace(record, choices=()) for record in chosen]
        return Task(name, chosen, self.tokenizer, max_length=self.length)

    def text(self, domain: str, characters: int) -> Task:
        """Held-out text of a domain: the beginnings of all its documents, so many characters together."""
        documents, share = self._held_out(domain, characters)
        records = [replace(d, gold=d.gold[:share]) for d in documents if d.gold[:share].strip()]
        return Task(domain, records, self.tokenizer, max_length=self.length)

    def rest_of_a_document(self, domains: Collection[str], characters: int) -> Task:
        """A single held-out document of the first of these domains that has any, without what `text` takes of it."""
        for domain in domains:
            if domain in self.texts:
                documents, share = self._held_out(domain, characters)
                if rests := [replace(d, gold=d.gold[share:]) for d in documents if d.gold[share:].strip()]:
                    return Task("one-document", rests[:1], self.tokenizer, max_length=self.length)
        raise ValueError(
            f"{self.root}/tasks has no .valid.jsonl.gz of a document that is longer than what judges, for the task "
            "one-document: put one there, or leave out what asks for it (`sweep --which` without traps)"
        )

    def _held_out(self, domain: str, characters: int) -> tuple[list[Record], int]:
        """All held-out documents of a domain, and how much of each makes so many characters together."""
        path = self.root / f"tasks/{domain}.valid.jsonl.gz"
        documents = read_records(path)
        if not documents:
            raise ValueError(f"{path} has no document: put some there, or remove it")
        return documents, max(1, characters // len(documents))
