import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynmix.influence.batch import Batches, next_token_loss
from dynmix.influence.capture import Capture
from dynmix.influence.curvature import EKFAC, KFAC, DataInf, Identity, LayerByLayer
from dynmix.influence.group import group_influence
from dynmix.influence.layers import Layers
from dynmix.influence.probes import picked, spread_rows
from dynmix.influence.sets import ratio_of_sums
from tests.influence.conftest import Batcher, Models
from tests.influence.test_layers import build

Sets = dict[str, list[dict[str, Tensor]]]


@pytest.fixture
def sets(token_batches: Batcher) -> tuple[Sets, Sets]:
    domains = {"web": token_batches(6, seed=1, ragged=True), "code": token_batches(5, seed=2)}
    tasks = {"qa": token_batches(7, seed=3, ragged=True), "sums": token_batches(4, seed=4), "web": domains["web"]}
    return domains, tasks


def groups(reference: Any, split: str, key: str) -> Sets:
    ids = reference.numbers[key]
    return {str(i): reference.batches(split, np.flatnonzero(ids == i), size=3) for i in np.unique(ids)}


@pytest.mark.parametrize("curvature", [EKFAC(), Identity()])
def test_group_scores_of_the_reference(reference: Any, curvature: EKFAC | Identity) -> None:
    domains, tasks = groups(reference, "train", "group_id"), groups(reference, "query", "task_id")
    influence = group_influence(reference.model, domains, tasks, curvature, **reference.settings)
    # The reference: mean over pairs of sequences of products of gradients of summed losses; see group_influence.
    length = {
        name: np.mean([n for b in batches for n in scored(reference, b)])
        for sets in (domains, tasks)
        for name, batches in ((f"{id(sets)}/{name}", batches) for name, batches in sets.items())
    }
    n_domain = np.array([length[f"{id(domains)}/{name}"] for name in domains])
    n_task = np.array([length[f"{id(tasks)}/{name}"] for name in tasks])
    n = np.mean([n for b in reference.batches("train") for n in scored(reference, b)])
    key = "ekfac" if isinstance(curvature, EKFAC) else "identity"
    expected = reference.numbers[f"group_score.kron_{key}_heur"] / np.outer(n_task, n_domain)
    if key == "ekfac":
        expected *= n
    np.testing.assert_allclose(influence.scores, expected, rtol=1e-4, atol=1e-12)


def scored(reference: Any, batch: dict[str, Tensor]) -> list[float]:
    if reference.settings:
        return [1.0] * len(batch["x"])
    return (batch["attention_mask"].sum(1) - 1).tolist()


def rows(batches: Batches) -> list[dict[str, Tensor]]:
    return [{k: x[i : i + 1] for k, x in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]


def mean_gradient(
    model: nn.Module, batches: Batches, parameters: list[nn.Parameter] | None = None
) -> tuple[Tensor, float]:
    """Gradient of the mean loss per token for parameters, None: of linear layers, and that loss; brute force."""
    model.eval()
    if parameters is None:
        parameters = [p for name in Capture(model).layers for p in model.get_submodule(name).parameters()]
    results = [next_token_loss(model, batch) for batch in batches]
    loss = sum(losses.sum() for losses, _ in results) / sum(tokens.sum() for _, tokens in results)
    assert isinstance(loss, Tensor)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]), loss.item()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_identity_is_the_product_of_gradients(tiny_lm: Models, sets: tuple[Sets, Sets], kind: str) -> None:
    model, (domains, tasks) = tiny_lm(kind, dropout=0.3, dtype=torch.float64), sets
    influence = group_influence(model, domains, tasks, Identity())
    assert model.training
    G = {name: mean_gradient(model, batches)[0] for name, batches in domains.items()}
    for i, batches in enumerate(tasks.values()):
        gradient, loss = mean_gradient(model, batches)
        np.testing.assert_allclose(influence.scores[i], [float(gradient @ G[d]) for d in domains], rtol=1e-5)
        assert influence.task_loss is not None
        assert influence.task_loss[i] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_identity_with_a_tied_head_is_that_of_the_untied_model(
    tiny_lm: Models, sets: tuple[Sets, Sets], kind: str
) -> None:
    """Tied, the head counts as the layer that it is used as; a copy of its weights has that gradient alone."""
    tied, untied = (tiny_lm(kind, tied=flag, dtype=torch.float64) for flag in (True, False))
    weights = tied.state_dict()
    embedding = tied.get_input_embeddings().weight
    untied.load_state_dict(weights | {"lm_head.weight": embedding.detach().clone()})
    domains, tasks = sets
    expected = [
        [float(mean_gradient(untied, t)[0] @ mean_gradient(untied, d)[0]) for d in domains.values()]
        for t in tasks.values()
    ]
    np.testing.assert_allclose(group_influence(tied, domains, tasks, Identity()).scores, expected, rtol=1e-5)


