"""What is said of domains while a run reads them again, against the epochs of a walk."""

import logging

import numpy as np
import pytest

from dynmix import MixtureDataset
from dynmix.ahead import Ahead

SIZES = {"small": 3, "large": 50}


def dataset(samples: int) -> MixtureDataset:
    domains = {name: [{"input_ids": np.full(4, k)} for k in range(size)] for name, size in SIZES.items()}
    return MixtureDataset(domains, {"small": 0.5, "large": 0.5}, num_samples=samples, seed=3)


def test_each_new_epoch_is_told_once_in_the_step_that_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dynmix.mixture")
    data, batch = dataset(24), 2
    ahead = Ahead(data)
    again = ahead.look(0, 24)
    domains = data.schedule.assign(0, 24)[0]
    walk = [int(p) for k, p in enumerate(np.flatnonzero(domains == 0)) if k and k % SIZES["small"] == 0]
    assert [each.position for each in again] == walk
    told: dict[int, list[str]] = {}
    for step in range(1, 24 // batch + 1):
        caplog.clear()
        ahead.tell(step * batch, step)
        told[step] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for position in walk:
        step = position // batch + 1
        assert any(f"at position {position}" in text and text.endswith(f"in step {step}") for text in told[step])
    assert sum(map(len, told.values())) == len(walk)


def test_a_run_that_goes_on_is_told_only_what_is_to_come(caplog: pytest.LogCaptureFixture) -> None:
    data = dataset(24)
    whole, rest = Ahead(data).look(0, 24), Ahead(data).look(12, 24)
    assert rest == [each for each in whole if each.position >= 12]
    assert Ahead(data).look(24, 24) == []
    ahead = Ahead(data)
    ahead.look(0, 24)
    ahead.warn()
    assert f"domain 'small' begins its epoch 2 at position {whole[0].position}" in caplog.text
