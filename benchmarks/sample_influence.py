"""What scoring a corpus by sample influence costs, and whether it finds the data that belongs to a task.

    python benchmarks/sample_influence.py cost
    python benchmarks/sample_influence.py precision runs/precision

`cost`: a Llama of hidden size 384 with 8 layers over a vocabulary of 4,096, six tasks, sequences of 256 tokens. F is a
forward pass with its loss, F + B a training step's forward and backward pass without its optimizer, over the same
sequences and measured in turn in this process, in processor time with one thread; beside each ratio stands the one of
the FLOPs that cannot be saved. The reference way takes each sequence's gradient by autograd, one at a time, and
multiplies it with the tasks' preconditioned ones. What is made once, the tasks' gradients and the curvature, is not
timed.

`precision` needs the test corpus (`$DYNMIX_SHARED`, default ../shared): it trains a small Llama on all 14 domains with
a checkpoint every 10th of the way (resumed where it was stopped) and lets the checkpoint where each of six tasks peaks
score every 12th document as a whole, in windows of 256 tokens. For the two tasks that have a domain of their own it
prints what share of the top decile is of that domain, beside its share of all and the most that there can be; and the
same of as many documents as the domain has. And it prints how much of each domain is in the top half by joint
influence, and its mean influence on each task. With `--at` checkpoints of any steps score all tasks, and are blended.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from influence import passes, seconds
from pretraining.kept import check_settings
from rich.console import Console
from rich.table import Table
from shared import shared
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dynmix.influence.batch import next_token_loss
from dynmix.influence.capture import Capture
from dynmix.influence.sample import SampleScorer

app = typer.Typer(no_args_is_help=True, add_completion=False)
TASKS = ("gsm8k", "humaneval", "arc_easy", "piqa", "hellaswag", "blimp")
LENGTH = 256
PAIRED = {"gsm8k": "math_word", "humaneval": "code_python"}
LINEAR = r"^(?!.*embed)"


def llama(hidden: int, layers: int, length: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            max_position_embeddings=length,
        )
    )


@app.command()
def cost(rounds: int = 5, batch: int = 4, length: int = 256) -> None:
    """Time over a forward pass, and over forward and backward; beside the ratio of the FLOPs."""
    torch.set_num_threads(1)
    model = llama(384, 8, length)
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, Tensor]:
        return {"input_ids": torch.randint(0, 4096, (batch, length), generator=generator)}

    data, tasks = [draw(), draw()], {name: [draw()] for name in TASKS}
    scorers = {
        "default layers": SampleScorer(model, tasks, [draw()]),
        "all linear layers": SampleScorer(model, tasks, [draw()], layers=LINEAR),
    }

    def forward() -> None:
        with torch.no_grad():
            for one in data:
                next_token_loss(model, one)

    def step() -> None:
        passes(model, data)

    def reference(scorer: SampleScorer) -> np.ndarray[Any, Any]:
        """Scores by a gradient a sequence."""
        parameters = [module.weight for name, module in Capture(model).layers.items() if name in scorer.layers]
        towards = [scorer._towards[name] for name in Capture(model).layers if name in scorer.layers]
        found = []
        for one in data:
            for row in one["input_ids"]:
                loss, tokens = next_token_loss(model, {"input_ids": row[None]})
                gradients = torch.autograd.grad(loss.sum() / tokens.sum(), parameters)
                found.append(sum(R.flatten(1) @ g.flatten() for R, g in zip(towards, gradients, strict=True)))
        return torch.stack(found).numpy()  # type: ignore[arg-type]

    everything = sum(m.weight.numel() for m in Capture(model).layers.values())
    table = Table("six tasks, one checkpoint", "over", "time", "floor", "reference way / ours", "correlation")
    forward()
    step()
    for name, scorer in scorers.items():
        chosen = sum(m.weight.numel() for n, m in Capture(model).layers.items() if n in scorer.layers)
        base, over = (forward, "F") if name == "default layers" else (step, "F + B")
        # Two FLOPs a weight and token forward, as many for each of what the backward pass does: the gradient of the
        # input and that of the weight. The products with six tasks come once a sequence.
        work = everything + 2 * chosen + len(TASKS) * chosen / length
        floor = work / (everything if over == "F" else 3 * everything)
        ours, theirs, bases = [], [], []
        scores = np.concatenate([scorer(one).scores for one in data])
        expected = reference(scorer)
        for _ in range(rounds):
            bases.append(seconds(base))
            ours.append(seconds(lambda: [scorer(one) for one in data]))  # noqa: B023
            theirs.append(seconds(lambda: reference(scorer)))  # noqa: B023
        ratio = statistics.median(a / b for a, b in zip(ours, bases, strict=True))
        slower = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
        same = np.corrcoef(scores.ravel(), expected.ravel())[0, 1]
        table.add_row(name, over, f"{ratio:.2f}", f"{floor:.2f}", f"{slower:.2f}", f"{same:.6f}")
    Console().print(table)


def proxy(folder: Path, hidden: int, depth: int, steps: int, batch: int, rate: float, seed: int = 0) -> dict[str, Path]:
    """Stores of the 14 domains, by name, and a small Llama trained on them with ten checkpoints, in `folder/run`.

    What is there already is used, and a training that was stopped goes on; one of other sizes is refused.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from dynmix import MixtureDataset
    from dynmix.mixture.prepare import prepare

    own = {"hidden": hidden, "depth": depth, "steps": steps, "batch": batch, "rate": rate, "seed": seed}
    check_settings(folder, own)
    corpus = shared("corpus")
    if not (folder / "stores/prepared").exists():
        prepare([corpus / "domains"], folder / "stores", str(corpus / "tokenizers/bpe4096"), overwrite=True)
        (folder / "stores/prepared").touch()
    paths = {path.stem: path for path in sorted((folder / "stores").glob("*.idx"))}
    dataset = MixtureDataset(paths, num_samples=steps * batch, sequence_length=LENGTH, block=batch)
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=100, save_steps=steps // 10, logging_steps=100, report_to=[],
        train_sampling_strategy="sequential", weight_decay=0.1, bf16=torch.cuda.is_available(), max_grad_norm=1.0,
    )  # fmt: skip
    last: str | None = get_last_checkpoint(str(folder / "run")) if (folder / "run").is_dir() else None  # type: ignore[no-untyped-call]
    if last is None or int(last.rsplit("-", 1)[1]) < steps:
        Trainer(llama(hidden, depth, 512, seed), arguments, train_dataset=dataset).train(resume_from_checkpoint=last)
    return paths


