"""TiKMiX's own claims at small scale (arXiv 2508.17677), each with its number beside the paper's.

They share the checkpoints, windows and influences of `benchmarks/fidelity.py`: its folder, if there is one, is used.
Knows windows and cells; draws nothing.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr

from dynmix import TiKMiXD, TokenStore
from dynmix.influence.group import scored_groups

from .kept import kept
from .sweep import BASE
from .tables import Cells
from .windows import Windows, agreement, curvature_maker

Array = NDArray[np.float64]


def perturbed(weights: Mapping[str, float], count: int, seed: int) -> list[dict[str, float]]:
    """Mixtures whose weights are the given ones times factors of 0.5 to 2, made to sum to 1 (Appendix D)."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        scaled = {name: weight * generator.uniform(0.5, 2.0) for name, weight in weights.items()}
        found.append({name: value / sum(scaled.values()) for name, value in scaled.items()})
    return found


def figure4(windows: Windows, mixtures: int, curvature: str, repeats: int = 1) -> dict[str, Any]:
    """Predicted against realised mean gain, in nats, over random mixtures trained from one checkpoint (Figure 4).

    What a mixture gains is the mean over `repeats` windows with other sequences: that of one is also how lucky its few
    hundred sequences were.
    """
    generator, natural = np.random.default_rng(4), windows.natural
    alpha = np.array(list(natural.values())) * len(natural)  # a Dirichlet around the natural mixture, and broad
    drawn = [dict(zip(natural, w.tolist(), strict=True)) for w in generator.dirichlet(alpha, mixtures)]
    influence, _ = windows.influence(curvature)
    predicted = np.array([windows.gains(influence.scores, weights, list(influence.domains)) for weights in drawn])

    def gained(weights: Mapping[str, float], name: str, seed: int) -> list[float]:
        base, loss = windows.base(seed), windows.mixed(name, weights, seed)
        return [base[task] - loss[task] for task in influence.tasks]

    one = [[gained(w, f"mixture-{k:02d}", seed) for k, w in enumerate(drawn)] for seed in range(repeats)]
    realised = np.mean(one, axis=0)
    total, change = predicted.mean(axis=1), realised.mean(axis=1)
    scale = np.abs(influence.scores).max(axis=1)  # Eq. 6's
    normalised = float(pearsonr((predicted / scale).sum(axis=1), change).statistic)
    alike = [(gains / gains.std(axis=0)).sum(axis=1) for gains in (predicted, realised)]
    each = zip(influence.tasks, predicted.T, realised.T, strict=True)
    by_task = ", ".join(f"{task} {pearsonr(a, b).statistic:.3f}" for task, a, b in each)
    alone = np.mean(one, axis=2)
    foreseen = [pearsonr(total, gain).statistic for gain in alone]
    agree = [pearsonr(a, b).statistic for a, b in combinations(alone, 2)]
    noise = ""
    if agree:
        noise = f"; on single windows {min(foreseen):.3f} to {max(foreseen):.3f}, which agree by {np.mean(agree):.3f}"
    return {
        "claim": f"Figure 4: predicted against realised mean gain of the tasks ({curvature})",
        "here": f"Pearson {pearsonr(total, change).statistic:.3f}, Spearman {spearmanr(total, change).statistic:.3f}; "
        f"with every task counted by its spread over the mixtures {pearsonr(*alike).statistic:.3f}; the sum of Eq. 6's "
        f"normalised influences against the gain in nats {normalised:.3f}; a task: {by_task}{noise}",
        "paper": "Pearson 0.789",
        "on": f"{mixtures} mixtures, windows of {windows.settings.window} steps, {repeats} for each; "
        f"{windows.settings.probes} probes a domain",
        "points": [total.tolist(), change.tolist()],
    }


