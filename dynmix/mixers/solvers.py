"""TiKMiX-D's `Problem` solved: three solvers behind one signature, Problem -> (weights, multipliers of the rows).

The dual has 2 n_tasks unknowns however many domains there are, and a certified gap; it needs gamma above 0, and has no
place for noise. Clarabel, an interior-point solver of conic programmes, takes those problems if it is installed; what
remains is SciPy's SLSQP, slow beyond a few hundred domains. `solve` tries them in turn, and believes no answer
that it has not verified.
"""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import xlogy

from dynmix.mixers.problem import Problem, lift
from dynmix.mixers.simplex import water_fill
from dynmix.observation import Array

logger = logging.getLogger("dynmix.mixers")

# Row-scaled violation up to which a constraint counts as met: what interior-point solvers leave, far below any score.
FEASIBLE = 1e-7
GAP = 1e-9  # relative duality gap at which the dual's answer is final
ROUNDING = 1e-12  # row-scaled violation of a constraint that is no more than rounding
NEWTON_STEPS = 200  # dozens are enough
SLSQP_DOMAINS = 400


def solve(problem: Problem) -> tuple[Array, Array, str]:
    """Return (w, multipliers of the rows, solver): the first answer that keeps all constraints, or `start` and "prior".

    Where an answer is no better than `start`, that is w.
    """
    solvers = {"dual": solve_dual} if problem.gamma > 0 and not problem.robust else {}
    solvers |= {"clarabel": solve_clarabel, "slsqp": solve_slsqp}
    # The mixture follows from the ratios of the three, and the solvers' tolerances are for an objective near 1.
    unit = max(problem.alpha, problem.beta, problem.gamma) or 1.0
    p = replace(problem, **{name: getattr(problem, name) / unit for name in ("alpha", "beta", "gamma", "cost")})
    failures = []
    for name, method in solvers.items():
        try:
            w, multipliers = method(p)
        except ArithmeticError as failure:
            failures.append(f"{name}: {failure}")
            continue
        inside = (w >= p.lower - 1e-9).all() and (w <= p.upper + 1e-9).all() and abs(w.sum() - 1) < 1e-9
        better = p.objective(p.start) - p.objective(w)
        accuracy = GAP * max(1.0, abs(p.objective(w)))
        if inside and better >= -accuracy:
            if better <= accuracy:
                return p.start, unit * multipliers, name
            if p.violation(w) <= FEASIBLE:
                return w, unit * multipliers, name
        failures.append(f"{name}: an answer that misses a bound or a constraint")
    logger.warning("TiKMiX-D keeps the prior, because no solver answered: %s", "; ".join(failures))
    return p.start, np.zeros(len(p.C)), "prior"


