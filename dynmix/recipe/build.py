"""The objects that a recipe describes: tokenizer, model, dataset, callback, Trainer.

Knows the constructors of the library and of transformers, and which value of a recipe goes where. Decides nothing.
"""

import types
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from dynmix.callbacks import MixtureCallback
from dynmix.in_run import InRun
from dynmix.influence.base import Curvature
from dynmix.influence.curvature import EKFAC, KFAC, AdamDiagonal, DataInf, GaussNewton, Identity
from dynmix.influence.layers import Layers
from dynmix.mixers.registry import find_mixer, make_mixer
from dynmix.mixers.simplex import normalized
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.distinct import distinct_epochs
from dynmix.proxies.plan import new_model
from dynmix.recipe.names import RecipeError, check_arguments, check_names, in_a_line, named
from dynmix.recipe.schema import Measurement, Model, Recipe

CURVATURES: dict[str, Any] = {
    "ekfac": EKFAC,
    "kfac": KFAC,
    "datainf": DataInf,
    "adam": AdamDiagonal,
    "identity": Identity,
    "gauss-newton": GaussNewton,
}
_OURS = {
    "output_dir": "output",
    "gradient_accumulation_steps": "batch_size (over all processes)",
    "num_train_epochs": "training.max_steps, and data.max_epochs to bound how often a domain is read",
    "resume_from_checkpoint": "nothing: the same command goes on from the newest checkpoint",
}
_NEVER = {
    "save_only_model": "save no state of the optimizer, so that the same command could not go on where the run was "
    "killed: leave it out; save_total_limit says how many checkpoints are kept",
    "auto_find_batch_size": "change what a step is during the run: leave it out, and give a smaller "
    "training.per_device_train_batch_size",
    "ignore_data_skip": "start the data again from its first sample where the run goes on: leave it out",
}


def training_arguments(recipe: Recipe, **more: Any) -> TrainingArguments:
    """Trainer arguments with the defaults of a recipe: a checkpoint per stage, two kept, and no trackers.

    In a launched process this starts torch.distributed.

    Raises:
        RecipeError: a name that is none, a value of another type, a batch that the processes cannot share.
    """
    given = dict(recipe.training)
    check_names("training", given, [each.name for each in fields(TrainingArguments)])
    for name, instead in _OURS.items():
        if name in given:
            raise RecipeError(f"training.{name}: say it as {instead}")
    hints = get_type_hints(TrainingArguments)
    for name, value in given.items():
        _check_type(f"training.{name}", value, hints[name])
    if not isinstance(given.get("max_steps"), int) or given["max_steps"] < 1:
        raise RecipeError("training.max_steps: give the optimizer steps of the run, at least 1")
    if given.get("train_sampling_strategy", "sequential") != "sequential":
        raise RecipeError(
            f"training.train_sampling_strategy={given['train_sampling_strategy']!r} would shuffle the stages together: "
            "leave it out, the stream is shuffled already"
        )
    if given.get("eval_strategy", "no") != "no":
        raise RecipeError(
            f"training.eval_strategy={given['eval_strategy']!r}: a recipe has no eval_dataset; leave it out, the "
            "losses of tasks and guards are measured at every boundary"
        )
    for name, why in _NEVER.items():
        if given.get(name):
            raise RecipeError(f"training.{name}=True would {why}")
    defaults = {
        "per_device_train_batch_size": min(8, recipe.batch_size),
        "train_sampling_strategy": "sequential",
        "seed": recipe.seed,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 10,
        "save_steps": recipe.stages.steps,
        "save_total_limit": 2,
    }
    try:
        arguments = TrainingArguments(output_dir=recipe.output, **{**defaults, **given, **more})
    except (ValueError, TypeError, ImportError) as problem:
        raise RecipeError(f"training: {in_a_line(problem)}") from problem
    for name, value in (
        ("batch_size", recipe.batch_size),
        ("training.per_device_train_batch_size", arguments.per_device_train_batch_size),
    ):
        if value < 1:
            raise RecipeError(f"{name}={value}: at least 1 sequence")
    split = splits_batches(arguments)
    share = arguments.train_batch_size * (1 if split else arguments.world_size)
    if recipe.batch_size % share:
        raise RecipeError(
            f"batch_size={recipe.batch_size}: no multiple of training.per_device_train_batch_size="
            f"{arguments.per_device_train_batch_size}" + ("" if split else f" times {arguments.world_size} processes")
        )
    arguments.gradient_accumulation_steps = recipe.batch_size // share
    return arguments


