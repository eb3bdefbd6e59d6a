"""Methods that train small models first: DoReMi, DoGE, RegMix and MDE, and what that spends.

Each returns fixed weights for the target run. Its share of the budget is the same for all of them.
"""

import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dynmix import MixtureDataset
from dynmix.batches import as_batches
from dynmix.callbacks import MixtureHook
from dynmix.laws import Experts, LightGBM, Ridge, WithExperts, best_mixture
from dynmix.laws.bounds import Bounds
from dynmix.laws.optimise import SMOOTHING
from dynmix.laws.runs import read_runs
from dynmix.mixers.doremi import DoReMi
from dynmix.proxies import run_proxies, small_llama
from dynmix.proxies.plan import Training as ProxyTraining
from dynmix.proxies.train import token_log_probabilities

from .cost import Counter, Spent
from .doge import DogeProxy
from .loop import step_flops, train
from .methods import NO_TASKS, Bench
from .training import Training

MAX_EPOCHS = 4.0  # of a domain in the target run, or as many for each that it makes of the whole corpus


def weights_of(bench: Bench, method: str, seed: int, folder: Path, spent: Spent, operations: float) -> dict[str, float]:
    """Domain -> weight of the target run, found with so many operations, which are added to `spent`."""
    found: dict[str, Callable[..., dict[str, float]]] = {
        "doremi": _doremi, "doge": _doge, "regmix": _regmix, "mde": _mde,
    }  # fmt: skip
    return found[method](bench, seed, folder, spent, operations)


def _proxy(bench: Bench, seed: int) -> Training:
    return Training(bench.budget.proxy, len(bench.corpus.tokenizer), seed, bench.device)


def _stream(
    bench: Bench, weights: Any, operations: float, seed: int, proxy: Callable[[Bench, int], Training] = _proxy
) -> MixtureDataset:
    thrown_away = proxy(bench, seed)
    make = partial(thrown_away.size.dataset, bench.corpus.stores, weights, seed=seed)
    return make(max(4, 1 + int(operations / step_flops(thrown_away, make(1)))))


def _run(training: Training, dataset: MixtureDataset, hook: Any, spent: Spent, operations: float, state: Path) -> None:
    """Train a proxy; all that it spends is spent beforehand."""
    own = Spent()
    train(training, dataset, hook, own, operations, state, title=state.stem, save_every=500)
    spent.flops["before"] += own.total
    spent.seconds["before"] += sum(own.seconds.values())


def _doremi(bench: Bench, seed: int, folder: Path, spent: Spent, operations: float) -> dict[str, float]:
    """A reference on the natural mixture, a proxy with minimax weights, and their mean (arXiv 2305.10429)."""
    reference = _proxy(bench, seed)
    _run(reference, _stream(bench, "natural", operations / 2, seed), None, spent, operations / 2, folder / "ref.pt")
    training, mixer = _proxy(bench, seed), DoReMi()
    dataset = _stream(bench, "uniform", operations / 2, seed)
    hook = MixtureHook(
        training.model, dataset, bench.tasks, mixer, 2, batch_size=training.size.batch, reference=reference.model,
        keep=0, loss_every=10**9, **NO_TASKS,
    )  # fmt: skip
    _run(training, dataset, hook, spent, operations / 2, folder / "proxy.pt")
    return mixer.mean


def _doge(bench: Bench, seed: int, folder: Path, spent: Spent, operations: float) -> dict[str, float]:
    """A proxy whose domains are weighted by their gradients' alignment, and the mean of the weights (2310.15393)."""
    dataset, training = _stream(bench, "uniform", operations, seed, _doge_proxy), _doge_proxy(bench, seed)
    _run(training, dataset, None, spent, operations, folder / "proxy.pt")
    return dict(zip(dataset.domains, training.mean.tolist(), strict=True))


