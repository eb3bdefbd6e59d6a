"""A cell: one method, one seed, one budget. It is trained, judged and written down once."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dynmix.callbacks import MixtureHook

from .beforehand import weights_of
from .cost import Spent
from .criteria import Judges
from .hindsight import HINDSIGHT, Law
from .kept import kept
from .loop import step_flops, train
from .methods import BY_PROXIES, STATIC, Bench, Method, hook_options, make_dataset, static_weights
from .tables import Cells
from .training import Training


def run_cell(bench: Bench, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return what became of a cell, run if it was not.

    Its folder gets `cell.json` at last; `run/journal.jsonl` is dynmix's own journal of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)  # from now on the settings stand
    result: dict[str, Any] = kept(folder / "cell.json", lambda: _run(bench, Method.parse(name), seed, folder))
    (folder / "state.pt").unlink(missing_ok=True)
    return result


def _run(bench: Bench, method: Method, seed: int, folder: Path) -> dict[str, Any]:
    budget, vocabulary = bench.budget, len(bench.corpus.tokenizer)
    thrown_away = Training(budget.size, vocabulary, seed, bench.device)
    a_step = step_flops(thrown_away, make_dataset(bench, Method("natural"), "natural", 1, seed))
    share = float(method.options.get("share", 1))
    operations, steps = share * budget.steps * a_step, max(1, round(share * budget.steps))

    def before() -> dict[str, Any]:
        spent, own = Spent(), replace(bench, budget=replace(budget, steps=steps))  # the target run of its share
        weights = weights_of(own, method.name, seed, folder, spent, budget.proxy_share * operations)
        return {"weights": weights, "flops": spent.flops["before"], "seconds": spent.seconds["before"]}

    spent = Spent()
    weights: Any = "natural"
    if method.name in STATIC or "start" in method.options:
        weights = static_weights(bench, method.options.get("start", method.name), steps)
    elif method.name == HINDSIGHT:  # one mixture for all seeds
        weights = kept(folder.parent / "weights.json", lambda: _looking_back(folder.parents[1]))
    elif method.name in BY_PROXIES:
        found = kept(folder / "before.json", before)
        weights, spent.flops["before"], spent.seconds["before"] = found["weights"], found["flops"], found["seconds"]
        steps = max(1, -(-int(operations - found["flops"]) // int(a_step)))
    training = Training(budget.size, vocabulary, seed, bench.device)
    dataset = make_dataset(bench, method, weights, steps, seed)
    options = hook_options(bench, method, training, folder / "run", steps)
    hook = None if options is None else MixtureHook(training.model, dataset, **options)
    judges = Judges(bench.corpus, bench.split, budget)
    curve = train(
        training, dataset, hook, spent, operations, folder / "state.pt", title=f"{folder.parent.name}, seed {seed}",
        evaluate=lambda: judges.quick(training.model), curve=budget.curve, save_every=max(1, budget.steps // 8),
        free=method.options.get("free") == "yes",
    )  # fmt: skip
    if hook is not None:
        hook.finish()
    drawn = dataset.schedule.counts(training.steps * budget.size.batch)
    return {
        "method": folder.parent.name,
        "seed": seed,
        "steps": training.steps,
        "tokens": training.steps * budget.size.step_tokens,
        "budget": operations,
        "spent": asdict(spent),
        "sampled": dict(zip(dataset.domains, (drawn / drawn.sum()).tolist(), strict=True)),
        "curve": curve,
        "final": judges.final(training.model),
    }


def _looking_back(folder: Path) -> dict[str, float]:
    cells = Cells.read(folder)
    return Law.fit(cells).best(cells)
