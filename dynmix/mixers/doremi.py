"""DoReMi: more of the domains on which a reference model shows most room to learn (arXiv 2305.10429)."""

from dynmix.mixers.base import Run
from dynmix.mixers.online import Multiplicative
from dynmix.observation import Observation


class DoReMi(Multiplicative):
    """Domain reweighting by minimax optimisation (Xie et al. 2023, arXiv 2305.10429, Algorithm 1).

    At each step alpha'_i = alpha_i exp(eta x_i), with x_i the mean over the domain's tokens of max(loss - reference
    loss, 0); then alpha = (1 - c) alpha' / sum(alpha') + c / K. A domain that the batch does not hold keeps its last
    x_i, as in the authors' code (sangmichaelxie/doremi); one that none has held yet counts as an average one, where
    the code has ln(vocabulary size).

    Two things differ from the paper, which trains a proxy model, weights its loss by alpha at each step and hands the
    mean of alpha to a second run. Here alpha is the share that is sampled, so the loss has no weights; and it is
    sampled from the next boundary on, so that over a long stage alpha runs ahead of the batches: let eta be the
    smaller the longer the stages are. For the paper's recipe read `mean` after a run and give it to `Fixed`.

    Args:
        eta: step size of the ascent, above 0.
        smoothing: c, the share of the uniform mixture mixed in at each step.
        average: propose the mean of alpha over the steps in place of the last.
        initial: alpha before the first step: `"uniform"` as in the paper or `"prior"`, the weights of the first stage.

    Raises:
        ValueError: settings out of range; from `observe`, if there is no reference model or no `start` before it.
    """

    needs = frozenset({"loss", "reference_loss"})
    _learnt = (*Multiplicative._learnt, "_excess")

    def __init__(self, eta: float = 1.0, smoothing: float = 1e-3, average: bool = False, initial: str = "uniform"):
        super().__init__(smoothing, average, initial)
        if not 0 < eta < float("inf"):
            raise ValueError(f"eta={eta}: must be finite and above 0")
        self.eta = float(eta)

    def start(self, run: Run) -> None:
        """Set alpha to the initial one. See `Mixer.start`."""
        super().start(run)
        self._excess: dict[str, float] = {}

    def observe(self, observation: Observation) -> None:
        """Update alpha from the excess losses of one step."""
        if observation.loss and not observation.excess_loss:
            raise ValueError("DoReMi needs a reference model's loss on the same tokens: give the controller reference=")
        excess = self._usable(observation.excess_loss)
        if not excess:
            return
        self._excess.update(excess)
        unseen = sum(self._excess.values()) / len(self._excess)
        self._ascend({name: self.eta * self._excess.get(name, unseen) for name in self._domains})
