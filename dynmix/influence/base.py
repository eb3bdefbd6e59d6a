"""What a curvature is: a choice with its settings, and what fitting it to batches gives.

`fit` reads batches through a `Capture` and returns the fitted operator, so that the factors live exactly as long as
somebody holds them. This module knows layers and gradients; it knows no domains, no tasks and no scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from dynmix.influence.batch import Batches
from dynmix.influence.capture import Capture


class InverseCurvature(Protocol):
    """A fitted, symmetric approximation of H^-1 for the curvature H of the mean loss per token."""

    def precondition_all(self, gradients: dict[str, Tensor]) -> None:
        """Put H^-1 of each layer times its gradients [n, out, in] (in includes the bias column) in their place.

        To be called inside `isolated(model)`: some approximations read batches here.
        """
        ...


class LayerByLayer(ABC):
    """An inverse curvature of blocks, a block a layer, that needs nothing but a layer's matrix."""

    @abstractmethod
    def precondition(self, layer: str, matrix: Tensor) -> Tensor:
        """H^-1 of that layer applied to gradients [..., out, in]; same shape."""

    def precondition_all(self, gradients: dict[str, Tensor]) -> None:
        """In place, a layer at a time, so that both sides of it are never held for the whole model."""
        for layer, stack in gradients.items():
            gradients[layer] = self.precondition(layer, stack)


class Curvature(Protocol):
    """Which curvature to use."""

    @property
    def passes(self) -> int:
        """How often a group influence reads the curvature's batches."""
        ...

    def fit(self, capture: Capture, batches: Batches) -> InverseCurvature:
        """Read the batches as often as it takes, inside `isolated(capture.model)`."""
        ...


def check_curvature(curvature: object, *parts: str) -> None:
    """Raise ValueError for what is no curvature: a name, which recipes alone know, a class, or what lacks a part."""
    if isinstance(curvature, type) or not all(hasattr(curvature, part) for part in ("fit", *parts)):
        raise ValueError(
            f"curvature={curvature!r} is no curvature: pass an instance, as EKFAC() or DataInf(), or one of your own "
            "that has `fit` and `passes`"
        )


@dataclass(frozen=True)
class Identity(LayerByLayer):
    """H = 1: influence is the plain product of gradients."""

    passes: ClassVar[int] = 0

    def fit(self, capture: Capture, batches: Batches) -> Identity:
        """Nothing to read."""
        return self

    def precondition(self, layer: str, matrix: Tensor) -> Tensor:
        """The gradients as they are."""
        return matrix
