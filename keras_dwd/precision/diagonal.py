"""The diagonal precision: one number per parameter."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keras_dwd.precision.block import EarlierNames, Place, padded
from keras_dwd.variables import Arrays


@dataclass(frozen=True)
class Diagonal(EarlierNames):
    """A diagonal matrix over the elements of one variable.

    Attributes:
        path: Path of the variable.
        values: The diagonal, in the shape of the variable, ≥ 0.
    """

    path: str
    values: Any

    @property
    def paths(self) -> tuple[str, ...]:
        """Path of the variable that the block covers."""
        return (self.path,)

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues."""
        return float(np.asarray(self.values).sum(dtype="float64"))

    def arrays(self) -> dict[str, Any]:
        """The arrays that the block consists of, by name."""
        return {"precision": self.values}

    def with_arrays(self, arrays: dict[str, Any]) -> "Diagonal":
        """The same block with these arrays, or with Keras variables that hold them."""
        return replace(self, values=arrays["precision"])

    def matvec(self, differences: list[Any]) -> list[Any]:
        """The product Λ δ, as a list of one tensor. Graph code."""
        return [self.values.value * differences[0]]

    def proximal_correction(self, differences: list[Any], stiffness: list[Any]) -> list[Any]:
        """The product (stiffness + Λ)⁻¹ Λ δ, as a list of one tensor. Graph code."""
        values = self.values.value
        return [values / (stiffness[0] + values) * differences[0]]

    def scale_variables(self, strengths: Mapping[str, float]) -> "Diagonal":
        """The block scaled by the strength of its variable."""
        return replace(self, values=strengths[self.path] * np.asarray(self.values, "float64"))

    def merged(self, new: "Diagonal", decay: float) -> "Diagonal":
        """The sum of `decay` times this block and a new one."""
        return replace(self, values=decay * np.asarray(self.values, "float64") + new.values)

    def importances(self) -> np.ndarray:
        """The diagonal, whose elements are the eigenvalues."""
        return np.asarray(self.values)

    def coordinates(self, values: Arrays) -> np.ndarray:
        """The values of the variable."""
        return values[self.path]

    def scale_importances(self, strengths: np.ndarray) -> "Diagonal":
        """The block with each element of the diagonal multiplied by a strength."""
        return replace(self, values=strengths * self.values)

    def grown(self, place: Place) -> "Diagonal":
        """The block for a variable that has become larger; new elements have zero precision."""
        return Diagonal(place.paths[0], padded(np.asarray(self.values), place.shapes[0]))
