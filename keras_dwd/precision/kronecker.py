"""The Kronecker-factored precision of a layer's weight matrix."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from keras_dwd.precision.block import EarlierNames, Place, corner
from keras_dwd.precision.diagonal import Diagonal
from keras_dwd.precision.factor import Factor
from keras_dwd.precision.matrix_form import MatrixForm
from keras_dwd.variables import Arrays

SIDES = ("input", "output")


@dataclass(frozen=True)
class Kronecker(EarlierNames):
    """The precision A ⊗ G of a layer's weights: A for the inputs, G for the outputs.

    With the weights as a matrix W (fan_in × fan_out, the bias as its last row), Λ δ is A δ G.

    Attributes:
        paths: Paths of the kernel and, if the matrix has a bias row, of the bias.
        form: How the variables form the matrix.
        a: A, with one row for each row of the matrix.
        g: G, with one row for each column of the matrix.
        rank: The largest number of directions that a factor keeps when tasks are merged.
        rows: Indices of the inputs that A covers and of the outputs that G covers; `None` if it
            covers all. The others, units that were never active, have zero precision.

    Reference:
        [Martens & Grosse, 2015](https://arxiv.org/abs/1503.05671), for dense layers;
        [Grosse & Martens, 2016](https://arxiv.org/abs/1602.01407), for convolutions.
    """

    paths: tuple[str, ...]
    form: MatrixForm
    a: Factor
    g: Factor
    rank: int
    rows: tuple[Any, Any] = (None, None)

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues, including those stored as their mean."""
        return self.a.trace * self.g.trace

    def arrays(self) -> dict[str, Any]:
        """The arrays that the block consists of, by name."""
        arrays: dict[str, Any] = {}
        for side, factor, rows in zip(SIDES, (self.a, self.g), self.rows, strict=True):
            arrays |= {f"{side}_{name}": array for name, array in factor.arrays().items()}
            if rows is not None:
                arrays[f"{side}_rows"] = rows
        return arrays

    def with_arrays(self, arrays: dict[str, Any]) -> "Kronecker":
        """The same block with these arrays, or with Keras variables that hold them.

        Raises:
            ValueError: If the shapes of the arrays do not fit the matrix.
        """
        arrays = dict(arrays)
        inputs, outputs = (arrays.pop(f"{side}_rows", None) for side in SIDES)
        rows = inputs, outputs
        factors = [
            Factor.from_arrays({n.removeprefix(p): v for n, v in arrays.items() if n.startswith(p)})
            for p in (f"{side}_" for side in SIDES)
        ]
        for factor, indices, size in zip(factors, rows, self._sizes, strict=True):
            if factor.size != (size if indices is None else indices.shape[0]) or factor.size > size:
                raise ValueError(
                    f"Factors of {factors[0].size} and {factors[1].size} rows do not fit a matrix "
                    f"of {self._sizes}."
                )
        return replace(self, a=factors[0], g=factors[1], rows=rows)

    @property
    def _sizes(self) -> tuple[int, int]:
        """The numbers of rows and columns of the matrix."""
        return self.form.rows, self.form.shape[1]

    def matvec(self, differences: list[Any]) -> list[Any]:
        """The product Λ δ, one tensor per variable. Graph code."""
        x = self.a.product(self._covered(self.form.join(*differences)))
        return self.form.split(self._spread(self.g.product(x, from_right=True)))

    def _covered(self, matrix: Any) -> Any:
        """The rows and columns of the matrix that the factors cover."""
        for axis, rows in enumerate(self.rows):
            if rows is not None and tf.is_tensor(matrix):
                matrix = tf.gather(matrix, tf.cast(rows, "int32"), axis=axis)
            elif rows is not None:
                matrix = np.take(matrix, np.asarray(rows, int), axis)
        return matrix

    def _spread(self, covered: Any) -> Any:
        """The inverse of `_covered`, with zeros in all other rows and columns."""
        height, width = self._sizes
        rows, columns = self.rows
        if columns is not None:  # `tf.scatter_nd` works along the first axis
            across = tf.cast(columns, "int32")[:, None], tf.transpose(covered)
            covered = tf.transpose(tf.scatter_nd(*across, (width, tf.shape(covered)[0])))
        if rows is not None:
            covered = tf.scatter_nd(tf.cast(rows, "int32")[:, None], covered, (height, width))
        return covered

    def _extended(self, rows: list[np.ndarray | None]) -> "Kronecker":
        """The same block with factors that cover more rows and columns of the matrix."""
        factors = [
            factor if indices is None else factor.among(np.asarray(indices, int), new_indices, size)
            for factor, indices, new_indices, size in zip(
                (self.a, self.g), self.rows, rows, self._sizes, strict=True
            )
        ]
        return replace(self, a=factors[0], g=factors[1], rows=(rows[0], rows[1]))

    def proximal_correction(self, differences: list[Any], stiffness: list[Any]) -> list[Any]:
        """The product (d + Λ)⁻¹ Λ δ with d the mean stiffness, by variable. Graph code."""
        sizes = [tf.cast(tf.size(s), "float32") for s in stiffness]
        d = tf.add_n([tf.reduce_sum(s) for s in stiffness]) / tf.add_n(sizes)

        def function(eigenvalues: Any) -> Any:
            return eigenvalues / (d + eigenvalues)

        u, v = (tf.convert_to_tensor(factor.vectors) for factor in (self.a, self.g))
        s, t = (tf.convert_to_tensor(factor.values) for factor in (self.a, self.g))
        p, q = (tf.convert_to_tensor(factor.rest) for factor in (self.a, self.g))
        # Four subspaces: inside and outside the span of U, inside and outside the span of V.
        both, rows = function(s[:, None] * t), function(s * q)[:, None]
        columns, neither = function(p * t), function(p * q)
        x = self._covered(self.form.join(*differences))
        left, right = tf.matmul(u, x, transpose_a=True), tf.matmul(x, v)
        middle = (both - rows - columns + neither) * tf.matmul(left, v)
        y = neither * x
        y += tf.matmul((columns - neither) * right, v, transpose_b=True)
        inside = (rows - neither) * left + tf.matmul(middle, v, transpose_b=True)
        return self.form.split(self._spread(y + tf.matmul(u, inside)))

    def scale_variables(self, strengths: Mapping[str, float]) -> "Kronecker":
        """The block scaled by the strength of each variable, given by path."""
        if len({strengths[path] for path in self.paths}) == 1:
            return replace(self, a=self.a.times(strengths[self.paths[0]]))
        rows = np.full(self.form.rows, np.sqrt(strengths[self.paths[0]]))
        if len(self.paths) == 2:
            rows[-1] = np.sqrt(strengths[self.paths[1]])
        covered = self.rows[0]
        return replace(
            self, a=self.a.scale_rows(rows if covered is None else rows[np.asarray(covered, int)])
        )

    def merged(self, new: "Kronecker", decay: float) -> "Kronecker":
        """A single Kronecker product that approximates decay · this + new, with the same trace.

        Each factor is the mean of the old and the new factor, weighted by the traces of the two
        products. The nearest Kronecker product in the Frobenius norm would drop directions of the
        task with the smaller Fisher information; this one keeps the directions of every task.
        """
        arrays = self.arrays().items()
        old = self.with_arrays({name: np.asarray(array, "float64") for name, array in arrays})
        traces = [f.trace for f in (old.a, old.g, new.a, new.g)]
        old_trace, new_trace = decay * traces[0] * traces[1], traces[2] * traces[3]
        if old_trace == 0:
            return new
        if new_trace == 0:
            return replace(old, a=old.a.times(decay))
        rows = [
            None if old_rows is None or new_rows is None else np.union1d(old_rows, new_rows)
            for old_rows, new_rows in zip(old.rows, new.rows, strict=True)
        ]
        old, new = old._extended(rows), new._extended(rows)
        total = old_trace + new_trace
        a = old.a.combine(old_trace / traces[0], new.a, new_trace / traces[2], self.rank)
        g = old.g.combine(
            old_trace / (total * traces[1]), new.g, new_trace / (total * traces[3]), self.rank
        )
        return replace(self, a=a, g=g, rows=(rows[0], rows[1]))._balanced()

    def of_diagonal(self, diagonal: Diagonal) -> "Kronecker":
        """A product in the form of this one, near to a diagonal over the kernel.

        It has the same sums over the rows and over the columns of the matrix, and no precision for
        the bias. Earlier versions have a diagonal for recurrent layers.
        """
        bias = None if self.form.bias_shape is None else np.zeros(self.form.bias_shape)
        matrix = self.form.join(np.asarray(diagonal.values, "float64"), bias)
        total = matrix.sum() or 1.0
        a, g = (
            Factor.from_matrix(np.diag(matrix.sum(axis) / np.sqrt(total)), self.rank)
            for axis in (1, 0)
        )
        return replace(self, a=a, g=g, rows=(None, None))

    def _balanced(self) -> "Kronecker":
        """The same product with factors of equal trace, which avoids float32 overflow."""
        ratio = float(np.sqrt(self.g.trace / self.a.trace))
        return replace(self, a=self.a.times(ratio), g=self.g.times(1 / ratio))

    def importances(self) -> np.ndarray:
        """The eigenvalues, of shape `(eigenvectors of A, eigenvectors of G)`."""
        return np.multiply.outer(self.a.values, self.g.values)

    def coordinates(self, values: Arrays) -> np.ndarray:
        """The weights in the basis of the eigenvectors, in the shape of `importances`."""
        matrix = self._covered(self.form.join(*(values[path] for path in self.paths)))
        return self.a.vectors.T @ matrix @ self.g.vectors

    def scale_importances(self, strengths: np.ndarray) -> "Kronecker":
        """The block with each eigenvalue multiplied by a strength, again as a Kronecker product.

        The result has the same eigenvectors, and its eigenvalues, as a matrix, have the row and
        column sums of the scaled eigenvalues. Of all Kronecker products with these eigenvectors it
        is the nearest one in the Kullback-Leibler divergence.
        """
        scaled = strengths * self.importances()
        total = scaled.sum()
        if total == 0:
            return replace(self, a=self.a.times(0.0))
        factors = []
        for factor, axis in ((self.a, 1), (self.g, 0)):
            values = scaled.sum(axis) / np.sqrt(total)
            old_sum = factor.values.sum()
            ratio = values.sum() / old_sum if old_sum > 0 else 1.0
            factors.append(Factor(factor.vectors, values, ratio * factor.rest))
        return replace(self, a=factors[0], g=factors[1])

    def grown(self, place: Place) -> "Kronecker":
        """The block for a matrix with new rows or columns, which have zero precision."""
        old, new = self.form, place.form
        if new is None or (old.bias_shape is None) != (new.bias_shape is None):
            raise ValueError(f"{place.paths[0]!r} is no longer a matrix of the same variables.")
        # The index of each row and column of the old matrix in the new one.
        indices = new.split(np.arange(new.rows * new.shape[1]).reshape(new.rows, new.shape[1]))
        parts = [indices[0][corner(old.kernel_shape)]]
        if old.bias_shape is not None:
            parts.append(indices[1][corner(old.bias_shape)])
        positions = old.join(*parts)
        places = positions[:, 0] // new.shape[1], positions[0] % new.shape[1]
        factors, rows = [], list(self.rows)
        for side, (factor, size) in enumerate(
            zip((self.a, self.g), (new.rows, new.shape[1]), strict=True)
        ):
            active = self.rows[side]
            if active is not None:  # all other rows have zero precision already
                rows[side] = places[side][np.asarray(active, int)].astype(np.asarray(active).dtype)
                factors.append(factor)
            else:
                factors.append(factor.grown(places[side], size))
        return replace(
            self, paths=place.paths, form=new, a=factors[0], g=factors[1], rows=(rows[0], rows[1])
        )
