"""Factors that are carried from one measurement of a run to the next, and their files.

Knows factored curvatures and safetensors; nothing of stages, and not when it is measured.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dynmix.influence.batch import Batches
from dynmix.influence.capture import Capture
from dynmix.influence.factored import FactoredCurvature
from dynmix.influence.factors import Factors, FittedFactors
from dynmix.influence.sums import Sums
from dynmix.influence.tensor_file import read_tensors, write_tensors

_WHAT = "factors of a curvature"


class Carried:
    """A factored curvature with a memory: fitted anew at every `refresh_every`-th time, averaged by `ema`.

    Factors that are not finite are used, so that the scores say so, and forgotten.
    """

    def __init__(self, curvature: FactoredCurvature) -> None:
        self.curvature = curvature
        self.fitted: FittedFactors | None = None
        self.used = 0  # times since it was fitted

    def __repr__(self) -> str:
        return repr(self.curvature)

    @property
    def passes(self) -> int:
        """How often the next measurement reads the curvature's batches."""
        return 0 if self._fresh else self.curvature.passes

    @property
    def _fresh(self) -> bool:
        return self.fitted is not None and self.used < self.curvature.refresh_every

    def fit(self, capture: Capture, batches: Batches, sums: Sums | None = None) -> FittedFactors:
        """The factors for this time; `sums` as in `FactoredCurvature.fit`, of batches that are read."""
        if self.fitted is not None:
            self.fitted = self.fitted.to(next(capture.model.parameters()).device)
            if self._fresh:
                self.used += 1
                return self.fitted
        fitted = self.curvature.fit(capture, batches, sums, self.fitted)
        capture.ranks.exchange("the fitted curvature", None)  # kept on all ranks or on none
        if fitted.finite:
            self.fitted, self.used = fitted, 1
        return fitted

    def save(self, path: Path) -> None:
        """Write the factors, if there are any, to a safetensors file, whole or not at all; what layers share, once."""
        if self.fitted is None:
            return
        tensors: dict[str, Tensor] = {}
        names: dict[str, dict[str, str]] = {}
        written: dict[int, str] = {}
        for layer, f in self.fitted.factors.items():
            parts = {part: tensor for part, tensor in vars(f).items() if tensor is not None}
            names[layer] = {part: written.setdefault(id(tensor), f"{layer}/{part}") for part, tensor in parts.items()}
            tensors |= {names[layer][part]: tensor for part, tensor in parts.items()}
        facts = {
            "damping": self.fitted.damping,
            "tokens_per_sequence": self.fitted.tokens_per_sequence,
            "used": self.used,
            "layers": names,
        }
        write_tensors(path, _WHAT, tensors, facts)

    def load(self, path: Path | None) -> None:
        """Go on from a file, or without factors. Raises ValueError if it is missing or no such file."""
        if path is None:
            self.fitted, self.used = None, 0
            return
        if not path.exists():
            raise ValueError(
                f"{path} is gone: of factors that are carried on those of the last checkpoint are kept, and of the "
                "newest stages; go on from a newer checkpoint, or with a curvature without ema and refresh_every"
            )
        tensors, facts = read_tensors(path, _WHAT)
        factors = {
            layer: Factors(**{part: tensors[name] for part, name in parts.items()})
            for layer, parts in facts["layers"].items()
        }
        self.fitted = FittedFactors(factors, self.curvature.damping, facts["tokens_per_sequence"])
        self.used = facts["used"]
