"""Second moments of per-example gradients, or sketches of them, for Kronecker factors."""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from threadpoolctl import threadpool_limits

# Rows that are zero are left out if at most this share of all rows is nonzero.
FEW = 0.5

# Each per-example gradient is projected onto at most this many directions per side.
_DIRECTIONS = 8


def products(
    rows: tf.Tensor, other: tf.Tensor, weights: tf.Tensor, first: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Two matrices L and R with L Rᵀ = Σ_b w_b D_b D_bᵀ, for D_b = rows_bᵀ other_b.

    With many positions and many columns, L Rᵀ is an unbiased estimate of the sum: each D_b is
    projected onto a few directions of its columns, which differ between neighbouring examples.

    Args:
        rows: `(batch, positions, n)`.
        other: `(batch, positions, m)`.
        weights: `(batch,)`, the weights w_b of the examples.
        first: The number of examples processed before this batch.
    """
    traced = _traced(tuple(rows.shape), tuple(other.shape))
    return traced(rows, other, weights, tf.convert_to_tensor(first, "int32"))


@functools.lru_cache(maxsize=256)
def _traced(*shapes: tuple[int | None, ...]) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """`_products` as a graph that layers of the same shapes share: it takes long to trace."""
    return tf.function(_products, autograph=False)


def _products(
    rows: tf.Tensor, other: tf.Tensor, weights: tf.Tensor, first: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    n, m, positions = rows.shape[2], other.shape[2], rows.shape[1]
    if positions is None or positions > _DIRECTIONS:
        if m > 2 * _DIRECTIONS:
            other = _project(other, first)
        if positions is None or positions > other.shape[2]:  # D_b is the smaller one
            d = tf.matmul(rows * tf.sqrt(weights)[:, None, None], other, transpose_a=True)
            d = tf.reshape(tf.transpose(d, (1, 0, 2)), (n, -1))
            return d, d
    overlaps = tf.matmul(other * weights[:, None, None], other, transpose_b=True)
    left, right = (tf.reshape(x, (-1, n)) for x in (tf.matmul(overlaps, rows), rows))
    return tf.transpose(left), tf.transpose(right)


def product(left: tf.Tensor, right: tf.Tensor, probe: tf.Tensor | None) -> tf.Tensor:
    """L Rᵀ of shape `(n, n)`, or L Rᵀ · probe of shape `(n, r)` if there is a probe."""
    if probe is not None:
        right = tf.matmul(probe, right, transpose_a=True)
    return tf.matmul(left, right, transpose_b=True)


def product_of_active(left: tf.Tensor, right: tf.Tensor, probe: tf.Tensor | None) -> tf.Tensor:
    """The same product, computed only from the rows in which L or R is nonzero if these are few."""
    n = left.shape[0]
    rows = tf.where(tf.reduce_any((left != 0) | (right != 0), 1))

    def over_active_rows() -> tf.Tensor:
        parts = [None if x is None else tf.gather(x, rows[:, 0]) for x in (left, right, probe)]
        small = product(*parts)
        if probe is None:  # scatter the columns, then the rows: a scatter works along one axis
            tall = tf.scatter_nd(rows, tf.transpose(small), (n, tf.shape(rows)[0]))
            small = tf.transpose(tall)
        return tf.scatter_nd(rows, small, (n, n if probe is None else probe.shape[1]))

    few = tf.shape(rows)[0] <= int(FEW * n)
    return tf.cond(few, over_active_rows, lambda: product(left, right, probe))


@functools.lru_cache(maxsize=64)
@threadpool_limits.wrap(limits=1)
def probe_of(size: int, columns: int) -> np.ndarray:
    """Orthonormal columns to multiply a large matrix by instead of forming it; always the same."""
    normal = np.random.default_rng(size).normal(size=(size, columns))
    return np.linalg.qr(normal)[0].astype("float32")


def _project(x: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
    """Project the columns of `(batch, positions, m)` onto directions that differ by example."""
    m = x.shape[2]
    group = (tf.range(tf.shape(x)[0]) + first) % _groups(m)
    return tf.matmul(
        x, _signs(m, group)[:, :, None] * tf.one_hot(tf.range(m) % _DIRECTIONS, _DIRECTIONS)
    )


def _signs(m: int, group: tf.Tensor) -> tf.Tensor:
    """The signs with which columns c, c + 8, … add up to direction c, `(len(group), m)`.

    They are the signs of a Hadamard matrix times one random sign per column. The directions of all
    groups are orthogonal, so each is used equally often, and no matrix of them is stored.
    """
    overlap = tf.bitwise.bitwise_and(group[:, None], tf.range(m)[None] // _DIRECTIONS)
    odd = tf.cast(tf.raw_ops.PopulationCount(x=overlap) % 2, "float32")
    return (1 - 2 * odd) * np.random.default_rng(m).choice((-1.0, 1.0), m).astype("float32")


def _groups(m: int) -> int:
    """The number of groups of directions: the smallest power of two ≥ m / `_DIRECTIONS`."""
    return 1 << (-(-m // _DIRECTIONS) - 1).bit_length()
