"""What `dynmix prepare` costs over its floor: the tokenizer's own encode_batch_fast on the same texts.

    python benchmarks/prepare.py TEXTS TOKENIZER [--megabytes 24] [--workers 1 2]

TEXTS is a folder of .jsonl.gz files with a `text` field, of which so many megabytes are taken. Prepare unpacks, parses,
tokenises, hashes and writes; the floor only tokenises, on one core. Each number is the median of rounds measured in
turn with the floor, as documents per second over the floor's: 1 is as fast, with two workers 2 would be. The second
column is the same per second of processor time, all processes together, which other work on the machine disturbs less.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core is the unit

import argparse
import gzip
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from dynmix.mixture.prepare import prepare

ROUNDS = 3


def take(texts: Path, output: Path, megabytes: float) -> list[str]:
    """Copy the first documents of every file, as many of each; return them all."""
    files = sorted(texts.glob("*.jsonl.gz"))
    if not files:
        raise SystemExit(f"{texts}: no .jsonl.gz files")
    taken: list[str] = []
    for file in files:
        left = megabytes * 1e6 / len(files)
        with gzip.open(file) as source, gzip.open(output / file.name, "wb") as target:
            for line in source:
                taken.append(json.loads(line)["text"])
                target.write(line)
                left -= len(line)
                if left < 0:
                    break
    return taken


def clocks() -> tuple[float, float]:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in used)


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """What it takes: seconds of the wall clock and of processors."""
    wall, processors = clocks()
    action()
    now = clocks()
    return now[0] - wall, now[1] - processors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--megabytes", type=float, default=24.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts"
        source.mkdir()
        texts = take(options.texts, source, options.megabytes)

        def floor() -> None:
            for first in range(0, len(texts), 1000):
                tokenizer.backend_tokenizer.encode_batch_fast(texts[first : first + 1000], add_special_tokens=False)

        def prepared(workers: int) -> None:
            output = Path(folder) / "stores"
            prepare(source, output, tokenizer, workers=workers, overwrite=True, progress=False)

        ratios: dict[int, list[tuple[float, float]]] = {workers: [] for workers in options.workers}
        rates = []
        for _ in range(ROUNDS):
            own = seconds(floor)
            rates.append(len(texts) / own[0])
            for workers, found in ratios.items():
                its = seconds(lambda workers=workers: prepared(workers))  # type: ignore[misc]
                found.append((own[0] / its[0], own[1] / its[1]))
    table = Table("what", "documents/s over encode_batch_fast's", "per second of processor time")
    for workers, found in ratios.items():
        medians = (f"{statistics.median(column):.2f}" for column in zip(*found, strict=True))
        table.add_row(f"prepare, workers={workers}", *medians)
    Console().print(table)
    Console().print(f"encode_batch_fast alone: {statistics.median(rates):,.0f} documents/s, {len(texts):,} documents")


if __name__ == "__main__":
    main()
