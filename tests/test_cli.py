import json
import logging
import os
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

import dynmix.laws.auto
import dynmix.laws.optimise
import dynmix.shown
from dynmix.cli import app
from dynmix.mixers.registry import mixer_names

run = CliRunner().invoke


def test_report_of_a_folder_without_a_journal_is_one_clear_line(tmp_path):
    done = run(app, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert "journal.jsonl" in done.output.replace("\n", "")


def test_the_version_is_that_of_the_package():
    done = run(app, ["--version"])
    assert (done.exit_code, done.output) == (0, version("dynmix") + "\n")


def test_mixers_lists_every_name_with_what_it_needs():
    done = run(app, ["mixers"])
    assert done.exit_code == 0
    for name in mixer_names():
        assert any(line.strip().startswith(name) for line in done.output.splitlines()), name
    assert "reference_loss" in done.output


def test_a_demo_with_a_mixer_that_is_not_there_or_needs_a_reference_is_refused_at_once(tmp_path):
    for name, message in (("tikmix", "no mixer 'tikmix'"), ("doremi", "reference model")):
        done = run(app, ["demo", "--mixer", name, "--output", str(tmp_path / "run")])
        assert done.exit_code == 1
        assert message in done.output
        assert not (tmp_path / "run").exists()


def test_importing_the_package_and_its_commands_loads_nothing_that_takes_time():
    code = (
        "import sys, json, dynmix, dynmix.cli; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "accelerate", "numpy", "scipy", "sklearn", "pandas", "pyarrow", "matplotlib"}
    heavy |= {"lightgbm", "lightning", "ray", "datasets", "omegaconf"}
    assert not heavy & {*json.loads(done.stdout)}


def test_what_is_logged_goes_to_stderr_and_leaves_json_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    (tmp_path / "journal.jsonl").write_text('{"kind": "sta')
    done = run(app, ["inspect", str(tmp_path), "--json"])
    assert "half-written" in done.stderr
    assert "half-written" not in done.stdout


def test_fit_shows_how_far_it_is(tmp_path, monkeypatch):
    bars = []

    class Bar(dynmix.shown.Bar):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": False})
            bars.append(self)

    for module in (dynmix.laws.auto, dynmix.laws.optimise):
        monkeypatch.setattr(module, "Bar", Bar)
    runs = tmp_path / "runs.csv"
    lines = [f"{w},{1 - w},{3 + (w - 0.3) ** 2}" for w in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)]
    runs.write_text("\n".join(["weight/web,weight/code,loss/web", *lines]))
    assert run(app, ["fit", str(runs), "--law", "ridge"]).exit_code == 0
    assert [(bar.desc, bar.n) for bar in bars] == [
        ("comparing laws", 5), ("fitting to all runs", 1), ("searching the best mixture", bars[-1].total)
    ]  # fmt: skip
    assert bars[0].total == 5
    assert all(bar.delay == 2 for bar in bars)


def test_what_other_libraries_print_of_their_log_is_not_printed_again():
    code = """if True:
        import logging
        from dynmix.cli import main
        hub = logging.getLogger("hub")
        hub.addHandler(logging.StreamHandler())
        main()
        hub.warning("retrying")
        logging.warning("of nobody")  # which makes a handler for all
        logging.getLogger("dynmix.part").warning("half-written")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr.count("retrying"), done.stderr.count("half-written")) == ("", 1, 1)


def test_what_nobody_reads_ends_nothing():
    """Rich ends a process that writes to a closed pipe, and takes its stdout away; tqdm raises, in any library."""
    code = """if True:
        import logging, os
        from tqdm import tqdm
        from dynmix.cli import main
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        main()
        logging.getLogger("dynmix.part").warning("half-written")
        list(tqdm(range(3)))
        print("done")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_what_the_locale_has_no_letters_for_ends_nothing(tmp_path, encoding):
    path, shown = tmp_path / os.fsdecode(b"\xff"), {"latin-1": b"\\u2264", "utf-8": "≤".encode()}
    code = (
        "import sys, typer, dynmix.cli as cli; from dynmix.commands import print_json; cli.main();"
        "typer.echo('≤'); typer.echo(sys.argv[1]); print_json(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True
    )
    sign, name, *rest = done.stdout.split(b"\n")
    assert (done.returncode, sign, name) == (0, shown[encoding], os.fsencode(path))
    assert json.loads(b"".join(rest)) == [str(path)]


@pytest.mark.parametrize(("rank", "said"), [("0", "interrupted: checkpoint-40 is kept"), ("1", "")])
def test_ctrl_c_ends_one_of_several_processes_at_once_even_where_python_does_not_come_round(tmp_path, rank, said):
    """As in a collective: the main thread is in C, where it waits for a lock that it has itself."""
    for name in ("checkpoint-7/trainer_state.json", "checkpoint-40/trainer_state.json", "checkpoint-50/optimizer.pt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    code = """if True:
        import ctypes, os, sys, dynmix.commands.train as train
        train.end_at_once(lambda: train._kept(sys.argv[1]) if os.environ["RANK"] == "0" else "")
        print("ready", flush=True)
        library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        library.pthread_mutex_lock(lock)
        library.pthread_mutex_lock(lock)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"RANK": rank},
    )  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors.strip().partition(",")[0] == said