def halves(half: int) -> dict[str, Any]:
    """Up to 200 examples a task: the even ones (half 0) make scores and peaks, the odd ones (1) are for judging."""
    from dynmix import Task

    corpus = shared("corpus")
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizers/bpe4096")
    whole = {t: Task.from_jsonl(corpus / f"tasks/{t}.jsonl", tokenizer, max_length=256) for t in TASKS}
    return {t: Task(t, task.records[half::2][:200], tokenizer, max_length=256) for t, task in whole.items()}


Folder = Annotated[Path, typer.Argument(help="For stores, checkpoints and scores; what is there is used.")]


@app.command()
def precision(
    folder: Folder,
    steps: int = 2400,
    batch: Annotated[int, typer.Option(help="Sequences of 256 tokens a step.")] = 8,
    hidden: int = 128,
    depth: int = 4,
    rate: float = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the parameters.")] = 0,
    every: Annotated[int, typer.Option(help="So many documents of a domain, one is scored.")] = 12,
    documents: Annotated[int, typer.Option(help="So many documents of each domain instead; 0: as many as come.")] = 0,
    unit: Annotated[str, typer.Option(help="document (a whole one) or sequence (256 tokens in a row).")] = "document",
    curvature: Annotated[str, typer.Option(help="datainf or ekfac.")] = "datainf",
    layers: str | None = None,
    at: Annotated[
        str | None, typer.Option(help="Score all tasks by the checkpoints of these steps, by commas, not their peaks.")
    ] = None,
    blend: Annotated[str, typer.Option(help="Of several checkpoints: step, early or equal.")] = "step",
    batch_tokens: int = 8192,
) -> None:
    """The share of the paired domain in a task's top decile; noise and near-duplicates by joint influence."""
    from dynmix import EKFAC, DataInf, TokenStore
    from dynmix.checkpoints import list_checkpoints, select_checkpoints
    from dynmix.mixers.regroup import blended
    from dynmix.scoring import all_sources, peak_sources, read_scores, score_corpus

    curvatures = {"datainf": DataInf, "ekfac": EKFAC}
    known = {
        "curvature": (curvature, [*curvatures]),
        "unit": (unit, ["document", "sequence"]),
        "blend": (blend, ["step", "early", "equal"]),
    }
    for option, (value, values) in known.items():
        if value not in values:
            raise SystemExit(f"--{option} {value}: one of {', '.join(values)}")
    kept = [str(step) for step in range(steps // 10, steps + 1, steps // 10)]
    if at is not None and not set(at.split(",")) <= set(kept):
        raise SystemExit(f"--at {at}: there are checkpoints of the steps {','.join(kept)}")
    paths, tasks = proxy(folder, hidden, depth, steps, batch, rate, seed), halves(0)
    chosen = select_checkpoints(folder / "run", tasks)
    if at is None:
        sources, scored_at = peak_sources(chosen), {task: peak.path.name for task, peak in chosen.items()}
    else:
        asked = [found for found in list_checkpoints(folder / "run") if str(found.step) in at.split(",")]
        sources, scored_at = all_sources(asked, tasks), dict.fromkeys(tasks, f"{len(asked)} steps, {blend}")
    some = {}
    for name, path in paths.items():
        store = TokenStore.open(path)
        numbers = range(0, len(store), every)
        if unit == "sequence":
            numbers = range(0, store.num_tokens // 256, every)
        if documents:
            numbers = range(0, numbers.stop, max(1, numbers.stop // documents))[:documents]
        texts = (store[i] if unit == "document" else store.tokens[256 * i : 256 * (i + 1)] for i in numbers)
        some[name] = TokenStore.write(folder / f"{unit}s-{every}-{documents}" / name, texts)
    out = (
        folder
        / f"scores-{unit}-{every}-{documents}-{curvature}-{at}-{'last' if layers is None else layers.encode().hex()}"
    )
    score_corpus(
        some, tasks, sources, out, unit="document", sequence_length=256, layers=layers,
        curvature=curvatures[curvature](), curvature_sequences=256, batch_tokens=batch_tokens,
    )  # fmt: skip
    scores = read_scores(out)
    by_task, joint = blended(scores, blend)  # type: ignore[arg-type]
    domain = np.array(scores.domains)[scores.domain]
    table = Table("task", "scored at", "its domain", "of the top", "is of it", "by chance", "at most", title=out.name)
    for task, own in PAIRED.items():
        order, has = np.argsort(-by_task[:, scores.tasks.index(task)], kind="stable"), int((domain == own).sum())
        for what, n in (("decile", len(domain) // 10), (f"{has}", has)):
            share, most = (domain[order[:n]] == own).mean(), min(1.0, has / n)
            row = (f"{share:.0%}", f"{has / len(domain):.0%}", f"{most:.0%}")
            table.add_row(task, scored_at[task], own, what, *row)
    half = joint > np.median(joint)
    ranks = Table("domain", "in the top half", "joint", *scores.tasks, title="by joint influence; mean influence")
    for name in sorted(scores.domains, key=lambda name: -joint[domain == name].mean()):
        own = domain == name
        means = (joint[own].mean(), *by_task[own].mean(axis=0))
        ranks.add_row(name, f"{half[own].mean():.0%}", *(f"{mean:+.2f}" for mean in means))
    Console(width=120).print(table, ranks)


if __name__ == "__main__":
    app()
