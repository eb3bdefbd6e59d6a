"""What a recipe may say: typed dataclasses, which OmegaConf fills from YAML and whose names it knows.

Knows names, types and defaults. The library's own arguments, which these become, say what the values mean.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Model:
    """A causal LM of transformers; a path or name alone stands for `path`.

    Attributes:
        path: folder or hub name of a checkpoint, from whose weights the run starts.
        config: instead of `path`, for a new model: folder or hub name of a configuration, or `model_type` and its
            arguments. If left out, `vocab_size`, `max_position_embeddings` and the ids of BOS, EOS and PAD follow from
            the tokenizer and `data.sequence_length`.
        dtype: of the parameters.
        attn_implementation: as in `from_pretrained`; None: transformers' choice.
    """

    path: str | None = None
    config: Any = None
    dtype: str = "float32"
    attn_implementation: str | None = None


@dataclass
class Domain:
    """A domain; a path or a list of paths alone stands for `path`.

    Attributes:
        path: whatever `MixtureDataset` takes as a path (token store, flat file, folder or glob of these, saved HF
            dataset, `s3://`), or text: jsonl (.gz, .zst), plain text (.txt, where a blank line ends a document) and
            parquet files, and folders of them, which are tokenised once.
        text_field: field of a record that holds its text.
        held_out: for text: share of the documents that is held out for tasks, above 0 and below 1, by a hash of the
            text; None: nothing.
    """

    path: Any = MISSING
    text_field: str = "text"
    held_out: float | None = None


@dataclass
class Data:
    """How domains become the stream; arguments of `MixtureDataset`, apart from the cache's default.

    Attributes:
        sequence_length: tokens of a sequence.
        weights: of the first stage: "natural", "uniform", or domain -> weight, summing to 1. With an automixer `proxy`
            they are the small run's; with an mde `proxy` they are not used.
        max_epochs: how often a domain may be read, for all or by name; None: no limit.
        distinct_epochs: in its place, how often a text may be read of which a domain has near-duplicates: that times
            the share of each domain that is distinct (`dynmix.mixture.distinct`), for which all tokens are read as the
            run starts.
        when_exhausted, packing, boundaries: as in `MixtureDataset`.
        homogeneous: number of consecutive sequences that come from one domain, as in `MixtureDataset`.
        groups: folder that `dynmix regroup` wrote, instead of `domains` and `weights`.
        cache_dir: where tokenised text and copies of remote files are kept; None: `tokens` in the run folder.
    """

    sequence_length: int = 1024
    weights: Any = "natural"
    max_epochs: Any = None
    distinct_epochs: float | None = None
    when_exhausted: str | None = None
    packing: str = "concat"
    boundaries: str | None = None
    homogeneous: int = 1
    groups: str | None = None
    cache_dir: str | None = None


@dataclass
class TaskFile:
    """A task or a guard; a path alone stands for `path`.

    Attributes:
        path: token store, or a `.jsonl` (.gz) file as `dynmix.Task` reads it.
        held_out: instead of `path`: the domain whose held-out documents to use, those of text that is tokenised here or
            the store `<domain>.valid` beside the domain's.
        limit: most examples of a file that are used, evenly spread; None: all.
        metric: how a file's choices are compared, as in `Task`.
    """

    path: str | None = None
    held_out: str | None = None
    limit: int | None = None
    metric: str = "auto"


@dataclass
class Stages:
    """When the mixture is decided; arguments of `MixtureController`.

    Attributes:
        steps: optimizer steps per stage (`stage_steps`).
        max_stages: most stages of the run; the last one lasts to its end.
        keep: how many of the newest snapshots are kept, one per stage; 0: none.
        loss_every: measure task losses for the journal at every so many boundaries.
    """

    steps: int = MISSING
    max_stages: int | None = None
    keep: int = 2
    loss_every: int = 1


@dataclass
class InRun:
    """The training's own backward passes measure the domains; arguments of `dynmix.InRun`.

    Attributes:
        window: how many of a stage's last optimizer steps are observed.
        folds, every, least: as there; without `every` micro-batches hold one domain each (`data.homogeneous`).
    """

    window: int = MISSING
    folds: int = 4
    every: int | None = None
    least: int = 8


@dataclass
class Measurement:
    """How to measure; arguments of `MixtureController`.

    Attributes:
        curvature: name and arguments: ekfac, kfac, datainf, adam, identity, gauss-newton; a name alone will do.
            None: the mixer's usual one.
        layers: regular expression on layers' names, or the arguments of `Layers`; None: the mixer's usual ones.
        probe_sequences, curvature_sequences, task_sequences, sample_sequences, micro_batch: as there.
        offload, layer_groups, rank: ways to use less memory, as there.
        in_run: see `InRun`; None: the domains are measured in separate passes, at the boundary.
    """

    curvature: Any = None
    layers: Any = None
    probe_sequences: int = 64
    curvature_sequences: int = 128
    task_sequences: int | None = 128
    sample_sequences: int = 512
    micro_batch: int = 8
    offload: str | None = None
    layer_groups: int = 1
    rank: int | None = None
    in_run: InRun | None = None


@dataclass
class MDEProxy:
    """`proxy: {name: mde}`: experts and sampled mixtures at a small size, a law of them, and its best mixture.

    Attributes:
        tokens: how many each small model is trained on.
        model: their configuration, as `model.config`.
        mixtures, batch_size, learning_rate, jobs: of `dynmix proxies`.
        criterion, law, max_epochs: of `dynmix fit`; the domains' tokens and the run's length bound the weights.
    """

    tokens: int = MISSING
    model: Model = field(default_factory=Model)
    mixtures: int = 25
    batch_size: int = 32
    learning_rate: float = 2e-3
    jobs: int = 1
    criterion: str = "avg"
    law: str = "auto"
    max_epochs: float = 4.0


@dataclass
class AutoMixerProxy:
    """`proxy: {name: automixer}`: a small model's run, whose peak checkpoints score and regroup the corpus.

    Attributes:
        model: the small model.
        batch_size: sequences per optimizer step.
        training: its Trainer arguments, including `max_steps`.
        every: steps between evaluations of the tasks.
        metric: what a task peaks by.
        layers, curvature: of the scores, as in `dynmix score`.
        keep, blend: of the groups, as in `dynmix regroup`.
        max_epochs: how often a group may be seen, unless `data.max_epochs` is less.
    """

    model: Model = field(default_factory=Model)
    batch_size: int = 32
    training: dict[str, Any] = field(default_factory=dict)
    every: int = MISSING
    metric: str = "loss"
    layers: str | None = None
    curvature: str = "datainf"
    keep: float = 0.5
    blend: str = "step"
    max_epochs: float = 4.0


@dataclass
class Recipe:
    """A run.

    Attributes:
        output: run folder: checkpoints, `model/` at the end, `recipe.yaml`, `run.json`, and `dynmix/` with the journal.
        model: see `Model`; required.
        tokenizer: folder or hub name; may be left out if `model.path` has one.
        domains: name -> `Domain`; required unless `data.groups` is given.
        data: see `Data`.
        tasks: name -> `TaskFile`: what the mixture is optimised for, at least one.
        guards: sets that a mixture must not make worse: "domains", None, or as `tasks`.
        mixer: name and arguments, as `dynmix mixers` lists them; a name alone will do.
        reference: path of the reference model, for mixers that need one.
        stages: see `Stages`; its `steps` are required.
        measurement: see `Measurement`.
        proxy: small runs that decide the weights first: `name` mde or automixer, and the attributes of `MDEProxy` or
            `AutoMixerProxy`; None: none.
        batch_size: sequences per optimizer step, over all processes; the accumulation follows from it.
        seed: of the parameters and the data's order.
        training: arguments of transformers' `TrainingArguments`, including `max_steps`. By default
            `per_device_train_batch_size` is 8, or `batch_size` if that is less; a checkpoint is saved every
            `stages.steps` and two are kept; losses are logged every 10 steps, and to no tracker (`report_to: none`).
            `output_dir`, `gradient_accumulation_steps`, `num_train_epochs` and `resume_from_checkpoint` follow from the
            recipe and are refused, as is `save_only_model`.
    """

    output: str = MISSING
    model: Model = field(default_factory=Model)
    tokenizer: str | None = None
    domains: dict[str, Domain] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    tasks: dict[str, TaskFile] = field(default_factory=dict)
    guards: Any = "domains"
    mixer: dict[str, Any] = field(default_factory=lambda: {"name": "tikmix-d"})
    reference: str | None = None
    stages: Stages = field(default_factory=Stages)
    measurement: Measurement = field(default_factory=Measurement)
    proxy: Any = None
    batch_size: int = 32
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
