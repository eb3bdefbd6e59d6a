"""Three solvers of TiKMiX-D's `Problem`, behind one signature: Problem -> (weights, Pareto multipliers).

The dual has 2 n_tasks unknowns however many domains there are, and a certified gap; it does not converge where gamma is
near 0 or where multipliers are infinite (a prior on the Pareto front). Clarabel, an interior-point solver of conic
programmes, takes those; SciPy's SLSQP is what remains, slow beyond a few hundred domains. None of them is believed by
its caller before the answer is verified.
"""

import clarabel
import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import xlogy

from dynmix.mixers.problem import Array, Problem, lift
from dynmix.mixers.simplex import water_fill

GAP = 1e-8  # relative duality gap at which the dual's answer is final


def solve_dual(p: Problem) -> tuple[Array, Array]:
    """Return (w, multipliers of the Pareto constraints) from the dual of Eq. 7; gamma must be above 0.

    With |K w| = max over |u| <= 1 of u^T K w, the minimum over w at fixed (lambda, u) is a softmax with upper bounds
    (`water_fill`), so what is left is a smooth concave maximum in 2 n_tasks unknowns.

    Raises:
        ArithmeticError: it did not reach a relative gap of `GAP`.
    """
    n = len(p.C)
    K, linear, base = p.spread, p.linear, p.floor

    def negative_dual(x: Array) -> tuple[float, Array]:
        lam, u = x[:n], x[n:]
        q = linear + u @ K - lam @ p.C
        w = water_fill(-q / p.gamma, p.upper)
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
            np.zeros(2 * n),
            jac=True,
            method="SLSQP",
            bounds=[(0, None)] * n + [(-1, 1)] * n,
            constraints=[ball],
            options={"maxiter": 300, "ftol": 1e-15},
        )
    x = np.asarray(answer.x, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ArithmeticError("the dual diverged")
    lam, u = np.maximum(x[:n], 0), x[n:] / max(1.0, float(np.linalg.norm(x[n:])))
    bound = -negative_dual(np.concatenate([lam, u]))[0]
    w = lift(p, water_fill((lam @ p.C - linear - u @ K) / p.gamma, p.upper))
    gap = p.objective(w) - bound
    if not gap <= GAP * max(1.0, abs(bound)):
        raise ArithmeticError(f"the dual stopped at a gap of {gap:.2g}")
    return w, lam


def solve_clarabel(p: Problem) -> tuple[Array, Array]:
    """Return (w, multipliers of the Pareto constraints) of Eq. 7 as a conic programme.

    Unknowns x = (w[m], e[m], s): minimise linear w - gamma sum(e) + s, with e_j <= -w_j log w_j (exponential cone)
    and |K w| <= s (second-order cone).

    Raises:
        ArithmeticError: it did not solve the problem.
    """
    n, m = p.C.shape
    K = p.spread
    eye, zeros = sparse.identity(m), sparse.csc_matrix
    # Exponential cone (x, y, z): y exp(x / y) <= z, here (e_j, w_j, 1).
    rows = np.arange(m)
    exponential = zeros((-np.ones(2 * m), (np.concatenate([3 * rows, 3 * rows + 1]), np.concatenate([m + rows, rows]))),
                        shape=(3 * m, 2 * m + 1))  # fmt: skip
    one = np.tile([0.0, 0.0, 1.0], m)
    blocks = [
        (sparse.hstack([np.ones((1, m)), zeros((1, m + 1))]), np.ones(1), clarabel.ZeroConeT(1)),
        (sparse.hstack([-eye, zeros((m, m + 1))]), np.zeros(m), clarabel.NonnegativeConeT(m)),
        (sparse.hstack([eye, zeros((m, m + 1))]), p.upper, clarabel.NonnegativeConeT(m)),
        (sparse.hstack([-p.C, zeros((n, m + 1))]), -p.floor, clarabel.NonnegativeConeT(n)),
        (sparse.block_array([[None, None, [[-1.0]]], [-K, zeros((n, m)), None]]), np.zeros(n + 1),
         clarabel.SecondOrderConeT(n + 1)),
    ]  # fmt: skip
    if p.gamma > 0:
        blocks.append((exponential, one, None))
    cones = [cone for _, _, cone in blocks if cone is not None] + [clarabel.ExponentialConeT()] * (m * (p.gamma > 0))
    cost = np.concatenate([p.linear, np.full(m, -p.gamma), [1.0]])
    if p.gamma == 0:  # nothing bounds e then
        blocks.append((sparse.hstack([zeros((m, m)), eye, zeros((m, 1))]), np.zeros(m), None))
        cones.append(clarabel.ZeroConeT(m))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    solution = clarabel.DefaultSolver(
        sparse.csc_matrix((2 * m + 1, 2 * m + 1)),
        cost,
        sparse.vstack([block for block, _, _ in blocks], format="csc"),
        np.concatenate([offset for _, offset, _ in blocks]),
        cones,
        settings,
    ).solve()
    if solution.status not in (clarabel.SolverStatus.Solved, clarabel.SolverStatus.AlmostSolved):
        raise ArithmeticError(f"clarabel: {solution.status}")
    w = np.clip(np.asarray(solution.x[:m]), 0, p.upper)
    multipliers = np.asarray(solution.z[1 + 2 * m : 1 + 2 * m + n])
    return lift(p, w / w.sum()), multipliers


def solve_slsqp(p: Problem) -> tuple[Array, Array]:
    """Return (w, zeros) of Eq. 7 by sequential quadratic programming from `start`, with analytic gradients.

    Raises:
        ArithmeticError: it ended without a finite answer.
    """
    K, linear = p.spread, p.linear
    tiny = 1e-12  # the entropy's gradient is infinite at 0

    def objective(w: Array) -> tuple[float, Array]:
        w = np.maximum(w, tiny)
        Kw = K @ w
        std = float(np.linalg.norm(Kw))
        value = std + float(linear @ w + p.gamma * xlogy(w, w).sum())
        return value, K.T @ Kw / max(std, tiny) + linear + p.gamma * (np.log(w) + 1)

    answer = minimize(
        objective,
        np.clip(p.start, tiny, None),
        jac=True,
        method="SLSQP",
        bounds=[(0, b) for b in p.upper],
        constraints=[
            {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones_like(w)},
            {"type": "ineq", "fun": lambda w: p.C @ w - p.floor, "jac": lambda w: p.C},
        ],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    if not np.isfinite(answer.x).all():
        raise ArithmeticError(f"SLSQP: {answer.message}")
    w = np.clip(answer.x, 0, p.upper)
    return lift(p, w / w.sum()), np.zeros(len(p.C))
