"""MDE (arXiv 2502.15950) on a small corpus: how well it ranks mixtures, alone and as features; and what it costs.

    python benchmarks/mde.py CACHE            (corpus: $DYNMIX_SHARED/corpus, or ../shared/corpus)
    python benchmarks/mde.py --only-timing    (its cost alone, which needs no corpus)

Trains proxies, Llamas of 0.4M parameters: an expert a domain, 25 mixtures to fit laws to and 24 to test them on,
sampled as in the paper's appendix B.4. Each run is kept in the folder CACHE as soon as it is done, so that an
interrupted benchmark goes on where it was; CACHE/runs.csv is input for `dynmix fit`. About 25 minutes of one core.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from influence import seconds
from numpy.typing import NDArray
from pretraining.kept import check_settings
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from shared import shared
from sklearn.base import clone
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaForCausalLM, get_cosine_schedule_with_warmup

from dynmix import MixtureDataset, TokenStore
from dynmix.laws import (
    GP,
    Experts,
    Law,
    LightGBM,
    MultiTaskGP,
    PowerLaw,
    Ridge,
    WithExperts,
    sample_mixtures,
    solve,
)
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.prepare import prepare
from dynmix.proxies import small_llama
from dynmix.whole_file import whole_file, write_whole

Array = NDArray[np.float64]

DOMAINS = (
    "wikipedia", "news", "books", "math_latex", "math_word", "code_python", "code_c", "manpages", "dictionary",
    "german", "movie_reviews", "web",
)  # fmt: skip
END_TASKS = ("hellaswag", "piqa", "gsm8k", "blimp", "arc_easy", "humaneval")
TRAIN, TEST, SPLITS = 25, 24, 5


@dataclass(frozen=True)
class Settings:
    """What a proxy is; part of the cache, so that runs of other settings are not mixed up."""

    hidden_size: int = 64
    layers: int = 2
    sequence_length: int = 128
    batch_size: int = 4  # sequences
    steps: int = 360
    learning_rate: float = 4e-3
    domain_sequences: int = 32  # of a validation set
    task_sequences: int = 24
    tokenizer: str = "bpe4096"


class Proxies:
    """Trains and evaluates proxies, run by run, into a folder."""

    def __init__(self, corpus: Path, cache: Path, settings: Settings):
        self.cache, self.settings = cache, settings
        check_settings(cache, asdict(settings))
        tokenizer = corpus / "tokenizers" / settings.tokenizer
        self.stores = {name: self._store(corpus / f"domains/{name}.jsonl.gz", tokenizer) for name in DOMAINS}
        self.sets = {name: self._sequences(corpus, name, tokenizer) for name in (*DOMAINS, *END_TASKS)}

    @property
    def tokens(self) -> list[int]:
        return [len(store.tokens) for store in self.stores.values()]

    def _store(self, source: Path, tokenizer: Path) -> TokenStore:
        path = self.cache / "stores" / source.name.removesuffix(".jsonl.gz")
        if not Path(f"{path}.idx").exists():
            prepare(source, path.parent, tokenizer, progress=False)
        return TokenStore.open(path)

    def _sequences(self, corpus: Path, name: str, tokenizer: Path) -> torch.Tensor:
        """Return an evaluation set, evenly spaced sequences of it: LongTensor[n, sequence_length]."""
        if name in DOMAINS:
            count = self.settings.domain_sequences
            store = self._store(corpus / f"tasks/{name}.valid.jsonl.gz", tokenizer)
        else:
            lines = (json.loads(line) for line in (corpus / f"tasks/{name}.jsonl").open())
            texts = [line["context"] + line["gold"] for line in lines]
            tokens = AutoTokenizer.from_pretrained(tokenizer)
            ended = ([*ids, tokens.eos_token_id] for ids in tokens(texts)["input_ids"])
            path, count = self.cache / "stores" / name, self.settings.task_sequences
            store = TokenStore.open(path) if path.with_suffix(".idx").exists() else TokenStore.write(path, ended)
        packed = PackedSequences(store, self.settings.sequence_length)
        rows = np.linspace(0, len(packed) - 1, count).round().astype(np.int64)
        return torch.from_numpy(packed.gather(rows))

    def run(self, name: str, weights: Array) -> Array:
        """Return log p of each token of the sets, float16[n_tokens], by a proxy of that mixture: trained, or kept."""
        path = self.cache / "runs" / f"{name}.npy"
        if not path.exists():
            start = time.perf_counter()
            model = self._train(weights)
            found = np.concatenate([self._log_probabilities(model, rows) for rows in self.sets.values()])
            with whole_file(path) as beside, open(beside, "wb") as file:
                np.save(file, found.astype(np.float16))
            print(f"{name}: loss {-found.mean():.3f}, {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        return np.lib.format.open_memmap(path, mode="r")

    def _train(self, weights: Array) -> LlamaForCausalLM:
        s = self.settings
        torch.manual_seed(0)
        model = LlamaForCausalLM(small_llama(4096, s.hidden_size, s.layers, 4, s.sequence_length))
        dataset = MixtureDataset(
            self.stores,
            dict(zip(DOMAINS, weights.tolist(), strict=True)),
            num_samples=s.steps * s.batch_size,
            sequence_length=s.sequence_length,
            block=s.batch_size * 8,
        )
        optimizer = torch.optim.AdamW(model.parameters(), s.learning_rate, weight_decay=0.01, fused=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, s.steps // 10, s.steps)
        for batch in DataLoader(dataset, batch_size=s.batch_size):
            model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return model

    @torch.no_grad()
    def _log_probabilities(self, model: LlamaForCausalLM, rows: torch.Tensor) -> NDArray[np.float32]:
        parts = []
        for some in (rows[first : first + 4] for first in range(0, len(rows), 4)):
            logits = model(input_ids=some).logits[:, :-1].flatten(0, 1)
            parts.append(-torch.nn.functional.cross_entropy(logits, some[:, 1:].flatten(), reduction="none").numpy())
        return np.concatenate(parts)


class Measured(NamedTuple):
    experts: Experts
    W: Array
    L: Array  # [n_runs, n_sets]


def measure(proxies: Proxies) -> Measured:
    """Train what is missing; write the experts' cache and the table of runs."""
    mixtures = sample_mixtures(proxies.tokens, TRAIN + TEST)
    tokens = {name: rows.shape[0] * (rows.shape[1] - 1) for name, rows in proxies.sets.items()}
    alone = {name: proxies.run(f"expert.{name}", w) for name, w in zip(DOMAINS, np.eye(len(DOMAINS)), strict=True)}
    ends = np.cumsum(list(tokens.values()))[:-1]
    L = np.array(
        [
            [-part.mean(dtype=np.float64) for part in np.split(proxies.run(f"mixture.{i:02}", w), ends)]
            for i, w in enumerate(mixtures)
        ]
    )
    folder = proxies.cache / "experts"
    experts = Experts.open(folder) if folder.exists() else Experts.write(folder, alone, tokens)
    names = [f"weight/{name}" for name in DOMAINS] + [f"loss/{name}" for name in proxies.sets]
    rows = [",".join(f"{x:.8g}" for x in row) for row in np.hstack([mixtures, L])]
    write_whole(proxies.cache / "runs.csv", "\n".join([",".join(names), *rows]) + "\n")
    return Measured(experts, mixtures, L)