def splits_batches(arguments: TrainingArguments) -> bool:
    """Whether accelerate splits each batch over the processes, so that its size is that of all of them."""
    config: Any = arguments.accelerator_config
    return bool(config.split_batches)


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """The run's tokenizer: the one that is named, or that of `model.path`; None where neither is."""
    name = recipe.tokenizer or recipe.model.path
    if name is None:
        return None
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as problem:
        if recipe.tokenizer is None:
            return None  # a checkpoint without one, for stores that are there
        raise RecipeError(
            f"tokenizer: {name}: no folder or hub name of a tokenizer ({in_a_line(problem)})"
        ) from problem
    return loaded


def model_config(
    model: Model, tokenizer: PreTrainedTokenizerBase | None, sequence_length: int, where: str = "model"
) -> PreTrainedConfig:
    """The configuration of a recipe's model. Raises RecipeError."""
    if (model.path is None) == (model.config is None):
        raise RecipeError(f"{where}: give `path`, a checkpoint to go on from, or `config`, of a new model")
    name = model.path or model.config
    try:
        config: PreTrainedConfig = (
            AutoConfig.from_pretrained(name)
            if isinstance(name, str)
            else _new_config(dict(name), tokenizer, sequence_length, where)
        )
    except RecipeError:
        raise
    except Exception as problem:  # every model's configuration has checks, and errors, of its own
        what = f"{where}.path: {name}" if model.path else f"{where}.config"
        raise RecipeError(f"{what}: no configuration of a model ({in_a_line(problem)[:300]})") from problem
    vocabulary = config.get_text_config().vocab_size
    if tokenizer is not None and (largest := max(tokenizer.get_vocab().values())) >= vocabulary:
        raise RecipeError(
            f"{where}: its vocabulary has {vocabulary} tokens and the tokenizer's largest id is {largest}: "
            + ("take the checkpoint's own tokenizer" if model.path else "leave vocab_size out, it follows")
        )
    return config


def make_model(model: Model, config: PreTrainedConfig, seed: int, checkpoint: Path | None = None) -> PreTrainedModel:
    """Load `model.path` or the Trainer's checkpoint, or draw a new model's parameters by `seed`. Raises RecipeError."""
    options: dict[str, Any] = {"dtype": _dtype(model)}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    set_seed(seed)
    path: str | Path | None = model.path
    if checkpoint is not None and any(checkpoint.glob("*.safetensors")):  # a sharded one may have its own format
        path = checkpoint
    try:
        return new_model(config, path, **options)
    except (OSError, ValueError, ImportError) as problem:
        raise RecipeError(f"model: {in_a_line(problem)[:500]}") from problem


def make_dataset(
    recipe: Recipe, domains: Mapping[str, Any], weights: Any, tokenizer: PreTrainedTokenizerBase | None, cache: Path
) -> MixtureDataset:
    """The stream of the whole run. Raises ValueError."""
    data, limits = recipe.data, recipe.data.max_epochs
    if data.distinct_epochs is not None:
        limits = distinct_epochs(domains, data.distinct_epochs, tokenizer=tokenizer, cache_dir=cache)
    return MixtureDataset(
        domains,
        weights,
        num_samples=recipe.training["max_steps"] * recipe.batch_size,
        sequence_length=data.sequence_length,
        seed=recipe.seed,
        block=recipe.batch_size,
        max_epochs=limits,
        when_exhausted=data.when_exhausted,  # type: ignore[arg-type]  # checked there
        packing=data.packing,  # type: ignore[arg-type]
        boundaries=data.boundaries,  # type: ignore[arg-type]
        homogeneous=data.homogeneous,
        tokenizer=tokenizer,
        cache_dir=cache,
    )


def check_parts(recipe: Recipe) -> None:
    """Check what takes no data: mixer, curvature and layers by name and arguments, weights by their sum.

    Raises:
        ValueError: an unknown name, with the nearest right one, or a value that is refused.
    """
    name, options = named("mixer", recipe.mixer)
    make = find_mixer(name)
    check_arguments(f"mixer {name!r}", options, make)
    make_mixer(recipe.mixer)
    _dtype(recipe.model)
    _curvature(recipe.measurement, lambda: None)
    _layers(recipe.measurement)
    _in_run(recipe.measurement)
    if None not in (recipe.data.max_epochs, recipe.data.distinct_epochs):
        raise RecipeError("data.distinct_epochs takes the place of data.max_epochs: leave one of them out")
    if isinstance(weights := recipe.data.weights, Mapping):
        try:
            normalized(weights, tuple(recipe.domains))
        except (ValueError, TypeError) as problem:
            raise RecipeError(f"data.weights: {problem}") from None


