"""The optimizer's own preconditioner as curvature: what Adam really does with a gradient. Nothing is fitted.

Knows optimizers and layers; no domains, no tasks and no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynmix.influence.base import LayerByLayer
from dynmix.influence.batch import Batches
from dynmix.influence.capture import Capture

MomentSource = torch.optim.Optimizer | Mapping[nn.Parameter, Tensor]


@dataclass(frozen=True)
class AdamDiagonal:
    """H = sqrt(v) + eps, entry by entry, with v the optimizer's bias-corrected second moments (Kingma & Ba 2015).

    So H^-1 g is the direction, in units of the learning rate, in which Adam moves for the gradient g, momentum and
    weight decay aside; the scores are the decrease of the task's loss per unit of that.

    Args:
        source: a torch optimizer with `exp_avg_sq` (Adam, AdamW and their kin, as amsgrad `max_exp_avg_sq`; fused,
            foreach and sharded too), a mapping of each parameter to its v, or a function that returns one of them when
            it is needed (`lambda: trainer.optimizer`).
        eps: added to the root; None: the optimizer's own, 1e-8 for a mapping.

    Raises:
        ValueError: a `source` that is none of these; when it is fitted or applied: there is no optimizer yet, or it is
            no kin of Adam, or a parameter has no second moments, as before the first step.
    """

    source: MomentSource | Callable[[], MomentSource | None]
    eps: float | None = None
    passes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not isinstance(self.source, torch.optim.Optimizer | Mapping) and not callable(self.source):
            raise ValueError(
                f"AdamDiagonal: source is a {type(self.source).__name__}: give an optimizer, a mapping, or where there "
                "is none yet a function, as lambda: trainer.optimizer"
            )

    def __repr__(self) -> str:  # goes into a run's configuration, where the optimizer's is of no use
        return f"AdamDiagonal(eps={self.eps})"

    def check(self) -> MomentSource | None:
        """Return the source as it is by now, None if there is none yet. Raises ValueError if it is no kin of Adam."""
        source = self.source if isinstance(self.source, torch.optim.Optimizer | Mapping) else self.source()
        if isinstance(source, torch.optim.Optimizer) and not _is_of_adam(source):
            raise ValueError(
                f"AdamDiagonal: this {type(source).__name__} is none of Adam's kin: it has no betas, or keeps no "
                "exp_avg_sq and step of each parameter (SGD, Adafactor, Adamax and schedule-free ones do not): take "
                "another curvature, as EKFAC()"
            )
        return source

    def fit(self, capture: Capture, batches: Batches) -> FittedAdamDiagonal:
        """Take the second moments as they are now; nothing is read."""
        source = self.check()
        if source is None:
            raise ValueError("AdamDiagonal: there is no optimizer yet")
        if isinstance(source, Mapping):
            eps = 1e-8 if self.eps is None else self.eps
            roots = {id(parameter): v.sqrt() + eps for parameter, v in source.items()}
        else:
            roots = _denominators(source, self.eps)
        return FittedAdamDiagonal(capture, roots)


@dataclass(frozen=True)
class FittedAdamDiagonal(LayerByLayer):
    """Denominators sqrt(v) + eps by the parameter's id, as they were when it was fitted."""

    capture: Capture
    denominators: dict[int, Tensor]

    def precondition(self, layer: str, matrix: Tensor) -> Tensor:
        """Gradients [..., out, in] over the layer's denominators."""
        return matrix / self.capture.layers[layer].matrix(self._of).to(matrix)

    def _of(self, parameter: nn.Parameter) -> Tensor:
        found = self.denominators.get(id(parameter))
        if found is None:
            names = [name for name, p in self.capture.model.named_parameters() if p is parameter]
            raise ValueError(
                f"AdamDiagonal: parameter {names[0]!r} has no second moments: take a step with the optimizer first, or "
                "leave its layer out with layers="
            )
        whole: Tensor = getattr(found, "full_tensor", lambda: found)()  # of a sharded one
        return whole


def _is_of_adam(optimizer: torch.optim.Optimizer) -> bool:
    """As far as can be said: before the first step it keeps nothing."""
    kept = optimizer.state.values()
    return any("betas" in group for group in optimizer.param_groups) and (
        not kept or any("exp_avg_sq" in state and "step" in state for state in kept)
    )


def _denominators(optimizer: torch.optim.Optimizer, eps: float | None) -> dict[int, Tensor]:
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state: Mapping[str, Any] = optimizer.state.get(parameter, {})
            moments = state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
            if moments is None or "step" not in state or "betas" not in group:
                continue
            correction = 1 - group["betas"][1] ** float(state["step"])
            found[id(parameter)] = (moments / correction).sqrt() + (group["eps"] if eps is None else eps)
    return found
