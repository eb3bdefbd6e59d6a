import io
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import typer
from rich.console import Console
from scipy.stats import spearmanr
from typer.testing import CliRunner

from dynmix.commands.fit import fit
from dynmix.fit import fit_runs, print_fit, write_fit
from dynmix.laws import Experts
from dynmix.laws.runs import Runs

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(fit)

DOMAINS, TARGETS = ("web", "code", "math", "news"), ("sp_web", "sp_code", "et_arc")


def losses(W, seed=0):
    a = np.random.default_rng(seed).lognormal(0, 1.2, size=(W.shape[1], 3))
    return 2 + (W**0.5 @ a) ** -0.5


def some_runs(n=20, k=4, noise=0.005, seed=1):
    rng = np.random.default_rng(seed)
    W = rng.dirichlet(np.full(k, 0.6), size=n)
    return W, losses(W) + noise * rng.standard_normal((n, 3))


def runs(n=20, **options):
    W, L = some_runs(n, **options)
    return Runs(tuple(f"d{i}" for i in range(W.shape[1])) if W.shape[1] != 4 else DOMAINS, TARGETS, W, L)


def printed(found):
    console = Console(file=io.StringIO(), width=120)
    print_fit(found, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def fitted():
    return fit_runs(runs(), law="power law")


@pytest.fixture
def path(tmp_path):
    W, L = some_runs()
    names = [f"weight/{d}" for d in DOMAINS] + [f"loss/{t}" for t in TARGETS]
    np.savetxt(tmp_path / "runs.csv", np.hstack([W, L]), delimiter=",", header=",".join(names), comments="")
    return tmp_path / "runs.csv"


def test_errors_are_of_left_out_runs(fitted):
    errors, L = fitted.errors(), fitted.runs.L
    left_out = fitted.law.left_out_
    assert np.abs(left_out - fitted.law.predict(fitted.runs.W)).max() > 1e-4  # not the fit's own
    assert errors["sp_code"]["mae"] == pytest.approx(np.abs(left_out - L)[:, 1].mean())
    assert errors["sp_code"]["spearman"] == pytest.approx(spearmanr(left_out[:, 1], L[:, 1]).statistic)
    assert errors["criterion"]["mae"] == pytest.approx(np.abs((left_out - L).mean(axis=1)).mean())
    assert list(errors) == [*TARGETS, "criterion"]


def test_the_best_mixture_is_near_the_best_there_is(fitted):
    W = np.random.default_rng(0).dirichlet(np.ones(4), size=20_000)
    assert losses(fitted.best.weights[None]).mean() < losses(W).mean(axis=1).min() + 0.02
    assert abs(losses(fitted.best.weights[None]).mean() - fitted.best.predicted) < 4 * fitted.best.std


def test_what_is_printed_has_every_name_and_number(fitted):
    text = printed(fitted)
    for name in (*DOMAINS, *TARGETS, "criterion"):
        assert name in text
    for number in (*fitted.best.weights, fitted.best.predicted, fitted.best.std, fitted.errors()["et_arc"]["mae"]):
        assert f"{number:.4f}" in text


def test_files_have_the_numbers_and_a_panel_a_target(fitted, tmp_path):
    paths = write_fit(fitted, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["fit.json", "fit.svg"]
    saved = json.loads(paths[0].read_text())
    np.testing.assert_allclose([saved["weights"][d] for d in DOMAINS], fitted.best.weights)
    assert saved["predicted"] == fitted.best.predicted
    ElementTree.parse(paths[1])
    first = paths[1].read_bytes()
    assert write_fit(fitted, tmp_path / "out")[1].read_bytes() == first


@pytest.mark.parametrize(("criterion", "wanted"), [("sp_*", [0.5, 0.5, 0]), ("et_arc", [0, 0, 1])])
def test_the_criterion_is_what_is_optimised(criterion, wanted):
    found = fit_runs(runs(), criterion, "power law")
    np.testing.assert_allclose(found.criterion, wanted)
    assert found.best.predicted == pytest.approx(found.best.targets @ wanted)
    assert found.best.predicted <= (fit_runs(runs(), "avg", "power law").best.targets @ wanted) + 1e-6


def test_awkward_runs_get_an_answer_and_words():
    W, L = some_runs(24)
    W[:, 3] = 0
    W /= W.sum(axis=1, keepdims=True)
    L = losses(W)
    W, L = np.vstack([0.997 * W, 0.997 * W[:4]]), np.vstack([L, L[:4] + 0.01])
    L[:, 2] = 3.0
    L[2:9, 0] = np.nan
    found = fit_runs(Runs(DOMAINS, TARGETS, W, L), smooth=True)
    assert found.best.weights[3] == 0
    assert found.best.weights[:3].min() > 0.002
    text = printed(found)
    assert "stay at 0" in text
    row = next(line for line in text.splitlines() if "et_arc" in line)
    assert "-" in row  # a constant has no rank correlation
    assert np.isfinite(found.best.predicted)
    assert found.best.std > 0


def test_8_runs_of_17_domains_have_an_answer():
    found = fit_runs(runs(8, k=17))
    assert found.best.weights.sum() == pytest.approx(1)
    assert found.best.std > 0.2 * found.runs.L.mean(axis=1).std()


def test_very_few_runs_are_fitted_without_errors_or_refused():
    found = fit_runs(runs(3))
    assert "too few to compare" in printed(found)
    assert np.isnan(found.errors()["criterion"]["mae"])
    W, L = some_runs(2)
    with pytest.raises(ValueError, match="2 different mixture"):
        fit_runs(Runs(DOMAINS, TARGETS, np.repeat(W, 5, axis=0), np.repeat(L, 5, axis=0)))


def test_epochs_bound_the_mixture():
    tokens = {"web": 1e6, "code": 1e9, "math": 1e9, "news": 1e9}
    found = fit_runs(runs(), law="power law", tokens=tokens, total_tokens=1e8, max_epochs=4)
    assert found.best.weights[0] <= 0.04 + 1e-9
    assert "bounds 1 of 4" in printed(found)


def test_experts_in_another_order_are_matched_by_name():
    rng = np.random.default_rng(3)
    names, sets = ("news", "web", "math", "code"), {"et_arc": 300, "sp_web": 500, "sp_code": 400}
    experts = Experts(-rng.gamma(1.5, 2.0, size=(4, 1200)), sets, names)
    W = some_runs()[0]
    L = experts.losses(W[:, [DOMAINS.index(n) for n in names]])[:, [list(sets).index(t) for t in TARGETS]]
    found = fit_runs(Runs(DOMAINS, TARGETS, W, L - 0.1 * (1 - (W**2).sum(axis=1, keepdims=True))), experts=experts)
    assert found.runs.domains == names
    assert any("MDE" in name for name in found.law.laws_)
    assert "ridge + MDE" in printed(found)
    fewer = fit_runs(Runs(DOMAINS, ("sp_web",), W, found.runs.L[:, 1:2]), law="ridge + MDE", experts=experts)
    assert fewer.runs.targets == ("sp_web",)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"law": "magic"}, "no law 'magic' for 20 runs; there are 'auto', 'power law'"),
        ({"law": "ridge + MDE"}, r"laws with MDE take experts \(--experts\)"),
        ({"criterion": "mmlu"}, "no target is called 'mmlu'"),
        ({"max_epochs": 2}, "max_epochs needs tokens"),
        ({"tokens": {"web": 1}}, "tokens are of web; the domains are web, code"),
        ({"experts": Experts(np.full((2, 3), -1.0), {"a": 3}, ["x", "y"])}, "wanted are x, y"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(ValueError, match=said):
        fit_runs(runs(), **{"law": "ridge", **options})


def test_the_command_prints_and_writes(path, tmp_path):
    done = CliRunner().invoke(
        app, [str(path), "--law", "ridge", "--criterion", "sp_*=1,et_arc=2", "--smooth", "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert "best mixture" in done.output
    assert (tmp_path / "out/fit.svg").exists()
    assert json.loads((tmp_path / "out/fit.json").read_text())["criterion"]["et_arc"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "w_*"], "no column for weights"),
        (["--tokens", "web:3"], "write domain=number"),
        (["--experts", "none"], "no cache of experts"),
    ],
)
def test_the_command_refuses_in_one_line(path, arguments, said):
    done = CliRunner().invoke(app, [str(path), *arguments])
    assert done.exit_code == 1
    assert said in done.output.replace("\n", " ")
    assert "Traceback" not in done.output


def test_a_missing_file_is_one_line(tmp_path):
    done = CliRunner().invoke(app, [str(tmp_path / "none.csv")])
    assert done.exit_code == 1
    assert "none.csv" in done.output.replace("\n", "")
