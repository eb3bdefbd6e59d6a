"""What the mixture costs over its floor: copying the same rows straight out of the memory map.

    python benchmarks/loader.py

Eight token stores, sequences of 1,024 tokens, batches of 32. Each line is the median ratio of rounds measured in turn
with the floor, in one process; above 1 is slower than the floor.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from dynmix import MixtureDataset, MixtureSchedule, TokenStore

DOMAINS, ROWS, LENGTH, BATCH, BATCHES, ROUNDS = 8, 2000, 1024, 32, 200, 5


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_ratio(action: Callable[[], object], floor: Callable[[], object]) -> float:
    action(), floor()
    return statistics.median(seconds(action) / seconds(floor) for _ in range(ROUNDS))


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    table = Table("what", "unit", "result")
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            f"domain{i}": TokenStore.write(
                Path(folder) / f"domain{i}", (rng.integers(0, 50_000, LENGTH).astype(np.uint16) for _ in range(ROWS))
            )
            for i in range(DOMAINS)
        }
        weights = dict(zip(stores, rng.dirichlet(np.ones(DOMAINS)).tolist(), strict=True))
        samples = BATCH * BATCHES
        dataset = MixtureDataset(stores, weights, num_samples=samples, sequence_length=LENGTH, block=BATCH)
        domain, row, _ = dataset.schedule.assign(0, samples)
        tables = [store.tokens.reshape(ROWS, LENGTH) for store in stores.values()]

        def floor() -> None:
            for i in range(0, samples, BATCH):
                rows = zip(domain[i : i + BATCH], row[i : i + BATCH], strict=True)
                torch.from_numpy(np.stack([tables[d][r] for d, r in rows]).astype(np.int64))

        def read(workers: int) -> Callable[[], None]:
            # Persistent, so that the rounds after the first do not pay for starting processes.
            loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)

            def action() -> None:
                for _ in loader:
                    pass

            return action

        for workers in (0, 2):
            ratio = median_ratio(read(workers), floor)
            table.add_row(f"DataLoader(dataset, num_workers={workers})", "time / raw gather", f"{ratio:.2f}")

    chunk = 65_536
    for domains in (8, 200):
        names = [f"d{i}" for i in range(domains)]
        shares = dict(zip(names, rng.dirichlet(np.ones(domains)).tolist(), strict=True))
        schedule = MixtureSchedule(shares, dict.fromkeys(names, 10**6))

        def permute() -> None:
            np.random.default_rng(0).permutation(chunk)

        ratio = median_ratio(lambda schedule=schedule: schedule.assign(10**9, 10**9 + chunk), permute)  # type: ignore[misc]
        table.add_row(f"assign of {chunk:,} positions, {domains} domains", "time / numpy permutation", f"{ratio:.1f}")
        ratio = median_ratio(lambda s=schedule: s.counts(10**12), lambda s=schedule: s.counts(1))  # type: ignore[misc]
        table.add_row(f"counts(10**12), {domains} domains", "time / counts(1)", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
