"""Experts and sampled mixtures trained as proxies, several at a time, into a folder that `dynmix fit` reads.

    runs.csv     a row per run that is done: run, weight/<domain>..., loss/<set>... in nats per token
    experts/     the experts' token probabilities, as `Experts.open` reads them, when all experts are done

Knows runs by name and what is done of them; how one is trained is `train`'s, and in which process `workers`'.
"""

import csv
import io
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from dynmix.alone import alone
from dynmix.laws.base import Array
from dynmix.laws.experts import Experts
from dynmix.laws.sampling import sample_mixtures
from dynmix.mixture.store import TokenStore
from dynmix.proxies.plan import Plan, Training
from dynmix.proxies.train import read_result
from dynmix.proxies.workers import Workers
from dynmix.shown import Bar
from dynmix.whole_file import write_whole

logger = logging.getLogger("dynmix.proxies")


@dataclass(frozen=True)
class Proxies:
    """What is there of the runs that were asked for.

    Attributes:
        done: names of the runs that are.
        failed: name of each run that is not -> what went wrong, and where its log is.
        table: the CSV of the runs that are done; None if none is.
        experts: folder of the experts' probabilities; None if none were asked for or not all are done.
    """

    done: tuple[str, ...]
    failed: dict[str, str]
    table: Path | None
    experts: Path | None


def run_proxies(
    stores: Mapping[str, TokenStore | str | os.PathLike[str]],
    validation: Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    model: PreTrainedConfig | str | os.PathLike[str],
    training: Training,
    mixtures: int = 25,
    experts: bool = True,
    frequency: float = 0.5,
    scale: tuple[float, float] = (0.5, 2.0),
    max_epochs: float = 4.0,
    jobs: int = 1,
    threads: int | None = None,
) -> Proxies:
    """Train an expert a domain and sampled mixtures, all from the same parameters, and evaluate them.

    Runs that are done are not trained again, and one that was interrupted goes on from its last checkpoint: call it
    again after any end, also with more mixtures. A run that fails is logged and does not stop the others.

    Args:
        stores: name -> token store of each domain, two at least.
        validation: name -> what the losses are of: a `Task`, or batches, examples or a token store as `as_batches`
            takes them.
        out: folder for everything.
        model: configuration of a transformers causal LM, or the folder or name of one; weights there are not used.
        training: how each proxy is trained.
        mixtures: how many are sampled, as `sample_mixtures` does with `frequency` and `scale` (MDE, arXiv 2502.15950,
            appendix B.4). More of them leave the first as they are.
        experts: whether each domain alone is trained on, too.
        frequency, scale: of `sample_mixtures`.
        max_epochs: runs that see a domain more often are warned of.
        jobs: runs at a time, each in a process of its own; GPUs are shared out among them.
        threads: of each; None: all threads of torch shared out among them.

    Raises:
        ValueError: an argument that does not fit, `out` has runs of another configuration (says what differs), or
            another process is at work in it.
    """
    if mixtures < 0 or jobs < 1 or (threads is not None and threads < 1) or not max_epochs > 0:
        raise ValueError(
            f"mixtures={mixtures}, jobs={jobs}, threads={threads}, max_epochs={max_epochs}: at least 0, 1, 1, above 0"
        )
    if not mixtures and not experts:
        raise ValueError("mixtures=0 without experts: there is nothing to train")
    plan, out = Plan.make(stores, validation, model, training, frequency, scale), Path(out)
    runs = planned_runs(plan, mixtures, experts)
    for note in repeated(plan, runs, max_epochs):
        logger.warning("%s", note)
    with alone(out, "trains proxies in it") as lock:
        plan.keep(out)
        workers = Workers(out, jobs, threads or max(1, torch.get_num_threads() // jobs), _devices(), lock)
        failed = _train(plan, out, runs, workers, jobs)
        table = _write_table(plan, out, runs)
        done = tuple(run for run in runs if read_result(out, run) is not None)
        cache = out / "experts"
        if experts and not cache.exists() and {*map(_expert, plan.domains)} <= {*done}:
            files = [out / "runs" / _expert(domain) / "log_probabilities.npy" for domain in plan.domains]
            found = dict(zip(plan.domains, (np.lib.format.open_memmap(file, "r") for file in files), strict=True))
            Experts.write(cache, found, plan.tokens)
    return Proxies(done, failed, table, cache if experts and cache.exists() else None)


def planned_runs(plan: Plan, mixtures: int, experts: bool) -> dict[str, Array]:
    """Return each run's weights float64[n_domains], by name; a mixture does not depend on how many there are.

    Raises:
        ValueError: what `sample_mixtures` refuses.
    """
    sampled = sample_mixtures(
        list(plan.sizes.values()),
        mixtures,
        frequency=plan.config["mixtures"]["frequency"],
        scale=tuple(plan.config["mixtures"]["scale"]),
        seed=plan.training.seed,
    )
    corners = zip(map(_expert, plan.domains), np.eye(len(plan.domains)), strict=True) if experts else ()
    return dict(corners) | {f"mixture-{i:03d}": w for i, w in enumerate(sampled)}


def repeated(plan: Plan, runs: Mapping[str, Array], max_epochs: float) -> list[str]:
    """Say of each domain whether runs see it more than so often, and how often the worst of them does."""
    epochs = np.array(list(runs.values())) * plan.training.sequences / list(plan.sizes.values())
    return [
        f"{name} has {size:,} sequences: {(seen > max_epochs).sum()} of {len(runs)} runs see it more than "
        f"{max_epochs:g} times, {list(runs)[int(seen.argmax())]} {seen.max():.1f} times"
        for (name, size), seen in zip(plan.sizes.items(), epochs.T, strict=True)
        if seen.max() > max_epochs
    ]


def _expert(domain: str) -> str:
    return f"expert-{domain}"


def _train(plan: Plan, out: Path, runs: Mapping[str, Array], workers: Workers, jobs: int) -> dict[str, str]:
    """Train the runs that are not done; return what went wrong with which."""
    missing = [run for run in runs if read_result(out, run) is None]
    failed = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        asked = {
            pool.submit(workers.train, run, dict(zip(plan.domains, runs[run].tolist(), strict=True))): run
            for run in missing
        }
        done = len(runs) - len(missing)
        kept = {"leave": True, "delay": 0}  # a run takes minutes
        for future in Bar(as_completed(asked), "proxies", len(runs), initial=done, unit="run", disable=None, **kept):
            run = asked[future]
            if problem := future.result():
                failed[run] = f"{problem}; its log is {out / 'runs' / run / 'log.txt'}"
                logger.error("%s: %s", run, failed[run])
            else:
                _write_table(plan, out, runs)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        workers.close()
        pool.shutdown()
    return failed


def _write_table(plan: Plan, out: Path, runs: Mapping[str, Array]) -> Path | None:
    """Write `runs.csv` of the runs that are done, in order; return its path, or None if none is."""
    found = {run: losses for run in runs if (losses := read_result(out, run)) is not None}
    if not found:
        return None
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["run", *(f"weight/{name}" for name in plan.domains), *(f"loss/{name}" for name in plan.validation)])
    for run, losses in found.items():
        rows.writerow([run, *runs[run].tolist(), *(losses[name] for name in plan.validation)])
    write_whole(out / "runs.csv", text.getvalue())
    return out / "runs.csv"


def _devices() -> list[str]:
    """Numbers of the GPUs that may be used: a run takes one, or the Trainer would split its batches over all."""
    if not torch.cuda.is_available():
        return []
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    return own.split(",") if own else [str(number) for number in range(torch.cuda.device_count())]
