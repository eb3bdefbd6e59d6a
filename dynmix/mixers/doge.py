"""DoGE: more of the domains whose gradients point where the target's do (arXiv 2310.15393)."""

import numpy as np

from dynmix.mixers.online import Multiplicative
from dynmix.observation import Observation


class DoGE(Multiplicative):
    """Domain reweighting with generalization estimation (Fan et al. 2023, arXiv 2310.15393, Algorithm 1).

    alpha_j is multiplied by exp(lr / mu W_j) a step and renormalised. For universal generalization W_j is the product
    of domain j's gradient with the sum of all domains' gradients, for an unseen target with the target's gradient.

    The gradients are measured at stage boundaries only, so one measurement stands for all the steps of a stage: the
    exponent is step_size * steps * W_j. The gradients of the domains' sum are those of held-out samples, where the
    paper takes both sides from the same batch. The authors' code (Olivia-fsm/DoGE) goes beyond the paper: it clips
    every gradient to a norm of 1, leaves <g_j, g_j> out of the sum, divides W by the mean norm of the domains'
    gradients, and clips it to [0, 5]. That is not done here, so step_size has to fit the size of the gradients and the
    length of the stages.

    Args:
        target: `"tasks"`: what is generalised to is the tasks, by the sum of their gradients. `"domains"`: all domains
            (universal generalization), by the guard row of `guards="domains"`, which is the mean of their gradients;
            guards of your own would stand in its place.
        step_size: lr / mu. Default: the code's learning rate of 5e-4 over its default mu of 0.05 (one of its
            configurations sets 0.01).
        smoothing: share of the uniform mixture mixed in at each update; none in paper and code.
        average: propose the mean of alpha over the updates, which the paper trains the main model on.
        initial: alpha at first: `"uniform"` as in the paper or `"prior"`, the weights of the first stage.

    Raises:
        ValueError: settings out of range; from `observe`, if there is no row of the target's kind.
    """

    needs = frozenset({"gradient", "guards"})

    def __init__(
        self,
        target: str = "tasks",
        step_size: float = 0.01,
        smoothing: float = 0.0,
        average: bool = False,
        initial: str = "uniform",
    ):
        super().__init__(smoothing, average, initial)
        if target not in ("tasks", "domains"):
            raise ValueError(f"target={target!r}: 'tasks' or 'domains'")
        if not 0 < step_size < float("inf"):
            raise ValueError(f"step_size={step_size}: must be finite and above 0")
        self.target, self.step_size = target, float(step_size)

    def observe(self, observation: Observation) -> None:
        """Update alpha from the products of the gradients, measured at a boundary."""
        products = observation.gradient
        if products is None:
            return
        self._check_started()
        rows = products.optimised if self.target == "tasks" else ~products.optimised
        if not rows.any():
            kind = "task" if self.target == "tasks" else "guard"
            raise ValueError(f"DoGE(target={self.target!r}) needs a {kind} row, but the rows are {products.tasks}")
        if self.target == "tasks":
            alignment = products.scores[rows].sum(axis=0)
        else:
            alignment = products.scores[rows].mean(axis=0) * len(products.domains)  # the guard is the domains' mean
        exponents = self.step_size * observation.steps * alignment
        by_domain = dict(zip(products.domains, exponents.tolist(), strict=True))
        if np.isfinite(exponents).all():
            self._ascend(by_domain)
        else:
            self._warn_of(by_domain)
