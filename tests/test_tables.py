import io

from rich.console import Console

from dynmix.tables import comparison_table, stage_table
from tests.journal_rows import journal_row


def row(**changes):
    measured = {
        "start": 40,
        "weights_before": {"web": 0.5, "noise": 0.5},
        "weights": {"web": 0.75, "noise": 0.25},
        "influence": [[1.234, None]],
        "standard_error": [[0.1, None]],
        "task_loss": {"t": 2.5},
        "task_loss_standard_error": {"t": 0.1},
        "message": "objective 1 -> 0",
    }
    return journal_row(1, **({"domains": ["web", "noise"], "tasks": ["t"]} | measured | changes))


def text(table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def test_a_stage_shows_weights_influence_losses_and_tokens():
    shown = text(stage_table(row()))
    for part in ("stage 1, from sample 40", "50.0→75.0%", "1.2±0.1", "1,000", "t 2.5000", "objective"):
        assert part in shown
    assert "out of memory" in text(stage_table(row(error="out of memory")))


def test_names_of_domains_and_tasks_are_no_markup():
    names = {"web[en]": 1, "[/b]": 2}
    shown = text(stage_table(row(domains=list(names), tokens=names, weights=None, weights_before=None, tasks=["[/i]"])))
    assert all(name in shown for name in (*names, "[/i]"))


def test_losses_and_words_are_no_markup():
    shown = text(stage_table(row(task_loss={"mmlu[five]": 2.5}, error="no file [/data/x] of shape [batch, 3]")))
    assert all(part in shown for part in ("mmlu[five] 2.5000", "no file [/data/x] of shape [batch, 3]"))


def test_the_first_stage_and_the_end_have_less_to_show():
    first = text(stage_table(row(weights_before=None, influence=None, standard_error=None)))
    assert "75.0%" in first
    assert "→" not in first
    end = text(stage_table(row(kind="final", weights=None, weights_before=None, influence=None)))
    assert "end of the run" in end
    assert "weight" not in end


def test_comparison_has_an_honest_sign():
    better, worse = row(task_loss={"t": 2.0}), row(task_loss={"t": 2.5})
    assert "-0.5000" in text(comparison_table([better], [worse]))
    assert "+0.5000" in text(comparison_table([worse], [better]))
    assert "-" in text(comparison_table([row(task_loss=None)], [worse]))
    named = row(tasks=["t[en]"], task_loss={"t[en]": 2.0}, task_loss_standard_error={"t[en]": 0.1})
    assert "t[en]" in text(comparison_table([named], [named]))
