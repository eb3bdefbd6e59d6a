"""What a law is, and the one place where runs and mixtures are validated.

A law of your own subclasses `Law` and writes `_fit(W, L)` and `_predict(W)`: they get clean float64 arrays, always two-
dimensional, with NaN in L where a run was not evaluated. Knows nothing of what a domain or a target is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Array = NDArray[np.float64]

# Mixtures float64[n, n_domains] -> what else a law is told of them, float64[n, n_features]: `MDEFeatures`, say.
Features = Callable[[Array], Array]

# Tables of weights are rounded, to three decimals for example; a sum further from 1 than this is a mistake.
SUM_TOLERANCE = 0.01 + 1e-9


def check_mixtures(W: ArrayLike, n_domains: int | None = None) -> Array:
    """Return W as float64[n_runs, n_domains] whose rows sum to 1.

    Raises:
        ValueError: W is no table of finite weights of at least 0, its rows sum to 1 only beyond 1 %, or it has another
            number of domains than `n_domains`. Says which row, which column, which value, and what to do.
    """
    W = _numbers(W, "W")
    if W.ndim != 2 or 0 in W.shape:
        raise ValueError(
            f"W has shape {W.shape}: a table [n_runs, n_domains] is needed (one mixture alone: W[None, :])"
        )
    if n_domains is not None and W.shape[1] != n_domains:
        raise ValueError(f"W has {W.shape[1]} domains, the law was fitted to {n_domains}: give the same columns")
    for bad, what, remedy in (
        (~np.isfinite(W), "is not finite", "a weight that is not known cannot be fitted: drop the run"),
        (W < 0, "is negative", "weights are shares of the training tokens, at least 0"),
    ):
        if bad.any():
            i, j = np.argwhere(bad)[0]
            raise ValueError(f"W[{i}, {j}] = {W[i, j]} {what} ({int(bad.sum())} such): {remedy}")
    total = W.sum(axis=1)
    off = np.abs(total - 1) > SUM_TOLERANCE
    if off.any():
        i = int(np.argmax(off))
        raise ValueError(
            f"row {i} of W sums to {total[i]:.6g}, not 1 ({int(off.sum())} such rows): divide each row by its sum, if "
            "these are shares of all domains; give every domain a column"
        )
    return np.asarray(W / total[:, None], dtype=np.float64)


def check_runs(W: ArrayLike, L: ArrayLike, min_runs: int = 2) -> tuple[Array, Array]:
    """Return W float64[n_runs, n_domains] and L float64[n_runs, n_targets], NaN where a run was not evaluated.

    Raises:
        ValueError: as `check_mixtures`; other numbers of rows; an infinite loss; a target with less than `min_runs`
            runs.
    """
    W = check_mixtures(W)
    L = np.array(_numbers(L, "L"))
    if L.ndim not in (1, 2) or 0 in L.shape:
        raise ValueError(f"L has shape {L.shape}: [n_runs, n_targets] is needed, or [n_runs]")
    L = L[:, None] if L.ndim == 1 else L
    if len(W) != len(L):
        raise ValueError(f"W has {len(W)} rows and L has {len(L)}: one row a run in both, in the same order")
    if np.isinf(L).any():
        i, j = np.argwhere(np.isinf(L))[0]
        raise ValueError(f"L[{i}, {j}] = {L[i, j]}: a run that diverged tells no law; make it NaN or drop the run")
    counts = np.isfinite(L).sum(axis=0)
    if (counts == 0).any():
        raise ValueError(f"column {int(np.argmin(counts))} of L is all NaN: drop the target, or evaluate it")
    if (counts < min_runs).any():
        j = int(np.argmax(counts < min_runs))
        raise ValueError(
            f"column {j} of L has {counts[j]} usable run(s), at least {min_runs} are needed: evaluate the target on "
            "more runs, or drop it"
        )
    return W, L


def _numbers(values: ArrayLike, name: str) -> Array:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not a table of numbers: {error}") from None


def by_missing(L: Array) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yield (rows, columns) of L such that the columns were measured in exactly those rows."""
    patterns, which = np.unique(np.isfinite(L), axis=1, return_inverse=True)
    for k in range(patterns.shape[1]):
        yield np.flatnonzero(patterns[:, k]), np.flatnonzero(which.ravel() == k)


