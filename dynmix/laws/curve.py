"""Nonlinear laws fitted to all targets at once: penalised least squares by Levenberg-Marquardt, and its error bar.

A target has its own parameters u, with a Gaussian prior; the fit is the most likely u, the error bar its Laplace
approximation. scipy's least_squares does one target at a time, and a Python call for each of its steps costs more than
the step: here a step of all targets is three numpy calls. Knows nothing of what the curve means.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from dynmix.laws.base import Array, Law, limits, spread

STEPS = 100
LONGEST = 2.0  # a step of one parameter; they are logarithms, so this is a factor of 7
GAIN = 1e-7  # relative decrease of the cost at which a target is done
STUCK = 1e7  # damping at which it is, too

Curve = Callable[..., tuple[Array, Array | None]]  # as `CurveLaw._curve`


@dataclass(frozen=True)
class Floor:
    """Where each target's floor is sought, from `bottom` to `bottom + height`; float64[n_targets] all.

    Losses are above 0, and so is their floor; for a criterion that is not (a reward, say) it is sought within 4 spreads
    below the least. `above`: how far the median loss is above the middle.
    """

    bottom: Array
    height: Array
    above: Array

    @classmethod
    def of(cls, L: Array) -> Self:
        """Return it for L float64[n_runs, n_targets], NaN left out."""
        top = np.nanmin(L, axis=0)
        bottom = np.where(top > 0, 0.0, top - 4 * spread(L))
        return cls(bottom, top - bottom, np.maximum(np.nanmedian(L, axis=0) - (bottom + 0.5 * (top - bottom)), 1e-12))

    def at(self, logit: Array) -> tuple[Array, Array]:
        """Return the floors, and their slopes by the logit [n_targets, 1] of where between the two they are."""
        share, height = 0.5 * (1 + np.tanh(0.5 * logit)), self.height[:, None]
        return self.bottom[:, None] + height * share, height * share * (1 - share)


def fit_curve(curve: Curve, W: Array, L: Array, weight: Array, start: Array, mean: Array, precision: Array) -> Array:
    """Return the u that minimises sum weight (L - curve)^2 + (u - mean)^T precision (u - mean), for each target.

    Args:
        curve: the law.
        W: float64[n_runs, n_domains].
        L, weight: float64[n_targets, n_runs]; weight 0 where L is missing (any finite number there).
        start, mean: float64[n_targets, n_parameters].
        precision: float64[n_targets, n_parameters, n_parameters], in units of the squared loss.
    """
    u, damping = start.copy(), np.full(len(L), 1e-2)
    diagonal = np.arange(u.shape[1])

    def cost(u: Array, f: Array) -> Array:
        away = (u - mean)[:, :, None]
        with np.errstate(over="ignore", invalid="ignore"):
            prior = (away.transpose(0, 2, 1) @ precision @ away)[:, 0, 0]
            total: Array = np.nan_to_num((weight * (L - f) ** 2).sum(axis=1) + prior, nan=np.inf)
            return total

    f, J = curve(u, W)
    now = cost(u, f)
    for _ in range(STEPS):
        assert J is not None
        weighted = (J * weight[:, :, None]).transpose(0, 2, 1)
        H = weighted @ J + precision
        H[:, diagonal, diagonal] *= 1 + damping[:, None]
        downhill = weighted @ (L - f)[:, :, None] - precision @ (u - mean)[:, :, None]
        step = np.clip(np.linalg.solve(H, downhill)[:, :, 0], -LONGEST, LONGEST)
        after = cost(u + step, curve(u + step, W, slope=False)[0])
        better = after < now
        done = np.where(better, now - after <= GAIN * now, damping > STUCK)
        u = np.where(better[:, None], u + step, u)
        now = np.where(better, after, now)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e9)
        if done.all():
            break
        f, J = curve(u, W)
    return u


class CurveLaw(Law):
    """A law that is a curve above a `Floor`, with a prior; `_curve` and `_prior` say which.

    Few runs cannot tell the noise from what the law misses, and a noise estimated too small lets it follow the noise:
    so the noise that weighs data against prior is `noise` times the target's standard deviation over its runs. Runs far
    off (a diverged one, say) count less: Student's t with 4 degrees of freedom, by three reweightings.
    """

    noise: float
    reweightings = 3
    freedom = 4.0

    @abstractmethod
    def _curve(self, u: Array, W: Array, slope: bool = True) -> tuple[Array, Array | None]:
        """Return losses float64[n_targets, n], and their slopes by u float64[n_targets, n, n_parameters] if asked.

        u is float64[n_targets, n_parameters], W float64[n, n_domains]; the floor is within `_floor`.
        """

    @abstractmethod
    def _prior(self, W: Array) -> tuple[Array, Array]:
        """Return the Gaussian prior of the parameters: its mean [n_targets, n_parameters], and its covariance.

        It is chosen with regard to W float64[n_runs, n_domains] and the floor.
        """

    def _fit(self, W: Array, L: Array) -> None:
        self._floor = Floor.of(L)
        (mean, covariance), curve = self._prior(W), self._curve
        known = np.isfinite(L.T)
        Y = np.where(known, L.T, 0.0)
        expected = (self.noise * spread(L)) ** 2
        precision = expected[:, None, None] * np.linalg.inv(covariance)
        weight = known.astype(np.float64)
        u = fit_curve(curve, W, Y, weight, mean, mean, precision)
        for _ in range(self.reweightings):
            residual = Y - curve(u, W, slope=False)[0]
            weight = known * (self.freedom + 1) / (self.freedom + residual**2 / expected[:, None])
            u = fit_curve(curve, W, Y, weight, u, mean, precision)
        f, J = curve(u, W)
        assert J is not None
        weighted = J * weight[:, :, None]
        self.parameters_ = u
        self._covariance = np.linalg.inv(weighted.transpose(0, 2, 1) @ J + precision)
        free = 1 - np.minimum(((weighted @ self._covariance) * J).sum(axis=2), 0.99)  # 1 - leverage
        # A left-out run misses by (Y - f) / free, the expected square of which is variance / free.
        self._variance = (known * (Y - f) ** 2 * free / free**2).sum(axis=1) / known.sum(axis=1)
        self._limits = limits(L)

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        f, J = self._curve(self.parameters_, W, slope=with_std)
        mean = np.clip(f.T, *self._limits)
        if J is None:
            return mean, None
        unknown = ((J @ self._covariance) * J).sum(axis=2)
        return mean, np.sqrt(self._variance[:, None] * (1 + unknown)).T
