"""A multi-task Gaussian process: the intrinsic coregionalisation model, which scikit-learn lacks. Knows arrays only."""

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

from dynmix.laws.base import Array, Features, Law, joined, of_unit_length, spread
from dynmix.laws.gp import evenly, features

JITTER = 1e-8


class MultiTaskGP(Law):
    """Targets that share what they learn: covariance B[i, i'] k(w, w') + noise_i, as in MDE (arXiv 2502.15950, B.6).

    B = A A^T + diag(d) of low rank, k linear plus squared-exponential in w^0.3; all of them, and each target's noise,
    are what makes the known cells likeliest. Missing cells cost nothing: what other targets show of a run counts.

    Args:
        rank: of A.
        kernel_cells: hyperparameters are chosen on whole runs of at most that many cells (run, target).
        max_cells: more known cells than that are refused: memory and time are their square and cube.
        extra: what the law is told besides the weights.

    Raises (from `fit`):
        ValueError: what `Law.fit` refuses, or more known losses than `max_cells`.
    """

    def __init__(self, rank: int = 2, kernel_cells: int = 400, max_cells: int = 4000, extra: Features | None = None):
        self.rank = rank
        self.kernel_cells = kernel_cells
        self.max_cells = max_cells
        self.extra = extra

    def _fit(self, W: Array, L: Array) -> None:
        t = L.shape[1]
        if (count := int(np.isfinite(L).sum())) > self.max_cells:
            raise ValueError(
                f"{count} known losses are more than max_cells={self.max_cells}: with so many runs GP or PowerLawGP "
                "know as much; or raise max_cells"
            )
        self._middle, self._scale = np.nanmean(L, axis=0), spread(L)
        self._extra = of_unit_length(self.extra, W)
        Z, X = (L - self._middle) / self._scale, joined(features(W, "root"), W, self._extra)
        self._centre = X.mean(axis=0)
        some = evenly(len(X), max(3, self.kernel_cells // t))
        self._cells = cells = _Cells(X - self._centre, Z, self.rank)
        if np.isfinite(Z[some]).sum() >= 3:
            cells = _Cells(X[some] - self._centre, Z[some], self.rank)
        start = _pack(_start(Z, self.rank), np.full(t, -2.0), np.full(t, -3.0), np.zeros(2))
        bounds = [(-3, 3)] * (t * self.rank) + [(-7, 2)] * t + [(-8, 1)] * t + [(-4, 4), (-2, 3)]
        found = minimize(cells.loss, start, method="L-BFGS-B", jac=True, bounds=bounds, options={"maxiter": 60})
        self.hyperparameters_ = found.x
        K, *_ = self._cells.covariance(found.x)
        self._factor = cho_factor(K, lower=True)
        self._solved = cho_solve(self._factor, self._cells.z)

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        t, cells = self.n_targets_, self._cells
        A, d, noise, kernel = cells.unpack(self.hyperparameters_)
        B = A @ A.T + np.diag(np.exp(d))
        X = joined(features(W, "root"), W, self._extra) - self._centre
        k = _kernel(X, cells.X, kernel)[0][:, cells.run]  # [n, n_cells]
        own = np.exp(kernel[0]) * (X**2).sum(axis=1) + 1
        mean, std = np.empty((len(W), t)), np.empty((len(W), t))
        for i in range(t):
            cross = k * B[i, cells.target]
            mean[:, i] = cross @ self._solved
            if with_std:
                explained = (solve_triangular(self._factor[0], cross.T, lower=True) ** 2).sum(axis=0)
                std[:, i] = np.sqrt(np.maximum(B[i, i] * own - explained, 0) + np.exp(noise[i]))
        return self._middle + self._scale * mean, self._scale * std if with_std else None


class _Cells:
    """The known cells of Z float64[n_runs, n_targets]: their run, target and value."""

    def __init__(self, X: Array, Z: Array, rank: int):
        self.run, self.target = np.nonzero(np.isfinite(Z))
        self.X, self.z = X, Z[self.run, self.target]
        self.n_targets, self.rank = Z.shape[1], rank

    def unpack(self, u: Array) -> tuple[Array, Array, Array, Array]:
        """Return A, log d, log noise and the kernel's own of what `_pack` put together."""
        t = self.n_targets
        A, d, noise, kernel = np.split(u, np.cumsum([t * self.rank, t, t]))
        return A.reshape(t, self.rank), d, noise, kernel

    def covariance(self, u: Array) -> tuple[Array, Array, Array, list[Array]]:
        """Return the cells' covariance, B and k between them, and k's derivatives, all float64[n_cells, n_cells]."""
        A, d, noise, kernel = self.unpack(u)
        B = (A @ A.T + np.diag(np.exp(d)))[np.ix_(self.target, self.target)]
        k, *slopes = (part[np.ix_(self.run, self.run)] for part in _kernel(self.X, self.X, kernel))
        K = B * k
        K[np.diag_indices_from(K)] += np.exp(noise)[self.target] + JITTER
        return K, B, k, slopes

    def loss(self, u: Array) -> tuple[float, Array]:
        """Return minus the log likelihood (up to a constant) with a weak prior on u, and its gradient."""
        A, d, noise, _ = self.unpack(u)
        K, B, k, slopes = self.covariance(u)
        factor = cho_factor(K, lower=True)
        solved = cho_solve(factor, self.z)
        value = 0.5 * float(self.z @ solved) + float(np.log(np.diag(factor[0])).sum())
        G = 0.5 * (cho_solve(factor, np.eye(len(K))) - np.outer(solved, solved))
        member = np.equal.outer(self.target, np.arange(self.n_targets)).astype(np.float64)
        by_target = member.T @ (G * k) @ member
        gradient = _pack(
            2 * by_target @ A,
            np.diag(by_target) * np.exp(d),
            (np.diag(G) @ member) * np.exp(noise),
            np.array([(G * B * slope).sum() for slope in slopes]),
        )
        return value + 0.05 * float(u @ u), gradient + 0.1 * u


def _kernel(X: Array, Y: Array, u: Array) -> tuple[Array, Array, Array]:
    """Return e^u0 x.y + exp(-|x - y|^2 / (2 e^(2 u1))) and its derivatives by u, each float64[len(X), len(Y)]."""
    linear = np.exp(u[0]) * X @ Y.T
    square = np.maximum((X**2).sum(1)[:, None] + (Y**2).sum(1) - 2 * X @ Y.T, 0) * np.exp(-2 * u[1])
    smooth = np.exp(-0.5 * square)
    return linear + smooth, linear, smooth * square


def _start(Z: Array, rank: int) -> Array:
    """Return A float64[n_targets, rank] from the principal directions of Z, missing cells taken as average."""
    _, s, V = np.linalg.svd(np.nan_to_num(Z), full_matrices=False)
    A = np.full((Z.shape[1], rank), 0.01)
    kept = min(rank, len(s))
    A[:, :kept] += V[:kept].T * s[:kept] / np.sqrt(len(Z))
    return A


def _pack(A: Array, d: Array, noise: Array, kernel: Array) -> Array:
    return np.concatenate([A.ravel(), d, noise, kernel])