class Score(NamedTuple):
    spearman: float
    mse: float


def score(predicted: Array, losses: Array) -> Score:
    """Of the average over the targets given."""
    p, y = predicted.mean(axis=1), losses.mean(axis=1)
    return Score(float(spearmanr(p, y).statistic), float(((p - y) ** 2).mean()))


def ranking(experts: Experts, W: Array, L: Array) -> Table:
    """Return Spearman and mean squared error of averages on left-out mixtures, beside the paper's Table 1."""
    laws: dict[str, tuple[Law, str, str]] = {
        "linear": (Ridge(), "0.234 / 0.646", "0.976 / 0.953"),
        "GBM": (LightGBM(), "0.923 / 0.814", "0.950 / 0.955"),
        "GP (paper: multi-task)": (GP(), "0.858 / 0.899", "0.984 / 0.935"),
        "multi-task GP": (MultiTaskGP(), "0.858 / 0.899", "0.984 / 0.935"),
        "power law": (PowerLaw(), "-", "-"),
    }
    k, sp = len(DOMAINS), slice(0, len(DOMAINS))
    # Each law sees the targets that it is judged by, and their features alone, as in the paper.
    sets = {"SP": (sp, experts.only(DOMAINS)), "SP+ET": (slice(None), experts)}
    found: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(len(W))
        train, test = order[:TRAIN], order[TRAIN:]
        fewer = train[: TRAIN - k]  # the experts count as runs
        for targets, (columns, own) in sets.items():
            for name, (law, *_) in laws.items():
                with_experts: dict[str, tuple[Law, NDArray[np.intp]]] = {"alone": (clone(law), train)}
                if "extra" in law.get_params():
                    with_experts["+ MDE"] = WithExperts(law, own), fewer
                    with_experts["+ MDE, all runs"] = WithExperts(law, own), train
                for how, (each, rows) in with_experts.items():
                    predicted = each.fit(W[rows], L[rows, columns]).predict(W[test])
                    found[f"{name}|{how}", targets].append(score(predicted, L[test, columns]))
            found["MDE|+ MDE", targets].append(score(own.losses(W[test]), L[test, columns]))
            constant = np.repeat(L[train, columns].mean(axis=0)[None], len(test), axis=0)
            missed = float(((constant - L[test, columns]).mean(axis=1) ** 2).mean())
            found["mean of the runs|alone", targets].append(Score(float("nan"), missed))
    title = (
        f"Spearman (mean squared error) of average losses, SP / SP+ET: {TRAIN} runs, {len(W) - TRAIN} left out, mean "
        f"of {SPLITS} splits"
    )
    table = Table("law", f"{TRAIN} runs", f"{TRAIN - k} runs + {k} experts", f"{TRAIN} runs + {k} experts",
                  "paper: 25 runs", "paper: 18 runs + 7 experts", title=title)  # fmt: skip
    published = {name: (without, with_) for name, (_, without, with_) in laws.items()}
    for name, theirs in (published | {"MDE": ("-", "0.912 / 0.886"), "mean of the runs": ("-", "-")}).items():
        cells = []
        for how in ("alone", "+ MDE", "+ MDE, all runs"):
            pair = [
                np.mean(found[f"{name}|{how}", targets], axis=0) for targets in sets if found[f"{name}|{how}", targets]
            ]
            cells.append(" / ".join(f"{p[0]:.3f} ({p[1]:.5f})" for p in pair) or "-")
        table.add_row(name, *cells, *theirs)
    return table