def test_predicts_the_decrease_of_the_loss(tiny_lm: Models, sets: tuple[Sets, Sets]) -> None:
    """The sign and the unit: a small step along one domain's gradient lowers each task's loss by score x step."""
    model, (domains, tasks) = tiny_lm("llama", dtype=torch.float64), sets
    influence = group_influence(model, domains, tasks, Identity())
    step, names = 1e-5, list(Capture(model).layers)
    gradient, _ = mean_gradient(model, domains["code"])
    before = [mean_gradient(model, batches)[1] for batches in tasks.values()]
    with torch.no_grad():
        parameters = [p for name in names for p in model.get_submodule(name).parameters()]
        for p, g in zip(parameters, torch.split(gradient, [p.numel() for p in parameters]), strict=True):
            p.sub_(step * g.view_as(p))
    after = [mean_gradient(model, batches)[1] for batches in tasks.values()]
    np.testing.assert_allclose((np.array(before) - after) / step, influence.scores[:, 1], rtol=0.02, atol=1e-3)


def test_same_call_same_bits_whatever_the_batches(tiny_lm: Models, sets: tuple[Sets, Sets]) -> None:
    model, (domains, tasks) = tiny_lm("gpt2", dropout=0.2), sets
    one, two = (group_influence(model, domains, tasks) for _ in range(2))
    for name in ("scores", "standard_error", "task_loss", "task_loss_standard_error"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    double = tiny_lm("gpt2", dtype=torch.float64)
    pooled = domains["web"] + domains["code"]
    rowwise: Any = rows(domains["web"])
    ways: list[Any] = [rowwise, domains["web"], DataLoader(rowwise, batch_size=None, shuffle=True)]
    again = [group_influence(double, domains | {"web": web}, tasks, curvature_batches=pooled) for web in ways]
    for other in again[1:]:
        np.testing.assert_allclose(other.scores, again[0].scores, rtol=1e-7)
        np.testing.assert_allclose(other.standard_error, again[0].standard_error, rtol=1e-7)  # type: ignore[arg-type]
    default = group_influence(double, domains, tasks)
    np.testing.assert_allclose(default.scores, again[0].scores, rtol=1e-7)


def test_one_preconditioning_of_tasks_and_one_of_domains_a_layer(tiny_lm: Models, sets: tuple[Sets, Sets]) -> None:
    class Counting(LayerByLayer):
        shapes: list[int]

        def fit(self, capture: Capture, batches: Any) -> "Counting":
            self.shapes = []
            return self

        def precondition(self, layer: str, matrix: Tensor) -> Tensor:
            self.shapes.append(len(matrix))
            return matrix

    counting, model = Counting(), tiny_lm("llama")
    group_influence(model, *sets, counting)
    n_layers = len(Capture(model).layers)
    assert counting.shapes == [2 * 3] * n_layers + [2] * n_layers  # a gradient and a contrast a task


def test_standard_errors_are_those_of_resampled_probe_sets(tiny_lm: Models, token_batches: Batcher) -> None:
    """Draw the probe sets anew from a large pool, many times: the scores must spread as their errors say."""
    model = tiny_lm("llama", dtype=torch.float64)
    pool = token_batches(400, size=400, ragged=True, length=8)[0]
    pool["input_ids"][:200] //= 3  # the task's half speaks of other tokens
    rng, layers, n_domain, n_task = np.random.default_rng(0), "layers.1.mlp|lm_head", 24, 16

    def some(low: int, n: int) -> list[dict[str, Tensor]]:
        rows = torch.as_tensor(rng.integers(low, low + 200, n))
        return [{key: x[rows] for key, x in pool.items()}]

    fit_on = [{key: x[::8] for key, x in pool.items()}]
    scores, errors, losses, loss_errors = [], [], [], []
    for _ in range(80):
        domains, tasks = {"d": some(200, n_domain)}, {"t": some(0, n_task)}
        got = group_influence(model, domains, tasks, Identity(), layers=layers, curvature_batches=fit_on)
        assert got.standard_error is not None
        assert got.task_loss is not None
        assert got.task_loss_standard_error is not None
        scores.append(got.scores[0, 0])
        errors.append(got.standard_error[0, 0])
        losses.append(got.task_loss[0])
        loss_errors.append(got.task_loss_standard_error[0])
    # the spread itself is known to 1 / sqrt(2 * 80) = 8 %
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(scores), rel=0.2)
    assert math.sqrt(np.mean(np.square(loss_errors))) == pytest.approx(np.std(losses), rel=0.2)


