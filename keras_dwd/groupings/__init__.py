"""Groupings of parameters and the rules for the strength λ_k of each group."""

from keras_dwd.groupings.assignment import Responsibilities
from keras_dwd.groupings.fixed import FixedGrouping, LayerGrouping, SingleGroup
from keras_dwd.groupings.gmm import GaussianMixtureGrouping
from keras_dwd.groupings.grouping import (
    BoundaryContext,
    Grouping,
    GroupingResult,
    Parameters,
    Partition,
)
from keras_dwd.groupings.spectral import SpectralGrouping
from keras_dwd.groupings.strength import Importance, Strength

__all__ = [
    "BoundaryContext",
    "FixedGrouping",
    "GaussianMixtureGrouping",
    "Grouping",
    "GroupingResult",
    "Importance",
    "LayerGrouping",
    "Parameters",
    "Partition",
    "Responsibilities",
    "SingleGroup",
    "SpectralGrouping",
    "Strength",
]
