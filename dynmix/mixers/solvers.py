"""Three solvers of TiKMiX-D's `Problem`, behind one signature: Problem -> (weights, multipliers of the rows).

The dual has 2 n_tasks unknowns however many domains there are, and a certified gap; it does not converge where gamma is
near 0 or where multipliers are infinite (a prior on the Pareto front), and has no place for noise. Clarabel, an
interior-point solver of conic programmes, takes those if it is installed; SciPy's SLSQP is what remains, slow beyond a
few hundred domains. None of them is believed by its caller before the answer is verified.
"""

from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import xlogy

from dynmix.mixers.problem import Array, Problem, lift
from dynmix.mixers.simplex import water_fill

GAP = 1e-8  # relative duality gap at which the dual's answer is final


def solve_dual(p: Problem) -> tuple[Array, Array]:
    """Return (w, multipliers of the rows) from the dual of Eq. 7; gamma must be above 0, and no score uncertain.

    With |K w| = max over |u| <= 1 of u^T K w, the minimum over w at fixed (lambda, u) is a softmax with upper bounds
    (`water_fill`), so what is left is a smooth concave maximum in 2 n_tasks unknowns.

    Raises:
        ArithmeticError: it did not reach a relative gap of `GAP`.
    """
    K, linear, base = p.spread, p.linear, p.floor
    n, k = len(p.C), len(p.A)

    def negative_dual(x: Array) -> tuple[float, Array]:
        lam, u = x[:n], x[n:]
        q = linear + u @ K - lam @ p.C
        w = water_fill(-q / p.gamma, p.upper, p.lower)
        value = lam @ base + q @ w + p.gamma * xlogy(w, w).sum()
        return -float(value), np.concatenate([p.C @ w - base, -(K @ w)])

    ball = {
        "type": "ineq",
        "fun": lambda x: 1 - x[n:] @ x[n:],
        "jac": lambda x: np.concatenate([0 * x[:n], -2 * x[n:]]),
    }
    with np.errstate(all="ignore"):
        answer = minimize(
            negative_dual,
            np.zeros(n + k),
            jac=True,
            method="SLSQP",
            bounds=[(0, None)] * n + [(-1, 1)] * k,
            constraints=[ball],
            options={"maxiter": 300, "ftol": 1e-15},
        )
    x = np.asarray(answer.x, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ArithmeticError("the dual diverged")
    lam, u = np.maximum(x[:n], 0), x[n:] / max(1.0, float(np.linalg.norm(x[n:])))
    bound = -negative_dual(np.concatenate([lam, u]))[0]
    w = lift(p, water_fill((lam @ p.C - linear - u @ K) / p.gamma, p.upper, p.lower))
    gap = p.objective(w) - bound
    if not gap <= GAP * max(1.0, abs(bound)):
        raise ArithmeticError(f"the dual stopped at a gap of {gap:.2g}")
    return w, lam


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
    of_rows = np.zeros((n, len(rows)))
    of_rows[rows, np.arange(len(rows))] = 1.0
    blocks = [
        (block(1, w=np.ones((1, m))), np.ones(1), [clarabel.ZeroConeT(1)]),
        (block(m, w=-eye), -p.lower, [clarabel.NonnegativeConeT(m)]),
        (block(m, w=eye), p.upper, [clarabel.NonnegativeConeT(m)]),
        (block(n, w=-p.C, t=of_rows), -p.floor, [clarabel.NonnegativeConeT(n)]),
        (sparse.vstack([block(1, s=[[-1.0]]), block(len(K), w=-K)]), np.zeros(len(K) + 1),
         [clarabel.SecondOrderConeT(len(K) + 1)]),
    ]  # fmt: skip
    for k, i in enumerate(rows):
        unit = -np.eye(1, len(rows), k)
        matrix = sparse.vstack([block(1, t=unit), block(m, w=-sparse.diags(p.R[i]))])
        offset = np.concatenate([[0.0], -p.R[i] * p.centre])
        blocks.append((matrix, offset, [clarabel.SecondOrderConeT(m + 1)]))
    if p.gamma > 0:  # (x, y, z) with y exp(x / y) <= z, here (e_j, w_j, 1)
        first = 3 * np.arange(m)
        ones = -np.ones(m)
        matrix = block(
            3 * m,
            w=sparse.csc_matrix((ones, (first + 1, np.arange(m))), shape=(3 * m, m)),
            e=sparse.csc_matrix((ones, (first, np.arange(m))), shape=(3 * m, m)),
        )
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
        ArithmeticError: it ended without a finite answer.
    """
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
            {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones_like(w)},
            {
                "type": "ineq",
                "fun": lambda w: p.C @ w - risk(w)[0] - p.floor,
                "jac": lambda w: p.C - risk(w)[1],
            },
        ],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    if not np.isfinite(answer.x).all():
        raise ArithmeticError(f"SLSQP: {answer.message}")
    w = np.clip(answer.x, p.lower, p.upper)
    return lift(p, w / w.sum()), np.asarray(answer.get("multipliers", np.zeros(n + 1)))[-n:]
