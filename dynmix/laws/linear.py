"""Linear laws: least squares, and ridge with its penalty by leave-one-out. Knows arrays only."""

from collections.abc import Sequence

import numpy as np

from dynmix.laws.base import Array, Features, Law, by_missing, joined


class Ridge(Law):
    """L_i(w) = b_i + sum_j x_ij w_j with a penalty on x: RegMix's linear law (arXiv 2407.01492, Section 3.2).

    Each target's penalty is the one with the least leave-one-out error, in closed form.

    Args:
        penalties: to choose from; a penalty counts as that many runs of a mixture that is one standard deviation of an
            average domain away from the mean. None: 25 from 1e-6 to 1e3.
        extra: what the law is told besides the weights.
    """

    def __init__(self, penalties: Sequence[float] | None = None, extra: Features | None = None):
        self.penalties = penalties
        self.extra = extra

    def _fit(self, W: Array, L: Array) -> None:
        grid = np.logspace(-6, 3, 25) if self.penalties is None else np.asarray(self.penalties, dtype=np.float64)
        W = joined(W, W, self.extra)
        k, t = W.shape[1], L.shape[1]
        self.coefficients_, self.penalty_ = np.empty((t, k)), np.empty(t)
        self._centre, self._level, self._variance = np.empty((t, k)), np.empty(t), np.empty(t)
        self._open = np.empty((t, k, k))  # covariance of the coefficients over the noise's variance
        self._runs = np.isfinite(L).sum(axis=0)
        for rows, columns in by_missing(L):
            X, Y = W[rows], L[np.ix_(rows, columns)]
            centre, level = X.mean(axis=0), Y.mean(axis=0)
            U, s, V = np.linalg.svd(X - centre, full_matrices=False)
            kept = s > 1e-9  # weights are shares: less than that is rounding
            U, s, V = U[:, kept], s[kept], V[kept]
            coordinates = U.T @ (Y - level)
            unit = (s**2).sum() / len(rows) / k
            errors = []
            for penalty in grid:
                shrunk = s**2 / (s**2 + penalty * unit)
                left = 1 - 1 / len(rows) - (U**2 @ shrunk)[:, None]
                residual = Y - level - U @ (shrunk[:, None] * coordinates)
                # A run that alone fixes a direction has no leave-one-out error: it counts as an infinite one.
                with np.errstate(divide="ignore", invalid="ignore"):
                    errors.append(np.where(left > 1e-8, (residual / left) ** 2, np.inf).mean(axis=0))
            best = np.argmin(errors, axis=0)
            for column, y, c, b in zip(columns, (Y - level).T, coordinates.T, best, strict=True):
                divisor = s**2 + grid[b] * unit
                self.coefficients_[column] = V.T @ (s / divisor * c)
                residual = y - U @ (s**2 / divisor * c)
                freedom = max(len(rows) - 1 - float((s**2 / divisor).sum()), 1.0)
                self._variance[column] = (residual**2).sum() / freedom
                self._open[column] = (V.T / divisor) @ V
            self.penalty_[columns] = grid[best]
            self._centre[columns], self._level[columns] = centre, level

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        away = joined(W, W, self.extra)[None] - self._centre[:, None]
        mean = (self._level[:, None] + (away @ self.coefficients_[:, :, None])[:, :, 0]).T
        if not with_std:
            return mean, None
        unknown = ((away @ self._open) * away).sum(axis=2) + 1 / self._runs[:, None]  # slopes, level
        return mean, np.sqrt(self._variance[:, None] * (1 + unknown)).T


class Linear(Ridge):
    """L_i(w) = b_i + sum_j x_ij w_j by least squares, of least norm where the runs leave x open.

    Args:
        extra: what the law is told besides the weights.
    """

    def __init__(self, extra: Features | None = None) -> None:
        super().__init__(penalties=(0.0,), extra=extra)
