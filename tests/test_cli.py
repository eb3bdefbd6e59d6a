from typer.testing import CliRunner

from dynmix.cli import app
from dynmix.mixers.registry import mixer_names

run = CliRunner().invoke


def test_report_of_a_folder_without_a_journal_is_one_clear_line(tmp_path):
    done = run(app, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert "journal.jsonl" in done.output.replace("\n", "")


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
