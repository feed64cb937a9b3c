"""A factor of a Kronecker product: a symmetric positive semi-definite matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Factor:
    """The n × n matrix M = U diag(s) Uᵀ + ρ (I − U Uᵀ), with r ≤ n orthonormal columns in U.

    The inputs and gradients of a layer vary mainly along a few directions. These are stored
    exactly, all others as their mean eigenvalue ρ: memory and products with a vector cost O(n r).
    A factor stores twice as many directions as it needs. When later tasks need more than that,
    the number is doubled again, so r seldom changes and the training step is seldom retraced.

    Attributes:
        vectors: U, of shape `(n, r)`: the eigenvectors.
        values: s, of shape `(r,)`, ≥ 0: their eigenvalues.
        rest: ρ ≥ 0, a scalar: the eigenvalue of all other directions.
    """

    vectors: Any
    values: Any
    rest: Any

    # The directions that a factor needs hold this share of the trace above ρ.
    ENERGY = 0.999
    # The number of stored directions is rounded up to a multiple of this.
    STEP = 32
    # `grown` stores all directions explicitly for factors of up to this many rows.
    EXPLICIT = 4096

    @property
    def size(self) -> int:
        """The number of rows, n."""
        return int(self.vectors.shape[0])

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues."""
        return float(self.values.sum() + (self.size - len(self.values)) * self.rest)

    def arrays(self) -> dict[str, Any]:
        """The arrays that the factor consists of, by name."""
        return {"vectors": self.vectors, "values": self.values, "rest": self.rest}

    def product(self, x: Any, from_right: bool = False) -> Any:
        """The product M x, or x M if `from_right`. Graph code."""
        u, rest = tf.convert_to_tensor(self.vectors), tf.convert_to_tensor(self.rest)
        above = tf.convert_to_tensor(self.values) - rest
        (n, r), width = u.shape, x.shape[0 if from_right else 1]
        if n * (r + width) < 2 * r * width:  # cheaper to form U diag(s − ρ) Uᵀ
            matrix = tf.matmul(above * u, u, transpose_b=True)
            return rest * x + (tf.matmul(x, matrix) if from_right else tf.matmul(matrix, x))
        if from_right:
            return rest * x + tf.matmul(above * tf.matmul(x, u), u, transpose_b=True)
        return rest * x + tf.matmul(u, above[:, None] * tf.matmul(u, x, transpose_a=True))

    @staticmethod
    def from_arrays(arrays: Mapping[str, Any]) -> "Factor":
        """The inverse of `arrays`.

        Raises:
            ValueError: If arrays are missing, or their shapes do not fit together.
        """
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        (n, r) = (*shapes.get("vectors", ()), 0, 0)[:2]
        if shapes != {"vectors": (n, r), "values": (r,), "rest": ()} or not 0 < r <= n:
            raise ValueError(f"No factor of a Kronecker product has the parts {shapes}.")
        return Factor(**arrays)

    @staticmethod
    def from_matrix(matrix: np.ndarray, rank: int) -> "Factor":
        """The factor with at most the `rank` largest eigenvalues of a matrix."""
        values, vectors = np.linalg.eigh(matrix)
        return Factor._truncated(vectors, values, 0.0, rank)

    @staticmethod
    def from_sketch(sketch: np.ndarray, probe: np.ndarray, trace: float) -> "Factor":
        """The Nyström approximation of M from `sketch` = M · `probe`, both of `(n, r)`.

        Reference:
            [Tropp et al., 2017](https://arxiv.org/abs/1706.05736), algorithm 3.
        """
        shift = np.sqrt(len(probe)) * np.finfo("float32").eps * np.linalg.norm(sketch)
        if shift == 0:
            return Factor(probe[:, :1], np.zeros(1), np.asarray(0.0))
        shifted = sketch + shift * probe
        core = probe.T @ shifted
        core_values, core_vectors = np.linalg.eigh((core + core.T) / 2)
        reliable = core_values > len(core_values) * np.finfo("float64").eps * core_values[-1]
        half = shifted @ (core_vectors[:, reliable] / np.sqrt(core_values[reliable]))
        vectors, singular, _ = np.linalg.svd(half, full_matrices=False)
        values = np.maximum(singular**2 - shift, 0)
        rest = max(trace - values.sum(), 0.0) / max(len(probe) - len(values), 1)
        return Factor._truncated(vectors, values, rest, len(values))

    @staticmethod
    def _truncated(
        vectors: np.ndarray, values: np.ndarray, rest: float, rank: int, room: int = 0
    ) -> "Factor":
        """Keep the largest eigenvalues and fold the others into ρ, which preserves the trace.

        Args:
            vectors: Orthonormal columns.
            values: The eigenvalue of each column.
            rest: The eigenvalue of all other directions.
            rank: The largest number of directions to keep.
            room: The number of directions stored so far.
        """
        order = np.argsort(values)[::-1]
        values, vectors = np.maximum(values[order], 0), vectors[:, order]
        energy, size = np.cumsum(np.maximum(values - rest, 0)), len(vectors)
        needed = int(np.searchsorted(energy, Factor.ENERGY * energy[-1])) + 1
        if needed > room:
            room = -(-2 * needed // Factor.STEP) * Factor.STEP
        count = min(rank, room, len(values))
        remainder = values[count:].sum() + (size - len(values)) * rest
        # With all directions kept, ρ does not change M: it stays the offset of all eigenvalues.
        rest = remainder / (size - count) if count < size else rest
        return Factor(vectors[:, :count], values[:count], np.asarray(rest))

    def combine(self, mine: float, other: "Factor", its: float, rank: int) -> "Factor":
        """The sum mine · M + its · other, with at most `rank` directions."""
        (above, rho), (other_above, other_rho) = self._above_rest, other._above_rest
        rest = mine * rho + its * other_rho
        basis, coefficients = np.linalg.qr(np.concatenate([self.vectors, other.vectors], 1))
        weights = np.concatenate([mine * above, its * other_above])
        values, vectors = np.linalg.eigh((coefficients * weights) @ coefficients.T)
        room = self.vectors.shape[1]
        return Factor._truncated(basis @ vectors, values + rest, rest, rank, room)

    def scale_rows(self, scale: np.ndarray) -> "Factor":
        """The product diag(scale) · M · diag(scale), with ρ scaled by the mean of scale²."""
        values, rest = self._above_rest
        basis, coefficients = np.linalg.qr(scale[:, None] * self.vectors)
        scaled, vectors = np.linalg.eigh((coefficients * values) @ coefficients.T)
        rest *= float(np.mean(scale**2))
        count = len(scaled)
        return Factor._truncated(basis @ vectors, scaled + rest, rest, count, count)

    def among(self, rows: np.ndarray, more: np.ndarray | None, size: int) -> "Factor":
        """The factor extended to more rows, over which the trace of ρ is spread.

        Args:
            rows: Indices of this factor's rows in the full matrix.
            more: Indices of the rows to cover in the full matrix, `None` for all of them.
            size: The number of rows of the full matrix.
        """
        if more is not None and len(more) == len(rows):
            return self
        height = size if more is None else len(more)
        directions = self.vectors.shape[1]
        vectors = np.zeros((height, directions))
        vectors[rows if more is None else np.searchsorted(more, rows)] = self.vectors
        rest = self.rest * (len(rows) - directions) / max(height - directions, 1)
        return Factor(vectors, self.values, np.asarray(rest))

    def grown(self, places: np.ndarray, size: int) -> "Factor":
        """The factor extended to new rows, in which the matrix is zero.

        Args:
            places: Index of each row of this factor in the larger matrix.
            size: The number of rows of the larger matrix.
        """
        if len(places) == size:
            return self
        vectors, values, rest = self.vectors, self.values, float(self.rest)
        new_rest = 0.0
        if rest > 0 and len(places) > Factor.EXPLICIT:
            # Spread the trace of ρ over the new rows as well, which makes them nearly free.
            new_rest = rest * (len(places) - len(values)) / (size - len(values))
        elif rest > 0:  # ρ applies to the old rows only: store its directions explicitly
            others = np.linalg.svd(np.asarray(vectors, "float64"))[0][:, vectors.shape[1] :]
            values = np.concatenate([values, np.full(others.shape[1], rest)])
            vectors = np.concatenate([vectors, others], 1)
        extended = np.zeros((size, vectors.shape[1]))
        extended[places] = vectors
        return Factor(extended, np.asarray(values), np.asarray(new_rest))

    def damped(self, share: float) -> "Factor":
        """The weighted mean of M and (tr M / n) · I, where `share` is the weight of the latter."""
        mean = share * self.trace / self.size
        keep = 1 - share
        return Factor(self.vectors, keep * self.values + mean, keep * self.rest + mean)

    def times(self, factor: float) -> "Factor":
        """The factor multiplied by a number."""
        return Factor(self.vectors, factor * self.values, factor * self.rest)

    @property
    def _above_rest(self) -> tuple[np.ndarray, float]:
        """The values s − ρ and ρ of the equivalent form U diag(s − ρ) Uᵀ + ρ I."""
        return self.values - self.rest, float(self.rest)
