"""Laws on RegMix's runs (arXiv 2407.01492): rank correlation on 1M and 60M models from 25, 64 and 512 runs at 1M.

    python benchmarks/regmix.py [folder of regmix_train_1m.csv, regmix_test_1m.csv, regmix_test_60m.csv, ...]

Every regmix_test_*.csv in the folder is a test. Laws are chosen by cross-validation inside the training runs; the tests
are looked at once. For 25 and 64 runs: the mean, and the least, over five random subsets. Spearman, mean over the
validation domains / of their average loss; `covered`: share of the 1M test losses within 1.96 predicted standard
deviations. Beside the laws stands LightGBM as RegMix set it: 1,000 trees at a rate of 0.01, without the early stopping,
which needs runs of its own. What is proposed from few runs is judged by a power law of all that there are at 1M. Takes
about twelve minutes of one core; `--quick` leaves the single laws and the proposals out.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightgbm import LGBMRegressor
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from shared import shared
from sklearn.base import clone

from dynmix.laws import DML, GP, AutoLaw, BiMix, Law, LightGBM, PowerLaw, Ridge, best_mixture

Array = NDArray[np.float64]
SUBSETS = 5


class Runs(NamedTuple):
    W: Array
    L: Array


class RegMix(Law):
    """Its trees need 40 runs: a leaf has 20."""

    def _fit(self, W: Array, L: Array) -> None:
        model = LGBMRegressor(n_estimators=1000, learning_rate=0.01, n_jobs=1, verbose=-1, random_state=42)
        self.models_ = [clone(model).fit(W[known], y[known]) for y, known in zip(L.T, np.isfinite(L.T), strict=True)]

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, None]:
        return np.stack([np.asarray(model.predict(W), dtype=np.float64) for model in self.models_], axis=1), None


def read(path: Path) -> Runs:
    """Columns w_<domain> and loss_<validation domain>; a missing cell is NaN."""
    names = path.read_text().split("\n", 1)[0].strip().split(",")
    table = np.genfromtxt(path, delimiter=",", skip_header=1)
    return Runs(*(table[:, [n.startswith(kind) for n in names]] for kind in ("w_", "loss_")))


def spearman(predicted: Array, losses: Array) -> tuple[float, float]:
    each = [spearmanr(p, y, nan_policy="omit").statistic for p, y in zip(predicted.T, losses.T, strict=True)]
    return float(np.mean(each)), float(spearmanr(predicted.mean(axis=1), losses.mean(axis=1)).statistic)


def pair(values: list[tuple[float, float]]) -> str:
    mean, least = np.mean(values, axis=0), np.min(values, axis=0)
    text = f"{mean[0]:.4f} / {mean[1]:.4f}"
    return text + (f"  (least {least[0]:.3f} / {least[1]:.3f})" if len(values) > 1 else "")


def subset(runs: Runs, count: int, seed: int) -> Runs:
    rows = np.sort(np.random.default_rng(seed).permutation(len(runs.W))[:count])
    return Runs(runs.W[rows], runs.L[rows])


def proposals(train: Runs, all_runs: Runs) -> Table:
    """What the mixtures that laws propose are worth, and those that trees alone find least."""
    judge = PowerLaw().fit(all_runs.W, all_runs.L)
    table = Table("runs", "by a power law", "by trees", "by the least of trees", title="average loss of the proposal")
    for count in (25, 64):
        found = np.empty((SUBSETS, 3))
        for seed in range(SUBSETS):
            runs = subset(train, count, seed)
            smooth, steps, least = (law.fit(runs.W, runs.L) for law in (PowerLaw(), LightGBM(), LightGBM()))
            least.steps = False
            best = [best_mixture(law, compare=runs.W).weights for law in (smooth, steps, least)]
            found[seed] = judge.predict(np.array(best)).mean(axis=1)
        table.add_row(str(count), *(f"{mean:.4f}" for mean in found.mean(axis=0)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    folder = given.folder or shared("reference/regmix")
    train = read(folder / "regmix_train_1m.csv")
    tests = {path.stem.removeprefix("regmix_test_"): read(path) for path in sorted(folder.glob("regmix_test_*.csv"))}
    laws: dict[str, Law] = {"AutoLaw": AutoLaw(), "RegMix's LightGBM": RegMix()}
    if not given.quick:
        laws |= {
            "PowerLaw": PowerLaw(),
            "GP": GP(),
            "LightGBM": LightGBM(),
            "BiMix": BiMix(),
            "DML": DML(),
            "Ridge": Ridge(),
        }
    console, reports = Console(width=160), []
    table = Table("runs", "law", *tests, "covered", "seconds a fit", title="Spearman, mean over domains / average loss")
    for count in (25, 64, len(train.W)):
        subsets = SUBSETS if count < len(train.W) else 1
        for name, law in laws.items():
            if isinstance(law, RegMix) and count < 40:
                continue
            found: dict[str, list[tuple[float, float]]] = {test: [] for test in tests}
            covered, seconds = [], 0.0
            for seed in range(subsets):
                runs = subset(train, count, seed)
                start = time.perf_counter()
                law.fit(runs.W, runs.L)
                seconds += (time.perf_counter() - start) / subsets
                for test, (W, L) in tests.items():
                    found[test].append(spearman(law.predict(W), L))
                if "1m" in tests and "LightGBM" not in name:
                    mean, std = law.predict(tests["1m"].W, return_std=True)
                    covered.append(float((np.abs(tests["1m"].L - mean) < 1.96 * std).mean()))
            share = f"{np.mean(covered):.3f}" if covered else "-"
            table.add_row(str(count), name, *map(pair, found.values()), share, f"{seconds:.1f}")
            if isinstance(law, AutoLaw):
                reports.append(f"{count} runs{', the last subset' if subsets > 1 else ''}\n{law.report_}\n")
    for report in reports:
        console.print(report, highlight=False)
    console.print(table)
    if not given.quick and "1m" in tests:
        both = [np.vstack(parts) for parts in zip(train, tests["1m"], strict=True)]
        console.print(proposals(train, Runs(*both)))


if __name__ == "__main__":
    main()
