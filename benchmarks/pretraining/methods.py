"""The methods by name, and what each does before and during a run.

A name may have options: `tikmix-d[curvature=KFAC:1,stages=8]`; `start` is the static mixer of its first stage, what
it spends on mixing is not taken from its budget with `free=yes`, `share=0.5` gives it half of that budget, and with
`epochs=4` no text is read more than four times, near-duplicates among them.
`hindsight` is a control (`hindsight.py`). Knows the package's mixers as any user does, and a bench; runs no target
model.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynmix import Layers, MixtureDataset, Task
from dynmix.batches import as_batches
from dynmix.mixers.base import Run
from dynmix.mixers.registry import make_mixer
from dynmix.mixture.distinct import distinct_epochs
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.store import TokenStore
from dynmix.mixture.view import RowView

from .corpus import Corpus
from .criteria import Split
from .hindsight import HINDSIGHT
from .settings import Budget
from .training import Training
from .windows import BLOCKS, curvature_maker

STATIC = ("natural", "uniform", "temperature", "unimax")
BY_LOSS = ("odm", "ado", "loss-proportional")
BY_PROXIES = ("doremi", "doge", "regmix", "mde")
BY_INFLUENCE = ("tikmix-d", "tikmix-m")
# At beta = 1 the entropy holds the mixture near an even one; at 2 the tasks decide more of it, as RegMix lets them.
TIKMIX = (
    "tikmix-d", "tikmix-d[start=unimax]", "tikmix-d[start=unimax,epochs=4]",
    "tikmix-d[start=unimax,beta=2]", "tikmix-d[start=unimax,beta=2,epochs=4]",
    "tikmix-m", "tikmix-m[start=unimax]", "tikmix-m[start=unimax,epochs=4]",
)  # fmt: skip
METHODS = (*STATIC, "odm", *BY_PROXIES, *TIKMIX, "automixer")

# Of methods that read no task: the journal has the tasks' losses once, and that is no cost of theirs.
NO_TASKS: dict[str, Any] = {"task_sequences": 1}
LAYERS = {"all": None, "blocks": BLOCKS, "embeddings": Layers(embeddings=True), "norms": Layers(norms=True)}
NUMBERS = ("alpha", "beta", "gamma", "confidence", "max_change", "guard_slack", "guard_weight", "memory", "lower")
COUNTS = {"stages": 2, "max_stages": 2, "probes": 1, "examples": 1}  # and the least that each may be
WORDS: dict[str, Collection[str]] = {
    "layers": LAYERS, "tasks": ("all", "rot13", "one-document"), "guards": ("domains", "none"), "start": STATIC,
    "free": ("yes",), "against": ("stage", "run"),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A method and its options."""

    name: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Method":
        """Read `name` or `name[key=value,...]`."""
        match = re.fullmatch(r"([a-z-]+)(?:\[([\w=.,:+-]+)\])?", text)
        known = (*STATIC, *BY_LOSS, *BY_PROXIES, *BY_INFLUENCE, "automixer", HINDSIGHT)
        if match is None or match[1] not in known:
            raise SystemExit(f"no method {text!r}: there are {', '.join(known)}, and name[key=value,...]")
        parts = [part.partition("=") for part in match[2].split(",")] if match[2] else []
        options = {key: value for key, _, value in parts}
        taken = _options_of(match[1])
        if len(options) < len(parts):
            raise SystemExit(f"{text}: an option is given twice")
        if unknown := sorted(set(options) - set(taken)):
            raise SystemExit(f"{text}: no option {unknown[0]!r}; {match[1]} takes {', '.join(sorted(taken))}")
        try:
            _check_options(options)
        except ValueError as problem:
            raise SystemExit(f"{text}: {problem}") from None
        return cls(match[1], options)


def _options_of(name: str) -> Collection[str]:
    """Options that make a difference to a method."""
    if name in BY_INFLUENCE:
        return {*NUMBERS, *COUNTS, *WORDS, "curvature", "share", "epochs"}
    if name == "automixer":
        return ("stages", "probes", "examples", "tasks", "start", "free", "share")
    return ("start", "free", "share", "epochs") if name in BY_LOSS else ("share", "epochs")


def _check_options(options: Mapping[str, str]) -> None:
    """Raise ValueError for a value that no run could have: now, and not when its turn comes after hours of others."""
    for key, value in options.items():
        if key in COUNTS and not (value.isdecimal() and int(value) >= COUNTS[key]):
            raise ValueError(f"{key}={value}: a whole number of at least {COUNTS[key]}")
        if key in WORDS and value not in WORDS[key]:
            raise ValueError(f"{key}={value}: one of {', '.join(WORDS[key])}")
        if key in (*NUMBERS, "share", "epochs") and not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value):
            raise ValueError(f"{key}={value}: a number")
    for key in ("share", "epochs"):
        if float(options.get(key, 1)) <= 0:
            raise ValueError(f"{key}={options[key]}: above 0")
    if "curvature" in options:
        curvature_maker(options["curvature"])
    make_mixer({"name": "tikmix-d", **_of_the_mixer(options)})


