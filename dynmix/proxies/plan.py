"""What proxies are trained on and with: checked before the first run, and kept with the runs that depend on it.

    proxies.json                    the plan, with fingerprints of the data
    model/config.json               the architecture, as transformers reads it
    validation/<set>.safetensors    the validation sets, as batches

Knows stores, batches and configurations; trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from dynmix.batches import Batch, as_batches, scored_sequence
from dynmix.influence.batch import next_token_labels
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.store import TokenStore
from dynmix.whole_file import write_json, write_whole

FORMAT = 1
LOOKED_AT = 1 << 24  # tokens of a store whose ids are compared with the vocabulary: enough to see a wrong tokenizer


@dataclass(frozen=True)
class Training:
    """How each proxy is trained.

    Attributes:
        tokens: that a proxy is trained on, at least; made up to whole steps.
        sequence_length: tokens of a sequence.
        batch_size: sequences of an optimizer step, and of a forward pass on a validation set.
        learning_rate: the highest, of AdamW with a cosine schedule after a tenth of warm-up.
        seed: of the parameters and of the order of the data, the same for all, and of the mixtures.

    Raises ValueError for fewer tokens than one step takes, or sizes below 2 tokens and 1 sequence.
    """

    tokens: int
    sequence_length: int = 1024
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequence_length < 2 or self.batch_size < 1:
            raise ValueError(
                f"sequence_length={self.sequence_length}, batch_size={self.batch_size}: at least 2 tokens, 1 sequence"
            )
        if self.tokens < self.sequence_length * self.batch_size:
            raise ValueError(
                f"tokens={self.tokens}: at least one step of {self.batch_size} sequences of {self.sequence_length} "
                f"tokens, {self.sequence_length * self.batch_size}"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate}: a number above 0")

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return -(-self.tokens // (self.sequence_length * self.batch_size))

    @property
    def sequences(self) -> int:
        """That a run is trained on."""
        return self.steps * self.batch_size

    def dataset(self, stores: Mapping[str, Any], weights: Any) -> MixtureDataset:
        """Return the stream of a run of these weights."""
        return MixtureDataset(
            stores,
            weights,
            num_samples=self.sequences,
            sequence_length=self.sequence_length,
            seed=self.seed,
            block=self.batch_size,
        )


def small_llama(
    vocab_size: int, hidden_size: int = 256, layers: int = 4, heads: int = 4, sequence_length: int = 1024
) -> LlamaConfig:
    """Return the configuration of a Llama with tied embeddings, for `run_proxies`.

    Args:
        vocab_size: of the tokenizer that the stores were made with.
        hidden_size: a multiple of twice `heads`; the MLP is three times as wide.
        layers: transformer blocks.
        heads: of attention.
        sequence_length: positions.

    Raises:
        ValueError: sizes that make none.
    """
    if min(hidden_size, layers, heads) < 1 or hidden_size % (2 * heads):
        raise ValueError(
            f"hidden_size={hidden_size}, layers={layers}, heads={heads}: at least 1, and an even number of dimensions "
            "a head"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


@dataclass(frozen=True)
class Plan:
    """What all runs of a folder have in common.

    Attributes:
        config: everything that a run's result depends on, as JSON, and the stores' `paths`, which it does not.
        model: of every proxy, trained from new parameters.
        validation: name -> batches.
    """

    config: dict[str, Any]
    model: PreTrainedConfig
    validation: dict[str, list[Batch]]

    @classmethod
    def make(
        cls,
        stores: Mapping[str, TokenStore | str | os.PathLike[str]],
        validation: Mapping[str, Any],
        model: PreTrainedConfig | str | os.PathLike[str],
        training: Training,
        frequency: float,
        scale: tuple[float, float],
    ) -> Self:
        """Check everything and put it together. Raises ValueError, saying which argument is wrong."""
        for what, names in (("stores", stores), ("validation", validation)):
            if bad := [name for name in names if not name or Path(name).name != name or name[0] == "."]:
                raise ValueError(f"{what}: {bad[0]!r} is to be a file's name: no slash in it, no dot before it")
        if len(stores) < 2 or not validation:
            raise ValueError(f"{len(stores)} domains and {len(validation)} validation sets: at least 2 and 1")
        opened = {name: s if isinstance(s, TokenStore) else TokenStore.open(s) for name, s in stores.items()}
        dataset = training.dataset(opened, "uniform")
        config = _architecture(model)
        text = config.get_text_config()
        vocabulary, limit = text.vocab_size, getattr(text, "max_position_embeddings", None)
        if limit and training.sequence_length > limit:
            raise ValueError(f"sequence_length={training.sequence_length}: the model takes {limit} tokens at most")
        for name, store in opened.items():
            if (largest := int(store.tokens[:LOOKED_AT].max())) >= vocabulary:
                raise ValueError(
                    f"domain {name!r} has token {largest}, the model's vocabulary has {vocabulary}: it is of another "
                    "tokenizer, or the model is"
                )
        batches = {
            name: as_batches(
                source, name=name, sequence_length=training.sequence_length, micro_batch=training.batch_size
            )
            for name, source in validation.items()
        }
        for name, own in batches.items():
            scored_sequence(own, f"validation set {name!r}")
            longest = max(batch["input_ids"].shape[1] for batch in own)
            largest = max(int(batch["input_ids"].max()) for batch in own)
            if largest >= vocabulary or (limit and longest > limit):
                raise ValueError(
                    f"validation set {name!r} has token {largest} and a sequence of {longest} tokens; the model's "
                    f"vocabulary has {vocabulary}, and it takes {limit} tokens at most"
                )
        facts = {
            "format": {"version": FORMAT},
            "order": {"domains": list(opened), "validation": list(batches)},
            "domains": {
                name: {"sequences": dataset.sizes[name], "content": content}
                for name, content in dataset.fingerprint.items()
            },
            "validation": {name: f"{_tokens(own)} tokens, {_hash(_packed(own))}" for name, own in batches.items()},
            "model": {k: v for k, v in json.loads(config.to_json_string()).items() if k != "transformers_version"},
            "training": asdict(training),
            "mixtures": {"frequency": frequency, "scale": list(scale)},
            "paths": {name: str(store.path) for name, store in opened.items()},
        }
        return cls(facts, config, batches)

    @classmethod
    def read(cls, out: Path) -> Self:
        """Return the plan that `keep` wrote."""
        config = json.loads((out / "proxies.json").read_text(encoding="utf-8"))
        validation = {name: _unpacked(out / f"validation/{name}.safetensors") for name in config["order"]["validation"]}
        return cls(config, AutoConfig.from_pretrained(out / "model"), validation)

    def keep(self, out: Path) -> None:
        """Write the plan into a folder, or see that the folder has the same one.

        Raises:
            ValueError: it has another; the message says what differs.
        """
        file = out / "proxies.json"
        if not file.exists() and (out / "runs").exists():
            raise ValueError(f"{out}/runs is there without {file.name}: give an empty folder")
        if file.exists():
            try:
                found = _differences(json.loads(file.read_text(encoding="utf-8")), self.config)
            except (ValueError, KeyError, TypeError, AttributeError) as problem:
                raise ValueError(f"{file} is damaged ({problem!r}): give another folder") from problem
            if found:
                raise ValueError(
                    f"{out} has runs of another configuration: {'; '.join(found[:5])}. Give another folder, or delete "
                    "this one"
                )
        for name, batches in self.validation.items():
            write_whole(out / f"validation/{name}.safetensors", _packed(batches))
        write_whole(out / "model/config.json", self.model.to_json_string())
        write_json(file, self.config)

    @property
    def training(self) -> Training:
        """How each proxy is trained."""
        return Training(**self.config["training"])

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self.config["order"]["domains"])

    @property
    def sizes(self) -> dict[str, int]:
        """Sequences of each domain, in order."""
        return {name: self.config["domains"][name]["sequences"] for name in self.domains}

    @property
    def tokens(self) -> dict[str, int]:
        """Scored tokens of each validation set."""
        return {name: _tokens(batches) for name, batches in self.validation.items()}


def new_model(config: PreTrainedConfig, checkpoint: str | Path | None = None, **options: Any) -> PreTrainedModel:
    """Return a causal LM with new parameters drawn from torch's random state, or those of a checkpoint.

    (The Trainer loads a checkpoint too, but not what is called otherwise in files than in the model, as experts are:
    that would stay as it was drawn.) It is float32, unless transformers' `options` say otherwise.
    """
    options = {"dtype": torch.float32, **options}
    if checkpoint is not None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, **options)
    else:
        model = AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    return model


def _architecture(model: PreTrainedConfig | str | os.PathLike[str]) -> PreTrainedConfig:
    """Return the configuration, seen to make a causal LM."""
    try:
        config = model if isinstance(model, PreTrainedConfig) else AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            new_model(config)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ArithmeticError) as problem:
        name = type(model).__name__ if isinstance(model, PreTrainedConfig) else model
        raise ValueError(f"model {name}: no configuration of a causal LM: {problem}") from problem
    assert isinstance(config, PreTrainedConfig)
    return config


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int((next_token_labels(batch) != -100).sum()) for batch in batches)


def _packed(batches: Sequence[Batch]) -> bytes:
    return save({f"{i:06d} {k}": x.cpu().contiguous() for i, batch in enumerate(batches) for k, x in batch.items()})


def _unpacked(file: Path) -> list[Batch]:
    batches: list[Batch] = []
    for name, tensor in sorted(load_file(file).items()):
        number, key = name.split(" ")
        if int(number) == len(batches):
            batches.append({})
        batches[-1][key] = tensor
    return batches


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{section} {key} was {old.get(key)!r} and is {new.get(key)!r}"
        for section in now
        if section != "paths"
        for old, new in [(before[section], now[section])]
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
