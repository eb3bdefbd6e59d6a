"""Does influence foresee what a mixture does? Predicted against realised change of task loss, from one checkpoint on.

    python benchmarks/fidelity.py --output runs/fidelity [--corpus ../shared/corpus] [--quick] [--device cpu]
    /path/to/venv-with-kronfluence/bin/python benchmarks/fidelity.py --output runs/fidelity --kronfluence

A small Llama (1.4M parameters) is trained on the natural mixture and kept with its optimizer's state. From there on,
windows of real training: on the natural mixture, on the natural mixture with half of each batch replaced by one domain
(all domains in turn, twice with other data), and with random halves of the domains left out. Realised is by how much
lower a task's loss ends than after the natural window with the same data else; predicted is the group influence at the
checkpoint times the change of the weights, for each curvature.

Printed: Pearson and Spearman correlation over the domains, mean over tasks ("within"), and over all pairs at once; the
linear datamodeling score, the rank correlation over the windows without half of the domains, mean over tasks; and what
a perfect prediction could reach, by how far two windows with other data agree. Every window and every influence is kept
in the folder as soon as it is there: the same command goes on. `--kronfluence` adds kronfluence's scores by EK-FAC, on
the blocks' layers alone and with all examples' gradients held, which takes 2 GB, to the folder, where that can be
imported; they are shown from then on, beside ours for the same layers. `--gauss-newton` adds the exact matrix, by eight
conjugate gradient steps a solve, which leave a residual that a solver would go on with; its processor time stands
beside the others'.
"""

import os
import tempfile
import time
from math import comb
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from pretraining.corpus import Corpus
from pretraining.kept import kept, write
from pretraining.training import check_device
from pretraining.windows import BLOCKS, CURVATURES, Settings, Windows, agreement
from rich.console import Console
from rich.table import Table
from scipy.stats import pearsonr, spearmanr

from dynmix.influence.capture import Capture

Array = NDArray[np.float64]
CORPUS = Path(os.environ.get("DYNMIX_SHARED", Path(__file__).parents[2] / "shared")) / "corpus"
QUICK = Settings(steps=60, warm_up=6, checkpoints=1, window=6, examples=24, probes=16, curvature_sequences=64)


