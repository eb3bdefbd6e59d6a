"""What a run will do and about what it costs, before it does: the plan that `dynmix train --dry-run` prints.

Knows the built objects and arithmetic; trains and measures nothing. The model is made without memory.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM

from dynmix.decider import Evidence
from dynmix.influence.layers import Layers, measurable_layers
from dynmix.influence.memory import peak_memory, size_in_words
from dynmix.influence.sample import last_layers
from dynmix.measurement import HELD_OUT
from dynmix.mixers.automixer import AutoMixer
from dynmix.mixers.static import Fixed, Natural, Static, Temperature, Uniform, UniMax
from dynmix.mixers.tikmix_d import TiKMiXD
from dynmix.mixers.tikmix_m import TiKMiXM
from dynmix.observation import Influence
from dynmix.recipe.run import RecipeRun
from dynmix.scoring.cost import flops_per_token, parameters_met

SHOWN = 12  # stages


@dataclass(frozen=True)
class DomainPlan:
    """A domain: what it has, and what the run takes of it; epochs are passes over it.

    Attributes:
        tokens: that it has, in whole sequences.
        weight: in the first stage.
        expected_tokens, expected_epochs: if that weight stays.
        least_epochs, most_epochs: of any weights from the second stage on that the mixer may propose.
    """

    tokens: int
    weight: float
    expected_tokens: int
    expected_epochs: float
    least_epochs: float
    most_epochs: float


@dataclass(frozen=True)
class StagePlan:
    """A stage: the steps (from 1) and positions (in samples, the last one excluded) that its weights serve.

    Attributes:
        decided_after: the step after which its weights are decided; None for the first.
    """

    stage: int
    first_step: int
    last_step: int
    start: int
    stop: int
    decided_after: int | None


@dataclass(frozen=True)
class RunPlan:
    """A run on paper.

    Attributes:
        parameters: of the model.
        tokens, steps, batch_size, processes, accumulation: of the run; the batch is over all processes.
        flops: of the training, 6 a token and parameter that it meets, which are not those of other experts or tables.
        measurement_tokens: that one boundary takes through the model, forward and backward.
        measurement_share: FLOPs of all boundaries over `flops`.
        in_run: whether the training's own backward passes measure the domains; what that takes is in the share.
        memory: what is known of the memory, in bytes: `training` (parameters, gradients and two moments), and at a
            boundary `gradients` and `factors` of the measurement, `fitting` (what making the factors takes besides)
            and how much of all is `elsewhere`, by `offload`. Activations come on top of both.
        scoring: FLOPs over `flops` of scoring the corpus for every task, by as many checkpoints as the mixer may take,
            for mixers that do.
    """

    model: str
    parameters: int
    tokens: int
    steps: int
    batch_size: int
    processes: int
    accumulation: int
    flops: float
    mixer: str
    domains: dict[str, DomainPlan]
    stages: list[StagePlan]
    sets: dict[str, int]
    measurement_tokens: int
    measurement_share: float
    in_run: bool
    memory: dict[str, float]
    scoring: float | None


def make_plan(run: RecipeRun) -> RunPlan:
    """Work out what a run will do. Raises ValueError for a run that cannot be carried out."""
    recipe, controller, dataset = run.recipe, run.callback.controller, run.dataset
    steps, batch = recipe.training["max_steps"], recipe.batch_size
    controller.plan(batch_size=batch, max_steps=steps)
    _check_mixer(run)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(run.config)  # type: ignore[no-untyped-call]
    controller.measurement.check(model)
    total, stage = controller.total, recipe.stages.steps * batch
    length, parameters = dataset.sequence_length, sum(p.numel() for p in model.parameters())
    starts = range(0, total, stage)[: controller.timetable.max_stages]
    measurement, measures = controller.measurement, controller.decider.measures
    measured = _measured_tokens(run) if measures else 0
    # A measurement takes the gradients of layers' outputs, and products with their inputs: no more than training does.
    of_boundary = 6.0 * parameters_met(model) * measured + (_in_run_flops(run, model) if measures else 0.0)
    flops = 6.0 * parameters_met(model) * total * length
    size = torch.empty(0, dtype=getattr(torch, recipe.model.dtype)).element_size()
    return RunPlan(
        model=type(model).__name__,
        parameters=parameters,
        tokens=total * length,
        steps=-(-total // batch),
        batch_size=batch,
        processes=run.arguments.world_size,
        accumulation=run.arguments.gradient_accumulation_steps,
        flops=flops,
        mixer=controller.decider.name,
        domains=_domains(run, total, min(stage, total)),
        stages=[
            StagePlan(
                k, start // batch + 1, -(-stop // batch), start, stop, start // batch - 1 if k else None
            )
            for k, (start, stop) in enumerate(zip(starts, [*starts[1:], total], strict=True))
        ],
        sets={name: sum(len(b["input_ids"]) for b in batches) for name, batches in measurement.sets.items()}
        | ({HELD_OUT: measurement.held_out_sequences * len(dataset.domains)} if measurement.held_out_sequences else {}),
        measurement_tokens=measured,
        measurement_share=of_boundary * (len(starts) - 1) / flops,
        in_run=controller.in_run is not None,
        memory={"training": 4.0 * size * parameters}
        | (_memory(run, model) if measures else {}),
        scoring=_scoring(run, model, flops) if controller.sampler is not None else None,
    )  # fmt: skip


def _check_mixer(run: RecipeRun) -> None:
    """Let our own mixers decide from an influence that says nothing: what they refuse then, they would refuse later."""
    controller, domains = run.callback.controller, run.dataset.domains
    decider, found = controller.decider, Evidence()
    if isinstance(decider.mixer, TiKMiXD | TiKMiXM):  # others may not take it
        rows = _rows(run)
        influence = Influence(np.zeros((len(rows), len(domains))), rows, domains)
        found.influence = controller.measurement.completed(influence)
    elif isinstance(decider.mixer, AutoMixer) and (sampler := controller.sampler) is not None:
        found.samples = sampler.of_one_each(domains, np.zeros((len(domains), len(sampler.sets))))
    else:
        return
    upper = controller.budget.upper(0, controller.timetable.stage_samples)
    decider.rehearse(found, run.dataset.schedule.weights_at(0), upper)


def _domains(run: RecipeRun, total: int, first: int) -> dict[str, DomainPlan]:
    dataset, length = run.dataset, run.dataset.sequence_length
    weights = dataset.schedule.weights_at(0)
    moves = not isinstance(run.callback.controller.mixer, Static | Natural | Uniform | Temperature | UniMax | Fixed)
    limits = run.callback.controller.budget.max_epochs
    found = {}
    for name, weight in weights.items():
        size, limit = dataset.sizes[name], limits.get(name, float("inf"))
        least, most = (weight * first, weight * first + total - first) if moves else (weight * total, weight * total)
        found[name] = DomainPlan(
            size * length, weight, round(weight * total) * length, weight * total / size,
            min(limit, least / size), min(limit, most / size),
        )  # fmt: skip
    return found


def _measured_tokens(run: RecipeRun) -> int:
    """Tokens that a boundary takes through the model."""
    controller, length, n_domains = run.callback.controller, run.dataset.sequence_length, len(run.dataset.domains)
    measurement = controller.measurement
    read = sum(int(each["input_ids"].numel()) for batches in measurement.sets.values() for each in batches)
    read += length * measurement.held_out_sequences * n_domains
    measured = length * measurement.curvature.passes * measurement.curvature_sequences + read
    if controller.in_run is not None:
        return measured
    measured += read + length * measurement.probe_sequences * n_domains
    return int(measured * measurement.memory_options["layer_groups"])


def _in_run_flops(run: RecipeRun, model: Any) -> float:
    """FLOPs of a window: products of the training's gradients with those of the tasks, by micro-batch or sequence."""
    controller, arguments = run.callback.controller, run.arguments
    if controller.in_run is None:
        return 0.0
    options, batch = controller.in_run.options, run.recipe.batch_size
    matrices = sum(layer.shape[0] * layer.shape[1] for layer in measurable_layers(model).values())
    products = 2.0 * matrices * options.folds * len(_rows(run))
    if options.every is None:
        return options.window * batch / arguments.per_device_train_batch_size * products
    steps = -(-options.window // options.every)
    return steps * batch * (products + 2.0 * matrices * run.dataset.sequence_length)


def _memory(run: RecipeRun, model: Any) -> dict[str, float]:
    """Bytes at a boundary; before the window of an in-run influence."""
    controller, rows, n_domains = run.callback.controller, len(_rows(run)), len(run.dataset.domains)
    measurement, in_run = controller.measurement, controller.in_run
    options = dict(measurement.memory_options) if in_run is None else {}
    if options.get("offload") == "cpu" and run.arguments.device.type == "cpu":
        options["offload"] = None
    peak = peak_memory(
        model, None, domains=n_domains, tasks=rows, micro_batch=measurement.micro_batch,
        curvature=measurement.curvature, layers=measurement.layers, **options,
    )  # fmt: skip
    gradients = peak.gradients
    if in_run is not None:
        gradients = gradients * in_run.options.folds * rows // (2 * rows + n_domains)
    found = {"gradients": gradients, "factors": peak.factors, "fitting": peak.fitting, "elsewhere": peak.elsewhere}
    return {name: float(size) for name, size in found.items() if size or name in ("gradients", "factors")}


def _rows(run: RecipeRun) -> list[str]:
    """Rows of the influence: tasks, and guards if the mixer needs them."""
    measurement = run.callback.controller.measurement
    return [*measurement.sets, *([HELD_OUT] if measurement.held_out_sequences else [])]


def _scoring(run: RecipeRun, model: Any, flops: float) -> float:
    controller, length = run.callback.controller, run.dataset.sequence_length
    assert controller.sampler is not None
    chosen = Layers.of(last_layers(model) if controller.sampler.layers is None else controller.sampler.layers)
    layers = [name for name in measurable_layers(model, embeddings=True) if chosen(name)]
    if not layers:
        raise ValueError(f"measurement.layers={controller.sampler.layers!r} selects no layer of the model")
    n_tasks, asked = len(controller.sampler.sets), controller.sampler.plan.checkpoints
    # At most: several tasks may peak in one checkpoint, and fewer may be there than are asked for.
    passes, tasks = (n_tasks, 1) if asked == "peak" else (1 if asked == "last" else asked, n_tasks)
    tokens = sum(run.dataset.sizes.values()) * length
    return flops_per_token(model, layers, tasks, length) * tokens * passes / flops


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print it as tables."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    say(
        f"{plan.model}, {plan.parameters:,} parameters; {plan.tokens:,} tokens in {plan.steps:,} steps of "
        f"{plan.batch_size} sequences (processes: {plan.processes}, accumulation: {plan.accumulation}); "
        f"{plan.flops:.2g} FLOPs"
    )
    table = Table(title="domains", box=box.SIMPLE_HEAD, caption="epochs: at the first weights, and whatever is decided")
    for head in ("domain", "tokens", "weight", "run takes", "epochs", "at least", "at most"):
        table.add_column(head, justify="left" if head == "domain" else "right")
    for name, each in plan.domains.items():
        table.add_row(
            escape(name), f"{each.tokens:,}", f"{each.weight:.4f}", f"{each.expected_tokens:,}",
            *(f"{epochs:.2f}" for epochs in (each.expected_epochs, each.least_epochs, each.most_epochs)),
        )  # fmt: skip
    console.print(table)
    stages = Table(title=f"{len(plan.stages)} stages, mixer {plan.mixer}", box=box.SIMPLE_HEAD)
    for head in ("stage", "steps", "samples", "decided"):
        stages.add_column(head, justify="left" if head == "decided" else "right")
    last = len(plan.stages) - 1
    for row in plan.stages:
        if last >= SHOWN and SHOWN - 2 <= row.stage < last:
            if row.stage == SHOWN - 2:
                stages.add_row("...", "", "", "")
            continue
        stages.add_row(
            str(row.stage), f"{row.first_step:,} to {row.last_step:,}", f"{row.start:,} to {row.stop - 1:,}",
            "before the run" if row.decided_after is None else f"after step {row.decided_after:,}",
        )  # fmt: skip
    console.print(stages)
    say("task and guard sequences: " + ", ".join(f"{name} {count}" for name, count in plan.sets.items()))
    if plan.measurement_tokens:
        say(
            f"a measurement reads {plan.measurement_tokens:,} tokens; all {last} together add about "
            f"{100 * plan.measurement_share:.1f} % to the training's FLOPs"
            + (", with what the training's own backward passes do for it" if plan.in_run else "")
        )
    elif plan.scoring is None:
        say(f"nothing is measured at the boundaries but the task losses: {plan.mixer} needs nothing else")
    if plan.scoring is not None:
        say(f"scoring the corpus for every task adds up to about {100 * plan.scoring:.1f} % to the training's FLOPs")
    sizes = {name: size_in_words(size) for name, size in plan.memory.items()}
    offloaded = f", of it {sizes.pop('elsewhere')} offloaded" if "elsewhere" in sizes else ""
    training, *measuring = (f"{name} {size}" for name, size in sizes.items())
    adds = f"; measuring adds {', '.join(measuring)}{offloaded}" if measuring else ""
    say(f"memory, activations aside: {training}{adds}")
