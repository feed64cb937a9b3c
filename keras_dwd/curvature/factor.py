"""A factor of a Kronecker product: a symmetric positive matrix, of full or low rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Factor:
    """M = U diag(s) Uᵀ + ρ (I − U Uᵀ), of n × n, with r ≤ n orthonormal columns in U.

    Inputs and gradients of a layer have few directions that matter. Those are kept exactly, the
    rest as their mean: O(n r) to keep and to multiply with. There is room for twice as many as it
    takes at first, and where later tasks need more, for twice as many again: nearly always the
    training step stays the one that was traced.

    Attributes:
        vectors: U, of `(n, r)`.
        values: s, of `(r,)`, ≥ 0.
        rest: ρ ≥ 0, a scalar.
    """

    vectors: Any
    values: Any
    rest: Any

    # Directions matter until they hold this share of the trace above the rest.
    ENERGY = 0.999
    # There is room for a multiple of this many.
    STEP = 32

    @property
    def size(self) -> int:
        """The number of rows, n."""
        return int(self.vectors.shape[0])

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues."""
        return float(self.values.sum() + (self.size - len(self.values)) * self.rest)

    def leaves(self) -> dict[str, Any]:
        """Its arrays by name."""
        return {"vectors": self.vectors, "values": self.values, "rest": self.rest}

    def product(self, x: Any, from_right: bool = False) -> Any:
        """This times x, or x times this, in the training step."""
        u, rest = tf.convert_to_tensor(self.vectors), tf.convert_to_tensor(self.rest)
        above = tf.convert_to_tensor(self.values) - rest
        (n, r), others = u.shape, x.shape[0 if from_right else 1]
        if n * (r + others) < 2 * r * others:  # less work with U diag(s − ρ) Uᵀ as a matrix
            matrix = tf.matmul(above * u, u, transpose_b=True)
            return rest * x + (tf.matmul(x, matrix) if from_right else tf.matmul(matrix, x))
        if from_right:
            return rest * x + tf.matmul(above * tf.matmul(x, u), u, transpose_b=True)
        return rest * x + tf.matmul(u, above[:, None] * tf.matmul(u, x, transpose_a=True))

    @staticmethod
    def from_leaves(leaves: Mapping[str, Any]) -> "Factor":
        """The inverse of `leaves`.

        Raises:
            ValueError: If parts are missing, or their shapes do not fit each other.
        """
        shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        (n, r) = (*shapes.get("vectors", ()), 0, 0)[:2]
        if shapes != {"vectors": (n, r), "values": (r,), "rest": ()} or not 0 < r <= n:
            raise ValueError(f"No factor of a Kronecker product has the parts {shapes}.")
        return Factor(**leaves)

    @staticmethod
    def from_matrix(matrix: np.ndarray, rank: int) -> "Factor":
        """Of a symmetric positive matrix, by its `rank` largest eigenvalues at the most."""
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
        inside, axes = np.linalg.eigh((core + core.T) / 2)
        sure = inside > len(inside) * np.finfo("float64").eps * inside[-1]
        half = shifted @ (axes[:, sure] / np.sqrt(inside[sure]))
        vectors, singular, _ = np.linalg.svd(half, full_matrices=False)
        values = np.maximum(singular**2 - shift, 0)
        rest = max(trace - values.sum(), 0.0) / max(len(probe) - len(values), 1)
        return Factor._truncated(vectors, values, rest, len(values))

    @staticmethod
    def _truncated(
        vectors: np.ndarray, values: np.ndarray, rest: float, rank: int, room: int = 0
    ) -> "Factor":
        """Keep the largest eigenvalues; what is left out goes into the rest: the trace stays.

        Args:
            vectors: Orthonormal columns.
            values: Of them.
            rest: Of all others.
            rank: The most that are kept.
            room: How many there is room for so far.
        """
        order = np.argsort(values)[::-1]
        values, vectors = np.maximum(values[order], 0), vectors[:, order]
        held, size = np.cumsum(np.maximum(values - rest, 0)), len(vectors)
        enough = int(np.searchsorted(held, Factor.ENERGY * held[-1])) + 1
        if enough > room:
            room = -(-2 * enough // Factor.STEP) * Factor.STEP
        kept = min(rank, room, len(values))
        left = values[kept:].sum() + (size - len(values)) * rest
        # With no direction left out the rest says what is the same in all of them.
        rest = left / (size - kept) if kept < size else rest
        return Factor(vectors[:, :kept], values[:kept], np.asarray(rest))

    def combine(self, mine: float, other: "Factor", its: float, rank: int) -> "Factor":
        """The sum mine · this + its · other, of `rank` at the most."""
        (a, d), (b, e) = self._above_rest, other._above_rest
        rest = mine * d + its * e
        basis, inside = np.linalg.qr(np.concatenate([self.vectors, other.vectors], 1))
        weights = np.concatenate([mine * a, its * b])
        values, vectors = np.linalg.eigh((inside * weights) @ inside.T)
        room = self.vectors.shape[1]
        return Factor._truncated(basis @ vectors, values + rest, rest, rank, room)

    def scaled(self, scale: np.ndarray) -> "Factor":
        """The product diag(scale) · this · diag(scale), its rest again the same everywhere."""
        values, rest = self._above_rest
        basis, inside = np.linalg.qr(scale[:, None] * self.vectors)
        within, vectors = np.linalg.eigh((inside * values) @ inside.T)
        rest *= float(np.mean(scale**2))
        count = len(within)
        return Factor._truncated(basis @ vectors, within + rest, rest, count, count)

    def among(self, held: np.ndarray, more: np.ndarray | None, size: int) -> "Factor":
        """The same about more rows, the rest of the same trace over them.

        Args:
            held: Indices of the rows that it is about, in the whole.
            more: Of those that it is to be about, `None` for all.
            size: Of the whole.
        """
        if more is not None and len(more) == len(held):
            return self
        height = size if more is None else len(more)
        directions = self.vectors.shape[1]
        vectors = np.zeros((height, directions))
        vectors[held if more is None else np.searchsorted(more, held)] = self.vectors
        rest = self.rest * (len(held) - directions) / max(height - directions, 1)
        return Factor(vectors, self.values, np.asarray(rest))

    def damped(self, share: float) -> "Factor":
        """The mean of this and the identity of the same trace, `share` of it the latter."""
        mean = share * self.trace / self.size
        keep = 1 - share
        return Factor(self.vectors, keep * self.values + mean, keep * self.rest + mean)

    def times(self, factor: float) -> "Factor":
        """This times a number."""
        return Factor(self.vectors, factor * self.values, factor * self.rest)

    @property
    def _above_rest(self) -> tuple[np.ndarray, float]:
        """The same matrix as U diag(s − ρ) Uᵀ + ρ I."""
        return self.values - self.rest, float(self.rest)