def make_callback(
    recipe: Recipe, dataset: MixtureDataset, tasks: Mapping[str, Any], guards: Any, optimizer: Any
) -> MixtureCallback:
    """The callback that decides the mixture; `optimizer` is a function that returns the run's. Raises ValueError."""
    asked = recipe.measurement
    made = {"curvature": _curvature(asked, optimizer), "layers": _layers(asked), "in_run": _in_run(asked)}
    return MixtureCallback(
        dataset,
        tasks,
        recipe.mixer,
        recipe.stages.steps,
        guards=guards,
        reference=recipe.reference,
        **(vars(asked) | made),  # the others as they are given
        max_stages=recipe.stages.max_stages,
        keep=recipe.stages.keep,
        loss_every=recipe.stages.loss_every,
        output=Path(recipe.output) / "dynmix",
    )


def curvature(name: str, options: Mapping[str, Any], optimizer: Any, where: str = "measurement.curvature") -> Curvature:
    """A curvature by name and arguments; `optimizer` as in `make_callback`, None: there is none. Raises RecipeError."""
    check_names(where, [name], CURVATURES)
    if name == "adam" and optimizer is None:
        raise RecipeError(f"{where}: adam is the optimizer of the run that trains, and there is none here; take ekfac")
    check_arguments(f"{where} {name!r}", options, CURVATURES[name])
    own = {"source": optimizer} if name == "adam" else {}
    try:
        made: Curvature = CURVATURES[name](**own, **options)
    except (ValueError, TypeError) as problem:
        raise RecipeError(f"{where}: {problem}") from None
    return made


def _dtype(model: Model) -> torch.dtype:
    found = getattr(torch, model.dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RecipeError(f"model.dtype={model.dtype!r}: float32, bfloat16 or float16")
    return found


def _curvature(measurement: Measurement, optimizer: Any) -> Curvature | None:
    if measurement.curvature is None:
        return None
    return curvature(*named("measurement.curvature", measurement.curvature), optimizer)


def _in_run(measurement: Measurement) -> InRun | None:
    try:
        return None if measurement.in_run is None else InRun(**asdict(measurement.in_run))
    except ValueError as problem:
        raise RecipeError(f"measurement.in_run: {problem}") from None


def _layers(measurement: Measurement) -> Any:
    given = measurement.layers
    if isinstance(given, Mapping):
        check_arguments("measurement.layers", given, Layers)
    try:
        found = Layers(**given) if isinstance(given, Mapping) else Layers(given)
    except ValueError as problem:
        raise RecipeError(f"measurement.{problem}") from problem
    return found if isinstance(given, Mapping) else given


def _new_config(
    given: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, sequence_length: int, where: str
) -> PreTrainedConfig:
    kind = given.pop("model_type", None)
    if not isinstance(kind, str):
        raise RecipeError(f"{where}.config: model_type is missing, such as llama")
    plain = AutoConfig.for_model(kind)
    known = {*vars(plain), *plain.attribute_map, *plain.to_dict()}
    check_names(f"{where}.config", given, [each for each in known if not each.startswith("_")])
    follows: dict[str, Any] = {"max_position_embeddings": sequence_length}
    if tokenizer is not None:
        follows |= {"vocab_size": max(tokenizer.get_vocab().values()) + 1}
        follows |= {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    # GPT-2's max_position_embeddings is its n_positions: given by either name it does not follow.
    own = {plain.attribute_map.get(name, name) for name in given}
    follows = {n: value for n, value in follows.items() if n in known and plain.attribute_map.get(n, n) not in own}
    config: PreTrainedConfig = AutoConfig.for_model(kind, **{**follows, **given})
    return config


def _check_type(where: str, value: Any, hint: Any) -> None:
    """Raises RecipeError where a plain number, flag or text was expected and YAML gave something else."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = {bool, int, float, str, types.NoneType}
    if not {*kinds} <= plain:
        return
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return
    if type(value) not in kinds:
        expected = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise RecipeError(f"{where}={value!r}: a value of type {expected} is expected")
