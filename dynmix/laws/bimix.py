"""BiMix (arXiv 2405.14908, Eq. 3) for runs of one length, with floors. Knows arrays only."""

import numpy as np

from dynmix.laws.base import Array, Law, by_missing, limits

ALPHAS = np.geomspace(0.02, 3, 24)
UNSEEN = np.geomspace(1e-4, 0.1, 9)  # what other domains are worth, as a share of the target's own


class BiMix(Law):
    """L_i(w) = c_i + k_i (w_j + e_i)^(-alpha_i), j the one domain that target i hangs on (arXiv 2405.14908, Eq. 3).

    The published law takes the validation set of domain j for target j and has neither floor: it is infinite at
    w_j = 0. Here c_i is one of the loss and e_i one of the weight, and j is the domain that fits best. Given alpha_i
    and e_i the rest is linear, so those are a grid and the fit is exact on it.

    Attributes:
        own_: int[n_targets], the domain of each target.
    """

    min_runs = 3

    def _fit(self, W: Array, L: Array) -> None:
        t = L.shape[1]
        self._limits = limits(L)
        self.own_ = np.zeros(t, dtype=np.intp)
        self.parameters_ = np.tile([1.0, 1.0, 0.0, 0.0], (t, 1))  # alpha, e, c, k
        self._variance = np.zeros(t)
        for rows, columns in by_missing(L):
            Y = L[np.ix_(rows, columns)]
            level = Y.mean(axis=0)
            least = ((Y - level) ** 2).sum(axis=0)
            self.parameters_[columns, 2] = level
            for alpha in ALPHAS:
                for unseen in UNSEEN:
                    x = (W[rows] + unseen) ** -alpha
                    centre = x.mean(axis=0)
                    moment = (x - centre).T @ (Y - level)  # [n_domains, n_columns]
                    square = ((x - centre) ** 2).sum(axis=0)[:, None]
                    slope = np.maximum(moment / np.maximum(square, 1e-300), 0)  # more of a domain never hurts its own
                    error = ((Y - level) ** 2).sum(axis=0) - slope * (2 * moment - slope * square)
                    own = error.argmin(axis=0)
                    k = slope[own, np.arange(len(columns))]
                    better = error.min(axis=0) < least
                    least = np.minimum(least, error.min(axis=0))
                    found = np.stack([np.full_like(k, alpha), np.full_like(k, unseen), level - k * centre[own], k], 1)
                    self.parameters_[columns[better]] = found[better]
                    self.own_[columns[better]] = own[better]
            self._variance[columns] = np.maximum(least, 0) / max(len(rows) - 4, 1)

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        alpha, unseen, c, k = self.parameters_.T
        mean = np.clip(c + k * (W[:, self.own_] + unseen) ** -alpha, *self._limits)
        # What the law misses is nearly all of its error, so the parameters count as known.
        return mean, np.broadcast_to(np.sqrt(self._variance), mean.shape) if with_std else None
