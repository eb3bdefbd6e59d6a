import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tokenize
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest

from dynmix.demo import corpus as corpus_module
from dynmix.demo.corpus import Corpus, build_corpus, train_tokenizer

TASKS = {"code", "docs", "reference", "arithmetic"}
CAPS = {"code": 2e6, "docs": 2e6, "unicode_names": 0.71e6, "arithmetic": 0.71e6, "noise": 0.71e6}


def size(documents: list[str]) -> int:
    return sum(len(d.encode()) for d in documents)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus()


def test_domains_tasks_and_sizes(corpus: Corpus) -> None:
    if not Path(sysconfig.get_path("stdlib"), "argparse.py").exists():
        pytest.skip("this Python has no library sources")
    assert set(corpus.domains) == {*TASKS, "capi_docs", "unicode_names", "noise"}
    assert set(corpus.tasks) == TASKS
    for name, documents in corpus.domains.items():
        held_out = corpus.tasks.get(name, [])
        assert 100_000 < size(documents) + size(held_out) <= CAPS.get(name, 2e6), name
        for d in documents + held_out:
            assert d.strip()
            assert len(d.encode()) <= 4096
    assert all(20_000 < size(d) < 500_000 for d in corpus.tasks.values())


def test_held_out_documents_are_in_no_domain_and_documents_are_there_once(corpus: Corpus) -> None:
    held_out = {d for documents in corpus.tasks.values() for d in documents}
    trained = [d for documents in corpus.domains.values() for d in documents]
    assert not held_out.intersection(trained)
    assert len(set(trained)) == len(trained)


def test_held_out_problems_and_long_paragraphs_of_the_reference_are_in_no_domain(corpus: Corpus) -> None:
    """Documents could differ and still share their contents."""
    for name in ("arithmetic", "reference"):
        trained = {p for d in corpus.domains[name] for p in d.strip().split("\n\n")}
        held_out = [p for d in corpus.tasks[name] for p in d.strip().split("\n\n")]
        shared = [p for p in held_out if p in trained and (name == "arithmetic" or len(p) >= 60)]
        # A problem or paragraph that a document's end cuts in two may leave a part by itself.
        assert len(shared) <= len(held_out) // 100, shared


def test_another_process_makes_the_same_corpus_and_imports_nothing_with_effects(corpus: Corpus) -> None:
    program = (
        "import json, sys, dynmix.demo.corpus as c; old = set(sys.modules); k = c.build_corpus();"
        "new = sorted(set(sys.modules) - old); t = c.train_tokenizer(k.domains['reference'], 400);"
        "print(json.dumps([k, new, t.get_vocab()]))"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=env)
    (domains, tasks), imported, vocabulary = json.loads(run.stdout)
    assert vocabulary == train_tokenizer(corpus.domains["reference"], 400).get_vocab()
    assert tasks == corpus.tasks
    fixed = set(corpus.domains) - {"capi_docs", "noise"}  # test tools patch builtins, which these two show
    assert {n: domains[n] for n in fixed} == {n: corpus.domains[n] for n in fixed}
    assert abs(size(domains["capi_docs"]) - size(corpus.domains["capi_docs"])) < 10_000

    tops = {name.split(".")[0] for name in imported}
    assert not tops & {"antigravity", "this", "idlelib", "turtle", "tkinter", "_tkinter", "readline", "_curses", "test"}
    assert tops <= sys.stdlib_module_names | {"pydoc_data"} | {t for t in tops if t.startswith("_sysconfigdata")}
    assert run.stderr == b""


SOURCE = '''#!/usr/bin/env python
"""Module's text
    over lines."""
import os  # an inline comment here

# a comment of
# two lines

def f(x="# no comment"):
    """A function's text."""
    y = """not a docstring"""
    return x  # short one


class C:
    r"""A class with \\d in its text."""

    a = 1
    "An attribute's own text."

    def g(self): "One line text."
'''


def test_code_and_prose_are_separated() -> None:
    code, prose = corpus_module._separate(SOURCE)
    assert prose == [
        "Module's text\nover lines.",
        "an inline comment here",
        "a comment of\ntwo lines",
        "A function's text.",
        "A class with \\d in its text.",
        "An attribute's own text.",
    ]
    assert code.split("\n") == [
        "import os",
        *["", ""],
        'def f(x="# no comment"):',
        '    y = """not a docstring"""',
        "    return x",
        *["", ""],
        "class C:",
        "",
        "    a = 1",
        "",
        '    def g(self): "One line text."',
        "",
    ]


def test_code_without_prose_still_means_the_same() -> None:
    path = Path(sysconfig.get_path("stdlib"), "textwrap.py")
    if not path.exists():
        pytest.skip("this Python has no library sources")
    source = path.read_text()

    def meaning(text: str) -> str:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [  # type: ignore[attr-defined]
                    s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                ]
        return ast.dump(tree)

    code, _ = corpus_module._separate(source)
    assert all(t.type != tokenize.COMMENT for t in tokenize.generate_tokens(StringIO(code).readline))
    assert meaning(code) == meaning(source)


def test_pieces_lose_nothing_and_end_at_lines() -> None:
    text = "\n".join(f"line {i} é" for i in range(3000)) + "\n" + "世" * 5000 + "\nlast\n"
    pieces = corpus_module._pieces([text])
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(len(p.encode()) <= 4096 for p in pieces)
    assert all(p.startswith("line") and p.endswith("é\n") for p in pieces[:5])
    assert corpus_module._pieces(["", "\n"]) == []


def test_without_sources_or_topics_the_rest_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    bare = build_corpus(tmp_path)
    assert set(bare.domains) == {"docs", "capi_docs", "unicode_names", "arithmetic", "noise"}
    assert set(bare.tasks) == {"docs", "arithmetic"}
    assert size(bare.domains["docs"]) > 200_000


def test_noise_is_words_of_every_domain_out_of_order(corpus: Corpus) -> None:
    noise = " ".join(corpus.domains["noise"]).split()
    others = {n: {w for d in documents for w in d.split()} for n, documents in corpus.domains.items() if n != "noise"}
    assert sum(any(w in words for words in others.values()) for w in noise) / len(noise) > 0.99
    for name, words in others.items():
        own = words.difference(*(w for n, w in others.items() if n != name))
        assert sum(w in own for w in noise) > 100, name
    pairs = {p for d in corpus.domains["code"] for p in pairwise(d.split())}
    assert sum(p in pairs for p in pairwise(noise)) / len(noise) < 0.1


def test_worked_results_are_right(corpus: Corpus) -> None:
    text = "\n".join(line for line in "".join(corpus.tasks["arithmetic"]).split("\n") if "Solve" not in line)
    chains = [c.replace("x", "*").split("=") for c in re.findall(r"\d[\d x+/=-]*\d", text) if "=" in c]
    assert len(chains) > 500
    for chain in chains:
        assert len({eval(part) for part in chain}) == 1, chain


def test_tokenizer_round_trips_and_its_end_is_id_0(corpus: Corpus) -> None:
    texts = [d for name in ("reference", "unicode_names") for d in corpus.domains[name][:30]]
    tokenizer = train_tokenizer(texts, vocab_size=600)
    assert len(tokenizer) == 600
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    for text in (texts[0], "Grüße, 世界\n\t\x00"):
        ids = tokenizer(text)["input_ids"]
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer(texts[0])["input_ids"]) < 0.7 * len(texts[0].encode())
    with pytest.raises(ValueError, match="vocab_size=256"):
        train_tokenizer(texts, vocab_size=256)
