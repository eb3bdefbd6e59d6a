"""The demonstration: a semi-dynamic pretraining run of a small Llama, and the same budget under its static prior.

Everything in it is what a user would write: token stores, a `MixtureDataset`, a `Trainer` with a `MixtureCallback`.
Both runs start from the same parameters and differ in the mixer alone.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed
from transformers.utils import logging

from dynmix.callbacks import MixtureCallback
from dynmix.demo.corpus import build_corpus, train_tokenizer
from dynmix.journal import Journal
from dynmix.mixers import Mixer, Static
from dynmix.mixers.registry import make_mixer
from dynmix.mixture.dataset import MixtureDataset
from dynmix.mixture.packing import PackedSequences
from dynmix.mixture.store import TokenStore
from dynmix.recipe.console import PrintStages, QuietProgress
from dynmix.report import write_report
from dynmix.tables import comparison_table


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration, chosen so that both runs take about four minutes on two cores."""

    stages: int = 4
    stage_steps: int = 60
    batch_size: int = 32  # sequences
    sequence_length: int = 128  # tokens
    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 2
    learning_rate: float = 4e-3
    task_sequences: int = 64
    tasks: tuple[str, ...] = ("reference", "code", "docs", "arithmetic")


def run_demo(
    output: Path,
    seed: int = 0,
    settings: DemoSettings | None = None,
    console: Console | None = None,
    mixer: str = "tikmix-d",
) -> Path:
    """Run the demonstration with this mixer into the folder `output`; return the path of its report.

    The static run is in `output/static`; what an earlier demonstration left is moved aside. Raises ValueError for a
    mixer that is not there or needs arguments.
    """
    decider = make_mixer(mixer)
    if "reference_loss" in decider.needs:
        raise ValueError(f"mixer={mixer!r} compares with a reference model, which the demonstration does not have")
    settings, console = settings or DemoSettings(), console or Console()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call] # of saving a snapshot: shorter than its bar
    corpus = build_corpus()
    tokenizer = train_tokenizer((d for documents in corpus.domains.values() for d in documents), settings.vocab_size)

    def store(kind: str, name: str, documents: list[str]) -> TokenStore:
        ended = ([*ids, tokenizer.eos_token_id] for ids in tokenizer(documents)["input_ids"])
        return TokenStore.write(output / "stores" / f"{name}.{kind}", ended)

    domains = {name: store("domain", name, documents) for name, documents in corpus.domains.items()}
    held_out = {name: store("task", name, corpus.tasks[name]) for name in settings.tasks if name in corpus.tasks}
    tasks = {
        name: list(islice(PackedSequences(text, settings.sequence_length), settings.task_sequences))
        for name, text in held_out.items()
    }
    console.print(f"domains: {', '.join(f'{n} {len(s.tokens):,} tokens' for n, s in domains.items())}")
    console.print(f"held-out tasks: {', '.join(tasks)}; the domain `noise` is shuffled words, as a control")

    runs: dict[str, tuple[Mixer, Path]] = {"dynamic": (decider, output), "static": (Static(), output / "static")}
    for name, (own, folder) in runs.items():
        console.rule(f"{name}: {type(own).__name__}")
        _train(domains, tasks, own, folder, seed, settings, tokenizer.eos_token_id, console)
    journals = {name: folder / "journal.jsonl" for name, (_, folder) in runs.items()}
    console.print(comparison_table(*(Journal(path).rows() for path in journals.values())))
    report = write_report(journals["dynamic"], output / "report.html", baseline=journals["static"], title="dynmix demo")
    console.print(f"report: {report}")
    return report


def _train(
    domains: dict[str, TokenStore],
    tasks: dict[str, list[Any]],
    mixer: Mixer,
    output: Path,
    seed: int,
    settings: DemoSettings,
    eos: int,
    console: Console,
) -> None:
    steps = settings.stages * settings.stage_steps
    dataset = MixtureDataset(
        domains,
        weights="natural",
        num_samples=steps * settings.batch_size,
        sequence_length=settings.sequence_length,
        seed=seed,
        block=settings.batch_size,
    )
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=3 * settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            max_position_embeddings=settings.sequence_length,
            bos_token_id=eos,
            eos_token_id=eos,
        )
    )
    callback = MixtureCallback(dataset, tasks, mixer, settings.stage_steps, output=output)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(output / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=dataset,
        callbacks=[callback, PrintStages(Journal(output / "journal.jsonl"), console)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    trainer.train()
