"""The precision of a large table of embeddings: a number per row, a matrix for all rows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from keras_dwd.precision.block import EarlierNames, Place
from keras_dwd.precision.diagonal import Diagonal
from keras_dwd.precision.factor import Factor
from keras_dwd.variables import Arrays


@dataclass(frozen=True)
class RowKronecker(EarlierNames):
    """The precision A ⊗ G of a table of vectors: A, for the rows, is diagonal.

    Most pairs of rows, the vectors of two words, are in few examples together. Instead of a number
    for each element of the table there is one for each row.

    Attributes:
        path: Path of the table.
        rows: The diagonal of A.
        g: G, with one row for each column of the table.
        rank: The largest number of directions that G keeps when tasks are merged.

    Reference:
        [Eschenhagen et al., 2023](https://arxiv.org/abs/2311.00636), section 3, on embeddings.
    """

    path: str
    rows: Any
    g: Factor
    rank: int

    @property
    def paths(self) -> tuple[str, ...]:
        """Path of the table."""
        return (self.path,)

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues, including those stored as their mean."""
        return float(np.asarray(self.rows).sum(dtype="float64")) * self.g.trace

    def arrays(self) -> dict[str, Any]:
        """The arrays that the block consists of, by name."""
        of_g = {f"output_{name}": array for name, array in self.g.arrays().items()}
        return {"input_values": self.rows} | of_g

    def with_arrays(self, arrays: dict[str, Any]) -> "RowKronecker":
        """The same block with these arrays, or with Keras variables that hold them.

        Raises:
            ValueError: If the shapes of the arrays do not fit together.
        """
        of_g = {n.removeprefix("output_"): v for n, v in arrays.items() if n != "input_values"}
        return replace(self, rows=arrays["input_values"], g=Factor.from_arrays(of_g))

    def of_diagonal(self, diagonal: Diagonal) -> "RowKronecker":
        """A block with the same sums over rows and over columns as a diagonal over the table.

        Earlier versions have a diagonal for all embeddings.
        """
        values = np.asarray(diagonal.values, "float64")
        total = values.sum()
        columns = values.sum(0) / (total if total > 0 else 1.0)
        return replace(self, rows=values.sum(1), g=Factor.from_matrix(np.diag(columns), self.rank))

    def matvec(self, differences: list[Any]) -> list[Any]:
        """The product Λ δ, as a list of one tensor. Graph code."""
        rows = tf.convert_to_tensor(self.rows)
        return [rows[:, None] * self.g.product(differences[0], from_right=True)]

    def proximal_correction(self, differences: list[Any], stiffness: list[Any]) -> list[Any]:
        """The product (d + Λ)⁻¹ Λ δ with d the mean stiffness, as a list of one. Graph code."""
        (x,), d = differences, tf.reduce_mean(tf.cast(stiffness[0], "float32"))
        rows = tf.convert_to_tensor(self.rows)[:, None]
        v, values = tf.convert_to_tensor(self.g.vectors), tf.convert_to_tensor(self.g.values)
        inside, outside = rows * values, rows * tf.convert_to_tensor(self.g.rest)
        inside, outside = inside / (d + inside), outside / (d + outside)
        return [outside * x + tf.matmul((inside - outside) * tf.matmul(x, v), v, transpose_b=True)]

    def scale_variables(self, strengths: Mapping[str, float]) -> "RowKronecker":
        """The block scaled by the strength of its variable."""
        return replace(self, rows=strengths[self.path] * np.asarray(self.rows, "float64"))

    def merged(self, new: "RowKronecker", decay: float) -> "RowKronecker":
        """One product that approximates decay · this + new, with the trace of each row."""
        arrays = self.arrays().items()
        old = self.with_arrays({name: np.asarray(array, "float64") for name, array in arrays})
        old_trace, new_trace = decay * old.trace, new.trace
        if old_trace == 0:
            return new
        if new_trace == 0:
            return replace(old, rows=decay * old.rows)
        mine, its = decay * old.g.trace, new.g.trace
        total = old_trace + new_trace
        rows = mine * old.rows + its * new.rows  # G then has trace one
        g = old.g.combine(
            old_trace / (total * old.g.trace), new.g, new_trace / (total * its), self.rank
        )
        return replace(self, rows=rows, g=g)

    def importances(self) -> np.ndarray:
        """The eigenvalues, of shape `(rows, eigenvectors of G)`."""
        return np.multiply.outer(np.asarray(self.rows), np.asarray(self.g.values))

    def coordinates(self, values: Arrays) -> np.ndarray:
        """The table in the basis of the eigenvectors, in the shape of `importances`."""
        return values[self.path] @ self.g.vectors

    def scale_importances(self, strengths: np.ndarray) -> "RowKronecker":
        """The nearest such product to the block with each eigenvalue multiplied by a strength.

        Its eigenvalues have the sums over rows and over columns of the scaled ones.
        """
        scaled = strengths * self.importances()
        total = scaled.sum()
        if total == 0:
            return replace(self, rows=0.0 * np.asarray(self.rows))
        values = scaled.sum(0) / total
        before = self.g.values.sum()
        rest = (values.sum() / before if before > 0 else 1.0) * self.g.rest
        return replace(self, rows=scaled.sum(1), g=Factor(self.g.vectors, values, rest))

    def grown(self, place: Place) -> "RowKronecker":
        """The block for a larger table; new rows and columns have zero precision."""
        height, width = place.shapes[0]
        rows = np.asarray(self.rows)
        rows = np.pad(rows, (0, height - len(rows)))
        return replace(
            self, path=place.paths[0], rows=rows, g=self.g.grown(np.arange(self.g.size), width)
        )
