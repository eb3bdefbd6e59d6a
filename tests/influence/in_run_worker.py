"""One of two gloo processes that train under DDP or FSDP2, looked at and not: the same bit for bit, and autograd's.

Run as two ranks of `in_run_worker.py`.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from dynmix.influence.batch import next_token_loss
from dynmix.influence.curvature import Identity
from dynmix.influence.in_run import ParameterProducts, Seen
from dynmix.influence.task_gradients import TaskGradients, task_gradients


def plain() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, num_attention_heads=2, attention_dropout=0.2, tie_word_embeddings=True, **sizes)
    ).train()


def wrapped(kind: str) -> nn.Module:
    model = plain()
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[no-any-return]


def train(kind: str, rank: int, R: TaskGradients | None) -> tuple[list[Tensor], list[Seen]]:
    """Three steps of two micro-batches, with the sum over the step's tokens of all ranks as the loss's denominator."""
    model = wrapped(kind)
    watch = None if R is None else ParameterProducts(model, R)
    torch.manual_seed(100 + rank)
    optimizer, trace, seen = torch.optim.AdamW(model.parameters(), lr=1e-2), [], []
    for step in range(3):
        for half in range(2):
            ids = micro_batch(step, half, rank)
            if kind == "ddp":
                model.require_backward_grad_sync = half == 1
            else:
                model.set_requires_gradient_sync(half == 1)  # type: ignore[operator]
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(80)).loss * 2
            loss.backward()
            trace.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            seen += watch.take()
            assert not watch.silent
    return trace + [getattr(p, "to_local", lambda p=p: p)().detach().clone() for p in model.parameters()], seen


def micro_batch(step: int, half: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * half + rank)
    return torch.randint(0, 50, (2 + half, 8), generator=generator)


def by_hand(ids: Tensor, R: TaskGradients) -> Tensor:
    model = plain().eval()  # without dropout
    named = dict(model.named_parameters())
    losses, _ = next_token_loss(model, {"input_ids": ids})
    found = torch.autograd.grad(losses.sum(), [named[name] for name in R.parameters])
    parts = [(R.parameters[name] * g).flatten(1).sum(1) for name, g in zip(R.parameters, found, strict=True)]
    return torch.stack(parts).sum(0)


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rank = dist.get_rank()
    tasks = {name: [{"input_ids": micro_batch(k, 1, 7)}] for name, k in (("t", 50), ("u", 60))}
    R = task_gradients(plain(), tasks, Identity(), tasks["t"], folds=2, over_ranks=True)
    for kind in ("ddp", "fsdp2"):
        without, _ = train(kind, rank, None)
        watched, seen = train(kind, rank, R)
        for index, (expected, actual) in enumerate(zip(without, watched, strict=True)):
            assert torch.equal(expected, actual), f"{kind}: entry {index} differs"
        assert [float(one.tokens.sum()) for one in seen] == [14.0, 21.0] * 3
        first = micro_batch(0, 0, rank)
        assert torch.equal(seen[0].input_ids, first)
        # Dropout of attention alone, at the first step.
        assert (
            torch.nn.functional.cosine_similarity(
                torch.as_tensor(seen[0].products[0]).float(), by_hand(first, R), dim=0
            )
            > 0.9
        ), (seen[0].products, by_hand(first, R))
    dist.barrier()  # leaving while the other still talks aborts the process
    dist.destroy_process_group()