def test_standard_error_of_each_side_alone(tiny_lm: Models, token_batches: Batcher) -> None:
    """A side whose sequences are all the same adds nothing: what is left is the other side's textbook error."""
    model = tiny_lm("llama", dtype=torch.float64)
    same = [{key: x[:1].repeat(5, 1) for key, x in token_batches(4, seed=1)[0].items()}]
    varied = token_batches(8, seed=2)
    single = [float(mean_gradient(model, same)[0] @ mean_gradient(model, [row])[0]) for row in rows(varied)]
    expected = np.std(single, ddof=1) / math.sqrt(8)
    for domains, tasks in (({"d": same}, {"t": varied}), ({"d": varied}, {"t": same})):
        error = group_influence(model, domains, tasks, Identity()).standard_error
        assert error is not None
        assert error[0, 0] == pytest.approx(expected, rel=1e-6)


def test_standard_error_from_all_pairs_of_sequences(tiny_lm: Models, token_batches: Batcher) -> None:
    """The same error from the matrix of products of every task sequence with every domain sequence."""
    model, m, n = tiny_lm("llama", dtype=torch.float64), 5, 7
    tasks, domains = token_batches(m, seed=1), token_batches(n, seed=2)
    for batch in tasks + domains:
        batch["input_ids"] //= 24  # few tokens, so that the sequences' gradients have much in common
    y, x = ([mean_gradient(model, [row])[0] for row in rows(batches)] for batches in (tasks, domains))
    K = np.array([[float(a @ b) for b in x] for a in y])
    signs = np.array([1, -1, 1, -1, 1])
    over_x, over_y = K.mean(0).var(ddof=1) / n, K.mean(1).var(ddof=1) / m
    both = (signs @ (K - K.mean(0)) / m).var(ddof=1) / n * m / (m - 1)
    assert 0.01 * over_x < both < min(over_x, over_y)
    error = group_influence(model, {"d": domains}, {"t": tasks}, Identity()).standard_error
    assert error is not None
    assert error[0, 0] == pytest.approx(math.sqrt(over_x + over_y - both), rel=1e-5)


def test_a_single_sequence_has_an_infinite_error(tiny_lm: Models, token_batches: Batcher) -> None:
    one, many = token_batches(1), token_batches(4, seed=1)
    influence = group_influence(tiny_lm("llama"), {"one": one, "many": many}, {"t": many, "u": one})
    assert influence.standard_error is not None
    assert np.isinf(influence.standard_error).tolist() == [[True, False], [True, True]]
    assert influence.task_loss_standard_error is not None
    assert np.isinf(influence.task_loss_standard_error).tolist() == [False, True]


