"""A run that domains join, as a process of its own: it keeps its order and its state, and may be killed anywhere.

    python joining_run.py FOLDER DIE_AT WORKERS

FOLDER has the stores `a` and `b`; DIE_AT is the position at which the process kills itself, -1 for never. A boundary is
worked at one batch before it, as the controller does.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from dynmix.mixture.dataset import MixtureDataset

BATCH, SAMPLES, LENGTH = 8, 256, 16
BOUNDARIES = {64: ("x", [0, 1, 1], [3, 2, 0]), 128: None, 192: ("y", [1, 0], [1, 1])}  # domain that joins, if any


def make(folder: Path) -> MixtureDataset:
    stores: dict[str, Any] = {name: folder / name for name in "ab"}
    return MixtureDataset(stores, "uniform", num_samples=SAMPLES, sequence_length=LENGTH, block=BATCH)


def decide(dataset: MixtureDataset, boundary: int, folder: Path) -> None:
    """Extend the dataset if a domain joins here, and publish the stage that begins here."""
    if new := BOUNDARIES[boundary]:
        dataset.extend({new[0]: (np.array(new[1]), np.array(new[2]))}, folder / "index")
    shares = np.arange(1, 1 + len(dataset.domains)) ** 2
    later = [other for other in BOUNDARIES if other > boundary]
    dataset.publish(dict(zip(dataset.domains, shares / shares.sum(), strict=True)), boundary, *later[:1])


def run(folder: Path, die_at: int, **loader: Any) -> None:
    dataset, order, state = make(folder), folder / "order.jsonl", folder / "state.json"
    position = 0
    if state.exists():
        saved = json.loads(state.read_text())
        dataset.load_state_dict(saved["dataset"])
        position = saved["position"]
        lines = order.read_text().splitlines(keepends=True)
        order.write_text("".join(lines[: position // BATCH]))
    else:
        dataset.schedule.hold(min(BOUNDARIES))
    with open(order, "a") as file:
        for batch in DataLoader(dataset, batch_size=BATCH, sampler=range(position, SAMPLES), **loader):
            print(json.dumps([batch["domain"].tolist(), batch["input_ids"].tolist()]), file=file, flush=True)
            position += BATCH
            if position + BATCH in BOUNDARIES:
                decide(dataset, position + BATCH, folder)
            if position == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            beside = state.with_suffix(".tmp")
            beside.write_text(json.dumps({"position": position, "dataset": dataset.state_dict()}))
            beside.replace(state)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), num_workers=int(sys.argv[3]), timeout=60 * (sys.argv[3] != "0"))