def _doge_proxy(bench: Bench, seed: int) -> DogeProxy:
    domains, size = len(bench.corpus.stores), bench.budget.proxy
    size = replace(size, batch=-(-size.batch // domains) * domains)  # in an even stream, as many of each
    return DogeProxy(size, len(bench.corpus.tokenizer), seed, bench.device, domains, bench.tasks)


def _regmix(bench: Bench, seed: int, folder: Path, spent: Spent, operations: float) -> dict[str, float]:
    """Boosted trees on the losses of random mixtures, and the mean of those that they like best (arXiv 2407.01492).

    As in the authors' code: of the best 128 of 100,000, drawn around the corpus's own. The very best of a function of
    steps is a corner, which the noise of the runs has chosen.
    """
    done = _proxies(bench, seed, folder, spent, operations, bench.budget.mixtures[0], experts=False)
    with spent.on("before", flops=0.0):
        runs = read_runs(done.table)
        law, limits = LightGBM().fit(runs.W, runs.L), _limits(bench, runs)
        shares = limits["tokens"] / limits["tokens"].sum()
        drawn = np.random.default_rng(seed).dirichlet(shares, 100_000)
        liked = np.argsort(law.predict(drawn).mean(axis=1), kind="stable")[:128]
        weights = Bounds.of(len(shares), **limits).nearest(drawn[liked].mean(axis=0))
    return dict(zip(runs.domains, weights.tolist(), strict=True))


def _mde(bench: Bench, seed: int, folder: Path, spent: Spent, operations: float) -> dict[str, float]:
    """Ridge regression on weights and on the losses of the experts' ensemble (arXiv 2502.15950).

    Smoothed as in the paper, so that no domain is left out altogether.
    """
    done = _proxies(bench, seed, folder, spent, operations, bench.budget.mixtures[1], experts=True)
    with spent.on("before", flops=0.0):
        experts, runs = Experts.open(done.experts), read_runs(done.table)
        runs = runs.ordered(experts.names, experts.targets)
        return _best(bench, WithExperts(Ridge(), experts).fit(runs.W, runs.L), runs)


def _best(bench: Bench, law: Any, runs: Any) -> dict[str, float]:
    best = best_mixture(law, **_limits(bench, runs), compare=runs.W, smoothing=SMOOTHING)
    return dict(zip(runs.domains, best.weights.tolist(), strict=True))


def _limits(bench: Bench, runs: Any) -> dict[str, Any]:
    """What bounds a mixture by how often the target run may read a domain."""
    own = bench.tokens
    tokens = np.array([own[name] for name in runs.domains], dtype=np.float64)
    wanted = bench.budget.steps * bench.budget.size.step_tokens
    epochs = MAX_EPOCHS * max(1.0, wanted / tokens.sum())
    return {"tokens": tokens, "total_tokens": wanted, "max_epochs": epochs}


def _proxies(
    bench: Bench, seed: int, folder: Path, spent: Spent, operations: float, mixtures: int, experts: bool
) -> Any:
    """Proxies of sampled mixtures, of equal length.

    Where an earlier call was interrupted, its proxies are taken to have cost as many seconds as those of this one.
    """
    size, runs = bench.budget.proxy, mixtures + experts * len(bench.corpus.stores)
    dataset = MixtureDataset(bench.corpus.stores, "natural", num_samples=size.batch, sequence_length=size.length)
    a_step = step_flops(_proxy(bench, seed), dataset)
    with Counter() as judging:
        for name, task in bench.tasks.items():
            batches = as_batches(task, name=name, sequence_length=size.length, micro_batch=size.batch)
            token_log_probabilities(_proxy(bench, seed).model, batches)
    steps = max(1, int((operations / runs - judging.total) / a_step))
    before, earlier = _child_seconds(), len(list(folder.glob("proxies/runs/*/result.json")))
    done = run_proxies(
        bench.corpus.stores, bench.tasks, folder / "proxies",
        model=small_llama(len(bench.corpus.tokenizer), size.hidden, size.layers, size.heads, size.length),
        training=ProxyTraining(steps * size.step_tokens, size.length, size.batch, size.rate, seed),
        mixtures=mixtures, experts=experts, jobs=1, threads=1,
    )  # fmt: skip
    if done.failed:
        raise SystemExit(f"proxies failed: {done.failed}")
    trained = runs - earlier
    spent.seconds["before"] += (_child_seconds() - before) * runs / trained if trained else float("nan")
    spent.flops["before"] += runs * (steps * a_step + judging.total)
    return done


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
