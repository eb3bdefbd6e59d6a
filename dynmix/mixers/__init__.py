"""Decisions: what was measured in, weights out. Knows no torch."""

from dynmix.mixers.base import Mixer, Proposal, Run, within
from dynmix.mixers.static import Static
from dynmix.mixers.tikmix_d import TiKMiXD

__all__ = ["Mixer", "Proposal", "Run", "Static", "TiKMiXD", "within"]