def halves(domains: list[str], count: int) -> list[list[str]]:
    """So many random halves of the domains, no two alike, or all that there are."""
    generator, found = np.random.default_rng(0), list[list[str]]()
    while len(found) < min(count, comb(len(domains), len(domains) // 2)):
        chosen = sorted(generator.permutation(domains)[: len(domains) // 2].tolist())
        if chosen not in found:
            found.append(chosen)
    return found


def realised(windows: Windows, share: float, seeds: int) -> Array:
    """Decrease of loss by domain and task, float64[seeds, n_tasks, n_domains]."""
    found = []
    for seed in range(seeds):
        base = windows.base(seed)
        raised = [windows.raised(domain, share, seed) for domain in windows.corpus.domains]
        found.append([[base[task] - own[task] for own in raised] for task in windows.tasks])
    return np.array(found)


def without(windows: Windows, kept_domains: list[list[str]]) -> tuple[list[dict[str, float]], Array]:
    """Weights of the windows on some domains alone, and their decrease of loss, float64[n_tasks, n_windows]."""
    natural, base = windows.natural, windows.base(0)
    mixtures, losses = [], []
    for number, names in enumerate(kept_domains):
        total = sum(natural[name] for name in names)
        mixtures.append({name: natural[name] / total for name in names})
        losses.append(windows.mixed(f"half-{number:02d}", mixtures[-1], 0))
    return mixtures, np.array([[base[task] - own[task] for own in losses] for task in windows.tasks])


def ceiling(found: Array) -> float:
    """Correlation that a perfect prediction would have with the mean over seeds, by how far two seeds agree."""
    seeds = len(found)
    if seeds < 2:
        return float("nan")
    pairs = [(a, b) for a in range(seeds) for b in range(a)]
    agree = np.mean([pearsonr(x, y).statistic for a, b in pairs for x, y in zip(found[a], found[b], strict=True)])
    agree = max(float(agree), 0.0)
    return float(np.sqrt(seeds * agree / (1 + (seeds - 1) * agree)))  # Spearman and Brown


def kronfluence(windows: Windows) -> dict[str, Any]:
    """Kronfluence's EK-FAC scores, summed over the sequences of domain and task, by mean loss a token; and their time.

    Processor seconds, as of ours, begin where the model and the sequences are there.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import Dataset

    training, s = windows.checkpoint(), windows.settings
    layers = list(Capture(training.model, layers=BLOCKS).layers)
    length = s.size.length

    class Rows(Dataset[torch.Tensor]):
        """Ids and labels, padded to one length, int64[2, tokens]."""

        def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
            self.rows: list[torch.Tensor] = []
            for batch in batches:
                ids, labels = batch["input_ids"], batch.get("labels", batch["input_ids"])
                pad = (0, length - ids.shape[1])
                both = torch.nn.functional.pad(ids, pad), torch.nn.functional.pad(labels, pad, value=-100)
                self.rows += list(torch.stack(both, dim=1))

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, row: int) -> torch.Tensor:
            return self.rows[row]

    class NextToken(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: torch.Tensor, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
            logits, labels = model(input_ids=batch[:, 0]).logits[:, :-1].float(), batch[:, 1, 1:]
            loss = torch.nn.functional.cross_entropy
            return loss(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

        def compute_measurement(self, batch: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    domains, tasks = windows.probes(s.probes, 1001), windows.task_batches()
    train, queries = (Rows([batch for own in sets.values() for batch in own]) for sets in (domains, tasks))
    fit_on = Rows(windows.sequences("natural", s.curvature_sequences, 2001))
    task = NextToken()
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(training.model, task)
        analyzer = Analyzer("fidelity", model, task, cpu=windows.device == "cpu", output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors("factors", fit_on, 16, factor_args=FactorArguments(use_empirical_fisher=True))
        # All queries' gradients are held, so that the domains are read once.
        held = ScoreArguments(damping_factor=None, query_gradient_accumulation_steps=len(queries))
        analyzer.compute_pairwise_scores("pairs", "factors", queries, train, 16, 16, score_args=held)
        pairs = analyzer.load_pairwise_scores("pairs")["all_modules"].double()
    found = []
    for own, scores in zip(tasks.values(), pairs.split([len(Rows(own)) for own in tasks.values()]), strict=True):
        scored = sum(int((row[1, 1:] != -100).sum()) for row in Rows(own).rows)
        found.append(scores.sum(0).view(len(domains), -1).sum(1) / scored / (s.probes * (length - 1)))
    return {"scores": torch.stack(found).tolist(), "seconds": time.process_time() - start}


def foreseen(windows: Windows, gauss_newton: bool) -> dict[str, tuple[Array, float]]:
    """Curvature -> scores float64[n_tasks, n_domains] and processor seconds."""
    names = (*CURVATURES, *(["GaussNewton"] if gauss_newton else []))
    made = {name: windows.influence(name) for name in names}
    few = windows.settings.probes // 4  # where damping decides how much of their noise comes through
    made |= {f"{name}, {few} probes": windows.influence(name, probes=few) for name in ("EKFAC:1", "EKFAC:0.1")}
    found = {name: (influence.scores, seconds) for name, (influence, seconds) in made.items()}
    file = windows.folder / "influence/kronfluence.json"
    if file.exists():
        ours, seconds = windows.influence("EKFAC:0.1", blocks=True)  # the damping of theirs
        theirs = kept(file, dict)
        found["EKFAC:0.1, blocks alone"] = ours.scores, seconds
        found["kronfluence, blocks alone"] = np.array(theirs["scores"]), theirs["seconds"]
    return found


def main(
    output: Annotated[Path, typer.Option(help="Keeps checkpoints, windows and influences; a second call goes on.")],
    corpus: Annotated[Path, typer.Option(help="Folder with domains/, tasks/ and tokenizers/.")] = CORPUS,
    quick: Annotated[bool, typer.Option(help="Few short windows: to see it work, not to learn from.")] = False,
    device: str = "cpu",
    share: Annotated[float, typer.Option(help="Of each batch, what becomes the raised domain.")] = 0.5,
    seeds: Annotated[int, typer.Option(help="Windows a domain.")] = 2,
    groups: Annotated[int, typer.Option(help="Windows without half of the domains.")] = 10,
    gauss_newton: bool = False,
    kron: Annotated[bool, typer.Option("--kronfluence", help="Add kronfluence's scores, and nothing else.")] = False,
) -> None:
    settings, groups = (QUICK, min(groups, 4)) if quick else (Settings(), groups)
    check_device(device)
    data = Corpus(corpus, output, length=settings.size.length)
    windows = Windows(data, output, settings, device)
    if kron:
        kept(output / "influence/kronfluence.json", lambda: kronfluence(windows))
        return
    domains, natural = data.domains, windows.natural
    predictions = foreseen(windows, gauss_newton)
    each = realised(windows, share, seeds)
    gained = each.mean(axis=0)
    mixtures, lost = without(windows, halves(domains, groups))
    raised = [{name: (1 - share) * natural[name] + share * (name == d) for name in domains} for d in domains]
    title = (
        f"{gained.size} changes of loss in {len(domains) * seeds} windows, {len(mixtures)} windows without half of the "
        "domains"
    )
    head = (
        "curvature", "Pearson within", "Spearman within", "Pearson, all", "Spearman, all", "datamodeling score",
        "CPU seconds",
    )  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    for name, (scores, seconds) in predictions.items():
        p = np.stack([windows.gains(scores, weights, domains) for weights in raised], axis=1)
        q = np.stack([windows.gains(scores, weights, domains) for weights in mixtures], axis=1)
        both = (float(measure(p.ravel(), gained.ravel()).statistic) for measure in (pearsonr, spearmanr))
        own = agreement(p, gained, pearsonr), agreement(p, gained)
        rows.append((name, *own, *both, agreement(q, lost), seconds))
    best = ceiling(each), None, ceiling(each.reshape(len(each), 1, -1)), None, None, None
    rows.append(("a perfect prediction", *best))
    write(output / "fidelity.json", {"title": title, "head": head, "rows": rows})
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(row[0], *("" if value is None else f"{value:.3f}" for value in row[1:]))
    console = Console(width=200)
    console.print(table)
    by_task = Table("task", *predictions, "perfect", title="Pearson over the domains")
    for i, task in enumerate(windows.tasks):
        figures = []
        for scores, _ in predictions.values():
            p = np.array([windows.gains(scores, weights, domains)[i] for weights in raised])
            figures.append(f"{pearsonr(p, gained[i]).statistic:.3f}")
        by_task.add_row(task, *figures, f"{ceiling(each[:, i : i + 1]):.3f}")
    console.print(by_task)


if __name__ == "__main__":
    typer.run(main)
