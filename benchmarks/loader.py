"""What the mixture costs over its floor, copying the same rows straight out of the memory map, and how exact it is.

    python benchmarks/loader.py [--quick] [--peers PYTHON] [--mosaic PYTHON]

Eight token stores, sequences of 1,024 tokens, batches of 32. Throughputs are medians of ratios to the floor, measured
in turn with it in one process (1 is the floor). The floor takes rows of plain arrays on the maps; a gather that indexes
`np.memmap` objects, as training scripts do, is slower, and ours stands beside it, too. Two bare gathers behind a
DataLoader show what torch's sampler, fetcher and `record_function` leave to be had. The other loaders read the same
tokens (`loader_peers.py`), each in a process of its own with its own floor, by the interpreters that have their
packages: `--peers` torchdata, datasets and litdata, `--mosaic` mosaicml-streaming, which needs older versions of NumPy
and transformers than dynmix. Times of the schedule are of the process, not of the clock: what else runs on the machine
is no cost of ours.

Distances of mixtures are total variations, over their expectation for independent draws; the ratio of the means over
all weight vectors, and the worst one. The nearest counts there are (largest remainders, at each number of draws anew)
are what no order can be better than.
"""

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_peers import (  # type: ignore[import-not-found]
    BATCH,
    BATCHES,
    LENGTH,
    PEERS,
    gather,
    raw,
    read,
    throughput_ratio,
)
from rich.console import Console
from rich.table import Table
from scipy.stats import binom
from torch.utils.data import DataLoader, Dataset

from dynmix import MixtureDataset, MixtureSchedule, TokenStore

DOMAINS, ROWS, ENDLESS, FAR = 8, 2000, 10**9, 10**12
PAGE = resource.getpagesize()


def median_seconds(action: Callable[[], object], rounds: int = 15) -> float:
    def once() -> float:
        start = time.process_time()
        action()
        return time.process_time() - start

    once()
    return statistics.median(once() for _ in range(rounds))


def named(weights: np.ndarray) -> dict[str, float]:
    return {f"domain{k}": weight for k, weight in enumerate(weights.tolist())}


def schedule_of(weights: np.ndarray, seed: int = 0) -> MixtureSchedule:
    return MixtureSchedule(named(weights), dict.fromkeys(named(weights), 10**6), seed=seed)


def peer_ratio(python: str, folder: Path, name: str) -> str:
    """The ratio, or why there is none."""
    package = PEERS[name][0]
    if subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode:
        return f"skipped: no {package} for {python}"
    script = str(Path(__file__).with_name("loader_peers.py"))
    done = subprocess.run([python, script, str(folder), name], capture_output=True, text=True)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    return f"{json.loads(done.stdout.splitlines()[-1]):.3f}"


class Bare(Dataset[Any]):
    """A gather whose rows are known beforehand, as a dataset: what torch's loader adds to it is no cost of ours."""

    def __init__(self, gather: Callable[..., object], tables: list[np.ndarray], domain: list[int], row: list[int]):
        self.gather, self.tables, self.domain, self.row = gather, tables, domain, row

    def __len__(self) -> int:
        return ENDLESS

    def __getitems__(self, positions: list[int]) -> object:
        at = positions[0] % len(self.row)
        return self.gather(self.tables, self.domain[at : at + BATCH], self.row[at : at + BATCH])


