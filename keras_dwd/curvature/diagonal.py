"""The diagonal precision: one number per parameter."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keras_dwd.variables import Arrays


@dataclass(frozen=True)
class Diagonal:
    """A diagonal matrix over the elements of one variable.

    Attributes:
        path: Of the variable.
        values: Of its shape, ≥ 0.
    """

    path: str
    values: Any

    @property
    def paths(self) -> tuple[str, ...]:
        """The variables it is about."""
        return (self.path,)

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues."""
        return float(np.asarray(self.values).sum(dtype="float64"))

    def leaves(self) -> dict[str, Any]:
        """Its arrays by name."""
        return {"precision": self.values}

    def with_leaves(self, leaves: dict[str, Any]) -> "Diagonal":
        """The same with other arrays, or with the variables that hold them."""
        return replace(self, values=leaves["precision"])

    def multiply(self, differences: list[Any]) -> list[Any]:
        """Λ δ in the training step, by variable."""
        return [self.values.value * differences[0]]

    def shrink(self, differences: list[Any], stiffness: list[Any]) -> list[Any]:
        """(stiffness + Λ)⁻¹ Λ δ in the training step, by variable."""
        values = self.values.value
        return [values / (stiffness[0] + values) * differences[0]]

    def weighted(self, strengths: dict[str, float]) -> "Diagonal":
        """Times the strength of its variable."""
        return replace(self, values=strengths[self.path] * np.asarray(self.values, "float64"))

    def merged(self, new: "Diagonal", decay: float) -> "Diagonal":
        """This times `decay`, plus `new`."""
        return replace(self, values=decay * np.asarray(self.values, "float64") + new.values)

    def spectrum(self) -> np.ndarray:
        """The eigenvalues: the values themselves."""
        return np.asarray(self.values)

    def coordinates(self, values: Arrays) -> np.ndarray:
        """The parameters along the eigenvectors."""
        return values[self.path]

    def scaled(self, strengths: np.ndarray) -> "Diagonal":
        """With each eigenvalue multiplied by the strength of its group."""
        return replace(self, values=strengths * self.values)
