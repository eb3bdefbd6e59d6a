"""ODM: domains as the arms of a bandit whose reward is the training loss (Albalak et al. 2023, arXiv 2312.02406)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dynmix.mixers.base import Proposal, Run
from dynmix.mixers.online import OnlineMixer, as_array, in_range
from dynmix.observation import Influence, Observation, Weights


class ODM(OnlineMixer):
    """Online Data Mixing (arXiv 2312.02406, Algorithm 1): Exp3 with a moving average of the estimated rewards.

    After each step R_i <- alpha R_i + (1 - alpha) L_i / pi_i for the domains of its batch; the policy of step t is
    pi_i = (1 - K e_t) softmax(e_{t-1} R)_i + e_t with e_t = min(1/K, sqrt(ln K / (K t))), e_0 = 1/K.

    Where a step holds several domains, L_i is the sum of the losses of its draws of domain i over the number of all its
    draws (by tokens: the mean loss times the domain's share of them), so that L_i / pi_i estimates the domain's loss
    without bias over all batches, however large; for a batch of one domain it is the loss itself. (R is of the batches
    that the domain is in, as the paper's: it is higher for one that is in few of them. The paper sums over the
    accumulated micro-batches and does not divide by their number.) pi is what the batch was drawn with: the weights of
    the stage. The first stage, which keeps the run's weights, is the warm-up.

    The class that the authors' repository names as "the implementation described in the paper"
    (SmoothedMeanWeightUpdater of alon-albalak/online-data-mixing) computes something else: R_i averages exp(loss), with
    no division by pi, and the policy is linear in it, (1 - K e_t) R_i / sum(R) + e_t. This follows the paper, in which
    the policy tends to the uniform one as t grows.

    Args:
        alpha: how much of the reward estimate is kept at each step, in [0, 1). The code's default is 0.9, its scripts
            for the main runs set 0.5.

    Raises:
        ValueError: alpha out of range; from `observe`, if `start` was not called.
    """

    needs = frozenset({"loss"})
    _learnt = ("_reward", "_steps", "_drawn")

    def __init__(self, alpha: float = 0.9):
        self.alpha = in_range("alpha", alpha, 1)

    def start(self, run: Run) -> None:
        """Forget the rewards. See `Mixer.start`."""
        super().start(run)
        self._reward = dict.fromkeys(self._domains, 0.0)
        self._steps = 0
        self._drawn = {name: float(weight) for name, weight in run.weights.items()}

    def observe(self, observation: Observation) -> None:
        """Update the reward estimates from the losses of one step."""
        losses = self._usable(observation.loss)
        draws = sum(observation.tokens.values())
        for name, loss in losses.items():
            if self._drawn[name] > 0:  # else it is of a stage before, and its probability is not known
                reward = loss * observation.tokens[name] / draws / self._drawn[name]
                self._reward[name] = self.alpha * self._reward[name] + (1 - self.alpha) * reward
        self._steps += bool(losses)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; a domain that joined since is one that was never drawn.

        Raises ValueError if a part of it is missing.
        """
        super().load_state_dict(state)
        never = dict.fromkeys(self._domains, 0.0)
        self._reward, self._drawn = never | self._reward, never | self._drawn

    def _exploration(self, step: int) -> float:
        arms = len(self._domains)
        return 1 / arms if step == 0 else min(1 / arms, math.sqrt(math.log(arms) / (arms * step)))

    def _policy(self) -> dict[str, float] | None:
        if self._steps == 0:
            return None
        now, before = self._exploration(self._steps + 1), self._exploration(self._steps)
        scores = before * as_array(self._reward, self._domains)
        gibbs = np.exp(scores - scores.max())
        policy = (1 - len(self._domains) * now) * gibbs / gibbs.sum() + now
        return dict(zip(self._domains, policy.tolist(), strict=True))

    def propose(self, influence: Influence | None, prior: Weights, upper: Weights | None = None) -> Proposal:
        """Return the policy of the next step inside `upper`; the batches to come are drawn with it.

        (All but the next one: weights are published one step ahead of their stage.)
        """
        proposal = super().propose(influence, prior, upper)
        self._drawn = dict(proposal.weights)
        return proposal
