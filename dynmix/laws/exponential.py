"""DML, the exponential law of "Data Mixing Laws" (arXiv 2403.16952, Eq. 7), bounded. Knows arrays only."""

import numpy as np

from dynmix.laws.base import Array
from dynmix.laws.curve import CurveLaw

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

    def _prior(self, W: Array) -> tuple[Array, Array]:
        k, above = W.shape[1], self._floor.above
        mean = np.zeros((len(above), k + 1))
        mean[:, :k] = np.log(above)[:, None]
        covariance = np.eye(k + 1)
        covariance[:k, :k] = self.tau**2 * np.eye(k) + 1.0
        return mean, covariance

    def _curve(self, u: Array, W: Array, slope: bool = True) -> tuple[Array, Array | None]:
        """u = t [k], logit of the floor."""
        floor, floor_slope = self._floor.at(u[:, -1:])
        above = np.exp(np.clip(u[:, :-1] @ W.T, -STEEPEST, STEEPEST))
        f = floor + above
        if not slope:
            return f, None
        J = np.empty((*f.shape, u.shape[1]))
        J[:, :, :-1] = above[:, :, None] * W
        J[:, :, -1] = floor_slope
        return f, J
