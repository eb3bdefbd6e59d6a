"""One of several gloo ranks that share their measurements, which must be those of a single process.

Run by test_dealing.py, as 2 ranks and as 4.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from dynmix.influence.batch import next_token_loss
from dynmix.influence.carried import Carried
from dynmix.influence.curvature import EKFAC, KFAC, AdamDiagonal, DataInf, Identity
from dynmix.influence.dealing import Turns
from dynmix.influence.group import group_influence, scored_groups
from dynmix.influence.layers import Layers
from dynmix.influence.losses import task_losses
from dynmix.observation import Influence
from dynmix.ranks import Ranks, from_rank_0
from dynmix.retry import within_memory

VOCABULARY = 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}
Batches = list[dict[str, Tensor]]
Sets = dict[str, Batches]


def batches(sequences: int, seed: int, size: int = 2, length: int = 6) -> Batches:
    """Of sequences of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (sequences, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(3, length + 1, (sequences, 1), generator=generator)).long()
    return [{"input_ids": ids[i : i + size], "attention_mask": mask[i : i + size]} for i in range(0, sequences, size)]


def sets() -> tuple[Sets, Sets]:
    domains = {"small": batches(2, seed=1), "large": batches(5, seed=2)}
    domains["both"] = [domains["small"][0], domains["large"][1]]  # batches that are read once for two domains
    return domains, {"t": batches(3, seed=3), "v": batches(4, seed=5)}


def llama(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True, **settings)).double()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=6)).double()


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:  # type: ignore[union-attr, operator]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with second moments that has changed nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    next_token_loss(model, batches(4, seed=9)[0])[0].mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def same(ours: Influence, single: Influence, rtol: float = 1e-8) -> None:
    """Equal to a single process's to rounding, and to the other ranks' exactly."""
    for name in ("scores", "standard_error", "task_loss", "task_loss_standard_error"):
        own = getattr(ours, name)
        np.testing.assert_allclose(own, getattr(single, name), rtol=rtol, err_msg=name)
        for other in Ranks(True).exchange(name, own):
            assert np.array_equal(own, other, equal_nan=True)


def measured(model: nn.Module, curvature: Any, *, shared: bool, **options: Any) -> Influence:
    return group_influence(model, *sets(), curvature, over_ranks=shared, **options)


def by_rank_0(model: nn.Module, curvature: Any, **options: Any) -> Influence:
    """What it measures alone, among others."""
    found = measured(model, curvature, shared=False, **options) if dist.get_rank() == 0 else None
    return from_rank_0(found)  # type: ignore[return-value]


def test_curvatures(every: bool) -> None:
    """Of a model sharded, and in DDP; with the curvature's batches among the domains', apart, and from no list."""
    alone, models = llama(), [wrapped(kind, llama()) for kind in ("ddp", "fsdp2")]
    optimizers = {id(model): stepped(model) for model in (alone, *models)}
    apart: Any = batches(5, seed=6)
    loader = torch.utils.data.DataLoader(apart, batch_size=None)
    everything = Layers(embeddings=True, norms=True)
    cases: list[tuple[Callable[[nn.Module], Any], dict[str, Any]]] = [
        (lambda _: EKFAC(), {"error_sequences": None, "layers": everything, "curvature_batches": loader}),
        (lambda _: EKFAC(labels="sampled"), {"curvature_batches": apart}),
        (lambda _: Identity(), {"error_sequences": 2}),
        (lambda m: AdamDiagonal(optimizers[id(m)]), {"layers": everything}),
        (lambda _: DataInf(), {"curvature_batches": apart}),
        (lambda _: EKFAC(), {"strata": {"v": 2}}),
    ]
    for curvature, options in cases if every else cases[-2:]:
        single = by_rank_0(alone, curvature(alone), **options)
        assert single.finite
        for model in models if "strata" in options else models[1:]:
            same(measured(model, curvature(model), shared=True, **options), single)
            if "error_sequences" in options:  # each rank for itself, to the bit
                unshared = measured(model, curvature(model), shared=False, **options)
                assert np.array_equal(unshared.scores, single.scores)
    if every:
        (domains, tasks), single_losses = sets(), task_losses(alone, sets()[1])
        expected = scored_groups(alone, domains, tasks, KFAC())
        for model in models[1:]:
            found = scored_groups(model, domains, tasks, KFAC(), over_ranks=True)
            same(found.influence, expected.influence)
            for name in domains:
                np.testing.assert_allclose(found.scores[name], expected.scores[name], rtol=1e-7)
                assert np.array_equal(found.tokens[name], expected.tokens[name])
            for mine, theirs in zip(task_losses(model, tasks, over_ranks=True), single_losses, strict=True):
                np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-9)


def test_experts_that_only_some_ranks_see() -> None:
    everything = Layers(embeddings=True, norms=True)
    single = by_rank_0(mixtral(), EKFAC(), layers=everything)
    same(measured(wrapped("fsdp2", mixtral()), EKFAC(), shared=True, layers=everything), single)


