"""How feasible, how optimal and how fast TiKMiX-D's proposals are, beside an exact solver and the paper's plain SLSQP.

    python benchmarks/mixers.py [--quick]    (TiKMiX-M: python benchmarks/mixers_m.py)

Nine tasks, ten kinds of influence matrices, five kinds of priors, alpha = beta = gamma = 1. Eq. 7 is written here a
second time, and so is an exact solver: Clarabel, with a bound from its multipliers that no solver has to be trusted
for. Times are those of the processor, in one process; each row of a table compares runs on the same cases.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import clarabel
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import logsumexp, xlogy
from scipy.stats import chi2, norm

from dynmix import Influence, TiKMiXD

Array = NDArray[np.float64]
Random = np.random.Generator

TASKS, EPS, FEASIBLE = 9, 1e-8, 1e-6
OPTIMAL = 1e-4  # of plain SLSQP, which ends where it gains less than 1e-6: a stricter limit would only find that
SLSQP_SECONDS = 5.0  # after which the paper's solver is stopped where it stands
# Domains, seeds of a pair of kind and prior, and every how many-th of these cases the exact solver and SLSQP get.
SIZES = ((26, 4, 1, 7), (200, 2, 1, 33), (1000, 2, 3, 0), (5000, 1, 7, 0))
QUICK = ((26, 1, 1, 7), (200, 1, 1, 0), (1000, 1, 7, 0))


def conflicting(r: Random, m: int) -> Array:
    """Every other row the negative of the one before: rows 0 and 1 exactly, the others nearly."""
    S = r.normal(size=(TASKS, m))
    for i in range(1, TASKS, 2):
        S[i] = -S[i - 1] + (i > 1) * 0.05 * S[i]
    return S


def one_task_all_negative(r: Random, m: int) -> Array:
    S = r.normal(size=(TASKS, m))
    S[:4] = -np.abs(S[:4]) - 0.01
    return S


def near_zero_maxima(r: Random, m: int) -> Array:
    S = r.normal(size=(TASKS, m))
    S[:3] = -np.abs(S[:3])
    S[np.arange(3), r.integers(m, size=3)] = 1e-9
    return S


def zero_rows(r: Random, m: int) -> Array:
    S = r.normal(size=(TASKS, m))
    S[:2] = 0
    return S


def sparse_heavy_tailed(r: Random, m: int) -> Array:
    return np.asarray(r.standard_t(1.5, size=(TASKS, m)) * (r.random((TASKS, m)) < 0.2), dtype=np.float64)


def duplicates(r: Random, m: int) -> Array:
    """Each domain twice, rows 0 to 2 the same."""
    S = np.repeat(r.normal(size=(TASKS, (m + 1) // 2)), 2, axis=1)[:, :m]
    S[1:3] = S[0]
    return S


MATRICES: dict[str, Callable[[Random, int], Array]] = {
    "positive": lambda r, m: np.abs(r.normal(size=(TASKS, m))),
    "mixed signs": lambda r, m: r.normal(size=(TASKS, m)),
    "conflicting": conflicting,
    "low rank": lambda r, m: r.normal(size=(TASKS, 2)) @ r.normal(size=(2, m)),
    "rows all negative": one_task_all_negative,
    "near-zero maxima": near_zero_maxima,
    "scales 1e-6 to 1e3": lambda r, m: r.normal(size=(TASKS, m)) * np.logspace(-6, 3, TASKS)[:, None],
    "zero rows": zero_rows,
    "sparse, heavy tails": sparse_heavy_tailed,
    "duplicates": duplicates,
}


def with_zeros(r: Random, S: Array) -> Array:
    p = r.dirichlet(np.ones(S.shape[1])) * (r.random(S.shape[1]) < 0.5)
    p[0] += 1e-3
    return np.asarray(p / p.sum(), dtype=np.float64)


def natural(r: Random, S: Array) -> Array:
    """Shares that fall evenly in logarithm, down to 1e-6 of the largest."""
    p = np.logspace(0, -6, S.shape[1])
    return r.permutation(p / p.sum())


PRIORS: dict[str, Callable[[Random, Array], Array]] = {
    "uniform": lambda r, S: np.full(S.shape[1], 1 / S.shape[1]),
    "skewed": lambda r, S: r.dirichlet(np.full(S.shape[1], 0.3)),
    "natural": natural,
    "with zeros": with_zeros,
    "one domain": lambda r, S: np.eye(S.shape[1])[S[-1].argmax()],  # on the Pareto front
}


@dataclass(frozen=True)
class Case:
    """An influence and a prior, and Eq. 7 over them."""

    kind: str
    prior: str
    seed: int
    S: Array
    p: Array

    @classmethod
    def make(cls, kind: str, prior: str, seed: int, m: int) -> "Case":
        r = np.random.default_rng([list(MATRICES).index(kind), list(PRIORS).index(prior), seed, m])
        S = MATRICES[kind](r, m)
        return cls(kind, prior, seed, S, PRIORS[prior](r, S))

    @cached_property
    def normalised(self) -> Array:
        return np.asarray(self.S / (self.scale[:, None] + EPS), dtype=np.float64)

    @cached_property
    def scale(self) -> Array:
        return np.asarray(np.abs(self.S).max(axis=1), dtype=np.float64)

    def objective(self, w: Array) -> float:
        P = self.normalised @ w
        return float(P.std() - P.sum() + xlogy(w, w).sum())

    def miss_by_row(self, w: Array) -> Array:
        """How far each task is under the prior's, in units of its largest score.

        What is at Eq. 6's eps counts as nothing: (eps / largest score)^2 is forgiven.
        """
        least = np.maximum(self.scale, EPS)
        return np.asarray(self.S @ (self.p - w) / least - (EPS / least) ** 2, dtype=np.float64)

    def miss(self, w: Array) -> float:
        """How far the worst task is under the prior's, in those units or in nats per token: what is more."""
        return float(max(self.miss_by_row(w).max(), (self.S @ (self.p - w)).max()))

    def feasible(self, w: Array) -> bool:
        return bool(self.miss(w) <= FEASIBLE and (w >= -FEASIBLE).all() and abs(w.sum() - 1) <= FEASIBLE)

    def influence(self, errors: Array | None = None) -> Influence:
        n, m = self.S.shape
        return Influence(self.S, [f"task{i}" for i in range(n)], [f"domain{j}" for j in range(m)], errors)

    def errors(self) -> Array:
        """Standard errors of 5 to 15 % of a task's usual score."""
        r = np.random.default_rng(self.seed)
        return np.asarray(self.S.std(axis=1, keepdims=True) * r.uniform(0.05, 0.15, self.S.shape), dtype=np.float64)


