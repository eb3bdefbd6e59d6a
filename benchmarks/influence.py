"""What a measurement costs over its floor F: one forward and backward pass over the same domain and task sequences.

    python benchmarks/influence.py [--rounds 3] [--shrink 1] [--kronfluence] [--memory]

A Llama of hidden size 256 and 4 layers, 8 domains x 64 and 4 tasks x 32 sequences of 256 tokens. F is a training step's
forward and backward pass without its optimizer. The lines are ratios to F in processor time, measured in turn in one
process with one thread, beside the ratio that the matrix products alone would have. `--shrink 4` takes a quarter of
the sequences.

`--kronfluence` runs kronfluence instead, where it can be imported, and the measurement beside it, on the blocks' linear
layers alone (it would take the covariance of the whole vocabulary), with the same sequences for the factors, the same
damping, and eigenvectors sought in float64 as it does: how long each takes, and how far the scores are apart. It holds
all queries' gradients, so that it reads the domains once a call; summed, each task is a call. It gives no standard
errors.

`--memory` prints peaks of the resident set instead, over what there was before, each of a process of its own: what is
said before the start, what is measured with as many sequences and with a quarter of them, and with `--kronfluence` what
its per-sample mode takes for all pairs, with the queries' gradients of one batch held at a time, and with all of them.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix import EKFAC, Identity, Layers, group_influence
from dynmix.influence.layers import measurable_layers
from dynmix.influence.memory import peak_memory

DOMAINS, DOMAIN_SEQUENCES, TASKS, TASK_SEQUENCES, LENGTH, MICRO_BATCH, VOCAB = 8, 64, 4, 32, 256, 8, 4096

Batches = list[dict[str, torch.Tensor]]
Sets = dict[str, Batches]


def seconds(action: Callable[[], object]) -> float:
    """Of the processor, with one thread those of the clock but for what others take of the machine."""
    start = time.process_time()
    action()
    return time.process_time() - start


def passes(model: torch.nn.Module, batches: Batches) -> None:
    """A training step's forward and backward pass over each batch."""
    for batch in batches:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        model.zero_grad()


def llama(vocab: int, hidden: int, layers: int, length: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=length,
        )
    )


