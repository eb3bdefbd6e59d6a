"""What a training step costs with in-run influence over one without it, and whether the scores are those of a boundary.

    python benchmarks/in_run.py [--rounds 15] [--sequences 64] [--folds 4] [--agreement]

A Llama of hidden size 256 and 4 layers trains on 8 domains in micro-batches of 8 sequences of 256 tokens, all of one
domain (`homogeneous=8`; mixed ones, with `InRun(every=5)`, are not timed here); 4 tasks of 32 sequences, EK-FAC factors
from 64. Steps with and without alternate in one process with one thread, in processor time: the mean ratio of
neighbours with its standard error, and what of it was spent in the hooks themselves, which varies less. What is
measured before the window (factors, the tasks' gradients) is counted over a stage of 200 steps, whose window is all of
it or its last 50 steps.

`--agreement` trains on the demonstration's text instead and compares the scores of a window with those of a measurement
at its end, on probes: a correlation, and how large the differences are in their standard errors.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from influence import llama, seconds
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from dynmix import EKFAC, InRun, MixtureDataset, TiKMiXD, TokenStore
from dynmix.callbacks import MixtureHook
from dynmix.demo.corpus import build_corpus, train_tokenizer
from dynmix.influence.in_run import ParameterProducts
from dynmix.influence.tally import Tally
from dynmix.influence.task_gradients import task_gradients
from dynmix.journal import Journal
from dynmix.step_samples import StepSamples

DOMAINS, TASKS, TASK_SEQUENCES, FACTOR_SEQUENCES, MICRO_BATCH, STAGE_STEPS = 8, 4, 32, 64, 8, 200


class Timed(ParameterProducts):
    """One that knows how long its hooks took."""

    spent = 0.0

    def _try(self, action: Callable[[], None]) -> None:
        self.spent += seconds(lambda: super(Timed, self)._try(action))


def cost(rounds: int, sequences: int, folds: int, folder: Path) -> None:
    rng = np.random.default_rng(0)
    stores = {
        f"domain{k}": TokenStore.write(folder / f"d{k}", [rng.integers(0, 4096, 257, np.uint16) for _ in range(400)])
        for k in range(DOMAINS)
    }
    data = MixtureDataset(
        stores, "uniform", num_samples=10**6, sequence_length=256, block=sequences, homogeneous=MICRO_BATCH
    )
    model = llama(4096, 256, 4, 256).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = iter(DataLoader(data, batch_size=MICRO_BATCH))
    done = 0

    def step() -> None:
        nonlocal done
        for _ in range(sequences // MICRO_BATCH):
            batch = next(loader)
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
            (loss * MICRO_BATCH / sequences).backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1

    def probes(n: int, start: int) -> list[dict[str, torch.Tensor]]:
        rows = data.look(start, start + n).batch()
        assert rows is not None
        return [{"input_ids": ids} for ids in torch.split(rows["input_ids"], MICRO_BATCH)]

    tasks = {f"task{i}": probes(TASK_SEQUENCES, 10_000 + 1000 * i) for i in range(TASKS)}
    factors = probes(FACTOR_SEQUENCES, 20_000)
    step()
    start = time.process_time()
    gradients = task_gradients(model, tasks, EKFAC(), factors, folds=folds)
    before = time.process_time() - start
    tally = Tally(DOMAINS, gradients.folds)

    watch = Timed(model, gradients)

    def watched() -> None:
        step()
        own = time.process_time()
        samples = StepSamples(data, done, sequences)
        for seen in watch.take():
            [(domain, *_), *_] = samples.domains(seen.input_ids)
            tally.add(domain, seen.products, seen.tokens)
        watch.spent += time.process_time() - own

    watched()
    plain, with_it, hooks = [], [], []
    for _ in range(rounds):
        watch.active = False
        plain.append(seconds(step))
        watch.active, watch.spent = True, 0.0
        with_it.append(seconds(watched))
        hooks.append(watch.spent)
    base = statistics.mean(plain)
    ratios = [one / other for one, other in zip(with_it, plain, strict=True)]
    error = statistics.stdev(ratios) / rounds**0.5
    own = statistics.median(hooks) / base
    table = Table(f"a step of {sequences} sequences, {TASKS} tasks in {folds} folds", "over a step without")
    table.add_row("a step that is looked at", f"{statistics.mean(ratios):.3f} ± {error:.3f}")
    table.add_row("the same, by the time in the hooks", f"{1 + own:.3f}")
    table.add_row("factors and tasks' gradients, before the window", f"{before / base:.2f}")
    for window in (STAGE_STEPS - 2, 50):
        spent = 1 + (window * own + before / base) / STAGE_STEPS
        table.add_row(f"a stage of {STAGE_STEPS} steps, window {window}, by the hooks", f"{spent:.3f}")
    Console().print(table)


def agreement(folder: Path, steps: int = 120, window: int = 40) -> None:
    corpus = build_corpus()
    tokenizer = train_tokenizer((text for texts in corpus.domains.values() for text in texts), 1024)

    def store(name: str, texts: list[str]) -> TokenStore:
        return TokenStore.write(folder / name, [np.asarray(tokenizer(text)["input_ids"]) for text in texts])

    data = MixtureDataset(
        {name: store(name, texts) for name, texts in corpus.domains.items()},
        "uniform",
        num_samples=2 * steps * 32,
        sequence_length=128,
        block=32,
        homogeneous=4,
    )
    tasks = {name: store(f"task-{name}", texts) for name, texts in corpus.tasks.items()}
    model = llama(1024, 128, 2, 128).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    hook = MixtureHook(
        model, data, tasks, TiKMiXD(), steps, batch_size=32, output=folder / "run", in_run=InRun(window), keep=0
    )
    control = hook.controller
    for number, batch in enumerate(DataLoader(data, batch_size=4), 1):
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss / 8
        loss.backward()
        if number % 8:
            continue
        optimizer.step()
        optimizer.zero_grad()
        hook.step()
        if hook.steps == steps - 1:
            break
    prior = data.schedule.weights_at(0)
    expected, _ = control.measurement.influence(model, control.measurement.probes(steps * 32, steps * 32, prior), prior)
    row = list(Journal(folder / "run" / "journal.jsonl").rows())[-1]
    found, error = np.array(row["influence"], float), np.array(row["standard_error"], float)
    assert expected.standard_error is not None
    apart = (found - expected.scores) / np.hypot(error, expected.standard_error)
    table = Table("task", "correlation over domains", "median |difference| / standard error")
    for i, name in enumerate(expected.tasks):
        table.add_row(
            name, f"{np.corrcoef(found[i], expected.scores[i])[0, 1]:.3f}", f"{np.median(np.abs(apart[i])):.2f}"
        )
    both = np.corrcoef(found.ravel(), expected.scores.ravel())[0, 1]
    table.add_row("all", f"{both:.3f}", f"{np.median(np.abs(apart)):.2f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="2 at least")
    parser.add_argument("--sequences", type=int, default=64, help="an optimizer step, over all its micro-batches")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--agreement", action="store_true")
    given = parser.parse_args()
    if given.rounds < 2 or given.sequences % MICRO_BATCH:
        parser.error(f"--rounds of 2 at least, and --sequences in micro-batches of {MICRO_BATCH}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.agreement:
            agreement(Path(folder))
        else:
            cost(given.rounds, given.sequences, given.folds, Path(folder))


if __name__ == "__main__":
    main()
