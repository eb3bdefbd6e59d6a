"""Other loaders on the same tokens, each in the form that is natural and fast for it, against the raw gather.

    python benchmarks/loader_peers.py FOLDER NAME

Called by `loader.py`, with an interpreter that has the package; knows nothing of dynmix. FOLDER holds `weights.json`
and one `<domain>.bin` of uint16 tokens a domain. Prints the median ratio of throughputs as JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

LENGTH, BATCH, BATCHES, ROUNDS = 1024, 32, 200, 7

Action = Callable[[], object]


def throughput_ratio(action: Action, floor: Action) -> float:
    """Median over rounds, in turn, of the action's throughput over the floor's."""
    action(), floor()
    return statistics.median(1 / (_seconds(action) / _seconds(floor)) for _ in range(ROUNDS))


def _seconds(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def gather(tables: list[Any], domain: Iterable[int], row: Iterable[int]) -> torch.Tensor:
    """One batch straight out of the memory maps."""
    return torch.from_numpy(np.stack([tables[d][r] for d, r in zip(domain, row, strict=True)]).astype(np.int64))


def raw(tables: list[Any], domain: Any, row: Any) -> Action:
    """The floor: all batches, their rows known beforehand."""

    def action() -> None:
        for i in range(0, len(domain), BATCH):
            gather(tables, domain[i : i + BATCH], row[i : i + BATCH])

    return action


def read(batches: Iterable[Any]) -> Action:
    """Read on by `BATCHES` batches, so that starting costs nobody anything; begins anew where the loader ends."""
    ahead = iter(batches)

    def action() -> None:
        nonlocal ahead
        for _ in range(BATCHES):
            try:
                next(ahead)
            except StopIteration:
                ahead = iter(batches)
                next(ahead)

    return action


def nanogpt(tables: list[Any], weights: list[float], folder: Path) -> Iterable[Any]:
    """nanoGPT's `get_batch` for several files: slices of `np.memmap`, cast and stacked, each map opened only once."""
    maps = [
        np.memmap(folder / f"{name}.bin", np.uint16, "r") for name in json.loads((folder / "weights.json").read_text())
    ]
    rng = np.random.default_rng(0)
    while True:
        domain = rng.choice(len(maps), BATCH, p=weights)
        start = rng.integers([len(tables[d]) for d in domain]) * LENGTH
        rows = zip(domain, start, strict=True)
        yield torch.stack([torch.from_numpy(maps[d][i : i + LENGTH].astype(np.int64)) for d, i in rows])


def torchdata_nodes(tables: list[Any], weights: list[float], folder: Path) -> Iterable[Any]:
    """`MultiNodeWeightedSampler` over sources of row numbers; tokens are gathered a batch at a time."""
    from torch.utils.data import RandomSampler
    from torchdata import nodes

    def rows(number: int, table: Any) -> Any:
        return nodes.Mapper(nodes.SamplerWrapper(RandomSampler(table)), lambda row: (number, row))

    sources = {str(k): rows(k, table) for k, table in enumerate(tables)}
    mixed = nodes.MultiNodeWeightedSampler(
        sources, dict(zip(sources, weights, strict=True)), stop_criteria="CYCLE_FOREVER", seed=0
    )
    batches = nodes.Mapper(nodes.Batcher(mixed, BATCH), lambda batch: gather(tables, *zip(*batch, strict=True)))
    return nodes.Loader(batches)  # type: ignore[no-any-return]