class Poisoned(nn.Module):
    """Predicts NaN for a sequence that starts with token 96."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=input_ids).logits
        return logits * torch.where(input_ids[:, :1] == 96, math.nan, 1.0)[..., None]


@pytest.mark.parametrize("of", ["au", "abtu"])  # the latter: what the factors met is not read again
@pytest.mark.parametrize("curvature", [EKFAC(), Identity()])
def test_what_is_not_finite_is_nan_and_named(
    tiny_lm: Models, token_batches: Batcher, curvature: EKFAC | Identity, of: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Poisoned(tiny_lm("llama"))
    sets = {name: token_batches(4, seed=seed) for seed, name in enumerate("abtu")}
    for batches in sets.values():
        batches[0]["input_ids"][:, 0] = 1
    domains, tasks = {k: sets[k] for k in "ab"}, {k: sets[k] for k in "tu"}
    clean = group_influence(model, domains, tasks, curvature)
    assert clean.finite
    assert not caplog.records
    sets["b"][0]["input_ids"][2, 0] = sets["t"][0]["input_ids"][0, 0] = 96
    with caplog.at_level(logging.WARNING):
        factors_of = [batch for name in of for batch in sets[name]]
        influence = group_influence(model, domains, tasks, curvature, curvature_batches=factors_of)
    assert not influence.finite
    assert np.isnan(influence.scores).tolist() == [[True, True], [False, True]]
    assert influence.standard_error is not None
    assert np.isnan(influence.standard_error).tolist() == [[True, True], [False, True]]
    assert influence.task_loss is not None
    assert np.isnan(influence.task_loss).tolist() == [True, False]
    assert "domain 'b': a loss or gradient is not finite" in caplog.text
    assert "task 't': a loss or gradient is not finite" in caplog.text
    assert "'a'" not in caplog.text


def test_a_broken_model_gives_nan_not_an_exception(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.inf
    influence = group_influence(model, {"d": token_batches(4)}, {"t": token_batches(4, seed=1)})
    assert np.isnan(influence.scores).all()


def test_bad_arguments_are_refused_by_name(tiny_lm: Models, token_batches: Batcher) -> None:
    model, good = tiny_lm("llama"), token_batches(2)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"domains": {}}, ValueError, "domains is empty"),
        ({"tasks": {"t": []}}, ValueError, r"tasks\['t'\] is empty"),
        ({"domains": {"d": iter(good)}}, TypeError, r"domains\['d'\] can be read only once"),
        ({"tasks": {"t": (b for b in good)}}, TypeError, r"tasks\['t'\] can be read only once"),
        ({"tasks": {"t": good[0]}}, TypeError, r"tasks\['t'\] must be a list or DataLoader.*dict"),
        ({"curvature_batches": iter(good)}, TypeError, "curvature_batches can be read only once"),
        ({"error_sequences": 1}, ValueError, "error_sequences=1: at least 2"),
        ({"curvature": "ekfac"}, ValueError, "curvature='ekfac' is no curvature: pass an instance"),
        ({"layers": "nothing"}, ValueError, "layers='nothing'"),
        (
            {"tasks": {"t": [{**good[0], "labels": torch.full_like(good[0]["input_ids"], -100)}]}},
            ValueError,
            "task 't' has no scored token",
        ),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            group_influence(model, **({"domains": {"d": good}, "tasks": {"t": good}} | change))
    assert model.training


def test_batches_that_dry_up_are_named(tiny_lm: Models, token_batches: Batcher) -> None:
    class Once:
        def __init__(self) -> None:
            self.left = token_batches(2)

        def __iter__(self) -> Any:
            while self.left:
                yield self.left.pop()

    with pytest.raises(ValueError, match="domain 'once' has no batches in this pass"):
        group_influence(tiny_lm("llama"), {"once": Once()}, {"t": token_batches(2)})


def test_the_error_of_a_mean_over_kinds_leaves_out_what_the_kinds_differ_by():
    rng = np.random.default_rng(0)
    kinds = [rng.normal(loc=10 * k, size=(8, 1)) for k in range(3)]
    tokens = np.full(24, 5.0)
    mean, variance = ratio_of_sums(np.concatenate(kinds), tokens, stratum=8)
    alone = [ratio_of_sums(values, tokens[:8]) for values in kinds]
    np.testing.assert_allclose(mean, np.mean([m for m, _ in alone], axis=0))
    np.testing.assert_allclose(variance, np.sum([v for _, v in alone], axis=0) / 9)
    assert variance < ratio_of_sums(np.concatenate(kinds), tokens)[1] / 10


@pytest.mark.parametrize("curvature", [EKFAC(), KFAC()])
def test_batches_that_the_curvature_has_read_are_not_read_again(
    tiny_lm: Models, token_batches: Batcher, curvature: Any
) -> None:
    """The scores and errors are those of a measurement in which no batch is the curvature's own."""
    model = tiny_lm("llama", dtype=torch.float64)
    domains = {"a": token_batches(12, seed=1, ragged=True), "b": token_batches(8, seed=2)}
    domains["c"] = [domains["a"][1], domains["b"][0]]  # of two domains at once
    tasks = {"t": token_batches(6, seed=3), "u": token_batches(20, seed=4)}
    fit_on = [domains["a"][1], domains["b"][0], domains["b"][1], token_batches(4, seed=5)[0]]
    copies = [dict(batch) for batch in fit_on]
    runs: list[list[int]] = []

    def measured(batches: Any) -> Any:
        runs.append([])
        return group_influence(
            model,
            domains,
            tasks,
            curvature,
            curvature_batches=batches,
            error_sequences=None,
            tick=lambda: runs[-1].append(1),
        )

    shared, apart = measured(fit_on), measured(copies)
    np.testing.assert_allclose(shared.scores, apart.scores, rtol=1e-7)
    np.testing.assert_allclose(shared.standard_error, apart.standard_error, rtol=1e-7)
    # Errors from all sequences read the domains that were met again; a few sequences do not.
    few = [
        group_influence(model, domains, tasks, curvature, curvature_batches=b, error_sequences=4)
        for b in (fit_on, copies)
    ]
    np.testing.assert_allclose(few[0].scores, few[1].scores, rtol=1e-7)
    np.testing.assert_allclose(few[0].scores, shared.scores, rtol=1e-7)
    runs.clear()
    for batches in (fit_on, copies):
        runs.append([])
        group_influence(
            model,
            {"a": domains["a"]},
            tasks,
            curvature,
            curvature_batches=batches,
            error_sequences=4,
            tick=lambda: runs[-1].append(1),
        )
    assert len(runs[1]) - len(runs[0]) == 1


