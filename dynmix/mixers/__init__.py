"""Decisions: what was measured in, weights out. Knows no torch."""

from dynmix.mixers.base import Mixer, Proposal, Static
from dynmix.mixers.tikmix_d import TiKMiXD

__all__ = ["Mixer", "Proposal", "Static", "TiKMiXD"]