def _stacked(items: list[dict[str, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([item["input_ids"] for item in items]).astype(np.int64))


def _arrow(tables: list[Any], folder: Path) -> list[Any]:
    import datasets

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"), length=LENGTH)})
    for k, table in enumerate(tables):
        datasets.Dataset.from_dict({"input_ids": table}, features).save_to_disk(folder / f"arrow{k}")
    return [datasets.load_from_disk(folder / f"arrow{k}") for k in range(len(tables))]


def hf_map(tables: list[Any], weights: list[float], folder: Path) -> Iterable[Any]:
    """`interleave_datasets` of memory-mapped Arrow datasets, which DataLoader asks for whole batches."""
    import datasets

    parts = [part.shuffle(seed=k) for k, part in enumerate(_arrow(tables, folder))]
    mixed = datasets.interleave_datasets(parts, weights, seed=0, stopping_strategy="all_exhausted")
    return DataLoader(mixed.with_format("numpy"), batch_size=BATCH, collate_fn=_stacked)  # the fastest of its formats


def hf_iterable(tables: list[Any], weights: list[float], folder: Path) -> Iterable[Any]:
    """`interleave_datasets` of the same as iterable datasets, shuffled through a buffer."""
    import datasets

    parts = [
        part.to_iterable_dataset().shuffle(seed=k, buffer_size=256) for k, part in enumerate(_arrow(tables, folder))
    ]
    mixed = datasets.interleave_datasets(parts, weights, seed=0, stopping_strategy="all_exhausted")
    return DataLoader(mixed.with_format("numpy"), batch_size=BATCH, collate_fn=_stacked)  # the fastest of its formats


def litdata(tables: list[Any], weights: list[float], folder: Path) -> Iterable[Any]:
    """`CombinedStreamingDataset` of token chunks, read by its `TokensLoader`."""
    import litdata as ld

    parts = []
    for k, table in enumerate(tables):
        where, loader = str(folder / f"litdata{k}"), ld.TokensLoader(block_size=LENGTH)
        # In one piece: the functions that `optimize` starts processes with must be importable.
        os.makedirs(where)
        writer = ld.streaming.writer.BinaryWriter(where, chunk_size=2**22, item_loader=ld.TokensLoader())
        for row in range(len(table)):
            writer[row] = torch.from_numpy(table[row].astype(np.int32))
        writer.done()
        writer.merge()
        parts.append(ld.StreamingDataset(where, item_loader=loader, shuffle=True, drop_last=False))
    mixed = ld.CombinedStreamingDataset(parts, weights=weights, iterate_over_all=False, seed=0)
    return ld.StreamingDataLoader(mixed, batch_size=BATCH, num_workers=0)  # type: ignore[no-any-return]


def mosaic(tables: list[Any], weights: list[float], folder: Path) -> Iterable[Any]:
    """`StreamingDataset` with a stream a domain, on local uncompressed MDS shards."""
    from streaming import MDSWriter, Stream, StreamingDataset

    for k, table in enumerate(tables):
        with MDSWriter(out=str(folder / f"mds{k}"), columns={"input_ids": f"ndarray:uint16:{LENGTH}"}) as writer:
            for row in table:
                writer.write({"input_ids": row})
    streams = [Stream(local=str(folder / f"mds{k}"), proportion=weight) for k, weight in enumerate(weights)]
    mixed = StreamingDataset(streams=streams, epoch_size=BATCH * BATCHES * 2 * ROUNDS, shuffle=True, batch_size=BATCH)
    return DataLoader(mixed, batch_size=BATCH, collate_fn=_stacked)


PEERS: dict[str, tuple[str, Callable[[list[Any], list[float], Path], Iterable[Any]]]] = {
    "nanoGPT's get_batch": ("torch", nanogpt),
    "torchdata.nodes MultiNodeWeightedSampler": ("torchdata", torchdata_nodes),
    "HF interleave_datasets, map": ("datasets", hf_map),
    "HF interleave_datasets, iterable": ("datasets", hf_iterable),
    "litdata CombinedStreamingDataset": ("litdata", litdata),
    "Mosaic StreamingDataset": ("streaming", mosaic),
}


def main(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    weights = json.loads((folder / "weights.json").read_text())
    tables = [np.memmap(folder / f"{k}.bin", np.uint16, "r").view(np.ndarray).reshape(-1, LENGTH) for k in weights]
    rng, samples = np.random.default_rng(0), BATCH * BATCHES
    domain = rng.choice(len(tables), size=samples, p=list(weights.values())).tolist()
    row = [int(rng.integers(len(tables[d]))) for d in domain]
    batches = PEERS[name][1](tables, list(weights.values()), folder)
    print(json.dumps(throughput_ratio(read(batches), raw(tables, domain, row))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