def solve_dual(p: Problem) -> tuple[Array, Array]:
    """Return (w, multipliers of the rows) from the dual of Eq. 7; gamma must be above 0, and no score uncertain.

    With |K w| = max over |u| <= 1 of u^T K w, the minimum over w at fixed x = (lambda, u) is a softmax within bounds
    (`water_fill`), so what is left is a smooth concave maximum in 2 n_tasks unknowns with lambda >= 0 and |u| <= 1.
    Those are kept by a logarithmic barrier (Boyd and Vandenberghe, Convex Optimization, Section 11.3), whose weight mu
    falls while Newton's method follows. Where it has converged, C w - floor = mu / lambda: w is feasible. Floors are
    lowered by 0.1 mu, in the end by `ROUNDING`: where they leave no room, as a prior on the Pareto front or tasks that
    depend on each other do, multipliers would have no end.

    Raises:
        ArithmeticError: it did not reach a feasible w within a relative gap of `GAP`.
    """
    n, k = len(p.C), len(p.A)
    M, linear = np.concatenate([p.C, -p.spread]), p.linear
    x = np.concatenate([np.full(n, 0.1), np.zeros(k)])
    mu, gap = 0.1, np.inf
    floor = p.floor - mu

    def inner(x: Array) -> tuple[Array, float]:
        """Return the w that minimises the Lagrangian at x, and the dual's value."""
        q = linear - x @ M
        w = water_fill(-q / p.gamma, p.upper, p.lower)
        return w, float(x[:n] @ floor + q @ w + p.gamma * xlogy(w, w).sum())

    def barrier(x: Array) -> float:
        inside = 1 - x[n:] @ x[n:]
        return -float(np.log(x[:n]).sum() + np.log(inside)) if inside > 0 and (x[:n] > 0).all() else np.inf

    w, value = inner(x)
    for _ in range(NEWTON_STEPS):
        lam, u = x[:n], x[n:]
        inside = 1 - u @ u
        gradient = M @ w - np.concatenate([floor, np.zeros(k)])  # of the negative dual; then of the barrier
        slope = gradient + mu * np.concatenate([-1 / lam, 2 * u / inside])
        free = np.where((w > p.lower) & (w < p.upper), w, 0.0)
        centred = M - (M @ free)[:, None] / max(free.sum(), 1e-300)
        hessian = centred * free @ centred.T / p.gamma
        hessian[np.diag_indices(n + k)] += mu * np.concatenate([1 / lam**2, np.full(k, 2 / inside)])
        hessian[n:, n:] += mu * 4 * np.outer(u, u) / inside**2
        scale = 1 / np.sqrt(hessian.diagonal())  # its entries differ by many orders near the end
        step = -scale * np.linalg.solve(hessian * np.outer(scale, scale) + 1e-13 * np.eye(n + k), scale * slope)
        falls = float(-slope @ step)
        # Half of the way to the first bound at most, and then back until the barrier problem's value has fallen enough.
        size, before = min(1.0, 0.9 / max(float((-step[:n] / lam).max()), 1e-300)), -value + mu * barrier(x)
        if not np.isfinite(falls):
            break
        while True:
            tried = x + size * step
            height = barrier(tried)
            if np.isfinite(height):
                w_tried, value_tried = inner(tried)
                enough = before - 0.01 * size * falls + 1e-14 * max(1.0, abs(before))
                if -value_tried + mu * height <= enough or size < 1e-8:
                    break
            size /= 2
        x, w, value = tried, w_tried, value_tried
        if mu <= GAP:  # at a weight mu the gap is some n_tasks mu: no need to look before
            gap = p.objective(w) - value
            if gap <= GAP * max(1.0, abs(value)) and float(p.violation(w)) <= 2 * ROUNDING:
                return w, x[:n]
        if falls < mu and size == 1.0:
            mu = max(0.03 * mu, 1e-14)
            floor, lower = p.floor - max(0.1 * mu, ROUNDING), floor
            value += float(x[:n] @ (floor - lower))
    raise ArithmeticError(f"the dual stopped at a gap of {gap:.2g} and a violation of {float(p.violation(w)):.2g}")


