"""Small pretraining runs that judge mixing methods at equal compute, and the tables and figures of RESULTS.md.

    python -m benchmarks.pretraining run --output runs/bench [--methods natural,tikmix-d] [--seeds 0,1,2]
                                         [--budget small] [--device cpu]
    python -m benchmarks.pretraining sweep --output runs/bench [--which curvature,stages]
    python -m benchmarks.pretraining claims --output runs/bench [--folder runs/fidelity]
    python -m benchmarks.pretraining results --output runs/bench [--fidelity runs/fidelity]

A cell is a method, a seed and a budget: a small Llama trained from new parameters on the domains of `--corpus` until a
budget of floating-point operations is spent, those of proxies, references and measurements included. Cells are kept in
`OUTPUT/BUDGET/METHOD/SEED`; a killed one goes on from its last state, and the same command does what is missing.
`run` goes by seeds first, so that whatever time there was, methods can be compared.

Mixers see one half of the examples of the tasks; the other half judges, of a task called `blimp` also by the accuracy
of its pairs. Tasks of `--unseen-tasks` and domains of `--unseen-domains` are kept from training and mixers altogether;
domains called `noise` and `web_dup` are traps, whose own text no mean counts. A method may have options,
`tikmix-d[curvature=KFAC,stages=8]`: `sweep` runs those that decide the defaults. `claims` replicates what the paper
says of influences, and `results` writes RESULTS.md of whatever has been run. It keeps that beside the page, each cell
as a line, so that without `--output` it writes the page of what is kept.
"""

import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from .cells import run_cell
from .claims import run_claims
from .corpus import Corpus
from .criteria import Judges, Split
from .kept import check_settings, write
from .methods import METHODS, Bench, Method, make_dataset, tasks_of
from .results import write_results
from .settings import BUDGETS, Budget
from .sweep import BASE, SWEEPS
from .training import check_device
from .windows import Settings, Windows, curvature_maker

CORPUS = Path(os.environ.get("DYNMIX_SHARED", Path(__file__).parents[3] / "shared")) / "corpus"
PAGE = Path(__file__).parents[1] / "RESULTS.md"
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None)

Output = Annotated[Path, typer.Option(help="Folder of all cells.")]
CorpusOption = Annotated[Path, typer.Option("--corpus", help="Folder with domains/, tasks/ and tokenizers/.")]
BudgetOption = Annotated[str, typer.Option("--budget", help=f"One of {', '.join(BUDGETS)}.")]
SeedsOption = Annotated[str, typer.Option("--seeds", help="By commas.")]


@app.command()
def run(
    output: Output,
    methods: Annotated[str | None, typer.Option(help="By commas outside of brackets; default: all.")] = None,
    seeds: SeedsOption = "0,1,2",
    budget: BudgetOption = "small",
    corpus: CorpusOption = CORPUS,
    device: str = "cpu",
    unseen_tasks: Annotated[str, typer.Option(help="Kept from the mixers, by commas.")] = "blimp,piqa",
    unseen_domains: Annotated[str, typer.Option(help="Kept from training.")] = "movie_reviews,wikipedia",
) -> None:
    """Run the cells that are missing."""
    names = METHODS if methods is None else re.findall(r"[^,\[]+(?:\[[^\]]*\])?", methods)
    if not names:
        raise SystemExit(f"--methods {methods!r} names none: there are {', '.join(METHODS)}")
    _run(output, names, seeds, budget, corpus, device, unseen_tasks, unseen_domains)


@app.command()
def sweep(
    output: Output,
    which: Annotated[str | None, typer.Option(help="By commas; default: all.")] = None,
    seeds: SeedsOption = "0,1,2",
    budget: BudgetOption = "small",
    corpus: CorpusOption = CORPUS,
    device: str = "cpu",
    unseen_tasks: str = "blimp,piqa",
    unseen_domains: str = "movie_reviews,wikipedia",
) -> None:
    """Run the variants of TiKMiX-D that decide its defaults, and the traps, beside the prior and what they vary."""
    chosen = list(SWEEPS) if which is None else which.split(",")
    if unknown := [name for name in chosen if name not in SWEEPS]:
        raise SystemExit(f"no sweep {unknown[0]!r}: there are {', '.join(SWEEPS)}")
    names = ["natural", BASE, *(name for each in chosen for name in SWEEPS[each])]
    _run(output, names, seeds, budget, corpus, device, unseen_tasks, unseen_domains)