def test_errors_from_some_of_the_sequences_are_right_on_average(tiny_lm: Models, token_batches: Batcher) -> None:
    model = tiny_lm("llama", dtype=torch.float64)
    settings: dict[str, Any] = {"layers": "1.self_attn.v_proj", "curvature": Identity()}
    squares = []
    for seed in range(8):
        sets = {"d": token_batches(32, seed=seed, ragged=True)}, {"t": token_batches(24, seed=100 + seed, ragged=True)}
        some, every = (group_influence(model, *sets, **settings, error_sequences=n) for n in (8, None))
        np.testing.assert_allclose(some.scores, every.scores)
        squares.append([some.standard_error[0, 0] ** 2, every.standard_error[0, 0] ** 2])
    ratio = np.mean(squares, axis=0)
    assert ratio[0] / ratio[1] == pytest.approx(1.0, rel=0.25)


def test_errors_within_strata_take_as_many_of_each(tiny_lm: Models, token_batches: Batcher) -> None:
    assert spread_rows(12, 6, stratum=4) == [0, 2, 4, 6, 8, 10]
    assert spread_rows(12, 2, stratum=4) == [0, 2, 4, 6, 8, 10]  # two at least
    assert spread_rows(10, 4) == [0, 2, 5, 7]
    assert spread_rows(3, 4) == spread_rows(3, None) == [0, 1, 2]
    model = tiny_lm("llama", dtype=torch.float64)
    domains, task = {"d": token_batches(8)}, token_batches(16, seed=1)
    one = group_influence(model, domains, {"t": task}, Identity(), strata={"t": 4})
    two = group_influence(model, domains, {"t": task}, Identity(), strata={"t": 4}, error_sequences=None)
    np.testing.assert_allclose(one.standard_error, two.standard_error, rtol=0.9)
    assert one.standard_error[0, 0] > 0


def test_picked_sequences_come_in_batches_of_the_same_size(token_batches: Batcher) -> None:
    batches = token_batches(10, size=4, ragged=True)
    sizes = [len(batch["input_ids"]) for batch in batches]
    rows = torch.cat([batch["input_ids"] for batch in batches])
    found = list(picked(batches, sizes, [0, 3, 4, 6, 8]))
    assert [len(batch["input_ids"]) for batch in found] == [4, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found]), rows[[0, 3, 4, 6, 8]])
    assert list(picked(batches, sizes, list(range(10)))) == batches
    mixed = [{**batch, "note": "kept"} for batch in batches]
    apart = list(picked(mixed, sizes, [0, 4]))
    assert [(batch["note"], len(batch["input_ids"])) for batch in apart] == [("kept", 1), ("kept", 1)]
    longer = [batches[0], *token_batches(4, length=12)]
    assert [tuple(batch["input_ids"].shape) for batch in picked(longer, [4, 4], [0, 5])] == [(1, 10), (1, 12)]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_everything_in_a_model_is_measured_on_request(token_batches: Batcher, kind: str) -> None:
    """With all kinds of layers the product of gradients is that of all parameters."""
    model = build(kind).eval()
    domains, tasks = {"d": token_batches(5, seed=1)}, {"t": token_batches(4, seed=2, ragged=True)}
    layers = Layers(embeddings=True, norms=True)
    found = group_influence(model, domains, tasks, Identity(), layers=layers)
    sides = [mean_gradient(model, batches, list(model.parameters()))[0] for batches in (domains["d"], tasks["t"])]
    assert found.scores[0, 0] == pytest.approx(float(sides[0] @ sides[1]), rel=1e-5)
    for curvature in (EKFAC(), KFAC(), DataInf()):
        assert group_influence(model, domains, tasks, curvature, layers=layers).finite


def test_experts_that_the_curvature_has_not_seen_count_as_nothing(
    token_batches: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    model, sets = build("mixtral"), ({"d": token_batches(4, seed=1)}, {"t": token_batches(4, seed=2)})
    short = [{"input_ids": torch.tensor([[3, 3, 3]])}]
    with caplog.at_level(logging.WARNING):
        found = group_influence(model, *sets, EKFAC(), curvature_batches=short)
    assert found.finite
    assert "experts saw no token of its batches and are left out" in caplog.text
