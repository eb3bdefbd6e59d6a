"""Dynamic data mixing: measure how each domain moves each task, and change the mixture exactly at stage boundaries."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynmix.controller import MixtureController
    from dynmix.influence.curvature import EKFAC, Identity
    from dynmix.influence.group import group_influence
    from dynmix.mixers import Mixer, Proposal, Static, TiKMiXD
    from dynmix.mixers.tikmix_m import TiKMiXM
    from dynmix.mixture.dataset import MixtureDataset
    from dynmix.mixture.schedule import MixtureSchedule
    from dynmix.mixture.store import TokenStore
    from dynmix.observation import Influence

__all__ = [
    "EKFAC",
    "Identity",
    "Influence",
    "Mixer",
    "MixtureController",
    "MixtureDataset",
    "MixtureSchedule",
    "Proposal",
    "Static",
    "TiKMiXD",
    "TiKMiXM",
    "TokenStore",
    "group_influence",
]

_HOME = {
    "EKFAC": "dynmix.influence.curvature",
    "Identity": "dynmix.influence.curvature",
    "Influence": "dynmix.observation",
    "Mixer": "dynmix.mixers",
    "MixtureController": "dynmix.controller",
    "MixtureDataset": "dynmix.mixture.dataset",
    "MixtureSchedule": "dynmix.mixture.schedule",
    "Proposal": "dynmix.mixers",
    "Static": "dynmix.mixers",
    "TiKMiXD": "dynmix.mixers",
    "TiKMiXM": "dynmix.mixers.tikmix_m",
    "TokenStore": "dynmix.mixture.store",
    "group_influence": "dynmix.influence.group",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and neither a mixer nor the report needs it.
    if name not in _HOME:
        raise AttributeError(f"module 'dynmix' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