@app.command()
def claims(
    output: Output,
    folder: Annotated[
        Path | None, typer.Option(help="Of the windows, that of fidelity.py; default: OUTPUT/claims.")
    ] = None,
    mixtures: Annotated[int, typer.Option(min=2, help="Trained from one checkpoint, for Figure 4.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Windows of each of them, with other sequences.")] = 8,
    samples: Annotated[int, typer.Option(min=2, help="Mixtures that are measured, for Appendix D.")] = 256,
    sequences: Annotated[str, typer.Option(help="Of each of them, by commas.")] = "64,1024,4096,16384,65536",
    pool: Annotated[
        int,
        typer.Option(
            min=1, help="Sequences of each domain that they are drawn from; the domains' own are as many others."
        ),
    ] = 3500,
    size: Annotated[str | None, typer.Option(help="Budget whose model it is; default: that of fidelity.py.")] = None,
    steps: Annotated[int, typer.Option(min=3, help="Of the run up to the last checkpoint, of three.")] = 120,
    window: Annotated[int, typer.Option(min=1, help="Steps of a window.")] = 12,
    probes: Annotated[int, typer.Option(min=1, help="Sequences of each domain.")] = 64,
    curvatures: Annotated[str, typer.Option(help="By commas.")] = "EKFAC:0.1",
    corpus: CorpusOption = CORPUS,
    device: str = "cpu",
) -> None:
    """Replicate the paper's claims; needs cells of tikmix-d and regmix for the overhead alone."""
    for curvature in curvatures.split(","):
        curvature_maker(curvature)
    counts = _numbers("sequences", sequences, least=1)
    check_device(device)
    folder = folder or output / "claims"
    settings = Settings(steps=steps, warm_up=steps // 5, window=window, probes=probes)
    if size is not None:
        settings = replace(settings, size=_budget(size).size)
    windows = Windows(Corpus(corpus, folder, length=settings.size.length), folder, settings, device)
    found = run_claims(windows, output, mixtures, repeats, counts, samples, pool, curvatures.split(","))
    write(output / "claims.json", {"claims": found})
    for claim in found:
        print(f"{claim['claim']}: {claim['here']} (paper: {claim['paper']}; {claim['on']})")


@app.command()
def results(
    output: Annotated[Path | None, typer.Option(help="Folder of all cells; default: what is kept alone.")] = None,
    file: Annotated[Path, typer.Option(help="The page; figures and what is kept go beside it.")] = PAGE,
    fidelity: Annotated[Path | None, typer.Option(help="Folder of benchmarks/fidelity.py.")] = None,
) -> None:
    """Write RESULTS.md and its figures from the cells and claims that there are, and keep them beside it."""
    write_results(output, file, fidelity)


def _run(
    output: Path, methods: list[str] | tuple[str, ...], seeds: str, budget: str, corpus: Path, device: str,
    unseen_tasks: str, unseen_domains: str,
) -> None:  # fmt: skip
    chosen, wanted = _budget(budget), _numbers("seeds", seeds, least=0)
    parsed = [Method.parse(name) for name in methods]
    check_device(device)
    data = Corpus(corpus, output, length=chosen.size.length, without=_names(unseen_domains))
    split = Split.of(data, _names(unseen_tasks))
    bench = Bench(data, split, chosen, device)
    try:  # all that is read, before the settings stand and hours are spent
        Judges(data, split, chosen)
        make_dataset(bench, Method("natural"), "natural", 1, 0)
        for which in dict.fromkeys(method.options.get("tasks", "all") for method in parsed):
            tasks_of(bench, which)
    except ValueError as problem:
        raise SystemExit(str(problem)) from None
    check_settings(output / budget, asdict(chosen) | {"corpus": data.facts, "split": asdict(split), "device": device})
    for seed in wanted:
        for name in methods:
            run_cell(bench, name, seed, output / budget / name / str(seed))


def _budget(name: str) -> Budget:
    if name not in BUDGETS:
        raise SystemExit(f"no budget {name!r}: there are {', '.join(BUDGETS)}")
    return BUDGETS[name]


def _numbers(option: str, text: str, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [least - 1]
    if min(numbers) < least:
        raise SystemExit(f"--{option} {text!r}: whole numbers of at least {least}, by commas")
    return numbers


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in text.split(",") if name))


if __name__ == "__main__":
    app()
