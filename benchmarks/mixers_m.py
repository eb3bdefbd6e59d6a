"""TiKMiX-M on problems whose optimum is known: the share of the gain over the prior that could be had in the box.

    python benchmarks/mixers_m.py

The optimum is the best of several SLSQP runs on the true function, under the same box and Pareto constraint; on linear
problems it is the linear programme's. `noise` is the standard deviation of a measured task as a share of its own over
the box. Takes under two minutes of one core.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import linprog, minimize

from dynmix.mixers.candidates import around, hit_and_run, spread
from dynmix.mixers.search import Pareto
from dynmix.mixers.tikmix_d import TiKMiXD
from dynmix.mixers.tikmix_m import TiKMiXM
from dynmix.observation import Influence

Array = NDArray[np.float64]
SIZES = ((8, 3), (26, 9))
FAMILIES = ("linear", "saturating", "tanh", "synergy", "bowl")


class Case(NamedTuple):
    S: Array
    prior: Array
    effect: Callable[[Array], Array]  # float64[..., m] -> float64[..., n]

    def total(self, w: Array) -> Array:
        return np.asarray((self.effect(w) / np.abs(self.S).max(axis=1)).sum(axis=-1))


def case(family: str, m: int, n: int, seed: int) -> Case:
    rng = np.random.default_rng((seed, m, n))
    prior = rng.dirichlet(np.full(m, 4.0))
    S = rng.normal(0.3, 1, (n, m))
    if family == "linear":
        return Case(S, prior, lambda w: w @ S.T)
    if family == "saturating":
        return Case(S, prior, lambda w: (prior * (1 - np.exp(-1.2 * (w / prior - 1))) / 1.2) @ S.T)
    if family == "tanh":
        size = np.sqrt((S * prior) ** 2 @ np.ones(m))
        return Case(S, prior, lambda w: S @ prior + size * np.tanh((w - prior) @ S.T / size))
    if family == "synergy":
        Q = rng.normal(size=(n, m, m)) / m**0.5
        return Case(
            S,
            prior,
            lambda w: w @ S.T + 0.3 * prior.mean() * np.einsum("...j,ijk,...k->...i", w / prior - 1, Q, w / prior - 1),
        )
    assert family == "bowl"  # the optimum lies inside the box
    peak = np.clip(prior * np.exp(rng.normal(0, 0.35, m)), 0.55 * prior, 1.8 * prior)
    peak /= peak.sum()
    curve = rng.uniform(0.5, 2, (n, m)) / m
    return Case(2 * curve * (peak - prior) / prior**2, prior, lambda w: -(((w - peak) / prior) ** 2) @ curve.T)


def best(c: Case) -> float:
    m, box = len(c.prior), np.stack([c.prior / 2, 2 * c.prior], axis=1)
    C = c.S / np.abs(c.S).max(axis=1, keepdims=True)
    slope = C.sum(axis=0)
    lp = linprog(-slope, A_ub=-C, b_ub=-C @ c.prior, A_eq=np.ones((1, m)), b_eq=[1.0], bounds=box)
    starts = [lp.x, *hit_and_run(4, c.prior, box[:, 0], box[:, 1], np.random.default_rng(0))]
    rules = [
        {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        {"type": "ineq", "fun": lambda w: C @ (w - c.prior), "jac": lambda w: C},
    ]
    step = 1e-6 * np.eye(m)

    def slope_at(w: Array) -> Array:
        return -(c.total(w + step) - c.total(w - step)) / 2e-6

    answers = [
        minimize(lambda w: -float(c.total(w)), w, jac=slope_at, method="SLSQP", bounds=box, constraints=rules)
        for w in starts
    ]
    return max([float(c.total(lp.x)), *(-float(a.fun) for a in answers if a.success)])


def share(c: Case, most: float, noise: float = 0.0, **settings: Any) -> tuple[float, float]:
    """Return the share of the attainable gain that TiKMiX-M reaches and its CPU seconds."""
    rng = np.random.default_rng(1)
    n, m = c.S.shape
    names = [f"domain{j}" for j in range(m)]
    inside, _ = spread(200, c.prior / 2, 2 * c.prior, rng)
    size = noise * c.effect(inside).std(axis=0)
    influence = Influence(c.S, [f"task{i}" for i in range(n)], names)

    def measure(weights: dict[str, float]) -> Array:
        return np.asarray(c.effect(np.array([*weights.values()])) + size * rng.normal(size=n), dtype=np.float64)

    begun = time.process_time()
    proposal = TiKMiXM(**settings).propose(influence, dict(zip(names, c.prior, strict=True)), measure=measure)
    seconds = time.process_time() - begun
    w, start = np.array([*proposal.weights.values()]), float(c.total(c.prior))
    return (float(c.total(w)) - start) / (most - start), seconds


def searched(c: Case, most: float, anneal: Literal["narrowing", "literal"], vertices: bool) -> float:
    """Return the share that the search alone reaches with the true function in place of a surrogate.

    Without `vertices` it is Algorithm 1 as printed, inside the box and the Pareto constraint.
    """
    n, m = c.S.shape
    names = [f"domain{j}" for j in range(m)]
    low, high = (dict(zip(names, x * c.prior, strict=True)) for x in (0.5, 2.0))
    influence = Influence(c.S, [f"task{i}" for i in range(n)], names)
    problem = TiKMiXD().problem(influence, dict(zip(names, c.prior, strict=True)), high, low)
    assert problem is not None
    mixer, constraint, rng = TiKMiXM(anneal=anneal), Pareto(problem), np.random.default_rng(0)
    w = c.prior
    if vertices:
        w = mixer.search.find(c.total, w, problem, constraint, rng)
    else:
        steps = np.geomspace(*mixer.concentration, mixer.iterations) * m
        for step in steps if anneal == "narrowing" else steps[::-1]:
            W = constraint.shrink(around(mixer.samples, w, step, problem.lower, problem.upper, rng), w)
            w = W[np.argsort(-c.total(W))[: mixer.top_k]].mean(axis=0)
    start = float(c.total(c.prior))
    return (float(c.total(w)) - start) / (most - start)


def tikmix_m_tables() -> list[Table]:
    columns: dict[str, dict[str, Any]] = {
        "chosen": {},
        "noise 0.2": {"noise": 0.2},
        "one fit": {"rounds": 0},
        "literal": {"anneal": "literal"},
        "ridge": {"surrogate": "ridge"},
        "lightgbm": {"surrogate": "lightgbm"},
    }
    shares = Table("family", "domains x tasks", *columns, "CPU s", title="share of the attainable gain, 256 mixtures")
    alone = Table("family", "domains x tasks", "narrowing", "with vertices", "literal", "with vertices",
                  title="the search alone, on the true function")  # fmt: skip
    for family in FAMILIES:
        for m, n in SIZES:
            c = case(family, m, n, seed=0)
            most = best(c)
            found = [share(c, most, **settings) for settings in columns.values()]
            shares.add_row(family, f"{m} x {n}", *(f"{x:.3f}" for x, _ in found), f"{found[0][1]:.1f}")
            alone.add_row(
                family,
                f"{m} x {n}",
                *(f"{searched(c, most, 'narrowing', v):.3f}" for v in (False, True)),
                *(f"{searched(c, most, 'literal', v):.3f}" for v in (False, True)),
            )
    draws = Table("domains", "accepted by rejection", "256 mixtures by hit-and-run, ms", title="mixtures in the box")
    for m in (10, 26, 100):
        prior = np.full(m, 1 / m)
        rng = np.random.default_rng(0)
        accepted = np.mean([spread(4096, prior / 2, 2 * prior, rng)[1] for _ in range(4)])
        begun = time.perf_counter()
        hit_and_run(256, prior, prior / 2, 2 * prior, rng)
        draws.add_row(str(m), f"{accepted:.2g}", f"{1e3 * (time.perf_counter() - begun):.0f}")
    return [shares, alone, draws]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for table in tikmix_m_tables():
        Console().print(table)


if __name__ == "__main__":
    main()
