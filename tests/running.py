"""The loop of a whole run on the smallest model, for the tests of the rooms that it joins."""

import json

import torch

from dynmix import MixtureController, MixtureDataset, TiKMiXD
from tests.small import Bigram

NAMES = ("a", "b")
BATCH, STEPS = 4, 5


def sequences(domain: int, rows: int):
    return [{"input_ids": torch.tensor([domain, row % 64, row // 64, 3, 4])} for row in range(rows)]


def dataset(rows=(200, 300), samples=100, weights="natural"):
    return MixtureDataset(
        {name: sequences(i, n) for i, (name, n) in enumerate(zip(NAMES, rows, strict=True))},
        weights=weights,
        num_samples=samples,
        block=BATCH,
    )


def controller(data, mixer=None, **options):
    sizes = {"probe_sequences": 10, "curvature_sequences": 20, "task_sequences": 12}
    options = {"stage_steps": STEPS} | sizes | options
    return MixtureController(data, {"t": sequences(0, 6)}, mixer or TiKMiXD(), **options)


def begun(loop, model=None, step=0):
    """The loop, planned and begun after so many steps."""
    loop.plan(batch_size=BATCH)
    loop.begin(model or Bigram(), step)
    return loop


def run(loop, model=None, steps=25):
    model = model or Bigram()
    begun(loop, model)
    return [loop.step_ended(model, step) for step in range(1, steps + 1)]


def stepped(loop, model, first=1, last=25):
    """Take these steps; returns the state after each, by step, as a checkpoint would have it."""
    states = {}
    for step in range(first, last + 1):
        loop.step_ended(model, step)
        states[step] = json.loads(json.dumps(loop.state_dict()))
    return states
