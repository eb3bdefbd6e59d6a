"""What a rank does of a measurement that several share: passes, tokens, and time over one process's.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 benchmarks/influence_ranks.py [--rounds 3] [--shrink 4] [--fsdp]

The model and the sets of benchmarks/influence.py, with factors from a quarter of the domains' batches. Rank 0 measures
alone while the others wait, then all of them together, in turn; with `--fsdp` the model is sharded and "alone" is every
rank doing all of it. Times are those of the clock: they mean something on as many idle cores as there are ranks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from influence import build
from rich.console import Console
from rich.table import Table
from torch.distributed.fsdp import fully_shard

from dynmix import EKFAC, group_influence
from dynmix.ranks import Ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shrink", type=int, default=4)
    parser.add_argument("--fsdp", action="store_true")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    ranks = Ranks(shared=True)
    model, domains, tasks = build(arguments.shrink)
    if cuda:
        torch.cuda.set_device(ranks.rank)
        model.cuda()
    seen = [0, 0]  # passes, tokens

    def count(module: object, args: object, given: dict[str, torch.Tensor]) -> None:
        seen[0] += 1
        seen[1] += given["input_ids"].numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    if arguments.fsdp:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    batches = [batch for own in domains.values() for batch in own]
    few = batches[::4]

    def measure(over_ranks: bool) -> tuple[float, list[int], torch.Tensor]:
        seen[:] = [0, 0]
        start = time.perf_counter()
        found = group_influence(model, domains, tasks, EKFAC(), curvature_batches=few, over_ranks=over_ranks)
        return time.perf_counter() - start, list(seen), torch.from_numpy(found.scores.copy())

    ratios, apart = [], 0.0
    for number in range(arguments.rounds + 1):
        first = measure(False) if ranks.rank == 0 or arguments.fsdp else None
        alone = ranks.exchange("alone", first)[0]
        together = ranks.exchange("together", measure(True))
        assert alone is not None
        if number:  # the first one warms up
            ratios.append(max(seconds for seconds, *_ in together) / alone[0])
        apart = max(apart, ((together[0][2] - alone[2]).abs().max() / alone[2].abs().max()).item())
    if ranks.rank == 0 and alone is not None:
        table = Table("", "passes", "tokens", "share of one process's")
        table.add_row("one process", *map(str, alone[1]), "1.00")
        for rank, (_, own, _) in enumerate(together):
            table.add_row(f"rank {rank} of {ranks.size}", *map(str, own), f"{own[1] / alone[1][1]:.2f}")
        console = Console()
        console.print(table)
        console.print(
            f"time over one process's, median of {len(ratios)}: {statistics.median(ratios):.2f} (least "
            f"{min(ratios):.2f}); largest difference of scores over the largest score: {apart:.1e}"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