def cases(m: int, seeds: int) -> Iterator[Case]:
    for seed in range(seeds):
        for kind in MATRICES:
            for prior in PRIORS:
                yield Case.make(kind, prior, seed, m)


@dataclass(frozen=True)
class Exact:
    value: (
        float  # Eq. 7 at the mixture found, or the bound where that is higher: the mixture is under a floor by a hair
    )
    bound: float  # that no feasible mixture is under
    seconds: float


def exact(case: Case) -> Exact:
    """The best that Clarabel finds, in other units of w where it ends early: those decide whether it converges."""
    start, value, bound = time.process_time(), np.inf, -np.inf
    for unit in (1.0, 1 / len(case.p), len(case.p) ** -0.5):
        w, its_bound = conic(case, unit)
        bound = max(bound, its_bound)
        if case.miss_by_row(w).max() <= 1e-7:
            value = min(value, case.objective(w))
        if value <= bound + 1e-8:
            break
    return Exact(max(value, bound), bound, time.process_time() - start)


def conic(case: Case, unit: float) -> tuple[Array, float]:
    """Eq. 7 in v = w / unit as a conic programme; returns (w, lower bound).

    Minimise c v + sum(t) + s with t_j >= v_j log v_j and s >= |K v|. Any multipliers lambda >= 0, |u| <= 1 bound it
    in closed form: lambda C p - log sum exp(C^T lambda - c - K^T u).
    """
    (n, m), A = case.S.shape, case.normalised
    c, K = -A.sum(axis=0), (A - A.mean(axis=0)) / np.sqrt(n)
    some = case.scale > 0
    C = case.S[some] / case.scale[some, None]
    j, k = np.arange(m), len(C)
    ones, at = np.ones(m), (np.concatenate([3 * j, 3 * j + 1]), np.concatenate([m + j, j]))
    G = sparse.vstack(
        [
            sparse.csc_matrix(np.concatenate([ones, np.zeros(m + 1)])[None]),
            sparse.csc_matrix(np.hstack([-C, np.zeros((k, m + 1))])),
            sparse.csc_matrix(([-1.0], ([0], [2 * m])), shape=(1, 2 * m + 1)),
            sparse.csc_matrix(np.hstack([-K, np.zeros((n, m + 1))])),
            sparse.csc_matrix((np.concatenate([ones, -ones]), at), shape=(3 * m, 2 * m + 1)),  # v exp(-t / v) <= 1
        ],
        format="csc",
    )
    offset = np.concatenate([[1.0], -C @ case.p, np.zeros(n + 1), unit * np.tile([0.0, 0.0, 1.0], m)]) / unit
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(k), clarabel.SecondOrderConeT(n + 1)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    answer = clarabel.DefaultSolver(
        sparse.csc_matrix((2 * m + 1, 2 * m + 1)),
        np.concatenate([c, ones, [1.0]]),
        G,
        offset,
        cones + [clarabel.ExponentialConeT()] * m,
        settings,
    ).solve()
    w = np.clip(np.asarray(answer.x[:m]), 0, None)
    z = np.asarray(answer.z)
    multipliers, u = np.maximum(z[1 : 1 + k], 0), -z[2 + k : 2 + k + n]
    u = u / max(1.0, float(np.linalg.norm(u)))
    return w / w.sum(), float(multipliers @ C @ case.p - logsumexp(C.T @ multipliers - c - u @ K))