def solve_clarabel(p: Problem) -> tuple[Array, Array]:
    """Return (w, multipliers of the rows) of the problem as a conic programme.

    Unknowns x = (w[m], e[m], s, t[n]): minimise linear w - gamma sum(e) + s + cost t, with e_j <= -w_j log w_j
    (exponential cones), |K w| <= s and |R_i (w - centre)| <= t_i (second-order cones).

    Raises:
        ArithmeticError: it is not installed, or did not solve the problem.
    """
    try:
        import clarabel
    except ImportError as problem:
        raise ArithmeticError("clarabel is not installed: pip install 'dynmix[conic]'") from problem

    n, m = p.C.shape
    K, rows = p.spread, np.flatnonzero(p.R.any(axis=1))
    sizes = {"w": m, "e": m if p.gamma > 0 else 0, "s": 1, "t": len(rows)}

    def block(height: int, **parts: Any) -> Any:
        """Return rows of the constraint matrix from the parts of it that are not 0."""
        return sparse.hstack(
            [sparse.csc_matrix(parts.get(name, sparse.csc_matrix((height, width)))) for name, width in sizes.items()],
            format="csc",
        )

    eye = sparse.identity(m)
    blocks = [
        (block(1, w=np.ones((1, m))), np.ones(1), [clarabel.ZeroConeT(1)]),
        (block(m, w=-eye), -p.lower, [clarabel.NonnegativeConeT(m)]),
        (block(m, w=eye), p.upper, [clarabel.NonnegativeConeT(m)]),
        (block(n, w=-p.C, t=np.eye(n)[:, rows]), -p.floor, [clarabel.NonnegativeConeT(n)]),
        (sparse.vstack([block(1, s=[[-1.0]]), block(len(K), w=-K)]), np.zeros(len(K) + 1),
         [clarabel.SecondOrderConeT(len(K) + 1)]),
    ]  # fmt: skip
    for k, i in enumerate(rows):
        unit = -np.eye(1, len(rows), k)
        matrix = sparse.vstack([block(1, t=unit), block(m, w=-sparse.diags(p.R[i]))])
        offset = np.concatenate([[0.0], -p.R[i] * p.centre])
        blocks.append((matrix, offset, [clarabel.SecondOrderConeT(m + 1)]))
    if p.gamma > 0:  # (x, y, z) with y exp(x / y) <= z, here (e_j, w_j, 1)
        matrix = block(3 * m, e=-sparse.kron(eye, [[1], [0], [0]]), w=-sparse.kron(eye, [[0], [1], [0]]))
        blocks.append((matrix, np.tile([0.0, 0.0, 1.0], m), [clarabel.ExponentialConeT()] * m))
    cost = np.concatenate([p.linear, np.full(sizes["e"], -p.gamma), [1.0], p.cost[rows]])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    solution = clarabel.DefaultSolver(
        sparse.csc_matrix((len(cost), len(cost))),
        cost,
        sparse.vstack([matrix for matrix, _, _ in blocks], format="csc"),
        np.concatenate([offset for _, offset, _ in blocks]),
        [cone for _, _, cones in blocks for cone in cones],
        settings,
    ).solve()
    if solution.status not in (clarabel.SolverStatus.Solved, clarabel.SolverStatus.AlmostSolved):
        raise ArithmeticError(f"clarabel: {solution.status}")
    w = np.clip(np.asarray(solution.x[:m]), p.lower, p.upper)
    multipliers = np.asarray(solution.z[1 + 2 * m : 1 + 2 * m + n])
    return lift(p, w / w.sum()), multipliers


def solve_slsqp(p: Problem) -> tuple[Array, Array]:
    """Return (w, multipliers of the rows) by sequential quadratic programming from `start`, with analytic gradients.

    Norms are smoothed by 1e-9, because their gradient does not exist at 0, where a robust problem starts. SciPy tells
    the multipliers from 1.16 on; before, they are 0.

    Raises:
        ArithmeticError: it ended without a finite answer, or would take minutes to.
    """
    if len(p.start) > SLSQP_DOMAINS:
        raise ArithmeticError(f"SLSQP takes minutes beyond {SLSQP_DOMAINS} domains: pip install 'dynmix[conic]'")
    K, linear, n = p.spread, p.linear, len(p.C)
    tiny, smooth = 1e-12, 1e-9  # the entropy's gradient is infinite at 0

    def risk(w: Array) -> tuple[Array, Array]:
        """Return r(w) and its gradient [n_rows, n_domains], both smoothed."""
        R2, move = p.R**2, w - p.centre
        r = np.sqrt(R2 @ move**2 + smooth**2)
        return r - smooth, R2 * move / r[:, None]

    def objective(w: Array) -> tuple[float, Array]:
        w = np.maximum(w, tiny)
        Kw = K @ w
        std = float(np.sqrt(Kw @ Kw + smooth**2))
        r, slope = risk(w)
        value = std + float(linear @ w + p.cost @ r + p.gamma * xlogy(w, w).sum())
        return value, K.T @ Kw / std + linear + p.cost @ slope + p.gamma * (np.log(w) + 1)

    answer = minimize(
        objective,
        np.clip(p.start, tiny, None),
        jac=True,
        method="SLSQP",
        bounds=[*zip(p.lower, p.upper, strict=True)],
        constraints=[
            {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            {"type": "ineq", "fun": lambda w: p.C @ w - risk(w)[0] - p.floor, "jac": lambda w: p.C - risk(w)[1]},
        ],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    if not np.isfinite(answer.x).all():
        raise ArithmeticError(f"SLSQP: {answer.message}")
    w = np.clip(answer.x, p.lower, p.upper)
    return lift(p, w / w.sum()), np.asarray(answer.get("multipliers", np.zeros(n + 1)))[-n:]
