"""What a recipe's small runs decide before the run itself: weights (MDE), or groups in the domains' place (AutoMixer).

Each step keeps its result in `<output>/proxy` and goes on where it was killed. Knows the order of the library's calls.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedTokenizerBase, Trainer, default_data_collator

from dynmix.alone import alone
from dynmix.callbacks import PeakCallback
from dynmix.fit import FEWEST, fit_runs, write_fit
from dynmix.groups import open_groups, write_groups
from dynmix.laws.auto import default_laws
from dynmix.laws.bounds import Bounds
from dynmix.laws.criteria import criterion_weights
from dynmix.laws.experts import Experts
from dynmix.laws.mde import WITH_EXPERTS
from dynmix.laws.runs import read_runs
from dynmix.mixers.regroup import Blend, group_weights, regroup
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.store import TokenStore
from dynmix.peaks import PeakSnapshots
from dynmix.proxies.plan import Training
from dynmix.proxies.run import run_proxies
from dynmix.recipe.build import curvature, make_dataset, make_model, model_config, training_arguments
from dynmix.recipe.names import RecipeError
from dynmix.recipe.schema import AutoMixerProxy, MDEProxy, Recipe
from dynmix.scoring import peak_sources, read_scores, score_corpus
from dynmix.tasks import Task
from dynmix.trainer_checkpoint import newest_checkpoint

logger = logging.getLogger("dynmix")


def decided(
    recipe: Recipe,
    domains: Mapping[str, Any],
    tasks: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    on_paper: bool,
) -> tuple[Mapping[str, Any], Any]:
    """Domains and first weights of a run with groups, or of one whose small runs decide them.

    `on_paper`: small runs that are yet to be made are not made, and the recipe's own domains and weights returned.

    Raises:
        RecipeError: the small runs are yet to be made and this is one of several processes.
        ValueError: a step failed, in the words of the library.
    """
    if recipe.data.groups is not None:
        if recipe.domains:
            raise RecipeError("data.groups: groups take the domains' place; leave one of the two out")
        return open_groups(recipe.data.groups)
    folder = Path(recipe.output) / "proxy"
    mde = isinstance(recipe.proxy, MDEProxy)
    done = folder / "fit.json" if mde else folder / "groups" / "groups.json"
    if not done.exists():
        stores = {name: _store(name, source) for name, source in domains.items()}
        _check(recipe, recipe.proxy, stores, tuple(tasks))
        if on_paper:
            logger.warning("proxy: the small runs are yet to be made; what is shown has the recipe's own weights")
            return domains, recipe.data.weights
        if torch.distributed.is_initialized():
            raise RecipeError(
                "proxy: the small runs come first, in one process that makes its own: run `dynmix train RECIPE "
                "--only-proxy`, then launch this again"
            )
        if mde:
            _mix(recipe, recipe.proxy, stores, tasks, tokenizer, folder)
        else:
            with alone(folder, "makes these small runs"):
                _regroup(recipe, recipe.proxy, stores, tasks, tokenizer, folder)
    if mde:
        return domains, json.loads(done.read_text(encoding="utf-8"))["weights"]
    return open_groups(folder / "groups")


def _check(
    recipe: Recipe, proxy: MDEProxy | AutoMixerProxy, stores: Mapping[str, TokenStore], tasks: tuple[str, ...]
) -> None:
    """Raises ValueError for what would be asked for, and refused, only when the small runs are there."""
    if isinstance(proxy, MDEProxy):
        criterion_weights(proxy.criterion, tasks)
        if (runs := proxy.mixtures + len(stores)) < FEWEST:
            raise RecipeError(f"proxy.mixtures={proxy.mixtures}: with the experts {FEWEST} small runs are the fewest")
        laws = ["auto", *default_laws(runs, len(tasks)), *WITH_EXPERTS]
        if proxy.law not in laws:
            raise RecipeError(f"proxy.law={proxy.law!r}: there are {', '.join(map(repr, laws))}")
        try:
            tokens = [store.num_tokens for store in stores.values()]
            Bounds.of(len(tokens), tokens=tokens, total_tokens=_total(recipe), max_epochs=proxy.max_epochs)
        except ValueError as problem:
            raise RecipeError(f"proxy.max_epochs={proxy.max_epochs}: {problem}") from None
        return
    if recipe.data.packing != "concat":
        raise RecipeError(f"data.packing={recipe.data.packing!r}: the sequences that are regrouped are cut end to end")
    if isinstance(recipe.data.max_epochs, Mapping):
        raise RecipeError("data.max_epochs: give one number, or proxy.max_epochs; groups take the named domains' place")
    if recipe.data.distinct_epochs is not None:
        raise RecipeError("data.distinct_epochs: give data.max_epochs; groups take the domains' place")
    curvature(proxy.curvature, {}, None, "proxy.curvature")
    if proxy.blend not in get_args(Blend):
        raise RecipeError(f"proxy.blend={proxy.blend!r}: one of {', '.join(get_args(Blend))}")
    if not 0 < proxy.keep <= 1:
        raise RecipeError(f"proxy.keep={proxy.keep}: a share of a group's tokens, above 0 and at most 1")


def _mix(
    recipe: Recipe,
    proxy: MDEProxy,
    stores: Mapping[str, TokenStore],
    tasks: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> None:
    """Mixture-of-data-experts (arXiv 2502.15950): experts, sampled mixtures, a law of the loss, its best mixture."""
    length = recipe.data.sequence_length
    training = Training(proxy.tokens, length, proxy.batch_size, proxy.learning_rate, recipe.seed)
    config = model_config(proxy.model, tokenizer, length, "proxy.model")
    made = run_proxies(
        stores, tasks, folder, model=config, training=training, mixtures=proxy.mixtures, jobs=proxy.jobs,
        max_epochs=proxy.max_epochs,
    )  # fmt: skip
    if made.failed or made.table is None:
        missing = "; ".join(f"{run}: {problem}" for run, problem in made.failed.items())
        raise ValueError(f"{len(made.failed)} of the small runs failed; the same command tries them again ({missing})")
    fit = fit_runs(
        read_runs(made.table),
        proxy.criterion,
        proxy.law,
        experts=None if made.experts is None else Experts.open(made.experts),
        tokens={name: float(store.num_tokens) for name, store in stores.items()},
        total_tokens=_total(recipe),
        max_epochs=proxy.max_epochs,
    )
    write_fit(fit, folder)


def _regroup(
    recipe: Recipe,
    proxy: AutoMixerProxy,
    stores: Mapping[str, TokenStore],
    tasks: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> None:
    """AutoMixer: a small model's run keeps its peaks; they score every sequence; groups of them take over."""
    length = recipe.data.sequence_length
    files: dict[str, Task] = {name: task for name, task in tasks.items() if isinstance(task, Task)}
    if len(files) < len(tasks):
        other = next(name for name in tasks if name not in files)
        raise RecipeError(f"tasks.{other}: the proxy of automixer evaluates tasks, which are .jsonl files")
    small = replace(
        recipe, output=str(folder), model=proxy.model, training=proxy.training, batch_size=proxy.batch_size, proxy=None
    )
    arguments = training_arguments(small)
    dataset = make_dataset(small, stores, recipe.data.weights, tokenizer, folder)
    peaks = PeakCallback(files, every=proxy.every, folder=folder / "peaks", metric=proxy.metric)  # type: ignore[arg-type]
    if not (folder / "peaks" / "done").exists():
        checkpoint = newest_checkpoint(folder)
        config = model_config(proxy.model, tokenizer, length, "proxy.model")
        model = make_model(proxy.model, config, recipe.seed, checkpoint)
        trainer = Trainer(
            model, arguments, train_dataset=dataset, data_collator=default_data_collator, callbacks=[peaks]
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        (folder / "peaks" / "done").touch()
    found = PeakSnapshots(folder / "peaks", metric=proxy.metric).selected  # type: ignore[arg-type]
    sources = peak_sources(found)
    scores = folder / "scores"
    made = curvature(proxy.curvature, {}, None, "proxy.curvature")
    corpus: Any = stores
    if recipe.data.boundaries is not None:  # as the run will read them
        corpus = MixtureDataset(stores, num_samples=1, sequence_length=length, boundaries=recipe.data.boundaries)  # type: ignore[arg-type]
    score_corpus(corpus, files, sources, scores, sequence_length=length, layers=proxy.layers, curvature=made)
    table = read_scores(scores)
    groups = regroup(table, keep=proxy.keep, blend=proxy.blend)  # type: ignore[arg-type]
    limits = [limit for limit in (proxy.max_epochs, recipe.data.max_epochs) if limit is not None]
    weights = group_weights(groups, max_epochs=min(limits), tokens=_total(recipe))
    if weights is None:
        raise ValueError("proxy: no group of sequences helps any task, so that there is nothing to regroup")
    paths = {name: stores[name].path for name in table.domains}
    write_groups(folder / "groups", groups, weights, table, paths, unit="sequence", sequence_length=length)


def _total(recipe: Recipe) -> int:
    """Tokens that the run trains on."""
    return int(recipe.training["max_steps"] * recipe.batch_size * recipe.data.sequence_length)


def _store(name: str, source: Any) -> TokenStore:
    if isinstance(source, TokenStore):
        return source
    try:
        return TokenStore.open(source)
    except (ValueError, TypeError) as problem:
        raise RecipeError(f"domains.{name}: the small runs of a proxy take token stores or text: {problem}") from None