def mixture(experts: Experts) -> Table:
    """Return what `solve` finds for three criteria, beside the uniform mixture."""
    table = Table("criterion", "loss", "uniform", "gap", "iterations", "weights", title="MDE alone: the best mixture")
    for name, targets in {"SP": DOMAINS, "ET": END_TASKS, "SP+ET": experts.targets}.items():
        own = experts.only(targets)
        best, uniform = solve(own), own.losses(np.full((1, len(DOMAINS)), 1 / len(DOMAINS))).mean()
        weights = sorted(zip(best.weights, DOMAINS, strict=True), reverse=True)
        words = ", ".join(f"{name} {w:.2f}" for w, name in weights if w >= 0.005)
        table.add_row(name, f"{best.loss:.4f}", f"{uniform:.4f}", f"{best.gap:.0e}", str(best.iterations), words)
    return table


def timing() -> Table:
    """Return the cost of a mixture over that of the least it needs: logarithms, and the bytes of the probabilities."""
    n, k = 2_000_000, 26
    rng = np.random.default_rng(0)
    log_p = -rng.gamma(2, 2, size=(k, n)).astype(np.float16)
    values, p, W = (
        rng.random(n, dtype=np.float32),
        np.ones((k, n), dtype=np.float32),
        rng.dirichlet(np.full(k, 0.3), 64),
    )
    weights = W.astype(np.float32)
    logs = least(lambda: np.log(values))
    read = least(lambda: p.sum())
    with threadpool_limits(1):
        product = least(lambda: weights @ p[:, : n // 50]) * 50 / len(W)
    title = (
        f"MDE of {n:,} tokens, {k} experts, one thread. np.log of {n:,} float32: {1e3 * logs:.1f} ms, matrix product: "
        f"{1e3 * product:.1f} ms, reading {4e-6 * n * k:.0f} MB: {1e3 * read:.1f} ms"
    )
    heads = (
        "mixtures at once",
        "probabilities",
        "ms a mixture",
        "over np.log",
        "over the product",
        "over reading once",
    )
    table = Table(*heads, title=title)
    for where, memory in (("in memory", 1 << 30), ("float16 from the cache", 0)):
        experts = Experts(log_p, {"one": n}, memory=memory)
        for count in (1, 8, 64):
            each = least(lambda e=experts, c=count: e.losses(W[:c])) / count  # type: ignore[misc]
            ratios = (f"{each / floor:.1f}" for floor in (logs, product, read))
            table.add_row(str(count), where, f"{1e3 * each:.1f}", *ratios)
    return table


def least(action: Callable[[], object]) -> float:
    """Processor seconds, of three times."""
    found: float = min(seconds(action) for _ in range(3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, nargs="?")
    parser.add_argument("--only-timing", action="store_true")
    given = parser.parse_args()
    if (given.cache is None) != given.only_timing:
        parser.error("give the folder CACHE, or --only-timing, which needs none")
    torch.set_num_threads(1)
    console = Console(width=180)
    if given.cache:
        experts, W, L = measure(Proxies(shared("corpus"), given.cache, Settings()))
        console.print(ranking(experts, W, L))
        console.print(mixture(experts))
    console.print(timing())


if __name__ == "__main__":
    main()
