"""DML, the exponential law of "Data Mixing Laws" (arXiv 2403.16952, Eq. 7), bounded. Knows arrays only."""

import numpy as np

from dynmix.laws.base import Array, spread
from dynmix.laws.curve import Curve, CurveLaw, Prior

STEEPEST = 30.0  # |sum_j t_ij w_j|: the exponential stays finite at every step of the fit


class DML(CurveLaw):
    """L_i(w) = c_i + k_i exp(sum_j t_ij w_j), with t kept from running away (DML, arXiv 2403.16952, Eq. 7).

    k_i is part of t here, since weights sum to 1. Fitted without bounds its predictions beyond the runs grow without
    end; here t has a normal prior around a constant loss, c_i stays between 0 and the least loss, and predictions stay
    within one range of the observed losses beyond them.

    Args:
        tau: prior standard deviation of t_ij around the target's own level.
        noise: of a run, as a share of the target's standard deviation over the runs: weighs the data against the prior.
    """

    def __init__(self, tau: float = 8.0, noise: float = 0.05):
        self.tau = tau
        self.noise = noise

    def _curve(self) -> Curve:
        return _ExponentialCurve(*self._floor)

    def _prior(self, W: Array, L: Array) -> Prior:
        k = W.shape[1]
        top = np.nanmin(L, axis=0)
        bottom = np.where(top > 0, 0.0, top - 4 * spread(L))
        self._floor = bottom, top - bottom
        mean = np.zeros((len(top), k + 1))
        middle = np.maximum(np.nanmedian(L, axis=0) - (bottom + 0.5 * (top - bottom)), 1e-12)
        mean[:, :k] = np.log(middle)[:, None]
        covariance = np.eye(k + 1)
        covariance[:k, :k] = self.tau**2 * np.eye(k) + 1.0
        return Prior(mean, covariance)


class _ExponentialCurve:
    """u = t [k], logit of the floor between `bottom` and `bottom + height` [n_targets]."""

    def __init__(self, bottom: Array, height: Array):
        self._bottom, self._height = bottom, height

    def __call__(self, u: Array, W: Array, slope: bool = True) -> tuple[Array, Array | None]:
        share = 0.5 * (1 + np.tanh(0.5 * u[:, -1:]))
        above = np.exp(np.clip(u[:, :-1] @ W.T, -STEEPEST, STEEPEST))
        f = self._bottom[:, None] + self._height[:, None] * share + above
        if not slope:
            return f, None
        J = np.empty((*f.shape, u.shape[1]))
        J[:, :, :-1] = above[:, :, None] * W
        J[:, :, -1] = self._height[:, None] * share * (1 - share)
        return f, J
