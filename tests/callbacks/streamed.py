"""The Trainer on a `MixtureStream`, which its first process reads for all; run as ranks by test_stream.py."""

import json
import os
import sys
from pathlib import Path

from dynmix import MixtureStream, Static
from tests.callbacks import training


def stream() -> MixtureStream:
    return MixtureStream(
        {name: training.sequences(i) for i, name in enumerate(training.DOMAINS)},
        num_samples=training.STEPS * training.BATCH,
        sequence_length=training.LENGTH,
        block=training.BATCH,
        batch_size=training.BATCH // 2,
        world_size=1,
        sizes=dict.fromkeys(training.DOMAINS, training.ROWS),
    )


if __name__ == "__main__":
    training.dataset = stream
    trained = training.run(
        Path(sys.argv[1]),
        steps=8,
        per_device_train_batch_size=training.BATCH // 2,
        dataloader_num_workers=2,
        mixer=Static(),
        options={"loss_every": 100},
    )
    domains = trained.train_dataset.schedule.assign(0, 8 * training.BATCH)[0]
    found = {"order": trained.order, "domains": domains.tolist()}
    (Path(sys.argv[1]) / f"facts-{os.environ['RANK']}.json").write_text(json.dumps(found))