def with_labels(tables: list[np.ndarray], domain: list[int], row: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The fastest gather we know of inputs, and of labels that may be masked without masking the inputs."""
    both = np.empty((2, len(row), LENGTH), np.int64)
    both[:] = np.concatenate([tables[d][r] for d, r in zip(domain, row, strict=True)]).reshape(len(row), LENGTH)
    return torch.from_numpy(both[0]), torch.from_numpy(both[1])


def as_it_is(batch: object) -> object:
    return batch


def throughput(table: Table, peers: str, mosaic: str, rng: np.random.Generator) -> None:
    with tempfile.TemporaryDirectory() as where:
        folder, weights = Path(where), named(rng.dirichlet(np.ones(DOMAINS)))
        stores = {
            name: TokenStore.write(folder / name, rng.integers(0, 50_000, (ROWS, LENGTH), np.uint16))
            for name in weights
        }
        (folder / "weights.json").write_text(json.dumps(weights))
        dataset = MixtureDataset(stores, weights, num_samples=ENDLESS, sequence_length=LENGTH, block=BATCH)
        domain, row, _ = (part.tolist() for part in dataset.schedule.assign(0, BATCH * BATCHES))
        tables = [store.tokens.reshape(ROWS, LENGTH) for store in stores.values()]
        floor = raw(tables, domain, row)
        for what, function in (("the raw gather", gather), ("the fastest gather, with labels", with_labels)):
            loader = DataLoader(Bare(function, tables, domain, row), batch_size=BATCH, collate_fn=as_it_is)
            ratio = throughput_ratio(read(loader), floor)
            table.add_row(f"DataLoader({what} and nothing else)", "of raw gather", f"{ratio:.3f}")
        for workers in (0, 2):
            loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers)
            ratio = throughput_ratio(read(loader), floor)
            table.add_row(f"DataLoader(MixtureDataset, num_workers={workers})", "of raw gather", f"{ratio:.3f}")
        maps = [np.memmap(folder / f"{name}.bin", np.uint16, "r", shape=(ROWS, LENGTH)) for name in weights]
        ratio = throughput_ratio(read(DataLoader(dataset, batch_size=BATCH)), raw(maps, domain, row))
        table.add_row("DataLoader(MixtureDataset, num_workers=0)", "of a gather from np.memmap", f"{ratio:.3f}")
        for name, (package, _) in PEERS.items():
            ratio = peer_ratio(mosaic if package == "streaming" else peers, folder, name)
            table.add_row(name, "of raw gather", ratio)


def schedules(table: Table, rng: np.random.Generator) -> None:
    chunk = 65_536
    for domains in (8, 200):
        schedule = schedule_of(rng.dirichlet(np.ones(domains)))
        seconds = median_seconds(lambda s=schedule: s.assign(FAR, FAR + chunk))  # type: ignore[misc]
        table.add_row(
            f"assign, {domains} domains, chunks of {chunk:,}", "million positions/s", f"{chunk / seconds / 1e6:.1f}"
        )
        seconds = median_seconds(lambda s=schedule: s.counts(FAR), 100)  # type: ignore[misc]
        table.add_row(f"counts(10**12), {domains} domains", "ms", f"{seconds * 1e3:.2f}")

    rows = [{"input_ids": [row] * 8} for row in range(1000)]
    dataset = MixtureDataset({f"domain{k}": rows for k in range(DOMAINS)}, num_samples=2 * FAR)
    text = json.dumps(dataset.state_dict())

    def first_batch(position: int) -> None:
        dataset.load_state_dict(json.loads(text))
        dataset.__getitems__(list(range(position, position + BATCH)))

    near, far = (median_seconds(lambda p=position: first_batch(p)) for position in (0, FAR))  # type: ignore[misc]
    table.add_row("from a state to the first batch at 10**12", "time / at 0", f"{far / near:.2f}")


def rounded(shares: np.ndarray) -> np.ndarray:
    """The whole numbers of the same sum that are nearest to `shares`, by largest remainders."""
    whole: np.ndarray = np.floor(shares)
    whole[np.argsort(whole - shares)[: round(shares.sum() - whole.sum())]] += 1
    return whole


def independent(draws: int, weights: np.ndarray) -> float:
    """Expected total variation of the mixture of independent draws, by de Moivre's mean deviation of a binomial."""
    least = np.floor(draws * weights) + 1
    return float((least * (1 - weights) * binom.pmf(least, draws, weights)).sum() / draws)


def proportions(table: Table, rng: np.random.Generator, vectors: int) -> None:
    draws = (1_000, 10_000, 100_000)
    found = np.zeros((vectors, len(draws), 3))  # total variation: ours, the least of any counts, of independent draws
    for seed in range(vectors):
        weights = (
            10 ** rng.uniform(-5, 0, rng.integers(2, 201)) if seed % 2 else rng.dirichlet(np.ones(rng.integers(2, 201)))
        )
        weights = np.maximum(weights / weights.sum(), 1e-5)
        weights /= weights.sum()
        schedule = schedule_of(weights, seed=seed)
        for k, n in enumerate(draws):
            some = np.abs(np.stack([schedule.counts(n), rounded(n * weights)]) / n - weights).sum(axis=1) / 2
            found[seed, k] = *some, independent(n, weights)
    for k, n in enumerate(draws):
        for what, column in (("ours", 0), ("the nearest counts", 1)):
            shares = found[:, k, column] / found[:, k, 2]
            mean = found[:, k, column].mean() / found[:, k, 2].mean()
            result = f"{mean:.3f}, at most {shares.max():.3f}; over 0.2: {(shares > 0.2).sum()} of {vectors}"
            table.add_row(f"distance at {n:,} draws, {what}", "of independent draws", result)
    counts = np.array(
        [schedule_of(np.array([0.0, 1e-5, 0.3, 0.7 - 1e-5]), seed=seed).counts(10**6)[:2] for seed in range(vectors)]
    )
    table.add_row("weight 0, draws in a million", f"most of {vectors} seeds", str(counts[:, 0].max()))
    table.add_row(
        "weight 1e-5, draws in a million", f"{vectors} seeds", f"{counts[:, 1].min()} to {counts[:, 1].max()}"
    )


def memory(table: Table, rng: np.random.Generator, draws: int) -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6

    with tempfile.TemporaryDirectory() as folder:
        stores = {
            f"domain{k}": TokenStore.write(Path(folder) / str(k), [rng.integers(0, 50_000, 10**6, np.uint16)])
            for k in range(DOMAINS)
        }
        dataset = MixtureDataset(stores, "uniform", num_samples=draws, sequence_length=16, block=1000)
        for store in stores.values():  # what is mapped is resident once it has been read
            store.tokens.max()
        for number, _ in enumerate(DataLoader(dataset, batch_size=1000)):
            if number == draws // 100_000:
                before = resident()
        table.add_row(f"resident set over {draws:,} draws", "MB more than after 1 %", f"{resident() - before:.1f}")

    stages, length = rng.dirichlet(np.ones(50), 1000), 100_000
    schedule = schedule_of(stages[0])
    for number, weights in enumerate(stages[1:], 1):
        schedule.publish(named(weights), start=number * length)
    off = np.abs(schedule.counts(1000 * length) - length * stages.sum(axis=0)).max()
    table.add_row("1,000 stages of 50 domains: off by at most", "draws of a domain", f"{off:.1f}")
    text = json.dumps(schedule.state_dict())
    table.add_row("state after 1,000 stages of 50 domains", "kB", f"{len(text) / 1e3:.0f}")
    seconds = median_seconds(lambda: schedule.load_state_dict(json.loads(text)), 3)
    table.add_row("loading it", "ms", f"{seconds * 1e3:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the draws and vectors")
    parser.add_argument("--peers", default=sys.executable, help="interpreter that has torchdata, datasets, litdata")
    parser.add_argument("--mosaic", default=sys.executable, help="interpreter that has mosaicml-streaming")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("dynmix").setLevel(logging.ERROR)  # small domains begin many epochs
    rng, table = np.random.default_rng(0), Table("what", "unit", "result")
    throughput(table, given.peers, given.mosaic, rng)
    schedules(table, rng)
    proportions(table, rng, 20 if given.quick else 200)
    memory(table, rng, 10**6 if given.quick else 10**7)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
