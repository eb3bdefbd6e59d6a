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

_HOME = {
    "AdamDiagonal": "dynmix.influence.curvature",
    "AutoMixer": "dynmix.mixers.automixer",
    "DataInf": "dynmix.influence.curvature",
    "DocumentView": "dynmix.mixture.view",
    "EKFAC": "dynmix.influence.curvature",
    "FlatTokens": "dynmix.mixture.flat",
    "GaussNewton": "dynmix.influence.curvature",
    "Identity": "dynmix.influence.curvature",
    "InRun": "dynmix.in_run",
    "Influence": "dynmix.observation",
    "KFAC": "dynmix.influence.curvature",
    "Layers": "dynmix.influence.layers",
    "Mixer": "dynmix.mixers",
    "MixtureController": "dynmix.controller",
    "MixtureDataset": "dynmix.mixture.dataset",
    "MixtureSchedule": "dynmix.mixture.schedule",
    "MixtureStream": "dynmix.mixture.stream",
    "Proposal": "dynmix.mixers",
    "RowView": "dynmix.mixture.view",
    "Static": "dynmix.mixers",
    "Task": "dynmix.tasks",
    "TiKMiXD": "dynmix.mixers",
    "TiKMiXM": "dynmix.mixers.tikmix_m",
    "TokenStore": "dynmix.mixture.store",
    "group_influence": "dynmix.influence.group",
    "open_groups": "dynmix.groups",
    "sample_influence": "dynmix.influence.sample",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and neither a mixer nor the report needs it.
    if name not in _HOME:
        raise AttributeError(f"module 'dynmix' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
