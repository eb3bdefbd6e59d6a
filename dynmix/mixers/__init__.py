"""Decisions: what was measured in, weights out. Knows no torch.

The modules, in an order to read them in:

- `base` says what a mixer is, `registry` finds them by name, `simplex` keeps weights within bounds.
- By size or by hand: `static`. By the training's losses or gradients: `online`; then `odm`, `doremi`, `doge`, `ado`.
- `tikmix_d` averages influences in its `memory` and poses a `problem`, which `solvers` solve.
- `tikmix_m` has `candidates` measured, fits a `surrogate` to what was found, and makes a `search` on it.
- `automixer` has a scored corpus put into groups by `regroup`.
"""

from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from dynmix.mixers.base import Mixer, Proposal, Run, within
from dynmix.mixers.registry import BUILT_IN, GROUP
from dynmix.mixers.static import Fixed, Natural, Staged, Static, Temperature, Uniform, UniMax
from dynmix.mixers.tikmix_d import TiKMiXD

if TYPE_CHECKING:
    from dynmix.mixers.ado import ADO
    from dynmix.mixers.automixer import AutoMixer
    from dynmix.mixers.doge import DoGE
    from dynmix.mixers.doremi import DoReMi
    from dynmix.mixers.odm import ODM
    from dynmix.mixers.online import LossProportional
    from dynmix.mixers.tikmix_m import TiKMiXM

__all__ = [
    "ADO",
    "ODM",
    "AutoMixer",
    "DoGE",
    "DoReMi",
    "Fixed",
    "LossProportional",
    "Mixer",
    "Natural",
    "Proposal",
    "Run",
    "Staged",
    "Static",
    "Temperature",
    "TiKMiXD",
    "TiKMiXM",
    "UniMax",
    "Uniform",
    "within",
]


def __getattr__(name: str) -> Any:
    # The others when they are asked for: what they fit laws and surrogates with takes a second to import.
    for place in BUILT_IN.values():
        if place.endswith(f":{name}"):
            return EntryPoint(name, place, GROUP).load()
    raise AttributeError(f"module 'dynmix.mixers' has no attribute {name!r}")
