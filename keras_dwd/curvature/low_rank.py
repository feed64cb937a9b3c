"""A diagonal precision with a correction of low rank: for what has no Kronecker form."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from keras_dwd.curvature.factor import Factor
from keras_dwd.variables import Arrays


@dataclass(frozen=True)
class LowRank:
    """The matrix diag(d) + W Wᵀ over the n elements of one variable, with W of few columns.

    Its diagonal is that of the Fisher information exactly; W holds the directions in which the
    elements matter together.

    Attributes:
        path: Of the variable.
        values: d, of the variable's shape, ≥ 0.
        correction: W, of `(n, r)`.
        rank: The most columns that are kept when tasks are merged.
    """

    path: str
    values: Any
    correction: Any
    rank: int

    @staticmethod
    def around(path: str, diagonal: np.ndarray, factor: Factor, rank: int) -> "LowRank":
        """With a diagonal, and the directions of a factor off it."""
        correction = factor.vectors * np.sqrt(np.maximum(factor.values, 0))
        # Where the directions claim more than the diagonal has, they are scaled down to it.
        claimed = (correction**2).sum(1)
        has = np.asarray(diagonal, "float64").ravel()
        share = np.divide(has, claimed, out=np.ones_like(claimed), where=claimed > has)
        correction = np.sqrt(np.maximum(share, 0))[:, None] * correction
        left = np.maximum(has - (correction**2).sum(1), 0).reshape(diagonal.shape)
        return LowRank(path, left, correction, rank)

    @property
    def paths(self) -> tuple[str, ...]:
        """The variables it is about."""
        return (self.path,)

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues, that is of the diagonal."""
        return float(self.spectrum().sum())

    def leaves(self) -> dict[str, Any]:
        """Its arrays by name."""
        return {"precision": self.values, "correction": self.correction}

    def with_leaves(self, leaves: dict[str, Any]) -> "LowRank":
        """The same with other arrays, or with the variables that hold them.

        Raises:
            ValueError: If they do not fit each other.
        """
        values, correction = leaves["precision"], leaves["correction"]
        if len(correction.shape) != 2 or correction.shape[0] != np.prod(values.shape):
            raise ValueError(
                f"A correction of shape {tuple(correction.shape)} does not fit a variable of shape "
                f"{tuple(values.shape)}."
            )
        return replace(self, values=values, correction=correction)

    def multiply(self, differences: list[Any]) -> list[Any]:
        """Λ δ in the training step, by variable."""
        delta, w = differences[0], self.correction.value
        along = tf.linalg.matvec(w, tf.reshape(delta, (-1,)), transpose_a=True)
        together = tf.reshape(tf.linalg.matvec(w, along), tf.shape(delta))
        return [self.values.value * delta + together]

    def shrink(self, differences: list[Any], stiffness: list[Any]) -> list[Any]:
        """(stiffness + Λ)⁻¹ Λ δ in the training step, by variable.

        By the formula of Woodbury: what is inverted is of r × r.
        """
        (pulled,) = self.multiply(differences)
        rest = tf.reshape(stiffness[0] + self.values.value, (-1, 1))
        w = self.correction.value
        y = tf.reshape(pulled, (-1, 1)) / rest
        core = tf.eye(tf.shape(w)[1]) + tf.matmul(w, w / rest, transpose_a=True)
        inside = tf.linalg.solve(core, tf.matmul(w, y, transpose_a=True))
        return [tf.reshape(y - tf.matmul(w / rest, inside), tf.shape(pulled))]

    def weighted(self, strengths: dict[str, float]) -> "LowRank":
        """Times the strength of its variable."""
        return self.scaled(np.full(self.values.shape, strengths[self.path]))

    def merged(self, new: "LowRank", decay: float) -> "LowRank":
        """This times `decay`, plus `new`; the diagonal of the sum is exact."""
        old = [np.asarray(leaf, "float64") for leaf in (self.values, self.correction)]
        both = np.concatenate([np.sqrt(decay) * old[1], new.correction], 1)
        u, s, _ = np.linalg.svd(both, full_matrices=False)
        directions = u * s
        kept = max(1, min(self.rank, int((s > 1e-6 * s.max(initial=0)).sum())))
        lost = (directions[:, kept:] ** 2).sum(1).reshape(new.values.shape)
        values = decay * old[0] + new.values + lost
        return replace(self, values=values, correction=directions[:, :kept])

    def spectrum(self) -> np.ndarray:
        """The diagonal of the matrix: elements are grouped, not directions."""
        values = np.asarray(self.values, "float64")
        return values + (np.asarray(self.correction, "float64") ** 2).sum(1).reshape(values.shape)

    def coordinates(self, values: Arrays) -> np.ndarray:
        """The parameters."""
        return values[self.path]

    def scaled(self, strengths: np.ndarray) -> "LowRank":
        """With rows and columns multiplied by the roots of their elements' strengths."""
        values = np.asarray(self.values, "float64") * strengths
        roots = np.sqrt(np.asarray(strengths, "float64")).reshape(-1, 1)
        return replace(self, values=values, correction=roots * self.correction)
