"""Every mixer by its name in the same Trainer run: it decides, and goes on from a checkpoint bit for bit."""

import json
import shutil

import numpy as np
import pytest

from dynmix.journal import Journal
from dynmix.mixers.registry import BUILT_IN

WEIGHTS = {"web": 0.2, "code": 0.5, "noise": 0.3}
ARGUMENTS = {
    "fixed": {"weights": WEIGHTS},
    "staged": {"stages": [WEIGHTS, {"web": 0.5, "code": 0.5, "noise": 0.0}, {"web": 0.1, "code": 0.1, "noise": 0.8}]},
    "tikmix-d": {"confidence": 0.0},  # with these few sequences everything else is noise
    "tikmix-m": {
        "mixtures": 16,
        "rounds": 1,
        "iterations": 4,
        "samples": 32,
        "surrogate": "ridge",
        "direct": {"confidence": 0.0},
    },
    "ado": {"warmup": 2},  # and 40 steps more until there is a curve to fit: here it only observes
}
FROM_THE_FIRST_SAMPLE = {"natural", "uniform", "temperature", "unimax", "fixed", "staged"}
WITHOUT_MEMORY = {"natural", "uniform", "temperature", "unimax", "fixed"}  # they resume as "static" does


def options(name: str, training) -> dict:
    return {"reference": training.model(dropout=0.0)} if name == "doremi" else {}


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "automixer"])  # it has tests of its own
def test_a_mixer_decides_by_name_and_goes_on_from_a_checkpoint(name, training, tmp_path):
    def run(folder: str, **more):
        mixer = {"name": name} | ARGUMENTS.get(name, {})
        return training.run(
            tmp_path / folder,
            mixer=mixer if len(mixer) > 1 else name,
            options=options(name, training),
            save_strategy="steps",
            save_steps=4,
            **more,
        )

    whole = training.facts(run("whole"))
    assert [start for start, _, _ in whole["stages"]] == [0, 40, 80, 120]
    weights = np.array([list(w.values()) for _, _, w in whole["stages"]])
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    if name in FROM_THE_FIRST_SAMPLE:
        assert not np.allclose(weights[0], [0.3, 0.2, 0.5])
    else:
        np.testing.assert_allclose(weights[0], [0.3, 0.2, 0.5], atol=1e-9)
        assert np.allclose(weights[-1], weights[0], atol=1e-9) == (name in ("static", "ado"))
    assert all(row["error"] is None for row in Journal(tmp_path / "whole/dynmix/journal.jsonl").rows())

    if name in WITHOUT_MEMORY:
        return
    saved = 12
    for later in (16, 20):
        shutil.rmtree(tmp_path / f"whole/checkpoint-{later}")
    resumed = training.facts(run("whole", resume=True))
    assert resumed["stages"] == whole["stages"]
    assert resumed["order"] == whole["order"][saved * training.BATCH :]
    assert resumed["losses"] == whole["losses"][saved:]
    assert resumed["parameters"] == whole["parameters"]


def test_watching_the_losses_leaves_the_trajectory_bit_identical(training, tmp_path):
    watched = training.facts(training.run(tmp_path / "a", mixer="loss-proportional"))
    without = training.facts(training.run(tmp_path / "b", callback=False, stages=watched["stages"]))
    assert watched == without


@pytest.mark.parametrize(
    "arguments",
    [{"dataloader_num_workers": 2}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}],
)
def test_the_losses_by_domain_do_not_depend_on_workers_or_accumulation(arguments, training, tmp_path):
    stages = [
        [
            list(weights.values())
            for _, _, weights in training.facts(training.run(tmp_path / k, mixer="odm", **given))["stages"]
        ]
        for k, given in (("a", {}), ("b", arguments))
    ]
    # Accumulation changes the rounding of gradients, and dropout's draws: alike, not equal.
    np.testing.assert_allclose(stages[1], stages[0], atol=1e-9 if "dataloader_num_workers" in arguments else 2e-2)


def test_two_processes_add_up_their_losses_and_a_killed_run_goes_on_bit_for_bit(launch, training, tmp_path):
    half = training.BATCH // 2
    settings = {"mixer": "odm", "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": half}
    launch(tmp_path / "whole", ranks=2, **settings)
    whole = [json.loads((tmp_path / f"whole/facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert whole[0]["stages"] == whole[1]["stages"]
    assert whole[0]["stages"][-1][2] != whole[0]["stages"][0][2]
    one = {"mixer": "odm", "save_strategy": "steps", "save_steps": 3}
    single = training.facts(training.run(tmp_path / "single", **one))
    assert launch(tmp_path / "killed", kill_at=13, **one) == -9
    launch(tmp_path / "killed", resume=True, **one)
    killed = json.loads((tmp_path / "killed/facts-0.json").read_text())
    assert killed["stages"] == json.loads(json.dumps(single["stages"]))
    assert killed["parameters"] == single["parameters"]
    assert killed["losses"] == single["losses"][12:]


def test_a_last_batch_that_is_filled_up_on_one_process_leaves_none_waiting(launch, training, tmp_path):
    """The last batch of 157 samples is a short one, which accelerate fills up on the second process with the first."""
    half, samples = training.BATCH // 2, training.STEPS * training.BATCH - 3
    launch(tmp_path, ranks=2, mixer="odm", per_device_train_batch_size=half, data_options={"samples": samples})
    first, second = (json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in (0, 1))
    assert first["parameters"] == second["parameters"]
    assert len(first["losses"]) == training.STEPS
