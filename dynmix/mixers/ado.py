"""ADO: sample where each domain's scaling law predicts the fastest fall of the loss (arXiv 2410.11820)."""

import math

import numpy as np
from scipy.optimize import least_squares

from dynmix.mixers.base import Proposal, Run
from dynmix.mixers.online import OnlineMixer, as_array, in_range
from dynmix.observation import Array, Influence, Observation, Weights

BIN_STEPS = 10  # the authors' code fits each tenth step of a smoothed curve; here, means over ten steps
MAX_BINS = 256  # then neighbours are merged, so that the state stays small in a run of any length
MIN_BINS = 4  # a law has three parameters


class ADO(OnlineMixer):
    """Adaptive Data Optimization (Jiang et al. 2024, arXiv 2410.11820), as in the authors' code (yidingjiang/ado).

    For each domain a law L_k(n) = eps_k + beta_k n^-alpha_k is fitted to its training loss, n the tokens of all domains
    trained on, by a Huber loss of 1e-3 on log L, 0 <= alpha <= 0.8. With h a moving average of what was drawn,

        rho_k ~ mu_k h_k^s max(alpha_k, 0.05) (L_k(n) - eps_k) / n,  at least `floor`,
        policy = gamma rho + (1 - gamma) m,  m <- m t / (t + 1) + rho / (t + 1) after each step t.

    (alpha (L - eps) / n is the law's -dL/dn.) mu and the start of h and m are the weights of the first stage; domains
    that have none there stay out. The prior is kept for `warmup` steps and 40 more, the fewest a law is fitted to.

    Laws are fitted anew at each boundary (the code: each 1000 steps). What differs: the code has (h (1 - h))^s for
    the paper's h^s, smooths the losses by a Savitzky-Golay filter, and keeps eps above e^0.5 nats by a penalty.

    Args:
        s: exponent of the credit h, at least 0.
        gamma: weight of rho in the policy, and of the last step in h (the paper's gamma_1 and gamma_2), in (0, 1].
        floor: smallest preference of a domain, before renormalising.
        warmup: steps that nothing is fitted to and in which the weights are not changed; the first tenth of the run's
            tokens where that is less.

    Raises:
        ValueError: settings out of range; from `observe`, if `start` was not called.
    """

    needs = frozenset({"loss"})
    _learnt = ("_steps", "_seen", "_credit", "_mean", "_laws", "_last", "_open", "_bins", "_bin_steps")

    def __init__(self, s: float = 0.5, gamma: float = 0.1, floor: float = 0.01, warmup: int = 1000):
        self.s = in_range("s", s, math.inf)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma={gamma}: must be above 0 and at most 1")
        self.gamma, self.floor, self.warmup = float(gamma), in_range("floor", floor, 1), int(warmup)
        if self.warmup < 0:
            raise ValueError(f"warmup={warmup}: a number of steps, at least 0")

    def start(self, run: Run) -> None:
        """Forget what was observed. See `Mixer.start`."""
        super().start(run)
        self._total = run.total_tokens
        self._sampled = tuple(name for name, weight in run.weights.items() if weight > 0)
        self._mu = as_array(run.weights, self._sampled)
        self._steps, self._seen, self._bin_steps = 0, 0, BIN_STEPS
        self._credit: list[float] = self._mu.tolist()
        self._mean: list[float] = self._mu.tolist()
        self._laws: list[list[float]] = []  # a domain: log eps, log(L - eps) where n is n_0, alpha, log n_0
        self._last: dict[str, float] = {}
        self._open: list[list[float]] = []  # one entry a step: log n, then each domain's loss
        self._bins: list[list[float]] = []

    def observe(self, observation: Observation) -> None:
        """Take the losses of one step into the curves that are fitted, and the step into the averages."""
        losses = self._usable(observation.loss).items()
        self._last.update((name, loss) for name, loss in losses if loss > 0 and name in self._sampled)
        drawn = np.array([observation.tokens.get(name, 0) for name in self._sampled], dtype=np.float64)
        if not drawn.sum():
            return
        self._steps += 1
        self._seen += int(drawn.sum())
        credit = (1 - self.gamma) * np.array(self._credit) + self.gamma * drawn / drawn.sum()
        self._credit = credit.tolist()
        if self._last and (self._steps > self.warmup or self._seen > 0.1 * self._total):
            unseen = sum(self._last.values()) / len(self._last)
            self._open.append([math.log(self._seen), *(self._last.get(name, unseen) for name in self._sampled)])
            self._close_bins()
        if self._laws:
            mean = np.array(self._mean)
            self._mean = (mean + (self._preference() - mean) / (self._steps + 1)).tolist()

    def propose(self, influence: Influence | None, prior: Weights, upper: Weights | None = None) -> Proposal:
        """Fit the laws to what was observed so far and return the policy that follows, inside `upper`."""
        if len(self._bins) >= MIN_BINS:
            curves = np.array(self._bins)
            self._laws = [fit_law(curves[:, 0], curves[:, k]) for k in range(1, curves.shape[1])]
        return super().propose(influence, prior, upper)

    def _policy(self) -> dict[str, float] | None:
        if not self._laws:
            return None
        policy = self.gamma * self._preference() + (1 - self.gamma) * np.array(self._mean)
        return dict.fromkeys(self._domains, 0.0) | dict(zip(self._sampled, policy.tolist(), strict=True))

    def _preference(self) -> Array:
        """Return rho, float64[n_sampled_domains], sums to 1. Its 1 / n is the same for all and cancels."""
        _, reducible, alpha, origin = np.array(self._laws).T
        slope = np.maximum(alpha, 0.05) * np.exp(reducible - alpha * (math.log(self._seen) - origin))
        rho = self._mu * np.array(self._credit) ** self.s * slope
        rho = np.maximum(rho / rho.sum(), self.floor)
        return np.asarray(rho / rho.sum(), dtype=np.float64)

    def _close_bins(self) -> None:
        if len(self._open) == self._bin_steps:
            self._bins.append(np.mean(self._open, axis=0).tolist())
            self._open = []
            if len(self._bins) == MAX_BINS:
                self._bins = [np.mean(self._bins[i : i + 2], axis=0).tolist() for i in range(0, MAX_BINS, 2)]
                self._bin_steps *= 2


