"""MDE as a law: alone, as features of other laws (X-MDE), and its best mixture solved exactly. Knows arrays only."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone

from dynmix.laws.base import Array, Law, check_runs
from dynmix.laws.bounds import Bounds
from dynmix.laws.criteria import normalised
from dynmix.laws.experts import Experts
from dynmix.laws.gp import GP
from dynmix.laws.icm import MultiTaskGP
from dynmix.laws.linear import Ridge
from dynmix.laws.trees import LightGBM

STEPS = 0.5 ** np.arange(12)  # of a line search, tried at once
ARMIJO = 1e-4  # share of the promised decrease that a step must keep
ROUNDING = 1e-7  # of a loss that is a sum of float32


class MDE(Law):
    """The experts' ensemble as a law: predicts the losses of their validation sets from the weights, without a fit.

    Alone it ranks mixtures well and misses the losses' level (arXiv 2502.15950, Table 1).

    Args:
        experts: their validation sets are the targets, in order.
    """

    def __init__(self, experts: Experts):
        self.experts = experts
        self.n_features_in_, self.n_targets_ = len(experts.names), len(experts.targets)
        self.seen_ = np.ones(self.n_features_in_, dtype=bool)
        self._single = self.n_targets_ == 1

    def fit(self, W: ArrayLike, L: ArrayLike) -> Self:
        """Check that the runs are of the experts' domains and validation sets; nothing is learnt from them."""
        W, L = check_runs(W, L, min_runs=0)
        _check_columns(W, L, self.experts)
        return self

    def known(self, W: Array) -> NDArray[np.bool_]:
        """The experts' own mixtures."""
        return _corners(W)

    def _fit(self, W: Array, L: Array) -> None:
        pass

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        return self.experts.losses(W), None


class MDEFeatures:
    """The ensemble's loss on every validation set, as features of mixtures: float64[n, n_targets].

    `Ridge(extra=MDEFeatures(experts))` is the paper's LINEAR-MDE; `WithExperts` decides on the expert runs, too.

    Args:
        experts: for a search over mixtures, `experts.sample(10_000)` is as good and many times as fast.
    """

    def __init__(self, experts: Experts):
        self.experts = experts

    def __call__(self, W: Array) -> Array:
        """Return the features of mixtures."""
        return self.experts.losses(W)

    def __sklearn_clone__(self) -> Self:  # scikit-learn's name: a clone of a law shares them
        return self


class WithExperts(Law):
    """A law told the ensemble's losses besides the weights: X-MDE of arXiv 2502.15950, X the law.

    Args:
        law: one that takes features: `Ridge`, `Linear`, `LightGBM`, `GP` or `MultiTaskGP`.
        experts: of the domains of W, in order.
        corners: fit to the experts' own losses, too: each is a run of one domain alone. "auto" as the paper found
            (B.3): yes for the multi-task Gaussian process, no for others, which a run so far off bends. They need
            targets that are the experts' validation sets, in order. Runs of one domain alone that are given are such
            losses: of an expert that is among them no other is added, and without corners they are left out where
            every target has as many other runs as there are domains.

    Raises:
        ValueError: from `fit`: a law that takes no features, or runs of other domains or targets.
    """

    def __init__(self, law: Law, experts: Experts, corners: bool | str = "auto"):
        self.law = law
        self.experts = experts
        self.corners = corners

    def known(self, W: Array) -> NDArray[np.bool_]:
        """The experts' own mixtures, whose losses are features."""
        return _corners(W)

    def _fit(self, W: Array, L: Array) -> None:
        if "extra" not in self.law.get_params(deep=False):
            raise ValueError(
                f"{type(self.law).__name__} is a formula of the weights alone and takes no features: give Ridge, "
                "LightGBM, GP or MultiTaskGP, or let AutoLaw weigh it against laws with experts"
            )
        if self.corners not in (True, False, "auto"):
            raise ValueError(f'corners={self.corners!r}: "auto", True or False is needed')
        if W.shape[1] != len(self.experts.names):
            raise ValueError(f"W has {W.shape[1]} domains, there are {len(self.experts.names)} experts: one a domain")
        corners = isinstance(self.law, MultiTaskGP) if self.corners == "auto" else self.corners
        alone = _corners(W)
        if corners:
            _check_columns(W, L, self.experts)
            # `dynmix proxies` has the experts in its table of runs: twice they would count as two runs.
            missing = ~(W[alone] > 0.5).any(axis=0)  # the rest of a corner may be all but 0
            W, L = np.vstack([W, np.eye(W.shape[1])[missing]]), np.vstack([L, self.experts.corners[missing]])
        elif (np.isfinite(L[~alone]).sum(axis=0) >= W.shape[1]).all():
            W, L = W[~alone], L[~alone]  # fewer would leave the weights' own part open
        self.seen_ = np.ones(W.shape[1], dtype=bool)  # an expert is a run of its domain
        self.steps = self.law.steps
        self.law_: Law = clone(self.law).set_params(extra=MDEFeatures(self.experts)).fit(W, L)

    def _predict(self, W: Array, with_std: bool) -> tuple[Array, Array | None]:
        return self.law_._predict(W, with_std)


