"""RESULTS.md: put together from what was run, and saying what was not. Knows files; runs nothing."""

from pathlib import Path
from typing import Any

from . import figures, hindsight
from .kept import differences, read_json, write
from .methods import METHODS
from .settings import BUDGETS
from .sweep import BASE, SWEEPS
from .tables import (
    CONTROLS,
    PRIOR,
    TASKS,
    Cells,
    by_budget,
    by_set,
    costs,
    efficiency,
    line,
    markdown,
    overspent,
    overview,
    sampled,
    sweeps,
)

HEAD = """# Results

Written by `python -m benchmarks.pretraining results` from what was run; only "Reading" is typed by hand. Losses are
nats a token (lower is better), mean over seeds; in brackets the difference to the natural mixture with the same seed
and its 95 % interval (Student's t), over the seeds that both have. All runs of a table had the same number of
floating-point operations to spend, those of proxies, references, probes and measurements included: a method that pays
for its mixture trains on fewer tokens; what was bought last may have gone over, and where that is more than 1 % it is
said below the costs. Only where a name says `free=yes` are measurements not charged, and only one with `share=` has
less to spend. Mixers saw one half of the examples of the optimised tasks; all figures are of the other half, of tasks
that no mixer was told of, and of text that nothing was trained on.
"""


def write_results(output: Path | None, file: Path, fidelity: Path | None = None) -> None:
    """Draw what is kept in the folder `results` beside `file`, and what there is below `output`, which is kept then.

    Exits where `output`, or `fidelity`, or what is kept has nothing, and leaves the page that there was.
    """
    parts, drawn, reading = [HEAD], file.parent / "results", file.parent / "READING.md"
    made = [*output.glob("*/*/*/cell.json"), *output.glob("claims.json")] if output else []
    if fidelity and not (fidelity / "fidelity.json").exists():
        raise SystemExit(f"{fidelity} has no fidelity.json: nothing was written")
    if output and not made and not fidelity:
        raise SystemExit(f"{output} has no cells and no claims: nothing was written")
    if not output and not fidelity and not any(drawn.glob("*.json*")):
        raise SystemExit(f"{drawn} keeps nothing, and there is no --output: nothing was written")
    if reading.exists():  # what somebody makes of it
        parts.append(reading.read_text())
    drawn.mkdir(parents=True, exist_ok=True)
    budgets: dict[str, Cells] = {}
    for name, cells in _cells(output, drawn).items():
        plain = Cells(cells.settings, {name: own for name, own in cells.cells.items() if name in METHODS})
        if plain.cells:
            budgets[name] = plain
            parts += _budget(name, plain, drawn)
        parts += _sweeps(name, cells) + _others(name, cells) + hindsight.section(name, cells)
    if not budgets:
        parts.append("## Pretraining runs\n\nNot run.\n")
    if len(budgets) > 1:
        parts.append("## By budget\n")
        common = [group for group in TASKS if all(group in cells.groups for cells in budgets.values())]
        parts += [f"{group}:\n\n{by_budget(budgets, group)}\n" for group in common]
    for lines in sorted(drawn.glob("cells-*-*.jsonl")):
        parts += _aside(lines.stem.removeprefix("cells-").replace("-", ", ", 1), Cells.read_lines(lines))
    claims = _latest(output / "claims.json" if output else None, drawn / "claims.json")
    foreseen = _latest(fidelity / "fidelity.json" if fidelity else None, drawn / "fidelity.json")
    parts.append("## What influence foresees\n")
    parts.append(_fidelity(foreseen) if foreseen else "Not run.\n")
    parts.append("## The paper's claims\n")
    parts.append(_claims(claims["claims"], drawn) if claims else "Not run.\n")
    file.write_text("\n".join(parts))


def _cells(output: Path | None, drawn: Path) -> dict[str, Cells]:
    """Budget -> its cells, those that are kept and those below `output`, and keep them."""
    found: dict[str, Cells] = {}
    for name in sorted(BUDGETS):
        lines, folder = drawn / f"cells-{name}.jsonl", output / name if output else None
        if lines.exists():
            found[name] = Cells.read_lines(lines)
        if folder is None or not (folder / "settings.json").exists() or not (own := Cells.read(folder)).cells:
            continue
        if name in found and (changed := differences(found[name].settings, own.settings)):
            raise SystemExit(f"{lines} is of other settings than {folder} ({changed}): give a --file elsewhere")
        found[name] = found[name].joined(own) if name in found else own
        found[name].write_lines(lines)
    return found


def _latest(made: Path | None, keep: Path) -> dict[str, Any] | None:
    """What was made, which is kept, or else what is kept."""
    if made is not None and made.exists():
        write(keep, read_json(made))
    return dict(read_json(keep)) if keep.exists() else None


