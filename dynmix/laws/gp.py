"""Gaussian processes of scikit-learn: one a task, and one of what the power law misses. Knows arrays only."""

import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dynmix.laws.base import Array, Law, by_missing, spread
from dynmix.laws.power import PowerLaw

Features = Literal["sqrt", "log"]


def features(W: Array, kind: Features) -> Array:
    """Return sqrt(w) or log(w + 1e-3), scaled so that a usual distance is about 1, float64[n, n_domains]."""
    if kind == "sqrt":
        return np.sqrt(W)
    if kind == "log":
        return np.asarray(np.log(W + 1e-3) / (np.log(1e3) * np.sqrt(W.shape[1] / 4)), dtype=np.float64)
    raise ValueError(f"features={kind!r}: 'sqrt' or 'log' is needed")


def process(X: Array, Y: Array, kernel: Any, kernel_runs: int) -> Any:
    """Return scikit-learn's GP of Y on X; its kernel, a few numbers, is chosen on at most `kernel_runs` of the runs."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor

    with warnings.catch_warnings():  # a part that the data does not show ends at its bound, which is an answer
        warnings.simplefilter("ignore", ConvergenceWarning)
        some = _some(len(X), kernel_runs)
        model = GaussianProcessRegressor(kernel).fit(X[some], Y[some])
        if len(some) < len(X):
            model = GaussianProcessRegressor(model.kernel_, optimizer=None).fit(X, Y)
    return model


def _some(n: int, most: int) -> NDArray[np.intp]:
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(np.intp)


class GP(Law):
    """A Gaussian process a target: linear in the features, plus a smooth departure, plus noise.

    Args:
        features: "sqrt" or "log" of the weights: a domain's first per cents matter most.
        kernel_runs: the kernel is chosen on at most that many runs, all of them inform the prediction.
    """

    min_runs = 3

    def __init__(self, features: Features = "sqrt", kernel_runs: int = 160):
        self.features = features
        self.kernel_runs = kernel_runs

    def _fit(self, W: Array, L: Array) -> None:
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

        X = features(W, self.features)
        self._middle, self._scale = np.nanmean(L, axis=0), spread(L)
        Z = (L - self._middle) / self._scale
        self._centre = X.mean(axis=0)
        self.models_ = []
        for z in Z.T:
            kernel = (
                ConstantKernel(1.0, (1e-4, 1e3)) * DotProduct(1e-3, "fixed")
                + ConstantKernel(1.0, (1e-4, 1e3)) * RBF(1.0, (0.1, 30))
                + WhiteKernel(1e-2, (1e-5, 2))
            )
            rows = np.flatnonzero(np.isfinite(z))
            self.models_.append(process(X[rows] - self._centre, z[rows], kernel, self.kernel_runs))

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        X = features(W, self.features) - self._centre
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
        from sklearn.base import clone
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

        self.law_ = (clone(self.law) if self.law is not None else PowerLaw()).fit(W, L)
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
