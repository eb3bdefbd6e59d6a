"""Gaussian processes of scikit-learn: one per task, and one of what the power law misses. Knows arrays only."""

import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.base import clone

from dynmix.laws.base import Array, Features, Law, by_missing, joined, of_unit_length, spread
from dynmix.laws.power import PowerLaw

Shape = Literal["root", "sqrt", "log"]

ITERATIONS = 30  # of L-BFGS on a kernel; more change little, and a kernel with a length a domain is slow


def features(W: Array, kind: Shape) -> Array:
    """Return w^0.3, sqrt(w), or log(w + 1e-3) scaled to similar distances, float64[n, n_domains]."""
    if kind == "root":
        return np.asarray(W**0.3, dtype=np.float64)
    if kind == "sqrt":
        return np.sqrt(W)
    if kind == "log":
        return np.asarray(np.log(W + 1e-3) / (np.log(1e3) * np.sqrt(W.shape[1] / 4)), dtype=np.float64)
    raise ValueError(f"features={kind!r}: 'root', 'sqrt' or 'log' is needed")


def process(X: Array, Y: Array, kernel: Any, kernel_runs: int) -> Any:
    """Return scikit-learn's GP of Y on X; its kernel, a few numbers, is chosen on at most `kernel_runs` of the runs."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor

    with warnings.catch_warnings():  # a part that the data does not show ends at its bound, which is an answer
        warnings.simplefilter("ignore", ConvergenceWarning)
        some = evenly(len(X), kernel_runs)
        model = GaussianProcessRegressor(kernel, optimizer=_optimise).fit(X[some], Y[some])
        if len(some) < len(X):
            model = GaussianProcessRegressor(model.kernel_, optimizer=None).fit(X, Y)
    return model


def _optimise(objective: Any, start: Array, bounds: Array) -> tuple[Array, float]:
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS})
    return found.x, float(found.fun)


def evenly(n: int, most: int) -> NDArray[np.intp]:
    """Return which of n runs to take where `most` are enough."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(np.intp)


class GP(Law):
    """A Gaussian process a target: a smooth function with a length scale a domain, plus noise.

    Most domains matter little to a target, and the length scales say which: with one for all, 25 runs of 17 domains
    rank mixtures at 0.88 where these reach 0.95 (RegMix's training runs, by others of them).

    Args:
        features: "root" (w^0.3), "sqrt" or "log" of the weights: a domain's first per cents matter most.
        kernel_runs: the kernel is chosen on at most that many runs, all of them inform the prediction.
        extra: what the law is told besides the weights.
    """

    min_runs = 3

    def __init__(self, features: Shape = "root", kernel_runs: int = 64, extra: Features | None = None):
        self.features = features
        self.kernel_runs = kernel_runs
        self.extra = extra

    def _fit(self, W: Array, L: Array) -> None:
        from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern, WhiteKernel

        self._extra = of_unit_length(self.extra, W)
        X = joined(features(W, self.features), W, self._extra)
        self._middle, self._scale = np.nanmean(L, axis=0), spread(L)
        Z = (L - self._middle) / self._scale
        self._centre = X.mean(axis=0)
        self.models_ = []
        for z in Z.T:
            smooth = Matern(np.full(X.shape[1], 2.0), (0.3, 100), nu=2.5)
            kernel = ConstantKernel(1.0, (1e-2, 1e3)) * smooth + WhiteKernel(1e-2, (1e-3, 2))
            if self.extra is not None:  # features that are losses themselves: the trend is linear in them
                kernel += ConstantKernel(1.0, (1e-4, 1e3)) * DotProduct(1e-3, "fixed")
            rows = np.flatnonzero(np.isfinite(z))
            self.models_.append(process(X[rows] - self._centre, z[rows], kernel, self.kernel_runs))

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        X = joined(features(W, self.features), W, self._extra) - self._centre
        if not with_std:
            return self._middle + self._scale * np.stack([model.predict(X) for model in self.models_], axis=1), None
        mean, std = np.stack([model.predict(X, return_std=True) for model in self.models_], axis=2)
        return self._middle + self._scale * mean, self._scale * std


class PowerLawGP(Law):
    """The power law, plus a Gaussian process on sqrt(w) of what it misses: for hundreds of runs.

    The targets share the process's kernel, whose signal and noise are in units of each target's residual. With few runs
    the kernel finds no signal, and the power law is what remains.

    Args:
        law: the power law; None: `PowerLaw()`.
        kernel_runs: the kernel is chosen on at most that many runs, all of them inform the prediction.
    """

    def __init__(self, law: PowerLaw | None = None, kernel_runs: int = 320):
        self.law = law
        self.kernel_runs = kernel_runs

    def _fit(self, W: Array, L: Array) -> None:
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

        self.law_ = clone(self.law or PowerLaw()).fit(W, L)
        residual = L - self.law_.predict(W)
        self._scale = np.maximum(np.sqrt(np.nanmean(residual**2, axis=0)), 1e-12)
        X = np.sqrt(W)
        self.models_: list[tuple[NDArray[np.intp], Any]] = []
        for rows, columns in by_missing(L):
            kernel = ConstantKernel(0.3, (1e-3, 10)) * RBF(0.5, (0.05, 20)) + WhiteKernel(0.7, (1e-3, 2))
            Z = residual[np.ix_(rows, columns)] / self._scale[columns]
            self.models_.append((columns, process(X[rows], Z, kernel, self.kernel_runs)))

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        mean, std = self.law_._predict(W, with_std)
        change, noise = np.zeros_like(mean), np.zeros_like(mean)
        for columns, model in self.models_:
            # Beyond the runs the residual's process falls back to 0, and its deviation to the residual's own.
            m, s = model.predict(np.sqrt(W), return_std=True)
            change[:, columns] = m.reshape(len(W), -1)
            noise[:, columns] = s.reshape(len(W), -1)
        mean = mean + self._scale * change
        if std is None:
            return mean, None
        # The law's own deviation holds the residual's variance once; the process says how much of it is explained here.
        return mean, np.sqrt(np.maximum(std**2 - self._scale**2 * np.maximum(1 - noise**2, 0), (0.2 * std) ** 2))
