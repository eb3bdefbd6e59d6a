"""`dynmix report`: a run's journal in; a page, or figures for a paper, out."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dynmix.commands import command, print_json


class Format(StrEnum):
    """Of a figure in a file."""

    SVG = "svg"
    PNG = "png"
    PDF = "pdf"


@command
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, or its journal.jsonl.")],
    baseline: Annotated[Path | None, typer.Option(help="A second run to compare with.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="Default: report.html in the run folder.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Draw it anew as the run goes on, until it ends.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds from one look at the journal to the next.")] = 5.0,
    figures: Annotated[Path | None, typer.Option(help="Folder: each figure as a file of its own instead.")] = None,
    formats: Annotated[
        list[Format] | None, typer.Option("--format", help="Of --figures; may be given several times. Default: svg.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print where the page or the figures are as JSON.")] = False,
) -> None:
    """Draw a run's journal as one HTML page, or its figures as files for a paper."""
    if formats and figures is None:
        raise typer.BadParameter("is of the files of --figures FOLDER; the page is HTML", param_hint="--format")
    if figures is not None and (watch or output is not None):
        raise typer.BadParameter("draws no page: leave out --watch and --output", param_hint="--figures")
    source, other = _journal(run), None if baseline is None else _journal(baseline)
    if figures is not None:
        from dynmix.report_figures import write_figures

        written = write_figures(source, figures, formats or [Format.SVG], baseline=other)
        print_json({"figures": written}) if json else typer.echo("\n".join(map(str, written)))
        return
    if watch:
        page = _watch(run, output, baseline, every)
    else:
        from dynmix.report import write_report

        page = write_report(source, output or source.parent / "report.html", baseline=other)
    print_json({"report": page}) if json else typer.echo(str(page))


def _journal(path: Path) -> Path:
    inside = path / "dynmix" if (path / "dynmix").is_dir() else path
    return path if path.is_file() or path.suffix == ".jsonl" else inside / "journal.jsonl"


def _watch(run: Path, output: Path | None, baseline: Path | None, every: float) -> Path:
    from rich.console import Console

    from dynmix.report import watch_report

    page = output
    try:
        with Console(stderr=True).status("Ctrl-C stops") as status:
            while not (source := _journal(run)).exists():  # where it will be is known once the run has begun
                status.update(f"waiting for a run to begin in {run}; Ctrl-C stops")
                time.sleep(every)
            page = output or source.parent / "report.html"
            other = None if baseline is None else _journal(baseline)
            for row in watch_report(source, page, baseline=other, every=every):
                if row is not None:
                    status.update(f"{page}: stage {row['stage']}, step {row['step']}; Ctrl-C stops")
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"stopped watching {run}" + (f": {page} no longer follows it" if page else "")
        ) from stop
    return page
