"""What proxies cost, against a count of one that is trained."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.pretraining import beforehand
from benchmarks.pretraining.cost import Counter, Spent
from benchmarks.pretraining.settings import BUDGETS
from dynmix import TokenStore
from dynmix.laws import Ridge
from dynmix.proxies.plan import Plan
from dynmix.proxies.train import train_run


def test_proxies_are_charged_what_they_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, stores = np.random.default_rng(0), {name: tmp_path / name for name in ("one", "two")}
    for path in stores.values():
        TokenStore.write(path, [rng.integers(1, 50, 2000).astype(np.uint16)])
    examples = [{"input_ids": rng.integers(1, 50, n).tolist()} for n in (90, 5, 40, 6, 8)]  # most of a batch is padding
    bench = SimpleNamespace(
        corpus=SimpleNamespace(stores=stores, tokenizer=range(50)), budget=BUDGETS["tiny"], device="cpu",
        tasks={"t": [{key: np.array(ids) for key, ids in row.items()} for row in examples]},
    )  # fmt: skip
    given: dict[str, Any] = {}

    def run_proxies(stores: Any, validation: Any, out: Path, *, model: Any, training: Any, **more: Any) -> Any:
        given["plan"] = Plan.make(stores, validation, model, training, 0.5, (0.5, 2.0))
        return SimpleNamespace(failed={})

    monkeypatch.setattr(beforehand, "run_proxies", run_proxies)
    monkeypatch.setattr(beforehand, "_child_seconds", iter((1.0, 7.0)).__next__)
    (tmp_path / "before/proxies/runs/mixture-000").mkdir(parents=True)
    (tmp_path / "before/proxies/runs/mixture-000/result.json").touch()  # of a call that was interrupted
    spent = Spent()
    beforehand._proxies(bench, 0, tmp_path / "before", spent, 2e8, 4, experts=False)  # type: ignore[arg-type]
    given["plan"].keep(tmp_path / "run")
    with Counter() as counter:
        train_run(tmp_path / "run", "mixture-000", {"one": 0.5, "two": 0.5})
    assert spent.flops["before"] == 4 * counter.total
    assert spent.flops["before"] <= 2e8
    assert spent.seconds["before"] == 4 * (7 - 1) / 3


@pytest.mark.parametrize(("corpus", "epochs"), [(4.0, 4.0), (0.1, 40.0)])
def test_the_best_mixture_repeats_no_domain_often_but_as_the_whole_corpus_is(corpus: float, epochs: float) -> None:
    budget, W = BUDGETS["tiny"], np.array([[0.8, 0.2], [0.5, 0.5], [0.2, 0.8]])
    wanted = budget.steps * budget.size.step_tokens
    few = 0.01 * corpus * wanted
    bench = SimpleNamespace(budget=budget, tokens={"few": few, "many": corpus * wanted - few})
    law, runs = Ridge().fit(W, 5 - W[:, :1]), SimpleNamespace(domains=["few", "many"], W=W)
    weights = beforehand._best(bench, law, runs)  # type: ignore[arg-type]
    assert weights["few"] * wanted / few == pytest.approx(epochs)


def _bench(tokens: dict[str, float]) -> Any:
    return SimpleNamespace(budget=BUDGETS["tiny"], tokens=tokens)


@pytest.mark.parametrize(("gain", "expected"), [(0, 0.4), (1, 0.9)])
def test_regmix_trains_on_the_mean_of_what_its_law_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, expected: float
) -> None:
    """Of what makes no difference it is that of the corpus; and searching takes seconds that are paid for."""
    tokens = {"good": 4e6, "one": 2e6, "two": 4e6}
    W = np.random.default_rng(0).dirichlet(np.ones(3), 200)
    rows = ["weight/good,weight/one,weight/two,loss/t", *(",".join(map(str, (*w, 5 - gain * w[0]))) for w in W)]
    (tmp_path / "runs.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(beforehand, "_proxies", lambda *_, **__: SimpleNamespace(table=tmp_path / "runs.csv"))
    spent = Spent()
    weights = beforehand._regmix(_bench(tokens), 0, tmp_path, spent, 1.0)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["good"] == pytest.approx(expected, abs=0.1)
    assert weights["one"] / weights["two"] == pytest.approx(0.5, abs=0.2)
    assert spent.seconds["before"] > 0 == spent.flops["before"]


def test_mde_leaves_no_domain_out() -> None:
    W = np.array([[0.8, 0.2], [0.5, 0.5], [0.2, 0.8]])
    law, runs = Ridge().fit(W, 5 + W[:, :1]), SimpleNamespace(domains=["bad", "good"], W=W)
    weights = beforehand._best(_bench({"bad": 1e9, "good": 1e9}), law, runs)
    assert weights == pytest.approx({"bad": 0.005, "good": 0.995})
