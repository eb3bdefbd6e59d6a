"""The curvatures to choose from, and what one must be."""

from dynmix.influence.adam import AdamDiagonal
from dynmix.influence.base import Curvature, Identity, InverseCurvature, LayerByLayer
from dynmix.influence.datainf import DataInf
from dynmix.influence.ekfac import EKFAC
from dynmix.influence.gauss_newton import GaussNewton
from dynmix.influence.kfac import KFAC

__all__ = [
    "EKFAC",
    "KFAC",
    "AdamDiagonal",
    "Curvature",
    "DataInf",
    "GaussNewton",
    "Identity",
    "InverseCurvature",
    "LayerByLayer",
]
