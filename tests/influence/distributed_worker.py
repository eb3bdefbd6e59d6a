"""One of two gloo processes: five steps with dropout, with and without measurements, must be the same bit for bit.

Run as `distributed_worker.py ddp|fsdp2 RENDEZVOUS_FILE RANK`.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dynmix.influence.capture import next_token_loss
from dynmix.influence.curvature import EKFAC
from dynmix.influence.group import group_influence


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + self.dropout(self.down(self.up(x + mean).relu()))  # type: ignore[no-any-return]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 50, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def wrapped(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Tiny()
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def train(kind: str, rank: int, measure: bool) -> list[Tensor]:
    model, probes = wrapped(kind), torch.randint(0, 50, (4, 2, 6), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(100 + rank)
    optimizer, trace = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    sets = [[{"input_ids": probe}] for probe in probes]
    for step in range(5):
        # before the first forward, between backward and step, and after a step
        if measure and step in (0, 3):
            check(model, sets)
        losses, tokens = next_token_loss(model, {"input_ids": torch.randint(0, 50, (4, 6))})
        loss = losses.sum() / tokens.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if measure and step == 1:
            check(model, sets)
        optimizer.step()
        optimizer.zero_grad()
        trace.append(loss.detach())
    return trace + [getattr(p, "to_local", lambda p=p: p)().detach().clone() for p in model.parameters()]


def check(model: nn.Module, sets: list[list[dict[str, Tensor]]]) -> None:
    """The measurement is that of the same weights without any wrapper."""
    domains, tasks = {"a": sets[0], "b": sets[1]}, {"t": sets[2], "u": sets[3]}
    influence = group_influence(model, domains, tasks, EKFAC())
    with torch.random.fork_rng():
        plain = Tiny()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    state = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in inner.state_dict().items()}
    plain.load_state_dict(state)
    assert influence.finite
    assert (influence.scores == group_influence(plain, domains, tasks, EKFAC()).scores).all()


if __name__ == "__main__":
    kind, rendezvous, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    without, measured = train(kind, rank, False), train(kind, rank, True)
    assert len({float(loss) for loss in without[:5]}) == 5
    for index, (expected, actual) in enumerate(zip(without, measured, strict=True)):
        assert torch.equal(expected, actual), f"{kind}: entry {index} differs"
    dist.barrier()  # leaving while the other still talks aborts the process
    dist.destroy_process_group()