def test_factors_that_are_carried() -> None:
    model, ours, single = llama(), Carried(EKFAC(ema=0.5)), Carried(EKFAC(ema=0.5))
    for seed in range(2):
        fit_on = batches(3, seed=seed)
        options: Any = {"curvature_batches": fit_on, "error_sequences": 2}
        same(measured(model, ours, shared=True, **options), by_rank_0(model, single, **options))


def test_every_rank_has_its_share_and_a_failure_is_everybodys(rank: int) -> None:
    model, size = llama(), dist.get_world_size()
    done: list[int] = []
    single = by_rank_0(model, EKFAC(), tick=lambda: done.append(1))
    alone = from_rank_0(len(done))
    done.clear()
    same(measured(model, EKFAC(), shared=True, tick=lambda: done.append(1)), single)
    own, passes = len(done), 5  # each may end with a turn that some ranks have nothing for
    assert alone / size <= own <= alone / size + passes
    assert len(set(Ranks(True).exchange("passes", own))) == 1

    def failing(at: int, failure: Exception) -> Influence:
        """Rank 1 fails in its turn number `at`."""
        done.clear()

        def tick() -> None:
            done.append(1)
            if rank == 1 and len(done) == at:
                raise failure

        return measured(model, EKFAC(), shared=True, tick=tick)

    for at in (1, own // 2, own):
        with pytest.raises(OSError if rank == 1 else RuntimeError) as raised:
            failing(at, OSError("boom"))
        assert str(raised.value) == ("boom" if rank == 1 else "another rank failed: OSError: boom")
    turns, shrunk = iter([2, own + 1]), []

    def shrink() -> int:
        shrunk.append(1)
        return 1

    same(within_memory(lambda: failing(next(turns), torch.OutOfMemoryError("full")), shrink), single)
    assert shrunk == [1]

    words = "another rank failed: ValueError: error_sequences=1" if rank else "error_sequences=1: at least 2"
    with pytest.raises(RuntimeError if rank else ValueError, match=words):
        measured(model, Identity(), shared=True, error_sequences=2 if rank else 1)
    with pytest.raises(ValueError, match="the ranks were given different batches"):
        group_influence(model, sets()[0], {"t": batches(3, seed=rank)}, Identity(), over_ranks=True)
    with pytest.raises(RuntimeError, match=r"this rank is at '.*' and another one at '.*'"):
        Turns(Ranks(True), lambda batch: None).gathered(f"pass {rank}", [])


def test_what_is_not_finite_reaches_all() -> None:
    model, broken = llama(), sets()[0]["large"][1]["input_ids"][0]

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        losses, tokens = next_token_loss(model, batch)
        return losses * torch.where((batch["input_ids"] == broken).all(1), torch.nan, 1.0), tokens

    for curvature in (EKFAC(), DataInf()):
        ours = measured(model, curvature, shared=True, loss=loss)
        same(ours, by_rank_0(model, curvature, loss=loss))
        assert np.isnan(ours.scores[:, 1]).all()
        assert np.isfinite(ours.scores[:, 0]).all()


def train(kind: str, rank: int, measure: bool) -> list[Tensor]:
    model, (domains, tasks) = wrapped(kind, llama(attention_dropout=0.2)), sets()
    torch.manual_seed(100 + rank)
    optimizer, trace = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(4):
        # before the first forward, between backward and step, and after a step
        if measure and step in (0, 3):
            task_losses(model, tasks, over_ranks=step == 0)
        losses, tokens = next_token_loss(model, {"input_ids": torch.randint(0, VOCABULARY, (4, 6))})
        loss = losses.sum() / tokens.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if measure and step in (1, 2):
            group_influence(model, domains, tasks, KFAC(), over_ranks=step == 1)
        optimizer.step()
        optimizer.zero_grad()
        if measure and step == 0:
            group_influence(model, domains, tasks, KFAC(), over_ranks=True)
        trace.append(loss.detach())
    return trace + [getattr(p, "to_local", lambda p=p: p)().detach().clone() for p in model.parameters()]


def test_training_is_the_same_bit_for_bit(kind: str, rank: int) -> None:
    without, with_measurements = train(kind, rank, False), train(kind, rank, True)
    assert len({float(loss) for loss in without[:4]}) == 4
    for index, (expected, actual) in enumerate(zip(without, with_measurements, strict=True)):
        assert torch.equal(expected, actual), f"{kind}: entry {index} differs"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    rank, every = dist.get_rank(), dist.get_world_size() == 2  # four ranks are slow on few cores
    test_curvatures(every)
    test_experts_that_only_some_ranks_see()
    test_every_rank_has_its_share_and_a_failure_is_everybodys(rank)
    if every:
        test_training_is_the_same_bit_for_bit("ddp", rank)
        test_training_is_the_same_bit_for_bit("fsdp2", rank)
        test_factors_that_are_carried()
        test_what_is_not_finite_reaches_all()
    dist.barrier()  # leaving while the other still talks aborts the process
    dist.destroy_process_group()
