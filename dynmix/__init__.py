"""Dynamic data mixing: measure how each domain moves each task, and change the mixture exactly at stage boundaries."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynmix.controller import MixtureController
    from dynmix.groups import open_groups
    from dynmix.in_run import InRun
    from dynmix.influence.curvature import EKFAC, KFAC, AdamDiagonal, DataInf, GaussNewton, Identity
    from dynmix.influence.group import group_influence
    from dynmix.influence.layers import Layers
    from dynmix.influence.sample import sample_influence
    from dynmix.mixers import Mixer, Proposal, Static, TiKMiXD
    from dynmix.mixers.automixer import AutoMixer
    from dynmix.mixers.tikmix_m import TiKMiXM
    from dynmix.mixture.dataset import MixtureDataset
    from dynmix.mixture.flat import FlatTokens
    from dynmix.mixture.schedule import MixtureSchedule
    from dynmix.mixture.store import TokenStore
    from dynmix.mixture.stream import MixtureStream
    from dynmix.mixture.view import DocumentView, RowView
    from dynmix.observation import Influence
    from dynmix.tasks import Task

__all__ = [
    "EKFAC",
    "KFAC",
    "AdamDiagonal",
    "AutoMixer",
    "DataInf",
    "DocumentView",
    "FlatTokens",
    "GaussNewton",
    "Identity",
    "InRun",
    "Influence",
    "Layers",
    "Mixer",
    "MixtureController",
    "MixtureDataset",
    "MixtureSchedule",
    "MixtureStream",
    "Proposal",
    "RowView",
    "Static",
    "Task",
    "TiKMiXD",
    "TiKMiXM",
    "TokenStore",
    "group_influence",
    "open_groups",
    "sample_influence",
]

_NAMES = {
    "controller": ["MixtureController"],
    "groups": ["open_groups"],
    "in_run": ["InRun"],
    "influence.curvature": ["EKFAC", "KFAC", "AdamDiagonal", "DataInf", "GaussNewton", "Identity"],
    "influence.group": ["group_influence"],
    "influence.layers": ["Layers"],
    "influence.sample": ["sample_influence"],
    "mixers": ["Mixer", "Proposal", "Static", "TiKMiXD"],
    "mixers.automixer": ["AutoMixer"],
    "mixers.tikmix_m": ["TiKMiXM"],
    "mixture.dataset": ["MixtureDataset"],
    "mixture.flat": ["FlatTokens"],
    "mixture.schedule": ["MixtureSchedule"],
    "mixture.store": ["TokenStore"],
    "mixture.stream": ["MixtureStream"],
    "mixture.view": ["DocumentView", "RowView"],
    "observation": ["Influence"],
    "tasks": ["Task"],
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and neither a mixer nor the report needs it.
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"dynmix.{module}"), name)
    raise AttributeError(f"module 'dynmix' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Without it a notebook completes `dynmix.` to the modules that happen to be loaded, and to no public name.
    return sorted({*globals(), *__all__})
