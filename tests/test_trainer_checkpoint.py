import json

import pytest
import torch
from safetensors.torch import save_file

from dynmix.trainer_checkpoint import broken, newest_checkpoint


@pytest.fixture
def folder(tmp_path):
    for step in (5, 10):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        save_file({"w": torch.ones(100)}, path / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"a": torch.ones(100)}, path / name)
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return tmp_path


def test_the_newest_is_taken_by_its_number(folder):
    (folder / "checkpoint-9").mkdir()  # half-written, and not the newest
    assert newest_checkpoint(folder) == folder / "checkpoint-10"
    assert newest_checkpoint(folder / "nowhere") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_one_with_a_file_that_is_cut_short_is_set_aside_and_the_one_before_taken(folder, name, caplog):
    file = folder / "checkpoint-10" / name
    file.write_bytes(file.read_bytes()[:-20])
    assert broken(folder / "checkpoint-10") == f"{name} is cut short"
    assert newest_checkpoint(folder) == folder / "checkpoint-5"
    assert "checkpoint-10 is half-written" in caplog.text
    assert (folder / "broken-checkpoint-10" / name).exists()  # nothing is deleted
    assert newest_checkpoint(folder) == folder / "checkpoint-5"


@pytest.mark.parametrize("content", [None, "", '{"global_step": 1', "[]", '{"global_step": null}'])
def test_one_without_a_whole_trainer_state_is_none(folder, content):
    file = folder / "checkpoint-10" / "trainer_state.json"
    file.unlink() if content is None else file.write_text(content)
    assert "trainer_state.json" in broken(folder / "checkpoint-10")
    assert newest_checkpoint(folder) == folder / "checkpoint-5"


def test_a_second_broken_one_of_the_same_step_does_not_take_the_first_ones_place(folder):
    for _ in range(2):
        (folder / "checkpoint-12").mkdir()
        assert newest_checkpoint(folder) == folder / "checkpoint-10"
    assert len(list(folder.glob("broken-checkpoint-12*"))) == 2
