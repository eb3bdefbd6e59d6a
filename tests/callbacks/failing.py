"""A run of an adapter that fails before its ranks first work together, on rank 1 alone; run as ranks by the tests.

Arguments: a folder, the adapter's name, and the controller's method that fails.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dynmix.callbacks import MixtureHook
from dynmix.controller import MixtureController
from tests.callbacks import training


def loop(folder: Path) -> None:
    options = {"probe_sequences": 8, "curvature_sequences": 16, "task_sequences": 12}

    def hook() -> MixtureHook:
        return MixtureHook(training.model(), training.dataset(), training.tasks(), "static", 5, **options)

    training_hook = hook()
    training_hook.dataset.__getitems__(range(training.BATCH // 2))
    training_hook.step()
    hook().load_state_dict(training_hook.state_dict())


def lightning(folder: Path) -> None:
    from tests.callbacks import lightning_run

    lightning_run.run(folder, processes=2)


def fails(*_: Any, **__: Any) -> None:
    raise OSError("no disk")


def main(folder: Path, adapter: str, method: str) -> None:
    runs = {
        "loop": loop,
        "trainer": lambda folder: training.run(folder, per_device_train_batch_size=4),
        "lightning": lightning,
    }
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    if rank == 1:
        setattr(MixtureController, method, fails)
    try:
        runs[adapter](folder)
    except Exception as failure:
        print(f"<{rank} {type(failure).__name__}: {failure}>", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
