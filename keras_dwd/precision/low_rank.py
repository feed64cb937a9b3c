"""A diagonal precision with a low-rank correction, for variables without Kronecker factors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from keras_dwd.precision.block import EarlierNames, Place, padded
from keras_dwd.precision.factor import Factor
from keras_dwd.variables import Arrays


@dataclass(frozen=True)
class LowRank(EarlierNames):
    """The matrix diag(d) + W Wᵀ over the n elements of one variable, where W has few columns.

    The diagonal of the sum equals the diagonal of the Fisher information exactly. The columns of W
    are the directions in which the elements matter jointly.

    Attributes:
        path: Path of the variable.
        values: d, in the shape of the variable, ≥ 0.
        correction: W, of shape `(n, r)`.
        rank: The largest number of columns to keep when tasks are merged.
    """

    path: str
    values: Any
    correction: Any
    rank: int

    @staticmethod
    def around(path: str, diagonal: np.ndarray, factor: Factor, rank: int) -> "LowRank":
        """A block with this diagonal, whose off-diagonal elements come from a factor."""
        correction = factor.vectors * np.sqrt(np.maximum(factor.values, 0))
        # Where the low-rank part exceeds the exact diagonal, scale it down to the diagonal.
        low_rank = (correction**2).sum(1)
        exact = np.asarray(diagonal, "float64").ravel()
        share = np.divide(exact, low_rank, out=np.ones_like(low_rank), where=low_rank > exact)
        correction = np.sqrt(np.maximum(share, 0))[:, None] * correction
        remainder = np.maximum(exact - (correction**2).sum(1), 0).reshape(diagonal.shape)
        return LowRank(path, remainder, correction, rank)

    @property
    def paths(self) -> tuple[str, ...]:
        """Path of the variable that the block covers."""
        return (self.path,)

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues, which equals the sum of the diagonal."""
        return float(self.importances().sum())

    def arrays(self) -> dict[str, Any]:
        """The arrays that the block consists of, by name."""
        return {"precision": self.values, "correction": self.correction}

    def with_arrays(self, arrays: dict[str, Any]) -> "LowRank":
        """The same block with these arrays, or with Keras variables that hold them.

        Raises:
            ValueError: If the shapes of the arrays do not fit together.
        """
        values, correction = arrays["precision"], arrays["correction"]
        if len(correction.shape) != 2 or correction.shape[0] != np.prod(values.shape):
            raise ValueError(
                f"A correction of shape {tuple(correction.shape)} does not fit a variable of shape "
                f"{tuple(values.shape)}."
            )
        return replace(self, values=values, correction=correction)

    def matvec(self, differences: list[Any]) -> list[Any]:
        """The product Λ δ, as a list of one tensor. Graph code."""
        delta, w = differences[0], self.correction.value
        along = tf.linalg.matvec(w, tf.reshape(delta, (-1,)), transpose_a=True)
        together = tf.reshape(tf.linalg.matvec(w, along), tf.shape(delta))
        return [self.values.value * delta + together]

    def proximal_correction(self, differences: list[Any], stiffness: list[Any]) -> list[Any]:
        """The product (stiffness + Λ)⁻¹ Λ δ, as a list of one tensor. Graph code.

        Uses the Woodbury formula, which only inverts a matrix of r × r.
        """
        (pulled,) = self.matvec(differences)
        rest = tf.reshape(stiffness[0] + self.values.value, (-1, 1))
        w = self.correction.value
        y = tf.reshape(pulled, (-1, 1)) / rest
        core = tf.eye(tf.shape(w)[1]) + tf.matmul(w, w / rest, transpose_a=True)
        inside = tf.linalg.solve(core, tf.matmul(w, y, transpose_a=True))
        return [tf.reshape(y - tf.matmul(w / rest, inside), tf.shape(pulled))]

    def scale_variables(self, strengths: Mapping[str, float]) -> "LowRank":
        """The block scaled by the strength of its variable."""
        return self.scale_importances(np.full(self.values.shape, strengths[self.path]))

    def merged(self, new: "LowRank", decay: float) -> "LowRank":
        """The sum of `decay` times this block and a new one, with an exact diagonal."""
        old = [np.asarray(array, "float64") for array in (self.values, self.correction)]
        both = np.concatenate([np.sqrt(decay) * old[1], new.correction], 1)
        u, s, _ = np.linalg.svd(both, full_matrices=False)
        directions = u * s
        count = max(1, min(self.rank, int((s > 1e-6 * s.max(initial=0)).sum())))
        dropped = (directions[:, count:] ** 2).sum(1).reshape(new.values.shape)
        values = decay * old[0] + new.values + dropped
        return replace(self, values=values, correction=directions[:, :count])

    def importances(self) -> np.ndarray:
        """The diagonal of the matrix: elements are grouped here, not eigenvectors."""
        values = np.asarray(self.values, "float64")
        return values + (np.asarray(self.correction, "float64") ** 2).sum(1).reshape(values.shape)

    def coordinates(self, values: Arrays) -> np.ndarray:
        """The values of the variable."""
        return values[self.path]

    def scale_importances(self, strengths: np.ndarray) -> "LowRank":
        """The block with row i and column i multiplied by the square root of strength i."""
        values = np.asarray(self.values, "float64") * strengths
        roots = np.sqrt(np.asarray(strengths, "float64")).reshape(-1, 1)
        return replace(self, values=values, correction=roots * self.correction)

    def grown(self, place: Place) -> "LowRank":
        """The block for a variable that has become larger; new elements have zero precision."""
        shape = place.shapes[0]
        values, correction = np.asarray(self.values), np.asarray(self.correction)
        columns = correction.reshape(*values.shape, -1)
        columns = padded(columns, (*shape, columns.shape[-1])).reshape(-1, columns.shape[-1])
        return replace(self, path=place.paths[0], values=padded(values, shape), correction=columns)
