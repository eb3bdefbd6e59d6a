"""Adapters: each tells what a run is watched by when a step of one framework ended, and nothing more."""

from dynmix.callbacks.loop import MixtureHook
from dynmix.callbacks.peaks import PeakCallback
from dynmix.callbacks.trainer import MixtureCallback

__all__ = ["MixtureCallback", "MixtureHook", "PeakCallback"]