def _budget(name: str, cells: Cells, drawn: Path) -> list[str]:
    settings = cells.settings
    figures.curves(cells, drawn / f"curves-{name}.svg")
    figures.trade(cells, drawn / f"trade-{name}.svg")
    size = settings["size"]
    seeds = sorted({seed for own in cells.cells.values() for seed in own})
    missing = [f"{name} (seed {seed})" for name in METHODS for seed in seeds if seed not in cells.cells.get(name, {})]
    traps = " and ".join(f"`{name}`" for name in CONTROLS if name in settings["split"]["domains"])
    return [
        f"## Budget `{name}`\n",
        f"A Llama with hidden size {size['hidden']} and {size['layers']} layers; {settings['steps']} steps of "
        f"{size['batch']} sequences of {size['length']} tokens where nothing else is paid for; "
        f"{len(settings['split']['domains'])} domains; {_stages(settings)}, measured on "
        f"{settings['probe_sequences']} sequences a domain and {settings['task_sequences']} a task; "
        f"{100 * settings['proxy_share']:.0f} % of the operations for proxies where there are any; "
        f"device {settings['device']}.\n",
        overview(cells) + "\n",
        f"![loss by tokens](results/curves-{name}.svg)\n\n![trade](results/trade-{name}.svg)\n",
        f"Share of the natural run's tokens at which a method is where that run ends (on {settings['curve_examples']} "
        "examples a task, read off the runs' own curves, whose learning rate is still high there; counted are the "
        "tokens that the run itself trained on, no proxy or measurement; a mean is of the seeds that reached it):\n",
        efficiency(cells) + "\n",
        "What is spent (`beforehand`: proxies and references; `in the run`: probes, measurements, decisions):\n",
        costs(cells) + "\n",
        overspent(cells),
        "What was sampled, in percent" + (f"; the traps are {traps}" if traps else "") + ":\n",
        sampled(cells) + "\n",
        "By set, nats a token:\n",
        by_set(cells, "loss") + "\n",
        "By set, bits a byte:\n",
        by_set(cells, "bits") + "\n",
        ("Not run: " + ", ".join(missing) + ".\n") if missing else "",
    ]


def _aside(name: str, cells: Cells) -> list[str]:
    """Runs that are kept by hand, with a `note` among their settings: the same budget under other conditions."""
    return [f"## Budget `{name}`\n", cells.settings["note"] + "\n", overview(cells) + "\n", efficiency(cells) + "\n"]


def _stages(settings: dict[str, Any]) -> str:
    stages, most = settings["stages"], settings["max_stages"]
    return f"{stages} stages" if most is None else f"{most} stages, the first one a {stages}th of the run"


def _sweeps(name: str, cells: Cells) -> list[str]:
    table = sweeps(cells, BASE, SWEEPS)
    if not table:
        return []
    shown = [name for names in SWEEPS.values() for name in names if name in cells.cells]
    compared = [name for name in dict.fromkeys((PRIOR, BASE, *shown)) if name in cells.cells]
    own = Cells(cells.settings, {name: cells.cells[name] for name in compared})
    return [
        f"### Variants of `{BASE}` in `{name}`\n",
        f"Difference to `{BASE}` with the same seeds, nats a token (less is better), and its 95 % interval:\n",
        table + "\n",
        "Share of the natural run's tokens at which they are where that run ends:\n",
        efficiency(own) + "\n",
        *_traps(cells),
    ]


def _others(name: str, cells: Cells) -> list[str]:
    """What was run beside the methods and the variants that have a table."""
    varied = [variant for names in SWEEPS.values() for variant in names] if BASE in cells.cells else []
    others = [method for method in cells.cells if method not in (*METHODS, *varied)]
    if not others:
        return []
    own = Cells(cells.settings, {method: cells.cells[method] for method in (PRIOR, *others) if method in cells.cells})
    return [f"### Other runs in `{name}`\n", overview(own) + "\n", efficiency(own) + "\n", sampled(own) + "\n"]


def _traps(cells: Cells) -> list[str]:
    found = {name: cells.cells[name] for name in (PRIOR, BASE, *SWEEPS["traps"]) if name in cells.cells}
    if not set(found) & set(SWEEPS["traps"]):
        return []
    return ["What was sampled in the traps, in percent:\n", sampled(Cells(cells.settings, found)) + "\n"]


def _fidelity(found: dict[str, Any]) -> str:
    text = f"`python benchmarks/fidelity.py`, whose docstring says what the columns are: {found['title']}.\n\n"
    rows = [[f"{v:.3f}" if isinstance(v, float) else v or "" for v in row] for row in found["rows"]]
    return text + markdown(found["head"], rows) + "\n"


def _claims(found: list[dict[str, Any]], drawn: Path) -> str:
    lines = ["| claim | here | the paper | on |", "|---|---|---|---|"]
    lines += [line([c[key] for key in ("claim", "here", "paper", "on")]) for c in found]
    for number, claim in enumerate(c for c in found if "points" in c):
        name = f"figure4-{number}.svg"
        x, y = claim["points"]
        figures.scatter(x, y, ("predicted mean gain, nats", "realised", claim["here"].split(";")[0]), drawn / name)
        lines.append(f"\n![{claim['claim']}](results/{name})")
    return "\n".join(lines) + "\n"
