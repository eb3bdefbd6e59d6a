import errno
import logging

import pytest
import torch
import typer
from safetensors import SafetensorError
from typer.testing import CliRunner

from dynmix.cli import app as cli
from dynmix.commands import _GO_ON, command
from dynmix.recipe.names import RecipeError


def run_that_raises(problem: BaseException | None, *words: str):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @command
    def work(number: int = 0) -> None:
        """Do it."""
        if problem is not None:
            raise problem

    return CliRunner().invoke(app, [*words])


@pytest.mark.parametrize(
    ("problem", "code", "message"),
    [
        (ValueError("tasks.web: it is empty"), 1, "error: tasks.web: it is empty"),
        (RecipeError("mixr: no key"), 2, "error: mixr: no key"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.csv"), 1, "a.csv: no such file or directory"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 22400 vs 22288"), 1, "disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "lower measurement.micro_batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (MemoryError(), 1, "out of memory"),
        (KeyError("x"), 1, "error: KeyError: 'x' (`dynmix --verbose ...` shows where)"),
        (KeyboardInterrupt(), 130, "interrupted: the same command begins anew"),
        (KeyboardInterrupt("stopped after step 3"), 130, "stopped after step 3"),
        (typer.Exit(7), 7, ""),
        (typer.BadParameter("number"), 2, "number"),
        (None, 0, ""),
    ],
)  # fmt: skip
def test_a_failure_is_one_sentence_and_an_exit_code(problem, code, message):
    done = run_that_raises(problem)
    assert done.exit_code == code
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("name", "words"), [("demo", "begins anew"), ("influence", "begins anew"), ("prepare", "goes on from there")]
)
def test_an_interrupted_command_says_whether_it_would_go_on(name, words, capsys):
    def interrupted():
        raise KeyboardInterrupt

    interrupted.__name__ = name
    with pytest.raises(typer.Exit):
        command(interrupted)()
    assert words in capsys.readouterr().err
    assert {each.callback.__name__ for each in cli.registered_commands} >= {*_GO_ON, name}


def test_a_misuse_is_exit_code_2():
    assert run_that_raises(None, "--nonsense").exit_code == 2


def test_with_verbose_what_was_raised_goes_through(caplog):
    with caplog.at_level(logging.INFO, logger="dynmix"):
        assert isinstance(run_that_raises(KeyError("x")).exception, KeyError)


def test_that_accelerate_started_one_process_where_several_were_asked_for_is_told(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for told, names in ((True, ()), (False, ("WORLD_SIZE",)), (False, ("PMI_SIZE",))):
        with monkeypatch.context() as environment:
            environment.delenv("WORLD_SIZE", raising=False)
            for name in names:
                environment.setenv(name, "2")
            caplog.clear()
            assert CliRunner().invoke(cli, ["train", "none.yaml"]).exit_code == 2
            assert ("give --multi_gpu" in caplog.text) == told


def test_an_example_beside_a_recipe_is_a_misuse():
    done = CliRunner().invoke(cli, ["train", "recipe.yaml", "--example", "mde"])
    assert done.exit_code == 2
    assert "--example: prints a recipe and trains none" in done.output
    assert CliRunner().invoke(cli, ["train", "--example", "mde"]).exit_code == 0