def joined(X: Array, W: Array, extra: Features | None) -> Array:
    """Return X float64[n, n_columns] with the extra features of the mixtures W beside it."""
    return X if extra is None else np.hstack([X, extra(W)])


def spread(L: Array) -> Array:
    """Return each target's standard deviation over its runs, float64[n_targets]; above 0 even if all are equal."""
    scale = np.maximum(np.nanmax(np.abs(L), axis=0), 1e-12)
    return np.asarray(np.maximum(np.nanstd(L, axis=0), 1e-6 * scale), dtype=np.float64)


def of_unit_length(extra: Features | None, W: Array) -> Features | None:
    """Return the features in units in which two of the runs W are usually about 1 apart."""
    if extra is None:
        return None
    scale = spread(extra(W))
    scale *= np.sqrt(2 * len(scale))
    return lambda V: extra(V) / scale


def limits(L: Array) -> tuple[Array, Array]:
    """Return least and greatest prediction, one range of a target's losses beyond them, float64[n_targets] both.

    What extrapolates further is no prediction.
    """
    low, high = np.nanmin(L, axis=0), np.nanmax(L, axis=0)
    return low - (high - low), high + (high - low)


class Law(RegressorMixin, BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn has no types
    """A loss as a function of the mixture, for many targets at once; scikit-learn's interface of a regressor.

    Attributes:
        n_features_in_: n_domains of the runs it was fitted to.
        n_targets_: n_targets of them.
        seen_: bool[n_domains], the domains that a run had: the law knows nothing of the others.
        steps: whether it is a function of steps, without a slope.
    """

    min_runs = 2
    steps = False

    def fit(self, W: ArrayLike, L: ArrayLike) -> Self:
        """Fit to runs.

        Args:
            W: mixture weights, float[n_runs, n_domains]; rows sum to 1 within 1 % and are made to sum to 1.
            L: losses in nats per token, float[n_runs, n_targets] or [n_runs]; NaN where a run was not evaluated: each
                target is fitted to its own runs. Any unit of that size will do; the power laws' prior expects one.

        Raises:
            ValueError: what `check_runs` refuses.
        """
        L = _numbers(L, "L")
        self._single = L.ndim == 1
        W, L = check_runs(W, L, self.min_runs)
        self.n_features_in_, self.n_targets_ = W.shape[1], L.shape[1]
        self.seen_: NDArray[np.bool_] = W.max(axis=0) > 0
        # The matrices are small: BLAS threads that wait for each other made a fit of 512 runs seven times slower.
        with threadpool_limits(1, user_api="blas"):
            self._fit(W, L)
        return self

    def predict(self, W: ArrayLike, return_std: bool = False) -> Any:
        """Return the predicted losses of mixtures, float64[n, n_targets] ([n] if L was [n_runs]), in L's unit.

        Args:
            W: float[n, n_domains].
            return_std: return (mean, std), std the standard deviation of the loss that a new run with that mixture
                would have: what is not known of the law, and the noise between runs.

        Raises:
            ValueError: what `check_mixtures` refuses; `return_std` of a law that has none.
        """
        check_is_fitted(self, "n_features_in_")
        W = check_mixtures(W, self.n_features_in_)
        mean, std = self._predict(W, return_std)
        if return_std and std is None:
            raise ValueError(f"{type(self).__name__} has no standard deviation: use AutoLaw, which has it of any law")
        if self._single:
            mean, std = mean[:, 0], std if std is None else std[:, 0]
        return (mean, std) if return_std else mean

    def known(self, W: Array) -> NDArray[np.bool_]:
        """Which mixtures' losses the law has from elsewhere, bool[n]: of those no left-out prediction is one."""
        return np.zeros(len(W), dtype=np.bool_)

    @abstractmethod
    def _fit(self, W: Array, L: Array) -> None:
        """Fit to mixtures float64[n_runs, n_domains] and losses float64[n_runs, n_targets], NaN where unknown."""

    @abstractmethod
    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        """Return losses float64[n, n_targets], and their standard deviation where the law has one and it is wanted."""