WITH_EXPERTS = ("ridge + MDE", "LightGBM + MDE", "GP + MDE", "multi-task GP + MDE", "MDE")
"""What `laws_with_experts` has, before there are any."""


def laws_with_experts(experts: Experts) -> dict[str, Law]:
    """Return X-MDE of each law that takes features, and MDE alone: candidates for `AutoLaw`, by name."""
    laws = {"ridge": Ridge(), "LightGBM": LightGBM(), "GP": GP(), "multi-task GP": MultiTaskGP()}
    return {f"{name} + MDE": WithExperts(law, experts) for name, law in laws.items()} | {"MDE": MDE(experts)}


@dataclass(frozen=True)
class Solution:
    """The mixture whose ensemble has the least criterion.

    Attributes:
        weights: float64[n_experts], sums to 1.
        loss: the criterion there, nats per token.
        targets: each validation set's loss, float64[n_targets].
        gap: no mixture within the bounds has a loss under `loss - gap`: the Frank-Wolfe bound, by convexity.
        iterations: that it took.
        message: what bounds the weights, else "".
    """

    weights: Array
    loss: float
    targets: Array
    gap: float
    iterations: int
    message: str = ""


def solve(
    experts: Experts, criterion: ArrayLike | None = None, *, tolerance: float = 1e-6, steps: int = 100, **bounds: Any
) -> Solution:
    """Return the mixture with the least sum_i criterion_i L_i(w) of the ensemble, exactly.

    It is convex in w. Each step minimises the quadratic model within the bounds, Newton's way; EM and exponentiated
    gradient need hundreds of passes where experts are alike, this about ten.

    Args:
        experts: whose ensemble.
        criterion: weight of each validation set, made to sum to 1; None: all equal.
        tolerance: of `gap`, nats per token.
        steps: at most; what is reached by then is returned with its `gap`.
        bounds: `lower`, `upper`, `tokens`, `total_tokens`, `max_epochs` as in `best_mixture`.

    Raises:
        ValueError: bounds that leave no mixture, or weights of the wrong number.
    """
    k = len(experts.names)
    v, limits = normalised(criterion, len(experts.targets)), Bounds.of(k, **bounds)
    w = limits.nearest(np.full(k, 1 / k))
    for step in range(steps + 1):
        losses, gradients = experts.slopes(w[None])
        slope = v @ gradients[0]
        corner = limits.cheapest(slope)
        gap = float(slope @ (w - corner))
        if gap <= tolerance or step == steps:
            break
        towards = _newton(slope, experts.curvature(w, v), w, limits)
        if slope @ (towards - w) >= 0:  # the model's minimum is rounding: one step the way that must descend
            towards = corner
        line = w + STEPS[:, None] * (towards - w)
        values = experts.losses(line) @ v
        enough = values <= losses[0] @ v + ARMIJO * STEPS * (slope @ (towards - w)) + ROUNDING
        if not enough.any():
            break
        w = line[int(np.argmax(enough))]
    return Solution(w, float(losses[0] @ v), losses[0], max(gap, 0.0), step, limits.message)


def _newton(slope: Array, H: Array, w: Array, limits: Bounds) -> Array:
    """Return the minimum of slope @ d + d^T H d / 2 over mixtures w + d within the bounds."""
    x = limits.slsqp(
        lambda x: (float(slope @ (x - w) + 0.5 * (x - w) @ H @ (x - w)), slope + H @ (x - w)),
        w, slope=True, maxiter=200, ftol=1e-14,
    )  # fmt: skip
    return limits.nearest(np.clip(x, 0, 1))


def _corners(W: Array) -> NDArray[np.bool_]:
    """Which mixtures are of one domain alone, bool[n]."""
    return np.asarray(W.max(axis=1) > 1 - 1e-9)


def _check_columns(W: Array, L: Array, experts: Experts) -> None:
    for what, count, names in (("W", W.shape[1], experts.names), ("L", L.shape[1], experts.targets)):
        if count != len(names):
            raise ValueError(f"{what} has {count} columns, the experts {len(names)}: {', '.join(names)}, in that order")