def plain_slsqp(case: Case) -> tuple[Array, float]:
    """The paper's solver: SciPy's SLSQP from the uniform mixture, all else at its default; returns (w, seconds)."""
    m, start = case.S.shape[1], time.process_time()
    last = np.full(m, 1 / m)

    def objective(w: Array) -> float:
        if time.process_time() - start > SLSQP_SECONDS:
            raise TimeoutError
        return case.objective(np.maximum(w, 0))

    with suppress(TimeoutError):
        last = minimize(
            objective,
            last.copy(),
            method="SLSQP",
            bounds=[(0, 1)] * m,
            constraints=[
                {"type": "eq", "fun": lambda w: w.sum() - 1},
                {"type": "ineq", "fun": lambda w: case.S @ (w - case.p)},
            ],
            callback=lambda w: np.copyto(last, w),
        ).x
    return np.asarray(last, dtype=np.float64), time.process_time() - start


def relative(value: float, reference: float) -> float:
    """By how much `value` is above `reference`, which may be near 0."""
    return (value - reference) / max(abs(reference), 1e-2)


@dataclass(frozen=True)
class Ours:
    w: Array
    seconds: float
    solver: str


def propose(case: Case, mixer: TiKMiXD, influence: Influence) -> Ours:
    prior = dict(zip(influence.domains, case.p.tolist(), strict=True))
    start = time.process_time()
    proposal = mixer.propose(influence, prior)
    seconds = time.process_time() - start
    return Ours(np.array(list(proposal.weights.values())), seconds, proposal.solver)


def percent(flags: list[bool]) -> str:
    return f"{100 * sum(flags) / len(flags):.4g} %"


def milliseconds(seconds: list[float]) -> str:
    ms = 1000 * np.array(seconds)
    return f"{np.median(ms):.1f} / {np.percentile(ms, 95):.1f} / {ms.max():.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    sizes = QUICK if parser.parse_args().quick else SIZES
    console = Console(width=160)
    for case in cases(26, 1):  # nothing is timed before it has run once
        propose(case, TiKMiXD(), case.influence())
    for table in (*without_errors(sizes), with_errors([m for m, *_ in sizes if m <= 1000])):
        console.print(table)


