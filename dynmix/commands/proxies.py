"""`dynmix proxies`: experts and sampled mixtures trained at a small size, for `dynmix fit`."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from dynmix.commands import command, fail, print_json


@command
def proxies(
    data: Annotated[list[Path], typer.Option(help="Folder of token stores, each a domain, or one store.")],
    tasks: Annotated[
        list[Path], typer.Option(help="What losses are of: folder of tasks' or documents' .jsonl(.gz), or one file.")
    ],
    tokenizer: Annotated[str, typer.Option("--tokenizer", "-t", help="The stores' tokenizer: folder or name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs; what is there is continued.")],
    tokens: Annotated[int, typer.Option(help="That each proxy is trained on.")],
    mixtures: Annotated[int, typer.Option(help="How many are sampled.")] = 25,
    experts: Annotated[bool, typer.Option(help="Train a proxy per domain, too.")] = True,
    frequency: Annotated[
        float, typer.Option(help="How much the mixtures are drawn to the domains' sizes, 0 (uniform) to 1.")
    ] = 0.5,
    model: Annotated[
        str | None, typer.Option(help="Configuration of a causal LM: folder or name. Default: a Llama of these sizes.")
    ] = None,
    hidden_size: Annotated[int, typer.Option(help="Of the Llama.")] = 256,
    layers: Annotated[int, typer.Option(help="Of the Llama.")] = 4,
    heads: Annotated[int, typer.Option(help="Of the Llama.")] = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences of an optimizer step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 2e-3,
    task_limit: Annotated[int, typer.Option(help="Examples of a task that its loss is of, at most.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the parameters, the data's order and the mixtures.")] = 0,
    max_epochs: Annotated[float, typer.Option(help="Warn of runs that see a domain more often.")] = 4.0,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Runs at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Of each. Default: all, shared out.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what is done as JSON.")] = False,
) -> None:
    """Train proxies, one per domain and on sampled mixtures, and write runs.csv and experts/ for `dynmix fit`."""
    from transformers import AutoTokenizer

    from dynmix.mixture.prepare import check_tokenizer
    from dynmix.proxies.plan import Training, small_llama
    from dynmix.proxies.run import run_proxies
    from dynmix.scoring.inputs import find_stores, find_tasks, some_examples

    training = Training(tokens, sequence_length, batch_size, learning_rate, seed)
    stores = find_stores(data)
    found = find_tasks(tasks, tokenizer, sequence_length)
    check_tokenizer(stores.values(), tokenizer)
    size = (hidden_size, layers, heads, sequence_length)
    done = run_proxies(
        stores, {name: some_examples(task, task_limit) for name, task in found.items()}, out,
        model=model or small_llama(len(AutoTokenizer.from_pretrained(tokenizer)), *size), training=training,
        mixtures=mixtures, experts=experts, frequency=frequency, max_epochs=max_epochs, jobs=jobs, threads=threads,
    )  # fmt: skip
    if json:
        print_json({"done": done.done, "failed": done.failed, "table": done.table, "experts": done.experts})
    elif done.table:
        table = quote(str(done.table))
        cache = f" --experts {quote(str(done.experts))}" if done.experts else ""
        typer.echo(f"{len(done.done)} of {len(done.done) + len(done.failed)} runs are done: dynmix fit {table}{cache}")
    if done.failed:
        missing = "\n".join(f"  {run}: {problem}" for run, problem in done.failed.items())
        fail(ValueError(f"{len(done.failed)} runs failed; the same command tries them again:\n{missing}"))
