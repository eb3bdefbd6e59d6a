"""The default corpus: seven domains and four held-out tasks made from the Python installation, with no download.

The text is a function of the installation alone, and differs between Python versions. Files are read under the standard
library's folder only; pure-Python modules are tokenised as text, not imported. This module must not know of stores or
models.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import random
import re
import sys
import sysconfig
import tokenize
import unicodedata
import warnings
from ast import literal_eval
from collections.abc import Iterable, Iterator
from importlib.machinery import ExtensionFileLoader, PathFinder
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

_DOCUMENT_BYTES = 4096
_CAPS = {"code": 2_000_000, "docs": 2_000_000, "unicode_names": 700_000, "arithmetic": 700_000, "noise": 700_000}
_HELD_OUT_EVERY = {"code": 10, "docs": 10, "reference": 6, "arithmetic": 10}  # every n-th source is the task's

# Tests, packages that are no part of the library, text that is the `reference` domain, and character tables.
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "pydoc_data", "encodings",
}  # fmt: skip
_SKIPPED_MODULES = {"_tkinter", "readline", "_curses", "_curses_panel", "nis"}  # they open a display, terminal, network
_LAYOUT = {tokenize.NL, tokenize.COMMENT}
_LINE_START = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}

# What `docs` is made of where there are no sources: modules whose import has no effect.
_DOCUMENTED_MODULES = """
argparse collections contextlib csv dataclasses datetime decimal difflib email.message enum fractions ftplib functools
heapq html.parser http.client http.cookiejar inspect ipaddress json logging mailbox mimetypes optparse os pathlib pickle
platform random re selectors shutil smtplib socket statistics string subprocess tarfile tempfile textwrap threading
traceback unittest.case unittest.mock urllib.request uuid weakref zipfile
""".split()  # noqa: SIM905

_Source = list[str]  # documents of one origin (a file, a topic), which stay on one side of the split


class Corpus(NamedTuple):
    """Documents by domain, to train on, and by task, held out: no source of one is in the other."""

    domains: dict[str, list[str]]
    tasks: dict[str, list[str]]


def build_corpus(stdlib: Path | None = None) -> Corpus:
    """Build the corpus from the standard library in `stdlib` (this interpreter's own if None); takes a few seconds.

    Domains: `code`, `docs` (docstrings and comments), `reference` (the language reference in `pydoc`), `capi_docs`
    (C modules), `unicode_names`, `arithmetic` (generated), `noise` (shuffled words of the others, the control). Tasks:
    the held-out parts of `code`, `docs`, `reference` and `arithmetic`. Documents have up to 4096 bytes. Without sources
    there is no `code` and `docs` are those of imported modules; without `pydoc_data` there is no `reference`.
    """
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    code, docs = _read_sources(root, seen)
    if not code:
        _log.warning("no library sources in %s: no domain `code`, and `docs` from imported modules", root)
        docs = [_pieces(_module_docs(importlib.import_module(m), seen)) for m in _DOCUMENTED_MODULES]
    sources = {
        "code": code,
        "docs": docs,
        "reference": _reference(seen),
        "capi_docs": [_pieces(_module_docs(m, seen)) for m in _c_modules()],
        "unicode_names": [_pieces(_unicode_names())],
        "arithmetic": _arithmetic(),
    }
    corpus = Corpus({}, {})
    for name, parts in sources.items():
        every = _HELD_OUT_EVERY.get(name, 0)
        task = dict.fromkeys(d for part in parts[every - 1 :: every] for d in part) if every else {}
        domain = dict.fromkeys(d for part in parts for d in part if d not in task)
        if domain:
            corpus.domains[name] = list(domain)
        if task:
            corpus.tasks[name] = list(task)
    corpus.domains["noise"] = _noise(corpus.domains.values())
    return corpus


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` ids; id 0 is `<|endoftext|>` (BOS, EOS and padding).

    Raises:
        ValueError: `vocab_size` is below 257, the bytes and the special token.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: want at least 257, the 256 bytes and <|endoftext|>")
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    )


def _read_sources(root: Path, seen: set[str]) -> tuple[list[_Source], list[_Source]]:
    """Code and prose of the library's files, up to the caps; the files in a fixed shuffled order, to take all over."""
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        files += (Path(folder, n) for n in sorted(names) if n.endswith(".py"))
    random.Random("files").shuffle(files)
    room = {"code": _CAPS["code"], "docs": _CAPS["docs"]}
    found: dict[str, list[_Source]] = {"code": [], "docs": []}
    for path in files:
        if max(room.values()) <= 0:
            break
        if path.name.startswith("_sysconfigdata"):  # a table of this machine's build
            continue
        try:
            with tokenize.open(path) as file:
                code, prose = _separate(file.read())
        except (OSError, SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue  # the library also keeps files that are wrong on purpose
        for name, texts in (("code", [code]), ("docs", _unseen(prose, seen))):
            pieces = _pieces(texts)
            found[name].append(_within(pieces, room[name]))
            room[name] -= sum(len(piece.encode()) for piece in pieces)
    return found["code"], found["docs"]


def _separate(source: str) -> tuple[str, list[str]]:
    """Source text without docstrings and comments, and those, in order; neighbouring comment lines are one text."""
    lines = io.StringIO(source).readlines()
    tokens = list(tokenize.generate_tokens(iter([*lines, ""]).__next__))
    prose: list[str] = []
    before, comment_row = tokenize.NEWLINE, -1
    for token, after in zip(tokens, [*tokens[1:], tokens[-1]], strict=True):
        (row, column), (end_row, end_column) = token.start, token.end
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#!:").removeprefix(" ").rstrip()
            if row == comment_row + 1:
                prose[-1] += "\n" + text
            else:
                prose.append(text)
            comment_row = row
            code = lines[row - 1][:column].rstrip()
            lines[row - 1] = code + "\n" if code else ""
        elif token.type == tokenize.STRING and before in _LINE_START and after.type == tokenize.NEWLINE:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes
                value = literal_eval(token.string)
            if isinstance(value, str):
                prose.append(inspect.cleandoc(value))
            code = (lines[row - 1][:column] + lines[end_row - 1][end_column:]).rstrip()
            lines[row - 1 : end_row] = [code + "\n" if code else ""] + [""] * (end_row - row)
        if token.type not in _LAYOUT:
            before = token.type
    return re.sub(r"\n{4,}", "\n\n\n", "".join(lines)), [p for p in prose if len(p.split()) > 2]


def _reference(seen: set[str]) -> list[_Source]:
    """The topics of `pydoc`, whose texts overlap: a paragraph stays where it comes first, the long topics last."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        _log.warning("no pydoc_data in this Python: no domain `reference`")
        return []
    ordered = sorted(topics.values(), key=lambda text: (len(text), text))
    sources = [_pieces(_unseen(inspect.cleandoc(text).split("\n\n"), seen)) for text in ordered]
    return [s for s in sources if s]


def _c_modules() -> Iterator[ModuleType]:
    """Built-in and extension modules of the standard library; the library's own test modules are not in its list."""
    folders = [str(Path(sysconfig.get_path("stdlib"), "lib-dynload")), str(Path(sys.base_prefix, "DLLs"))]
    for name in sorted(sys.stdlib_module_names - _SKIPPED_MODULES):
        # Looked for in these folders alone: the general search runs the hooks of whatever else is installed.
        spec = None if name in sys.builtin_module_names else PathFinder.find_spec(name, folders)
        if name in sys.builtin_module_names or (spec and isinstance(spec.loader, ExtensionFileLoader)):
            with warnings.catch_warnings(), contextlib.suppress(ImportError):  # one whose C library is missing
                warnings.simplefilter("ignore")  # some are deprecated
                yield importlib.import_module(name)


def _module_docs(module: ModuleType, seen: set[str]) -> list[str]:
    """Docstrings of a module, its functions, classes and their members, each under its name and signature."""
    entries: list[tuple[str, object]] = [(module.__name__, module)]
    for name, value in sorted(vars(module).items()):
        if isinstance(value, type | BuiltinFunctionType | FunctionType):
            entries.append((f"{module.__name__}.{name}", value))
        if isinstance(value, type):
            entries += [(f"{module.__name__}.{name}.{n}", v) for n, v in sorted(vars(value).items()) if callable(v)]
    found = []
    for name, value in entries:
        doc = getattr(value, "__doc__", None)
        if isinstance(doc, str) and (text := inspect.cleandoc(doc)) and text not in seen:
            seen.add(text)
            signature = getattr(value, "__text_signature__", None) or ""
            found.append(f"{name}{signature}\n" + "\n".join(f"    {line}".rstrip() for line in text.split("\n")))
    return found


def _unicode_names() -> list[str]:
    """Named characters in order, from the first to the cap; ideographs and syllables have no names but numbers."""
    room, lines = _CAPS["unicode_names"], []
    for point in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(point), "")
        if name and not name.startswith(("CJK ", "HANGUL SYLLABLE", "TANGUT IDEO", "NUSHU CHAR", "KHITAN SMALL")):
            lines.append(f"U+{point:04X} {name}")
            room -= len(lines[-1]) + 1
            if room <= 0:
                break
    return ["\n".join(lines)]


def _arithmetic() -> list[_Source]:
    """Generated problems with worked results, none of them twice; a document is a source."""
    rng = random.Random("arithmetic")
    problems: dict[str, None] = {}
    room = _CAPS["arithmetic"]
    while room > 0:
        problem = _problem(rng)
        if problem not in problems:
            problems[problem] = None
            room -= len(problem) + 2
    return [[document] for document in _pieces(problems)]


def _problem(rng: random.Random) -> str:
    a, b, c = rng.randint(12, 999), rng.randint(3, 99), rng.randint(2, 12)
    name, other = rng.sample(["Ada", "Ben", "Chen", "Dora", "Emil", "Fatma", "Goro", "Hana", "Igor", "Jun"], 2)
    thing = rng.choice(["apples", "books", "coins", "stamps", "marbles", "pencils", "tickets", "shells"])
    tens, ones = divmod(b, 10)
    choices = (
        f"{a} + {b} = {a + b}, and {a + b} - {c} = {a + b - c}.",
        f"{a} x {b} = {a} x {tens * 10} + {a} x {ones} = {a * tens * 10} + {a * ones} = {a * b}.",
        f"{a} divided by {c} is {a // c} with remainder {a % c}, because {c} x {a // c} + {a % c} = {a}.",
        f"{b}% of {a * 100} is {b} x {a * 100} / 100 = {a * b}.",
        f"Solve {c} x + {b} = {c * a + b}. Then {c} x = {c * a}, so x = {a}.",
        f"{name} has {a} {thing} and buys {c} boxes of {b} {thing} each. That is {c} x {b} = {b * c} more, "
        f"so {name} has {a} + {b * c} = {a + b * c} {thing}.",
        f"{name} shares {b * c} {thing} among {c} friends. Each one gets {b * c} / {c} = {b} {thing}.",
        f"{name} has {a} {thing} and {other} has {b} more. {other} has {a} + {b} = {a + b}, "
        f"and together they have {a} + {a + b} = {2 * a + b} {thing}.",
        f"A ticket costs {b} coins. For {c} tickets {name} pays {c} x {b} = {b * c} coins, "
        f"and gets {b * c + a} - {b * c} = {a} coins back from {b * c + a}.",
        f"The sequence {a}, {a + c}, {a + 2 * c}, {a + 3 * c} grows by {c} each time; the next is {a + 4 * c}.",
    )
    return rng.choice(choices)


def _noise(domains: Iterable[list[str]]) -> list[str]:
    """Words of all domains, as much of each, in random order."""
    rng = random.Random("noise")
    pools = list(domains)
    words: list[str] = []
    for documents in pools:
        room = _CAPS["noise"] // len(pools)
        for document in rng.sample(documents, len(documents)):
            words += document.split()
            room -= len(document.encode())
            if room <= 0:
                break
    rng.shuffle(words)
    lines = (" ".join(words[i : i + 12]) for i in range(0, len(words), 12))
    return _within(_pieces(["\n".join(lines)]), _CAPS["noise"])


def _pieces(texts: Iterable[str]) -> list[str]:
    """`texts` joined by blank lines, then cut at line ends into documents of up to `_DOCUMENT_BYTES`."""
    pieces: list[str] = []
    part: list[str] = []
    size, width = 0, _DOCUMENT_BYTES // 4  # so many characters fit: each has at most 4 bytes
    for line in "\n\n".join(texts).splitlines(keepends=True):
        for cut in (line[i : i + width] for i in range(0, len(line), width)):
            length = len(cut.encode())
            if size + length >= _DOCUMENT_BYTES:  # a byte is for the last line's end
                pieces.append("".join(part))
                part, size = [], 0
            part.append(cut)
            size += length
    pieces.append("".join(part))
    return [p.strip("\n") + "\n" for p in pieces if p.strip()]


def _within(documents: list[str], room: int) -> list[str]:
    kept = []
    for document in documents:
        room -= len(document.encode())
        if room < 0:
            break
        kept.append(document)
    return kept


def _unseen(texts: Iterable[str], seen: set[str]) -> list[str]:
    """The texts that are not in `seen`, and adds them; short ones (headings) always stay."""
    kept = []
    for text in texts:
        if len(text) < 60 or text not in seen:
            kept.append(text)
            seen.add(text)
    return kept
