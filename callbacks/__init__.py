"""Adapters: each tells a `MixtureController` when a step of one framework ended, and nothing more."""

from dynmix.callbacks.loop import MixtureHook
from dynmix.callbacks.trainer import MixtureCallback

__all__ = ["MixtureCallback", "MixtureHook"]
