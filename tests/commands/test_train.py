"""What the command itself does; runs from recipes are in `recipe/test_run.py`."""

import weakref

import torch.distributed as dist
from typer.testing import CliRunner

import dynmix.recipe.run as runs
from dynmix.cli import app


def test_the_model_is_gone_before_the_process_group(tmp_path, monkeypatch):
    """DDP's reducer, as the last to know of a group of gloo, can wait for one of its threads forever."""
    made, gone, destroy = [], [], dist.destroy_process_group

    class Run:
        folder = tmp_path

    def build_run(recipe, on_paper):
        run = Run()
        made.append(weakref.ref(run))
        return run

    def destroyed():
        gone.append(made[0]() is None)
        destroy()

    monkeypatch.setattr(runs, "build_run", build_run)
    monkeypatch.setattr(runs, "train", lambda run, console: 3)
    monkeypatch.setattr(dist, "destroy_process_group", destroyed)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output: run\nmodel: base\ndomains: {web: stores/web}\ntasks: {web: web}\nstages: {steps: 5}\n")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    done = CliRunner().invoke(app, ["train", str(recipe)])
    assert done.exit_code == 0, done.output
    assert "3 steps done" in done.output
    assert gone == [True]
