"""The power law of effective data: the strongest law of few runs.

    L_i(w) = c_i + (sum_j a_ij w_j^g_ij)^(-alpha_i)

Domain j is worth a_ij w_j^g_ij of data to target i: domains substitute each other, each with diminishing returns, and
the loss is a power law of the total, as it is of data of one kind. With g = 1 and a = 1 + t / alpha it tends to DML's
c + exp(-sum_j t_ij w_j) as alpha grows; with one a_ij above 0 it is BiMix's. Knows arrays only.
"""

import numpy as np

from dynmix.laws.base import Array
from dynmix.laws.curve import CurveLaw

SMALLEST = 1e-5  # added to every weight: 0^g has no derivative, and a weight of 0 in a table is often a rounded one


class PowerLaw(CurveLaw):
    """L_i(w) = c_i + (sum_j a_ij w_j^g_ij)^(-alpha_i), a power law of effective data; ours.

    With a prior on each parameter 8 runs of 17 domains fit it too. Parameters are logarithms (a, g, alpha > 0) and a
    logistic share (c between 0 and the least loss), normal around the defaults. A small alpha makes a wide range of a
    cost little loss, so it is what keeps a law of few runs calm; the defaults were chosen on RegMix's training runs,
    25, 64 and 400 of them, by the others of the 512.

    Args:
        alpha, exponent: prior medians of alpha_i and g_ij.
        tau: prior standard deviation of log a_ij around the target's own level.
        tau_alpha, tau_exponent: of log alpha_i, and of what log g_ij have in common.
        tau_domain: of log g_ij around that.
        tau_floor: of the logit of c_i's share of the least loss, whose median is a half.
        noise: of a run, as a share of the target's standard deviation over the runs: weighs the data against the prior.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        exponent: float = 0.5,
        tau: float = 1.0,
        tau_alpha: float = 0.05,
        tau_exponent: float = 0.05,
        tau_domain: float = 0.1,
        tau_floor: float = 1.0,
        noise: float = 0.1,
    ):
        self.alpha = alpha
        self.exponent = exponent
        self.tau = tau
        self.tau_alpha = tau_alpha
        self.tau_exponent = tau_exponent
        self.tau_domain = tau_domain
        self.tau_floor = tau_floor
        self.noise = noise

    def _prior(self, W: Array) -> tuple[Array, Array]:
        k, above = W.shape[1], self._floor.above
        worth = np.log(((W + SMALLEST) ** self.exponent).sum(axis=1).mean())
        mean = np.zeros((len(above), 2 * k + 2))
        mean[:, :k] = (-np.log(above) / self.alpha - worth)[:, None]
        mean[:, k : 2 * k] = np.log(self.exponent)
        mean[:, 2 * k] = np.log(self.alpha)
        covariance = np.zeros((2 * k + 2, 2 * k + 2))
        # The level of a target's a follows from alpha and c, so it may move with them: in units of the loss, twofold.
        covariance[:k, :k] = self.tau**2 * np.eye(k) + 4.0
        covariance[k : 2 * k, k : 2 * k] = self.tau_domain**2 * np.eye(k) + self.tau_exponent**2
        covariance[2 * k, 2 * k], covariance[-1, -1] = self.tau_alpha**2, self.tau_floor**2
        return mean, covariance

    def _curve(self, u: Array, W: Array, slope: bool = True) -> tuple[Array, Array | None]:
        """u = log a [k], log g [k], log alpha, logit of the floor."""
        k = W.shape[1]
        log_a, g, alpha = u[:, None, :k], np.exp(u[:, None, k : 2 * k]), np.exp(u[:, 2 * k, None])
        floor, floor_slope = self._floor.at(u[:, 2 * k + 1, None])
        log_w = np.log(W + SMALLEST)
        log_terms = log_a + g * log_w
        # log-sum-exp: with a small alpha the logarithms of a reach tens.
        largest = log_terms.max(axis=2)
        terms = np.exp(log_terms - largest[:, :, None])
        total = terms.sum(axis=2)
        log_total = largest + np.log(total)
        with np.errstate(over="ignore"):  # a step too far is an infinite loss, and not taken
            above = np.exp(-alpha * log_total)
        f = floor + above
        if not slope:
            return f, None
        J = np.empty((*f.shape, u.shape[1]))
        J[:, :, :k] = (-alpha * above / total)[:, :, None] * terms
        J[:, :, k : 2 * k] = J[:, :, :k] * log_w * g
        J[:, :, 2 * k] = -alpha * log_total * above
        J[:, :, 2 * k + 1] = floor_slope
        return f, J

    @property
    def floor_(self) -> Array:
        """c_i, float64[n_targets], in L's unit."""
        return self._floor.at(self.parameters_[:, -1:])[0][:, 0]

    @property
    def alpha_(self) -> Array:
        """alpha_i, float64[n_targets]."""
        return np.asarray(np.exp(self.parameters_[:, -2]), dtype=np.float64)

    @property
    def log_worth_(self) -> Array:
        """log a_ij, float64[n_targets, n_domains]."""
        return np.asarray(self.parameters_[:, : self.n_features_in_], dtype=np.float64)

    @property
    def exponent_(self) -> Array:
        """g_ij, float64[n_targets, n_domains]."""
        k = self.n_features_in_
        return np.asarray(np.exp(self.parameters_[:, k : 2 * k]), dtype=np.float64)
