"""What a recipe may say: typed dataclasses, which OmegaConf fills from YAML and whose names it knows.

Knows names, types and defaults. What a value means is said where it is used: these are arguments of the library.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Model:
    """A causal LM of transformers; a path or name alone stands for `path`.

    Attributes:
        path: folder or hub name of a checkpoint, whose weights the run goes on from.
        config: instead, of a new model: folder or hub name of a configuration, or `model_type` and its arguments.
            Where `vocab_size`, `max_position_embeddings` or the ids of BOS, EOS and PAD are left out, they follow from
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
        held_out: share of the documents of text that is kept for tasks, above 0 and below 1, by a hash of the text;
            None: nothing.
    """

    path: Any = MISSING
    text_field: str = "text"
    held_out: float | None = None


@dataclass
class Data:
    """How domains become the stream; arguments of `MixtureDataset`, but for the folder of what is tokenised here.

    Attributes:
        sequence_length: tokens of a sequence.
        weights: of the first stage: "natural", "uniform", or domain -> weight, which sum to 1. With a `proxy` of
            automixer they are the small run's; with one of mde they are not used.
        max_epochs: how often a domain may be read, for all or by name; None: no limit.
        when_exhausted, packing, boundaries: as in `MixtureDataset`.
        homogeneous: sequences of one domain that stand in a row, so that micro-batches are of one domain.
        groups: folder that `dynmix regroup` wrote, instead of `domains` and `weights`.
        cache_dir: where tokenised text and copies of remote files are kept; None: `tokens` in the run folder.
    """

    sequence_length: int = 1024
    weights: Any = "natural"
    max_epochs: Any = None
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
        held_out: instead, the domain whose held-out documents it is: those of text that is tokenised here, or the store
            `<domain>.valid` beside the domain's.
        limit: so many examples of a file are taken, evenly spread; None: all.
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
        steps: optimizer steps a stage (`stage_steps`).
        max_stages: of the run at most; the last one goes on to the end.
        keep: newest snapshots that are kept, one a stage; 0: none.
        loss_every: task losses are measured for the journal at every so many boundaries.
    """

    steps: int = MISSING
    max_stages: int | None = None
    keep: int = 2
    loss_every: int = 1


@dataclass
class InRun:
    """The training's own backward passes measure the domains; arguments of `dynmix.InRun`.

    Attributes:
        window: last optimizer steps of a stage that are looked at.
        folds, every, least: as there; without `every` micro-batches hold one domain each (`data.homogeneous`).
    """

    window: int = MISSING
    folds: int = 4
    every: int | None = None
    least: int = 8


@dataclass
class Measurement:
    """What a measurement takes; arguments of `MixtureController`.

    Attributes:
        curvature: name and arguments: ekfac, kfac, datainf, adam, identity, gauss-newton; a name alone will do.
            None: the mixer's usual one.
        layers: regular expression on layers' names, or the arguments of `Layers`; None: the mixer's usual ones.
        probe_sequences, curvature_sequences, task_sequences, sample_sequences, micro_batch: as there.
        offload, layer_groups, rank: ways to take less memory, as there.
        in_run: None: the domains are measured by passes of their own, at the boundary.
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
        tokens: that each small model is trained on.
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
        batch_size: sequences of an optimizer step.
        training: its Trainer arguments, `max_steps` among them.
        every: steps from one evaluation of the tasks to the next.
        metric: by which a task peaks.
        layers, curvature: of the scores, as in `dynmix score`.
        keep, blend: of the groups, as in `dynmix regroup`.
        max_epochs: how often a group may be seen.
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
        model: see `Model`; needed.
        tokenizer: folder or hub name; may be left out with `model.path`, which has one.
        domains: name -> `Domain`; needed but with `data.groups`.
        data: see `Data`.
        tasks: name -> `TaskFile`: what the mixture is optimised for, at least one.
        guards: sets that a mixture must not do worse on: "domains", None, or as `tasks`.
        mixer: name and arguments, as `dynmix mixers` lists them; a name alone will do.
        reference: path of the reference model of mixers that need one.
        stages: see `Stages`; its `steps` are needed.
        measurement: see `Measurement`.
        proxy: small runs that decide the weights first: `name` mde or automixer, and the attributes of `MDEProxy` or
            `AutoMixerProxy`; None: none.
        batch_size: sequences of an optimizer step, over all processes; the accumulation follows.
        seed: of the parameters and the data's order.
        training: arguments of transformers' `TrainingArguments`, `max_steps` among them. Where it is silent:
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