def fit_law(log_n: Array, losses: Array) -> list[float]:
    """Fit L(n) = eps + beta n^-alpha by a Huber loss on log L; return [log eps, log beta n_0^-alpha, alpha, log n_0].

    n_0 is the last n, so that the second number says how far the loss still is above eps, whatever the unit of n.

    Args:
        log_n: float64[n_points].
        losses: float64[n_points], nats per token, above 0.
    """
    origin, log_loss = log_n[-1], np.log(losses)
    x = log_n - origin

    def residuals(law: Array) -> Array:
        eps, reducible, alpha = law
        return np.asarray(np.logaddexp(eps, reducible - alpha * x) - log_loss, dtype=np.float64)

    def jacobian(law: Array) -> Array:
        eps, reducible, alpha = law
        share = 1 / (1 + np.exp(eps - reducible + alpha * x))  # of the reducible part in the loss
        return np.stack([1 - share, share, -share * x], axis=1)

    def start(alpha: float) -> Array:
        beta, eps = np.polyfit(np.exp(-alpha * x), losses, 1)  # the law is linear for a given alpha
        return np.array([*np.log(np.maximum([eps, beta], 0.01 * losses.min())), alpha])

    best = min(map(start, (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)), key=lambda law: float(np.abs(residuals(law)).sum()))
    bounds = ([-12.0, -12.0, 0.0], [8.0, 8.0, 0.8])
    fit = least_squares(
        residuals, np.clip(best, *bounds), jac=jacobian, bounds=bounds, loss="huber", f_scale=1e-3, max_nfev=100
    )
    return [*fit.x.tolist(), float(origin)]
