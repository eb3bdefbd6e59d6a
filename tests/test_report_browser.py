"""The report's page in a real browser, if this machine has one: what it says on its console, fetches and shows."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynmix.journal import Journal
from dynmix.report import watch_report, write_report
from tests.journal_rows import journal_row

DOMAINS = ["web", "code", "books-and-papers", "a_domain/with_a_long/name_of_its_own", *(f"d{i}" for i in range(8))]
TASKS = ["reasoning", "code_completion_in_many_languages", "reading"]
# Of each: [width, height] on the page, 0 where a figure is not to be seen; how wide the page is; its colours.
LOOK = """
const box = each => { const r = each.getBoundingClientRect(); return [r.width, r.height, r.left, r.right]; };
const of = (each, name) => getComputedStyle(each)[name];
return {
  figures: [...document.querySelectorAll("svg, table.heat")].map(box),
  labels: [...document.querySelectorAll("svg text")].map(box),
  width: document.documentElement.scrollWidth,
  paper: of(document.body, "backgroundColor"),
  inks: [...document.querySelectorAll("p, td, svg text")].map(each => of(each, each.closest("svg") ? "fill" : "color")),
};
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install dynmix[dev]")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    binary, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium (or chrome) with its chromedriver on the PATH: the page is not opened in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield found
    found.quit()


def write_journal(path: Path, *, stages: int = 4, final: bool = True, seed: int = 0) -> Path:
    """A run whose every kind of figure, word and warning is there."""
    rng, shape = np.random.default_rng(seed), (len(TASKS), len(DOMAINS))
    for stage in range(stages + final):
        last = stage == stages
        measured = stage > 0 and not last
        row = journal_row(
            min(stage, stages - 1), domains=DOMAINS, tasks=TASKS, kind="final" if last else "stage", step=500 * stage,
            start=128_000 * stage, end=None if last else 128_000 * (stage + 1), guards=TASKS[2:],
            weights=None if last else dict(zip(DOMAINS, rng.dirichlet(np.ones(12)), strict=True)),
            influence=1e-4 * rng.normal(size=shape) if measured else None,
            standard_error=1e-4 * rng.uniform(0.1, 1, shape) if measured else None,
            task_loss={task: 3.0 - 0.3 * stage + 0.1 * i for i, task in enumerate(TASKS)},
            task_loss_standard_error=dict.fromkeys(TASKS, 0.05),
            tokens={name: 10_000_000 * stage * (i + 1) for i, name in enumerate(DOMAINS)},
            epochs=dict.fromkeys(DOMAINS, stage / 2), new_epochs={"code": [(2, 130_000)]} if stage == 1 else {},
            predicted_gain=dict.fromkeys(TASKS, 1e-5 * stage) if measured else None,
            predicted_gain_standard_error=dict.fromkeys(TASKS, 4e-6) if measured else None,
            multipliers={"reading": 0.25} if measured else None, solver="dual",
            message="reading is held to no worse than before", error="out of memory" if stage == 2 else None,
            seconds={"measure": 12.5, "propose": 0.01, "snapshot": 1.5} | ({"training": 300.0} if stage else {}),
            left_out=dict.fromkeys(TASKS, 0.02) if measured else None, warnings=["a word of warning"],
        )  # fmt: skip
        Journal(path).append(row)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    other = write_journal(folder / "static.jsonl", seed=1)
    return write_report(write_journal(folder / "run.jsonl"), folder / "report.html", baseline=other)


def show(browser: Any, page: Path, width: int, scheme: str = "light") -> dict[str, Any]:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme_of = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_of)
    browser.get(page.as_uri())
    return browser.execute_script(LOOK)


def requests(browser: Any) -> list[str]:
    """Every address asked for since the last call, the page itself included."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG defines it."""
    parts = np.array([float(each) / 255 for each in colour[colour.index("(") + 1 : -1].split(",")[:3]])
    return float(np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_whole_quiet_and_readable(browser: Any, page: Path, width: int, scheme: str) -> None:
    requests(browser)
    seen = show(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    assert requests(browser) == [page.as_uri()]
    # Weights; losses and gains, a task each; heat maps of three stages.
    assert len(seen["figures"]) == 1 + 2 * len(TASKS) + 3
    assert all(w > 100 and h > 50 for w, h, _, _ in seen["figures"])
    assert seen["width"] <= width
    assert all(w > 0 and left >= 0 and right <= width for w, _, left, right in seen["labels"])
    paper = luminance(seen["paper"])
    assert (paper > 0.5) == (scheme == "light")
    for ink in set(seen["inks"]):
        light, dark = sorted((luminance(ink), paper), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, ink


def test_it_prints(browser: Any, page: Path) -> None:
    show(browser, page, 1280, "dark")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert len(printed) > 10_000
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert luminance(browser.execute_script(LOOK)["paper"]) == pytest.approx(1)  # also from a dark screen


def test_only_a_watched_page_loads_itself_again(browser: Any, tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "run.jsonl", stages=2, final=False)
    watching = watch_report(journal, tmp_path / "report.html", every=0.1)
    assert next(watching)["stage"] == 1
    show(browser, tmp_path / "report.html", 375)
    write_journal(journal.with_name("more.jsonl"), stages=2)
    journal.write_bytes(journal.with_name("more.jsonl").read_bytes())
    assert [row["kind"] for row in watching] == ["final"]
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda it: "has not ended" not in it.page_source)  # by itself
    assert 'http-equiv="refresh"' not in browser.page_source
    assert browser.get_log("browser") == []