def _of_the_mixer(options: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of TiKMiX-D."""
    asked: dict[str, Any] = {key: float(options[key]) for key in NUMBERS if key in options}
    return asked | {key: options[key] for key in ("against",) if key in options}


@dataclass(frozen=True)
class Bench:
    """What all cells of a budget have in common."""

    corpus: Corpus
    split: Split
    budget: Budget
    device: str

    def task(self, name: str) -> Task:
        """A task as mixers see it."""
        return self.corpus.task(name, "measured", self.budget.examples)

    @property
    def tasks(self) -> dict[str, Task]:
        """Those that are optimised."""
        return {name: self.task(name) for name in self.split.optimised}

    @property
    def tokens(self) -> dict[str, int]:
        """Of each domain."""
        return {name: len(TokenStore.open(path).tokens) for name, path in self.corpus.stores.items()}


def static_weights(bench: Bench, name: str, steps: int) -> dict[str, float]:
    """Weights of a static mixer."""
    size, tokens = bench.budget.size, bench.tokens
    natural = {domain: count / sum(tokens.values()) for domain, count in tokens.items()}
    weights = make_mixer(name).start(Run(tokens, steps * size.step_tokens, natural))
    assert weights is not None
    return dict(weights)


def domains_of(bench: Bench, method: Method, steps: int) -> Mapping[str, Any]:
    """The data of a run: the stores, and for AutoMixer an even sample of them, as large as can be scored."""
    if method.name != "automixer":
        return bench.corpus.stores
    size = bench.budget.size
    parts = {name: PackedSequences(TokenStore.open(path), size.length) for name, path in bench.corpus.stores.items()}
    share = min(1.0, bench.budget.pool * steps * size.batch / sum(map(len, parts.values())))
    views = {}
    for name, rows in parts.items():
        chosen = np.unique(np.linspace(0, len(rows) - 1, max(2, round(share * len(rows)))).astype(np.int64))
        views[name] = RowView([rows], np.zeros(len(chosen), np.int64), chosen)
    return views


def hook_options(bench: Bench, method: Method, training: Training, folder: Path, steps: int) -> dict[str, Any] | None:
    """Arguments of `MixtureHook` beside model and dataset; None for a mixture that stays."""
    name, options, budget = method.name, method.options, bench.budget
    common: dict[str, Any] = {
        "tasks": tasks_of(bench, options.get("tasks", "all")),
        "batch_size": budget.size.batch,
        "max_steps": steps,
        "output": folder,
        "micro_batch": 16,
        "keep": 0,
        "loss_every": 10**9,
    }
    if name in BY_LOSS:
        return common | {"mixer": name, "stage_steps": budget.loss_steps, **NO_TASKS}
    common |= {
        "stage_steps": max(2, steps // int(options.get("stages", budget.stages))),
        "probe_sequences": int(options.get("probes", budget.probe_sequences)),
        "task_sequences": int(options.get("examples", budget.task_sequences)),
        "curvature_sequences": budget.curvature_sequences,
    }
    if name == "automixer":
        return common | {"mixer": name}
    if name not in BY_INFLUENCE:
        return None
    asked = {"confidence": budget.confidence, **_of_the_mixer(options)}
    mixer: dict[str, Any] = {"name": name, **({"direct": asked} if name == "tikmix-m" else asked)}
    most = options.get("max_stages", budget.max_stages)
    return common | {
        "mixer": mixer,
        "max_stages": None if most is None else int(most),
        "curvature": curvature_maker(options.get("curvature", budget.curvature))(training),
        "layers": LAYERS[options.get("layers", "all")],
        "guards": None if options.get("guards") == "none" else "domains",
    }


def tasks_of(bench: Bench, which: str) -> dict[str, Any]:
    """The tasks of a run: all that are optimised, or the traps `rot13` and `one-document`."""
    tasks: dict[str, Any] = dict(bench.tasks)
    first = next(iter(tasks.values()))
    if which == "rot13":  # a text like no domain's
        import codecs

        turned = [replace(r, gold=codecs.encode(r.gold, "rot13"), context="", choices=()) for r in first.records]
        tasks["rot13"] = Task("rot13", turned, bench.corpus.tokenizer, max_length=bench.corpus.length)
    elif which == "one-document":
        one = bench.corpus.rest_of_a_document(bench.split.domains, bench.budget.characters)
        tasks["one-document"] = as_batches(
            one, name="one-document", sequence_length=bench.corpus.length, micro_batch=16, sequences=8
        )
    return tasks


def make_dataset(bench: Bench, method: Method, weights: Any, steps: int, seed: int) -> MixtureDataset:
    """The stream of a run."""
    domains = domains_of(bench, method, steps)
    limits = distinct_epochs(domains, float(method.options["epochs"])) if "epochs" in method.options else None
    return bench.budget.size.dataset(domains, weights, steps, seed, limits)