def additivity(windows: Windows, mixtures: int, sizes: Sequence[int], pool: int, curvature: str) -> dict[str, Any]:
    """Influence of samples of mixtures against the weighted sum of the domains' (Appendix D).

    A set's influence is the sum of its sequences' scores over the sum of their tokens, so that one pass measures
    samples of any mixture. A domain's own influence is of `pool` of its sequences, or of half of them where that is
    less; the samples are drawn from as many others, with replacement: what is on both sides agrees with itself, and no
    small corpus holds samples as large as the paper's.
    """
    domains, length = list(windows.corpus.domains), windows.settings.size.length
    stores = windows.corpus.stores
    pools = [max(1, min(pool, len(TokenStore.open(stores[name]).tokens) // length // 2)) for name in domains]
    recipe = TiKMiXD(confidence=0).propose(windows.influence(curvature)[0], windows.natural).weights
    drawn = np.array([[w[name] for name in domains] for w in perturbed(recipe, mixtures, 0)])

    def measure() -> dict[str, Any]:
        training, s = windows.checkpoint(), windows.settings
        both = {name: windows.sequences({name: 1.0}, 2 * n, 5000) for name, n in zip(domains, pools, strict=True)}
        found = scored_groups(
            training.model, both, windows.task_batches(), curvature_maker(curvature)(training),
            curvature_batches=windows.sequences("natural", s.curvature_sequences, 2001),
        )  # fmt: skip
        return {name: [found.scores[name].tolist(), found.tokens[name].tolist()] for name in domains}

    scored = kept(windows.folder / f"influence/pools-{curvature}-{pool}.json", measure)
    read = [[np.array(part) for part in scored[name]] for name in domains]
    own = np.array([s[:n].sum(axis=0) / t[:n].sum() for (s, t), n in zip(read, pools, strict=True)])
    predicted = (drawn @ own).T
    others = [(s[n:], t[n:]) for (s, t), n in zip(read, pools, strict=True)]
    by_size = []
    for size in sizes:
        generator = np.random.default_rng(size)
        measured = np.zeros_like(predicted)
        for k, counts in enumerate(generator.multinomial(size, drawn)):
            rows = [generator.integers(pools[d], size=n) for d, n in enumerate(counts)]
            parts = [(s[at].sum(axis=0), t[at].sum()) for (s, t), at in zip(others, rows, strict=True)]
            measured[:, k] = sum(s for s, _ in parts) / sum(t for _, t in parts)
        each = [float(pearsonr(p, m).statistic) for p, m in zip(predicted, measured, strict=True)]
        by_task = ", ".join(f"{task} {r:.3f}" for task, r in zip(windows.tasks, each, strict=True))
        by_size.append(f"{size:,} sequences: {by_task}")
    many = f"{min(pools):,} to {max(pools):,}" if min(pools) < max(pools) else f"{pools[0]:,}"
    return {
        "claim": f"Appendix D: influence of a mixed sample against the weighted sum ({curvature})",
        "here": "Pearson of samples of " + "; of ".join(by_size),
        "paper": "Pearson ARC 0.845, HellaSwag 0.848, TriviaQA 0.931",
        "on": f"{mixtures} mixtures, drawn from {many} sequences a domain; domains from as many others",
    }


def stability(windows: Windows, curvature: str) -> dict[str, Any]:
    """Rank correlation of a task's influences between checkpoints, and between two measurements of one."""
    count = windows.settings.checkpoints
    found = [windows.influence(curvature, checkpoint=k)[0].scores for k in range(count)]
    again = windows.influence(curvature, seed=2)[0].scores
    pairs = ", ".join(f"{agreement(a, b):.3f}" for a, b in pairwise(found))
    return {
        "claim": f"rank stability of influences from stage to stage ({curvature})",
        "here": f"Spearman {pairs}; the same checkpoint measured twice {agreement(found[-1], again):.3f}",
        "paper": "strong temporal stability (no number)",
        "on": f"{count} checkpoints in {windows.settings.steps} steps, mean over tasks",
    }


def probe_tokens(windows: Windows, curvature: str, counts: tuple[int, ...]) -> dict[str, Any]:
    """How far measurements on few probes agree with one on the most (Table 2)."""
    most = windows.influence(curvature, probes=counts[-1], seed=3)[0].scores
    length, parts = windows.settings.size.length, []
    for count in counts[:-1]:
        scores = windows.influence(curvature, probes=count, seed=1)[0].scores
        parts.append(f"{count * length:,}: {agreement(scores, most):.3f}")
    return {
        "claim": f"Table 2: probe tokens a domain that are enough ({curvature})",
        "here": "Spearman by tokens " + ", ".join(parts),
        "paper": "0.1B tokens in all do as well as 0.5B",
        "on": f"against other {counts[-1] * length:,} tokens a domain, mean over tasks",
    }


def overhead(cells: Cells, budget: str) -> dict[str, Any] | None:
    """Operations that TiKMiX-D spends on mixing over RegMix's, in the cells of a budget."""

    def extra(method: str) -> list[float]:
        spent = [cell["spent"]["flops"] for cell in cells.cells.get(method, {}).values()]
        return [flops["before"] + flops["mixing"] for flops in spent]

    ours, theirs = extra(BASE) or extra("tikmix-d"), extra("regmix")
    if not ours or not theirs:
        return None
    return {
        "claim": "overhead of TiKMiX-D over RegMix's",
        "here": f"{100 * np.mean(ours) / np.mean(theirs):.0f} % of the operations",
        "paper": "about 20 %",
        "on": f"`{budget}`, {len(ours)} and {len(theirs)} seeds",
    }


def run_claims(
    windows: Windows,
    output: Path,
    mixtures: int,
    repeats: int,
    sequences: Sequence[int],
    samples: int,
    pool: int,
    curvatures: list[str],
) -> list[dict[str, Any]]:
    """All of them; the overhead where the cells are there."""
    found: list[dict[str, Any] | None] = []
    for curvature in curvatures:
        found.append(figure4(windows, mixtures, curvature, repeats))
        found.append(additivity(windows, samples, sequences, pool, curvature))
        found.append(stability(windows, curvature))
    found.append(probe_tokens(windows, curvatures[0], (4, 8, 16, 32, 64, 128)))
    for settings in sorted(output.glob("*/settings.json")):
        found.append(overhead(Cells.read(settings.parent), settings.parent.name))
    return [claim for claim in found if claim is not None]
