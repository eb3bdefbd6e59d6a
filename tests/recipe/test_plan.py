import json
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import dynmix.measurement
from dynmix import InRun
from dynmix.cli import app
from dynmix.mixture.store import TokenStore
from dynmix.recipe.plan import make_plan, print_plan
from dynmix.recipe.read import read_recipe
from dynmix.recipe.run import build_run, train

TEXT = """
output: run
model: {config: {model_type: llama, vocab_size: 30, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
  num_attention_heads: 2}}
domains: {web: stores/web, code: stores/code}
data: {sequence_length: 8, weights: {web: 0.75, code: 0.25}}
tasks: {web: stores/web.valid}
stages: {steps: 3, keep: 0}
measurement: {probe_sequences: 6, curvature_sequences: 10, task_sequences: 4, micro_batch: 2}
batch_size: 4
training: {max_steps: 8, per_device_train_batch_size: 4, save_strategy: "no", disable_tqdm: true}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, n in (("web", 40), ("code", 20), ("web.valid", 4)):
        TokenStore.write(Path("stores") / name, [rng.integers(0, 30, 8) for _ in range(n)])
    Path("recipe.yaml").write_text(TEXT)
    return lambda *words: read_recipe(Path("recipe.yaml"), words)


def test_stages_and_what_is_taken_of_each_domain(recipe):
    plan = make_plan(build_run(recipe("data.max_epochs=1.5")))
    stages = [(s.first_step, s.last_step, s.start, s.stop, s.decided_after) for s in plan.stages]
    assert stages == [(1, 3, 0, 12, None), (4, 6, 12, 24, 2), (7, 8, 24, 32, 5)]
    assert (plan.tokens, plan.steps, plan.batch_size) == (256, 8, 4)
    two = make_plan(build_run(recipe("stages.max_stages=2")))
    assert [(s.start, s.stop, s.decided_after) for s in two.stages] == [(0, 12, None), (12, 32, 2)]
    assert two.measurement_share == pytest.approx(plan.measurement_share / 2)
    web, code = plan.domains["web"], plan.domains["code"]
    assert (web.tokens, web.expected_tokens, web.expected_epochs) == (320, 24 * 8, 24 / 40)
    # Three quarters of the first stage are web; of the 20 samples that follow none or all may be.
    assert (web.least_epochs, web.most_epochs) == (9 / 40, 29 / 40)
    assert (code.least_epochs, code.most_epochs) == (3 / 20, 23 / 20)
    assert make_plan(build_run(recipe("data.max_epochs=1"))).domains["code"].most_epochs == 1
    TokenStore.write(Path("stores/code"), [np.arange(30)] * 5)
    plan = make_plan(build_run(recipe("data.distinct_epochs=2")))
    assert plan.domains["code"].most_epochs == pytest.approx(2 * 30 / 143)  # its distinct runs of eight tokens
    static = make_plan(build_run(recipe("mixer=static"))).domains["web"]
    assert static.least_epochs == static.most_epochs == static.expected_epochs


@pytest.mark.parametrize("name", ["tikmix-d", "tikmix-m"])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [("lower: 0.6", "lower"), ("upper: 0.1", "upper"), ("lower: {nope: 0.1}", "nope")],
)
def test_bounds_that_leave_no_mixture_are_refused_in_the_plan(recipe, name, bounds, message):
    given = f"{{name: {name}, {bounds}}}" if name == "tikmix-d" else f"{{name: {name}, direct: {{{bounds}}}}}"
    with pytest.raises(ValueError, match=message):
        make_plan(build_run(recipe(f"mixer={given}")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mixer=automixer", "tasks.rest=stores/web.valid"], "a task is called 'rest'"),
        (["mixer={name: automixer, budget: {nope: 9}}"], "budget: no task 'nope'; the tasks are ['web']"),
    ],
)
def test_what_no_regrouping_takes_is_refused_in_the_plan(recipe, words, message):
    assert make_plan(build_run(recipe("mixer={name: automixer, budget: {web: 99}}"))).mixer == "AutoMixer"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(build_run(recipe(*words)))


def test_a_model_with_too_few_positions_is_refused_in_the_plan(recipe):
    run = build_run(recipe("model.config={model_type: gpt2, vocab_size: 30, n_embd: 8, n_head: 1, n_positions: 4}"))
    with pytest.raises(ValueError, match=r"tasks\['web'\] has a sequence of 8 tokens, the model takes 4 at most"):
        make_plan(run)


def test_micro_batches_that_would_mix_domains_are_refused_on_paper(recipe):
    assert build_run(recipe("data.homogeneous=4"), on_paper=True).dataset.homogeneous == 4
    with pytest.raises(ValueError, match=r"data.homogeneous=2: micro-batches of 4 sequences would hold several"):
        build_run(recipe("data.homogeneous=2"), on_paper=True)


def test_the_tokens_of_a_measurement_are_those_that_one_reads(recipe, monkeypatch):
    plan = make_plan(build_run(recipe()))
    read = []
    real = dynmix.measurement.group_influence

    def counting(model, domains, tasks, curvature, *, curvature_batches=None, tick=None, **options):
        if curvature_batches is None:  # the rehearsal
            return real(model, domains, tasks, curvature, **options)
        sets = [*domains.values(), *tasks.values(), *tasks.values(), *([curvature_batches] * curvature.passes)]
        read.append(sum(batch["input_ids"].numel() for batches in sets for batch in batches))
        return real(model, domains, tasks, curvature, curvature_batches=curvature_batches, tick=tick, **options)

    monkeypatch.setattr(dynmix.measurement, "group_influence", counting)
    train(build_run(recipe()))
    assert len(read) == len(plan.stages) - 1
    assert read == [plan.measurement_tokens] * 2
    assert plan.measurement_share == pytest.approx(2 * plan.measurement_tokens / plan.tokens)
    assert make_plan(build_run(recipe("mixer=staged", "mixer={name: fixed, weights: {web: 0.5, code: 0.5}}",
                                      "output=other"))).measurement_tokens == 0  # fmt: skip


def test_memory_is_of_the_parameters_and_of_the_measured_layers(recipe):
    plan = make_plan(build_run(recipe()))
    assert plan.memory["training"] == 16 * plan.parameters
    layers = 4 * 16 * 16 + 3 * 16 * 32 + 30 * 16
    rows = 2 * 2 + 2  # a task and the guard, with their contrasts, and two domains
    assert plan.memory["gradients"] == 4 * rows * layers
    assert plan.memory["factors"] > 0


def test_of_a_mixture_of_experts_only_what_a_token_meets_is_in_the_price(recipe):
    experts = "model.config={model_type: mixtral, vocab_size: 30, hidden_size: 16, intermediate_size: 32, "
    experts += "num_hidden_layers: 1, num_attention_heads: 2, num_local_experts: 4, num_experts_per_tok: %d}"
    scored = "mixer={name: automixer, checkpoints: last}"
    one, all_four = (make_plan(build_run(recipe(experts % met, scored))) for met in (1, 4))
    assert one.parameters == all_four.parameters
    table = 30 * 16  # of which a token reads a row
    assert all_four.flops == 6 * (all_four.parameters - table) * all_four.tokens
    passed_by = 3 * (3 * 16 * 32)
    assert all_four.flops - one.flops == pytest.approx(6 * passed_by * one.tokens)
    # Forward, backward, and the sequences' gradients of 60 sequences; the products with the task's are of all.
    assert all_four.scoring * all_four.flops - one.scoring * one.flops == pytest.approx(2 * 3 * passed_by * 60 * 8)


def test_ways_to_take_less_memory_reach_the_measurement_and_its_price(recipe):
    whole = make_plan(build_run(recipe()))
    run = build_run(recipe("measurement={offload: disk, layer_groups: 2, rank: 1, probe_sequences: 6}"))
    assert run.callback.controller.measurement.memory_options == {"offload": "disk", "layer_groups": 2, "rank": 1}
    for less, name in (("layer_groups=4", "factors"), ("layer_groups=4", "gradients"), ("rank=1", "gradients")):
        plan = make_plan(build_run(recipe(f"measurement.{less}")))
        assert plan.memory[name] < whole.memory[name]
        assert plan.measurement_tokens == whole.measurement_tokens * (4 if less == "layer_groups=4" else 1)
    assert "elsewhere" not in make_plan(build_run(recipe("measurement.offload=cpu", "training.use_cpu=true"))).memory
    disk = make_plan(build_run(recipe("measurement.offload=disk"))).memory
    assert disk["elsewhere"] == disk["gradients"] + disk["factors"]


def test_an_in_run_influence_reads_no_probes_and_its_products_are_in_the_price(recipe):
    words = ("measurement.in_run={window: 1, folds: 2}", "data.homogeneous=2", "training.per_device_train_batch_size=2")
    run, whole = build_run(recipe(*words)), make_plan(build_run(recipe()))
    assert run.dataset.homogeneous == 2
    assert run.callback.controller.in_run.options == InRun(window=1, folds=2)
    plan = make_plan(run)
    tasks = 8 * (4 + plan.sets["held-out"])
    assert plan.measurement_tokens == tasks + 8 * 2 * 10  # once; and two passes that fit the curvature
    matrices, rows = 4 * 16 * 16 + 3 * 16 * 32 + 30 * 16, 2
    assert plan.memory["gradients"] == 4 * 2 * rows * matrices
    beside = 2 * 2 * matrices * 2 * rows  # two micro-batches, two operations a weight, fold and row
    boundaries = 2 * (6 * (plan.parameters - 30 * 16) * plan.measurement_tokens + beside)
    assert plan.measurement_share == pytest.approx(boundaries / plan.flops)
    assert plan.measurement_tokens < whole.measurement_tokens
    mixed = make_plan(build_run(recipe("measurement.in_run={window: 1, folds: 2, every: 1}")))
    assert mixed.measurement_share > plan.measurement_share  # every sequence's gradient is put together


def test_the_plan_of_a_static_mixer_has_weights_that_another_may_begin_from(recipe):
    weights = {name: each.weight for name, each in make_plan(build_run(recipe("mixer=unimax"))).domains.items()}
    assert weights != {"web": 0.75, "code": 0.25}
    begun = make_plan(build_run(recipe(f"data.weights={json.dumps(weights)}")))
    assert {name: each.weight for name, each in begun.domains.items()} == pytest.approx(weights)


def test_scoring_costs_as_much_as_its_checkpoints_and_layers_take(recipe):
    def scoring(*words):
        named = "mixer.name=automixer", "guards=null", "tasks.more=stores/web.valid", "model.config.num_hidden_layers=4"
        return make_plan(build_run(recipe(*named, *words))).scoring

    last = scoring("mixer.checkpoints=last")
    assert scoring("mixer.checkpoints=5") == pytest.approx(5 * last)
    assert scoring("mixer.checkpoints=last", "guards={kept: stores/web.valid}") == last  # a guard scores nothing
    assert last < scoring() < 2 * last  # two tasks may peak in two checkpoints, each to score one of them
    assert scoring("measurement.layers=.", "mixer.checkpoints=last") > 1.2 * last
    with pytest.raises(ValueError, match="measurement.layers='nothing' selects no layer"):
        scoring("measurement.layers=nothing")


def test_it_is_printed_with_every_domain_and_boundary_and_trains_nothing(recipe):
    def printed(word):
        done = CliRunner().invoke(app, ["train", "recipe.yaml", "--dry-run", word])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    text = printed("training.max_steps=90")
    for words in ("web", "code", "30 stages", "before the run", "after step 86", "% to the training's FLOPs"):
        assert words in text, words
    assert re.search(r"activations aside: training 0\.\d MiB; measuring adds gradients 0\.\d MiB, factors", text)
    assert re.search(r"of it 0\.\d MiB offloaded$", printed("measurement.offload=disk"))
    recipe()
    assert not Path("run").exists()
    assert json.loads(CliRunner().invoke(app, ["train", "recipe.yaml", "--dry-run", "--json"]).stdout)["tokens"] == 256
    out = StringIO()
    print_plan(make_plan(build_run(recipe("mixer=automixer", "guards=null"))), Console(file=out, width=200))
    assert "scoring the corpus for every task adds up to about" in out.getvalue()
