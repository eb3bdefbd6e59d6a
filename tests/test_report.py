import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmix.journal import Journal
from dynmix.report import _scaled, write_report
from dynmix.report_figures import _apart, power_of_1000
from dynmix.report_rows import RunRows
from tests.journal_rows import journal_row

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr", "path", "use"}
AWKWARD = ["<script>alert(1)</script>", "a & b", "$x^2$", 'say "hi"', "網頁", "two\nlines", "x" * 200, "a_b/c-d"]


class Page(HTMLParser):
    """What a browser would find: tags in order (checked to nest), attributes, and the text of cells and figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.svg_text: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "text":
            self.svg_text.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        if self.open[-1:] == ["text"]:
            self.svg_text[-1] += data

    def count(self, tag: str, word: str = "") -> int:
        return sum(1 for name, attrs in self.tags if name == tag and word in ["", *(attrs.get("class") or "").split()])


def write_journal(
    path: Path,
    domains: list[str],
    tasks: list[str],
    *,
    stages: int = 4,
    final: bool = True,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A run of random numbers; `changes` overwrite keys of every row."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-6, 2, size=(len(tasks), 1))
    for stage in range(stages + final):
        last, shape = stage == stages, (len(tasks), len(domains))
        weights = dict(zip(domains, rng.dirichlet(np.ones(len(domains))), strict=True))
        numbers = [dict(zip(tasks, rng.uniform(0.01, 4, len(tasks)), strict=True)) for _ in range(4)]
        measured = stage > 0 and not last
        row = journal_row(
            stage,
            domains=domains,
            tasks=tasks,
            kind="final" if last else "stage",
            step=100 * stage,
            start=1024 * stage,
            end=None if last else 1024 * stage + 1024,
            weights_before=weights if measured else None,
            weights=None if last else weights,
            influence=scale * rng.normal(size=shape) if measured else None,
            standard_error=scale * rng.uniform(0.1, 1, size=shape) if measured else None,
            task_loss=numbers[0],
            task_loss_standard_error=numbers[1],
            predicted_gain=numbers[2] if measured else None,
            predicted_gain_standard_error=numbers[3] if measured else None,
            solver="dual" if measured else None,
            message=f"the words of stage {stage}",
            seconds={"measure": 1.5, "propose": 0.25, "snapshot": 0.125},
        )
        row["stage"] = max(0, stage - last)  # the final row is of the last stage
        Journal(path).append(row | changes)  # type: ignore[operator]
    return path


def draw(journal: Path, **options: Any) -> tuple[Page, str]:
    text = write_report(journal, journal.with_suffix(".html"), **options).read_text(encoding="utf-8")
    return Page(text), text


def loads_nothing(page: Page, text: str) -> bool:
    names = ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background")
    targets = [value or "" for _, attrs in page.tags for name, value in attrs.items() if name in names]
    styles = "".join(re.findall(r"url\([^)]*\)|@import[^;]*", text))
    loading = {"script", "link", "img", "iframe", "object", "embed", "image"} & {tag for tag, _ in page.tags}
    return not loading and all(target.startswith("#") for target in targets + re.findall(r"url\(([^)]*)", styles))


def test_a_whole_run_beside_its_baseline(tmp_path: Path) -> None:
    domains, tasks = ["code", "docs", "noise"], ["qa", "held_out"]
    journal = write_journal(tmp_path / "run.jsonl", domains, tasks)
    baseline = write_journal(tmp_path / "static.jsonl", domains, tasks, seed=1, influence=None)
    page, text = draw(journal, baseline=baseline, title="Run <1>")
    rows, others = Journal(journal).rows(), Journal(baseline).rows()

    assert loads_nothing(page, text)
    assert page.count("svg") == 1 + 2 * len(tasks)  # weights; losses and gains, a task each
    assert page.count("table", "heat") == 3
    assert "Run <1>" in page.text
    for row in rows:
        assert row["message"] in page.text
        for share in (row["weights"] or {}).values():
            assert f"{100 * share:.1f}\u202f%" in page.cells
    for task in tasks:
        ours, theirs = ((each[-1]["task_loss"] or {})[task] or math.nan for each in (rows, others))
        errors = [((each[-1]["task_loss_standard_error"] or {})[task] or math.nan) for each in (rows, others)]
        difference = f"{ours - theirs:+.4f} ±\xa0{math.hypot(*errors):.4f}".replace("-", "\N{MINUS SIGN}")
        verdict = page.cells[page.cells.index(difference) + 1]
        assert verdict.startswith("lower" if ours < theirs else "higher")
        assert verdict.endswith("within the noise") == (abs(ours - theirs) < 2 * math.hypot(*errors))
    assert "If both are of the same sequences the error is less" in page.text
    assert {"code", "docs", "noise"} <= {text.split()[0] for text in page.svg_text}


def test_the_heat_map_has_each_number_on_its_tasks_scale_and_marks_the_uncertain(tmp_path: Path) -> None:
    influence = [[0.0123, -0.0041, 0.0002], [-40.0, 8.0, None]]
    error = [[0.001, 0.003, None], [30.0, 1.0, 1.0]]
    tasks, domains = ["fine", "coarse"], ["a", "b", "c"]
    journal = write_journal(
        tmp_path / "run.jsonl", domains, tasks, stages=1, final=False, influence=influence, standard_error=error
    )
    page, _ = draw(journal)
    heat = [(attrs["class"], attrs["style"]) for tag, attrs in page.tags if tag == "td" and "class" in attrs]
    assert heat == [
        ("helps", "--strength: 1.0"),
        ("hurts uncertain", "--strength: 1.0"),
        ("hurts uncertain", "--strength: 0.333"),
        ("helps", "--strength: 0.2"),
        ("helps", "--strength: 0.016"),
        ("missing", "--strength: 0"),
    ]
    assert "fine\N{MULTIPLICATION SIGN} 10⁻³" in page.cells
    assert "coarse" in page.cells
    for cell in ("+12.3± 1.0", "−4.1± 3.0", "+0.2", "−40.0± 30.0", "+8.0± 1.0", "–"):  # noqa: RUF001
        assert cell in page.cells


def test_realised_gain_is_what_the_loss_fell_by_over_the_stage(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "run.jsonl", ["a", "b"], ["qa"])
    rows = Journal(journal).rows()
    losses = [(row["task_loss"] or {})["qa"] or math.nan for row in rows]
    gains = RunRows.read(journal).gains("qa")
    assert [gain["stage"] for gain in gains] == [1, 2, 3]
    assert [gain["realised"][0] for gain in gains] == [losses[k] - losses[k + 1] for k in (1, 2, 3)]
    page, _ = draw(journal)
    for gain in gains:
        assert f"{gain['realised'][0]:+.4f} ".replace("-", "\N{MINUS SIGN}") in " ".join(page.cells)
    assert "as if its two losses were independent: they are of the same sequences" in page.text
    for missing, left in ((2, [3]), (3, [1])):  # as of a disk that was full
        partial = RunRows([row for row in rows if row["stage"] != missing or row["kind"] == "final"])
        assert [gain["stage"] for gain in partial.gains("qa")] == left


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_any_number_of_domains_and_one_task(tmp_path: Path, count: int) -> None:
    domains = [f"domain {i:02d}" for i in range(count)]
    page, _ = draw(write_journal(tmp_path / "run.jsonl", domains, ["only"]))
    labels = [label for label in page.svg_text if label.startswith("domain") or " others " in label]
    assert len(labels) == min(count, 8)
    assert sum(" others " in label for label in labels) == (count > 8)
    assert set(domains) <= set(page.cells)


def test_awkward_names_are_text_and_never_markup(tmp_path: Path) -> None:
    journal = write_journal(
        tmp_path / "run.jsonl", AWKWARD, AWKWARD[::-1], message=AWKWARD[0] + "\ud800", error=AWKWARD[1]
    )
    page, text = draw(journal, baseline=journal, title=AWKWARD[0])
    assert loads_nothing(page, text)
    for name in AWKWARD:
        assert page.cells.count(name) >= 2
        assert f"Loss of the task {name} over the run" in [attrs.get("aria-label") for _, attrs in page.tags]
    assert any("$x^2$" in label for label in page.svg_text)
    assert "Previous weights kept: a & b" in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": 1, "final": False},
        {"stages": 1, "final": False, "end": None},
        {"stages": 0, "final": True},
        {"stages": 3, "final": False, "end": None},
        {"influence": None, "standard_error": None},
        {"standard_error": None, "task_loss_standard_error": None, "predicted_gain_standard_error": None},
        {"task_loss": None, "predicted_gain": None},
        {"task_loss": {"qa": math.nan}, "predicted_gain": {"qa": math.inf}},
        {"task_loss": {"qa": 1.0}, "predicted_gain": {"qa": 0.0}},
        {"influence": [[math.nan, math.inf]], "error": "NaN in the influence of a on qa"},
        {"influence": [[0.0, 0.0]], "standard_error": [[0.0, 0.0]]},
        {"tokens": {"a": 10**13, "b": 0}, "epochs": {}},
        {"start": 0},
    ],
)
def test_runs_with_little_or_nothing_measured(tmp_path: Path, changes: dict[str, Any]) -> None:
    journal = write_journal(tmp_path / "run.jsonl", ["a", "b"], ["qa"], **changes)
    page, text = draw(journal, baseline=journal)
    assert loads_nothing(page, text)
    assert not re.search(r"\bnan\b|\binf\b|None", page.text + "".join(style or "" for _, a in page.tags for style in a))
    assert (changes.get("error") or "") in page.text
    assert ("has not ended" in page.text) == (not changes.get("final", True))


def test_the_same_journal_gives_the_same_bytes_whatever_the_process_has_set(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "run.jsonl", ["a", "b"], ["qa"])
    first = write_report(journal, tmp_path / "first.html").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert write_report(journal, tmp_path / "second.html").read_bytes() == first
        assert dict(matplotlib.rcParams) == before
    code = f"from dynmix.report import write_report; write_report({str(journal)!r}, {str(tmp_path / 'third.html')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "third.html").read_bytes() == first
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html"] * 3 + [".jsonl"]


def test_a_journal_with_nothing_to_draw_is_named_and_leaves_the_old_page(tmp_path: Path) -> None:
    output, journal = tmp_path / "report.html", tmp_path / "run.jsonl"
    output.write_text("old")
    with pytest.raises(ValueError, match=r"run\.jsonl: no journal"):
        write_report(journal, output)
    journal.write_text("{}\n")
    with pytest.raises(ValueError, match=r"run\.jsonl:1"):
        write_report(journal, output)
    assert output.read_text() == "old"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8).map(sorted))
def test_labels_keep_their_order_and_distance_and_move_only_when_they_must(heights: list[float]) -> None:
    gap = 0.1
    placed = _apart(heights, gap)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(placed))
    assert placed[0] >= -1e-9
    assert placed[-1] <= 1
    if all(b - a >= gap for a, b in pairwise(heights)):
        assert placed == pytest.approx(heights, abs=1e-9)


@given(st.floats(1e-12, 1e12))
def test_a_scaled_number_is_the_number(value: float) -> None:
    unit, power = power_of_1000(value)
    assert 0.999 < value / unit < 1001
    assert _scaled((value, math.nan)).endswith(f"10{power}" if power else f"{value:.2f}")


def test_a_guard_is_marked_and_one_on_other_sequences_each_time_is_not_compared(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "run.jsonl", ["a", "b"], ["qa", "safe", "held-out"], guards=["safe", "held-out"])
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    for row in (rows[0], rows[-1]):  # the domains' held-out text is measured at boundaries alone
        row["tasks"] = ["qa", "safe"]
        row["guards"] = ["safe"]
        row["task_loss"].pop("held-out")
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, text = draw(journal)
    losses, influence = text.partition('<h2 id="influence">')[0], text.partition('<h2 id="influence">')[2]
    assert "safe <small>guard</small>" in losses
    held_out = r"held.{0,12}out"  # a place to break the line may stand in it
    assert not re.search(held_out, losses)
    assert re.search(held_out + " <small>guard</small>", influence)
    assert "1 task ·" in text


def test_what_was_warned_of_is_told_beside_the_decision(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.jsonl", ["a", "b"], ["t"], stages=2, warnings=["out of <memory>"])
    page = Page(write_report(path, tmp_path / "report.html").read_text())
    assert page.text.count("Warning: out of <memory>") == 3


def test_cost_is_a_share_of_the_time_that_is_known(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "run.jsonl", ["a", "b"], ["qa"], stages=2)
    assert RunRows.read(journal).overhead is None
    page, _ = draw(journal)
    assert "Training" not in page.cells
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    rows[1]["seconds"]["training"], rows[2]["seconds"]["training"] = 30.0, 14.25  # the first row has none before it
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert RunRows.read(journal).overhead == pytest.approx(2 * 1.875 / (2 * 1.875 + 44.25))
    page, _ = draw(journal)
    assert "7.8\u202f%" in page.text
    assert {"30.000", "14.250", "44.250"} <= set(page.cells)


def test_what_a_low_rank_leaves_out_and_new_epochs_are_told(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "run.jsonl", ["a", "b"], ["qa"], stages=2, left_out={"qa": 0.031})
    assert "qa" in RunRows.read(journal).tasks
    page, _ = draw(journal)
    assert any("3.1\u202f% left out" in cell for cell in page.cells)
    journal = write_journal(tmp_path / "next.jsonl", ["a", "b"], ["qa"], new_epochs={"a": [(2, 1500), (3, 9000)]})
    page, _ = draw(journal)
    assert "a: epoch 2 from sample 1,500, epoch 3 from sample 9,000" in page.text
    assert "left out" not in page.text
