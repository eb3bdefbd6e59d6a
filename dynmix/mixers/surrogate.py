"""Surrogates of a measured target as a function of the mixture: ridge, LightGBM, a smooth one, and the choice of one.

Each has scikit-learn's `fit(W, y)` and `predict(W)`, W float64[n_mixtures, n_domains], y float64[n_mixtures]. Knows
nothing of what the target is. scikit-learn and LightGBM take seconds to import, so they are imported where they are
used.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np

from dynmix.observation import Array

Name = Literal["ridge", "lightgbm", "smooth"]
NAMES: tuple[Name, ...] = ("ridge", "lightgbm", "smooth")
FOLDS = 5


class Surrogate(Protocol):
    """What `fit` returns: scikit-learn's interface of a regressor."""

    def fit(self, W: Array, y: Array) -> Self:
        """Learn y from W."""

    def predict(self, W: Array) -> Array:
        """Return the target of each row of W, float64[n_mixtures]."""


class Smooth:
    """scikit-learn's Gaussian process: linear in the mixture, plus a smooth departure from that, plus noise.

    Trees are step functions and need many mixtures for what is nearly linear; ridge knows no interaction. How large
    each part is, and how far the smooth one reaches, is what makes the data likeliest. Without noise it interpolates,
    with noise it averages over neighbours.

    Args:
        kernel: one that another fit chose (`kernel` of it), taken as it is; None: choose.
    """

    def __init__(self, kernel: Any = None):
        self.kernel = kernel

    def fit(self, W: Array, y: Array) -> Self:
        """Choose the kernel, unless there is one, and learn y from W."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        length = np.sqrt(W.shape[1])  # a usual distance of standardised mixtures
        kernel = self.kernel or (
            ConstantKernel(1 / length**2, (1e-6, 1e4)) * DotProduct(1.0, "fixed")
            + ConstantKernel(0.1, (1e-6, 1e4)) * RBF(length, (0.3 * length, 30 * length))
            + WhiteKernel(1e-2, (1e-9, 1e2))
        )
        process = GaussianProcessRegressor(kernel, optimizer=None if self.kernel else "fmin_l_bfgs_b")
        self._model = make_pipeline(StandardScaler(), process)
        with warnings.catch_warnings():  # a part that the data does not show ends at its bound, which is an answer
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.fit(W, y)
        self.kernel = process.kernel_
        return self

    def predict(self, W: Array) -> Array:
        """Return the posterior mean at each row of W, float64[n_mixtures]."""
        return np.asarray(self._model.predict(W), dtype=np.float64)

    def posterior(self, W: Array) -> tuple[Array, Array]:
        """Return mean float64[n_mixtures] and covariance [n_mixtures, n_mixtures] of the target without its noise."""
        mean, covariance = self._model.predict(W, return_cov=True)
        noise = self.kernel.k2.noise_level
        return mean, covariance - noise * np.eye(len(W))


def ridge() -> Surrogate:
    """Return the linear baseline: ridge on standardised weights, its penalty by leave-one-out."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model: Surrogate = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-6, 4, 21)))
    return model


def lightgbm(count: int) -> Surrogate:
    """Return LightGBM with settings for `count` mixtures: its defaults are made for many thousands.

    With its default of 20 mixtures a leaf 16 mixtures would give one leaf, a constant. So leaves hold 1 in 32 of the
    mixtures, at least 2; there are at most as many as fit twice; and small steps make up for the few mixtures.
    """
    from lightgbm import LGBMRegressor

    leaf = max(2, count // 32)
    model: Surrogate = LGBMRegressor(
        n_estimators=100,
        learning_rate=0.1,
        max_bin=63,
        num_leaves=int(np.clip(count // (2 * leaf), 2, 8)),
        min_child_samples=leaf,
        min_data_in_bin=1,
        deterministic=True,
        force_row_wise=True,
        n_jobs=1,
        verbose=-1,
        random_state=0,
    )
    return model


@dataclass(frozen=True)
class Fitted:
    """The surrogate with the least cross-validated error, fitted to all; `r2`: name -> its cross-validated R2.

    `kernel` is the smooth one's, for a later fit on more data of the same kind.
    """

    model: Surrogate
    name: Name
    r2: dict[Name, float]
    kernel: Any


def fit(W: Array, y: Array, names: tuple[Name, ...] = NAMES, kernel: Any = None) -> Fitted:
    """Choose a surrogate by cross-validation.

    Folds are every fifth mixture. The plain minimum, without the rule that prefers the simplest within one standard
    error: that rule guards against variance, but what a search loses by a curvature it does not see is larger than by
    one it sees falsely, for the smooth surrogate is ridge where the data shows no curvature. Its kernel, three numbers,
    is chosen from all data, since folds differ little in it.
    """
    smooth = Smooth(kernel).fit(W, y) if "smooth" in names else None
    make: dict[Name, Callable[[], Surrogate]] = {
        "ridge": ridge,
        "lightgbm": lambda: lightgbm(len(y)),
        "smooth": lambda: Smooth(smooth.kernel if smooth else None),
    }
    fold = np.arange(len(y)) % min(FOLDS, len(y))
    total = max(float(((y - y.mean()) ** 2).sum()), 1e-300)
    r2: dict[Name, float] = {}
    for name in names:
        error = 0.0
        for k in range(fold.max() + 1):
            out = fold == k
            error += float(((make[name]().fit(W[~out], y[~out]).predict(W[out]) - y[out]) ** 2).sum())
        r2[name] = 1 - error / total
    best = max(r2, key=lambda name: r2[name])
    model = smooth if smooth is not None and best == "smooth" else make[best]().fit(W, y)
    return Fitted(model, best, r2, smooth.kernel if smooth else kernel)