def build(shrink: int) -> tuple[LlamaForCausalLM, Sets, Sets]:
    generator = torch.Generator().manual_seed(0)

    def batches(sequences: int) -> Batches:
        shape = (MICRO_BATCH, LENGTH)
        count = max(1, sequences // shrink // MICRO_BATCH)
        return [{"input_ids": torch.randint(0, VOCAB, shape, generator=generator)} for _ in range(count)]

    model = llama(VOCAB, 256, 4, LENGTH)
    domains = {f"domain{i}": batches(DOMAIN_SEQUENCES) for i in range(DOMAINS)}
    return model, domains, {f"task{i}": batches(TASK_SEQUENCES) for i in range(TASKS)}


def products(model: LlamaForCausalLM, share: float, again: float) -> float:
    """Multiplications of a measurement over those of F, both a token and in the linear layers alone.

    Args:
        model: what is measured.
        share: of the domains' sequences that the factors are fitted on.
        again: what is read for the standard errors alone, as a share of all sequences.
    """
    P = covariances = rotations = 0.0
    shapes = {name: layer.shape for name, layer in measurable_layers(model).items()}
    for name, (o, i) in shapes.items():
        shared = (
            3 if name.endswith(("q_proj", "k_proj", "v_proj")) else 2 if name.endswith(("gate_proj", "up_proj")) else 1
        )
        P += o * i
        for n, cost, times in (
            (i, min(i * i / shared, o * i * i / LENGTH), shared),
            (o, min(o * o, i * o * o / LENGTH), 1),
        ):
            if n <= 1024:
                covariances += n * n / times * (0.625 if n >= 512 else 0.75)
                rotations += cost
    domain = DOMAINS * DOMAIN_SEQUENCES / (DOMAINS * DOMAIN_SEQUENCES + TASKS * TASK_SEQUENCES)
    # A forward pass, the gradients of the outputs and those of the weights are P each.
    fit = share * domain * (2 * P + covariances + rotations)
    return (fit + (1 + again) * 3 * P) / (3 * P)


def kronfluence_scores(
    model: LlamaForCausalLM, domains: Sets, tasks: Sets, fit_on: Batches, folder: str, aggregate: bool,
    queries_held: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Mean over pairs of sequences of its score, [n_tasks, n_domains].

    Args:
        model: whose modules it wraps: a copy.
        domains: all of them are one dataset.
        tasks: all of them are the queries.
        fit_on: what the factors are fitted on.
        folder: for its files.
        aggregate: whether it sums the queries' gradients, which it can do of a whole task alone: a call each.
        queries_held: gradients that it holds at once; for each so many it reads the domains anew. None: all of a call.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import Dataset

    class Rows(Dataset[torch.Tensor]):
        def __init__(self, batches: Batches) -> None:
            self.rows = torch.cat([batch["input_ids"] for batch in batches])

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, row: int) -> torch.Tensor:
            return self.rows[row]

    class NextToken(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: torch.Tensor, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
            logits = model(input_ids=batch).logits[:, :-1].float()
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [name for name in measurable_layers(model) if name != "lm_head"]

    task = NextToken()
    prepared = prepare_model(model, task)
    analyzer = Analyzer("pairs", prepared, task, cpu=True, output_dir=folder, disable_tqdm=True)
    train = Rows([batch for own in domains.values() for batch in own])
    factors = FactorArguments(use_empirical_fisher=True)
    analyzer.fit_all_factors("factors", Rows(fit_on), MICRO_BATCH, factor_args=factors, overwrite_output_dir=True)
    sets = (
        {name: Rows(own) for name, own in tasks.items()}
        if aggregate
        else {"all": Rows([b for own in tasks.values() for b in own])}
    )
    scores = []
    for name, queries in sets.items():
        arguments = ScoreArguments(
            aggregate_query_gradients=aggregate,
            damping_factor=None,
            query_gradient_accumulation_steps=(queries_held or len(queries)) // MICRO_BATCH,
        )
        analyzer.compute_pairwise_scores(
            name, "factors", queries, train, MICRO_BATCH, MICRO_BATCH, score_args=arguments, overwrite_output_dir=True
        )
        found = analyzer.load_pairwise_scores(name)["all_modules"].double()
        scores.append(found / len(queries) if aggregate else found)
    pairs = torch.cat(scores).view(len(tasks), -1, len(domains), len(train) // len(domains))
    return pairs.mean((1, 3))


def beside_kronfluence(domains: Sets, tasks: Sets, shrink: int) -> None:
    """Its modes and ours on the same sequences and layers, and how far the scores are apart."""
    blocks = Layers(exclude="lm_head")
    batches = [batch for own in domains.values() for batch in own]
    few = batches[:: max(1, len(batches) * MICRO_BATCH * shrink // 128)]
    scores: dict[str, torch.Tensor] = {}
    spent: dict[str, float] = {}

    def timed(name: str, action: Callable[[], torch.Tensor]) -> None:
        spent[name] = seconds(lambda: scores.setdefault(name, action()))

    def ours(fit_on: Batches) -> torch.Tensor:
        curvature = EKFAC(eigh_dtype="float64")
        found = group_influence(build(shrink)[0], domains, tasks, curvature, layers=blocks, curvature_batches=fit_on)
        return torch.from_numpy(found.scores * (LENGTH - 1))  # of sums over tokens, by the curvature of sequences

    def theirs(fit_on: Batches, aggregate: bool) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            return kronfluence_scores(build(shrink)[0], domains, tasks, fit_on, folder, aggregate)

    def floor() -> torch.Tensor:
        passes(build(shrink)[0], [*batches, *(b for own in tasks.values() for b in own)])
        return torch.zeros(())

    floor()
    timed("F", floor)
    for fitted, fit_on in (("every sequence", batches), ("128 sequences", few)):
        timed(f"kronfluence, all pairs of sequences, factors from {fitted}", lambda: theirs(fit_on, False))  # noqa: B023
        timed(f"kronfluence, a task's queries summed, factors from {fitted}", lambda: theirs(fit_on, True))  # noqa: B023
        timed(f"dynmix, factors from {fitted}", lambda: ours(fit_on))  # noqa: B023
    exact = scores["kronfluence, all pairs of sequences, factors from every sequence"]
    table = Table("blocks' linear layers, EK-FAC", "time / F", "largest difference to the first / largest score")
    for name, found in scores.items():
        apart = f"{((found - exact).abs().max() / exact.abs().max()).item():.1e}" if found.ndim else ""
        table.add_row(name, f"{spent[name] / spent['F']:.2f}", apart)
    Console().print(table)


def resident(key: str) -> int:
    """KiB of this process's resident set: VmRSS is now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def peak_of(what: str, shrink: int) -> float:
    """MiB by which the resident set grows, at its peak; to be called in a process of its own."""
    torch.set_num_threads(1)
    model, domains, tasks = build(shrink)
    blocks = Layers(exclude="lm_head")
    batches = [batch for own in domains.values() for batch in own]
    passes(model, batches[:1])
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    if what == "dynmix, said":
        one = {"input_ids": batches[0]["input_ids"][:1]}
        said = peak_memory(model, one, domains=DOMAINS, tasks=TASKS, micro_batch=MICRO_BATCH, layers=blocks)
        return said.total / 2**20
    if what == "dynmix":
        group_influence(model, domains, tasks, layers=blocks)
    else:
        held = MICRO_BATCH if what.endswith("a batch") else None
        with tempfile.TemporaryDirectory() as folder:
            kronfluence_scores(model, domains, tasks, batches, folder, aggregate=False, queries_held=held)
    return (resident("VmHWM") - before) / 1024


def memory(shrink: int, kronfluence: bool) -> None:
    """Print the peaks."""
    runs = [("dynmix, said", shrink), ("dynmix", 4 * shrink), ("dynmix", shrink)]
    if kronfluence:
        runs += [
            ("kronfluence, all pairs, queries of a batch", shrink),
            ("kronfluence, all pairs, all queries", shrink),
        ]
    for what, divisor in runs:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            peak = process.apply(peak_of, (what, divisor))
        print(f"{what:45}{DOMAINS * DOMAIN_SEQUENCES // divisor:6} domain sequences {peak:8.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--kronfluence", action="store_true")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.kronfluence and not find_spec("kronfluence"):
        parser.error("kronfluence cannot be imported: pip install kronfluence, or leave --kronfluence out")
    torch.set_num_threads(1)
    if arguments.memory:
        memory(arguments.shrink, arguments.kronfluence)
        return
    model, domains, tasks = build(arguments.shrink)
    if arguments.kronfluence:
        beside_kronfluence(domains, tasks, arguments.shrink)
        return
    batches = [batch for own in domains.values() for batch in own]

    def floor() -> None:
        passes(model, [*batches, *(b for own in tasks.values() for b in own)])

    def ekfac(sequences: int) -> Callable[[], object]:
        few = batches[:: max(1, len(batches) * MICRO_BATCH * arguments.shrink // sequences)]
        return lambda: group_influence(model, domains, tasks, EKFAC(), curvature_batches=few)

    total = DOMAINS * DOMAIN_SEQUENCES
    # For standard errors, eight sequences of each task are read again; of each domain too, where all fit the factors.
    sequences = MICRO_BATCH * (len(batches) + sum(map(len, tasks.values())))
    tasks_again, all_again = 8 * TASKS / sequences, 8 * (TASKS + DOMAINS) / sequences
    ways: dict[str, tuple[Callable[[], object], float]] = {
        "no curvature": (lambda: group_influence(model, domains, tasks, Identity()), products(model, 0.0, tasks_again)),
        "EK-FAC, factors from 64 sequences": (ekfac(64), products(model, 64 / total, tasks_again)),
        "EK-FAC, factors from 128 sequences (a run's default)": (ekfac(128), products(model, 128 / total, tasks_again)),
        "EK-FAC, factors from every sequence": (ekfac(total), products(model, 1.0, all_again)),
    }
    floor()
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        base = seconds(floor)
        for name, (way, _) in ways.items():
            ratios[name].append(seconds(way) / base)
    table = Table("all pairs, with standard errors", "time / F, median", "least", "products / F")
    for name, values in ratios.items():
        table.add_row(name, f"{statistics.median(values):.2f}", f"{min(values):.2f}", f"{ways[name][1]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
