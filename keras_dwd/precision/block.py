"""The interface of all precision matrices."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from keras_dwd.precision.matrix_form import MatrixForm
from keras_dwd.variables import Arrays


@dataclass(frozen=True)
class Place:
    """The variables of a model that one block covers.

    Attributes:
        paths: Paths of the variables. For a layer's matrix: the kernel and, if the matrix has a
            bias row, the bias.
        shapes: Shapes of the variables.
        form: How the variables form one matrix; `None` if they do not.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    form: MatrixForm | None = None


class Block(Protocol):
    """A symmetric positive semi-definite matrix Λ over some of a model's variables.

    A block consists of a few arrays: NumPy arrays while it is built at a boundary, Keras variables
    in the training step.
    """

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the variables that the block covers."""
        ...

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues."""
        ...

    def arrays(self) -> dict[str, Any]:
        """The arrays that the block consists of, by name."""
        ...

    def with_arrays(self, arrays: dict[str, Any]) -> Self:
        """The same block with these arrays, or with Keras variables that hold them.

        Raises:
            ValueError: If the shapes of the arrays do not fit together.
        """
        ...

    def matvec(self, differences: list[Any]) -> list[Any]:
        """The product Λ δ, one tensor per variable. Graph code."""
        ...

    def proximal_correction(self, differences: list[Any], stiffness: list[Any]) -> list[Any]:
        """The product (stiffness + Λ)⁻¹ Λ δ, one tensor per variable. Graph code."""
        ...

    def scale_variables(self, strengths: Mapping[str, float]) -> Self:
        """The block scaled by the strength of each variable, given by path."""
        ...

    def merged(self, new: Any, decay: float) -> Self:
        """The sum of `decay` times this block and a new block of the same type."""
        ...

    def importances(self) -> np.ndarray:
        """The values that are grouped: the eigenvalues, or the diagonal of the matrix."""
        ...

    def coordinates(self, values: Arrays) -> np.ndarray:
        """The values of the variables in the basis of `importances`, in the same shape."""
        ...

    def scale_importances(self, strengths: np.ndarray) -> Self:
        """The block with each of its `importances` multiplied by a strength."""
        ...

    def grown(self, place: Place) -> Self:
        """The block for variables that have become larger; new elements have zero precision.

        Args:
            place: The grown variables. The old values come first along every axis.

        Raises:
            ValueError: If the block does not fit these variables.
        """
        ...


def corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The index of a subarray of this shape at the start of every axis of a larger array."""
    return tuple(slice(n) for n in shape)


def padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array extended to the given shape with zeros at the end of each axis."""
    result = np.zeros(shape, array.dtype)
    result[corner(array.shape)] = array
    return result


class EarlierNames:
    """Names of earlier versions that blocks still answer to, until 0.3."""

    def leaves(self: Block) -> dict[str, Any]:
        """The earlier name of `arrays`."""
        warnings.warn(
            "`leaves` of a precision in keras_dwd is deprecated and will be removed in 0.3: use "
            "`arrays`.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.arrays()
