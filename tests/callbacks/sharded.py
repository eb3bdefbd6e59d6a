"""A hook in a plain loop around an FSDP2 model; run as ranks by test_loop.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from dynmix import TiKMiXD
from dynmix.callbacks import MixtureHook
from tests.callbacks import training


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    model = training.model(dropout=0.0)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dataset = training.dataset()
    hook = MixtureHook(
        model,
        dataset,
        tasks=training.tasks(),
        mixer=TiKMiXD(confidence=0.0),
        stage_steps=training.STAGE_STEPS,
        probe_sequences=8,
        curvature_sequences=16,
        task_sequences=12,
        output=None if dist.get_rank() else output,  # as where one rank writes
        keep=1,
    )
    half = training.BATCH // 2
    order = []
    for batch in DataLoader(dataset, batch_size=half, sampler=DistributedSampler(dataset, shuffle=False)):
        order += batch["input_ids"][:, :2].tolist()
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hook.step()
    hook.finish()
    stages = [[stage.start, stage.end, stage.weights] for stage in dataset.schedule.stages]
    facts = {"order": order, "stages": stages}
    (output / f"facts-{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