def without_errors(sizes: tuple[tuple[int, int, int, int], ...]) -> tuple[Table, Table]:
    """Return the table of TiKMiX-D and that of plain SLSQP."""
    mixer = TiKMiXD(confidence=0.0)
    ours_table = Table(
        "domains", "cases", "feasible", "not worse than prior", "over exact, worst",
        "ms: median / 95 % / worst", "exact: ms, median", "solvers", title="TiKMiX-D",
    )  # fmt: skip
    slsqp_table = Table(
        "domains", "cases", "infeasible", f"over exact by {OPTIMAL:g}", "either", "out of time", "time / ours, median",
        title=f"plain SLSQP from the uniform mixture, {SLSQP_SECONDS:.0f} s at most",
    )  # fmt: skip
    for m, seeds, every_exact, every_slsqp in sizes:
        answers: list[tuple[Case, Ours]] = []
        over_exact, exact_seconds, ratios = [], [], []
        infeasible, suboptimal, late = [], [], []
        for number, case in enumerate(cases(m, seeds)):
            ours = propose(case, mixer, case.influence())
            answers.append((case, ours))
            if number % every_exact:
                continue
            best, value = exact(case), case.objective(ours.w)
            exact_seconds.append(best.seconds)
            over_exact.append(relative(value, best.value))
            if every_slsqp and number % every_slsqp == 0:
                w, seconds = plain_slsqp(case)
                infeasible.append(not case.feasible(w))
                suboptimal.append(relative(case.objective(np.maximum(w, 0)), best.value) > OPTIMAL)
                late.append(seconds > SLSQP_SECONDS)
                ratios.append(seconds / ours.seconds)
        ours_table.add_row(
            f"{m:,}",
            f"{len(answers)} (exact: {len(exact_seconds)})",
            percent([c.feasible(o.w) for c, o in answers]),
            percent([c.objective(o.w) <= c.objective(c.p) + 1e-12 for c, o in answers]),
            f"{max(over_exact):.1e}",
            milliseconds([o.seconds for _, o in answers]),
            f"{1000 * np.median(exact_seconds):.0f}",
            solvers([o for _, o in answers]),
        )
        if ratios:
            slsqp_table.add_row(
                f"{m:,}",
                str(len(ratios)),
                percent(infeasible),
                percent(suboptimal),
                percent([i or s for i, s in zip(infeasible, suboptimal, strict=True)]),
                percent(late),
                f"{np.median(ratios):.0f}",
            )
    return ours_table, slsqp_table


def with_errors(sizes: list[int]) -> Table:
    """Return the table of the problem in which a gain counts by its lower bound (Scheffé's, confidence 1)."""
    mixer = TiKMiXD(confidence=1.0)
    table = Table(
        "domains", "cases", "lower bounds >= 0", "feasible", "ms: median / 95 % / worst", "solvers",
        title="TiKMiX-D with standard errors of 5 to 15 % of a usual score, confidence 1",
    )  # fmt: skip
    for m in sizes:
        quantile = np.sqrt(chi2.ppf(norm.cdf(1.0), m - 1))
        answers, held, feasible = [], [], []
        for case in cases(m, 1):
            E = case.errors()
            answers.append(propose(case, mixer, case.influence(E)))
            w = answers[-1].w
            spread = quantile * np.linalg.norm(E * (w - case.p), axis=1) / np.maximum(case.scale, EPS)
            held.append(bool((case.miss_by_row(w) + spread).max() <= FEASIBLE))
            feasible.append(case.feasible(w))
        table.add_row(
            f"{m:,}",
            str(len(answers)),
            percent(held),
            percent(feasible),
            milliseconds([o.seconds for o in answers]),
            solvers(answers),
        )
    return table


def solvers(answers: list[Ours]) -> str:
    return ", ".join(f"{name} {n}" for name, n in Counter(o.solver for o in answers).most_common())


if __name__ == "__main__":
    main()
