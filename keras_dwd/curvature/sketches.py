"""The second moments that Kronecker factors are, from a batch of examples; or sketches of them."""

import numpy as np
import tensorflow as tf

# The share of rows that are not zero up to which it pays to leave the others out.
FEW = 0.5

# Of each example's gradient as a matrix D, at most this many directions of a side are looked along.
_LOOKS = 8


def products(
    rows: tf.Tensor, other: tf.Tensor, weights: tf.Tensor, first: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Two matrices L and R with L Rᵀ = Σ_b w_b D_b D_bᵀ, for D_b = rows_bᵀ other_b.

    With many positions and many columns in D an unbiased estimate of it: each example's D is seen
    along a few directions of its columns only, other ones for its neighbours in the batch.

    Args:
        rows: `(batch, positions, n)`.
        other: `(batch, positions, m)`.
        weights: `(batch,)`.
        first: How many examples came before these.
    """
    n, m, positions = rows.shape[2], other.shape[2], rows.shape[1]
    if positions is None or positions > _LOOKS:
        if m > 2 * _LOOKS:
            other = _look(other, first)
        if positions is None or positions > other.shape[2]:  # D is smaller than its parts
            d = tf.matmul(rows * tf.sqrt(weights)[:, None, None], other, transpose_a=True)
            d = tf.reshape(tf.transpose(d, (1, 0, 2)), (n, -1))
            return d, d
    overlaps = tf.matmul(other * weights[:, None, None], other, transpose_b=True)
    left, right = tf.matmul(overlaps, rows), rows
    return tuple(tf.transpose(tf.reshape(x, (-1, n))) for x in (left, right))


def product(left: tf.Tensor, right: tf.Tensor, probe: tf.Tensor | None) -> tf.Tensor:
    """L Rᵀ, `(n, n)`, or what a probe of `(n, r)` makes of it, `(n, r)`."""
    if probe is not None:
        right = tf.matmul(probe, right, transpose_a=True)
    return tf.matmul(left, right, transpose_b=True)


def product_of_active(left: tf.Tensor, right: tf.Tensor, probe: tf.Tensor | None) -> tf.Tensor:
    """The same, of those rows only in which one of the two is not zero, where these are few."""
    n = left.shape[0]
    rows = tf.where(tf.reduce_any((left != 0) | (right != 0), 1))

    def of_few() -> tf.Tensor:
        parts = [None if x is None else tf.gather(x, rows[:, 0]) for x in (left, right, probe)]
        small = product(*parts)
        if probe is None:  # columns first, then rows: a scatter along one axis each
            tall = tf.scatter_nd(rows, tf.transpose(small), (n, tf.shape(rows)[0]))
            small = tf.transpose(tall)
        return tf.scatter_nd(rows, small, (n, n if probe is None else probe.shape[1]))

    few = tf.shape(rows)[0] <= int(FEW * n)
    return tf.cond(few, of_few, lambda: product(left, right, probe))


def probe_of(size: int, columns: int) -> np.ndarray:
    """What a large matrix is multiplied with, instead of being formed: the same each time."""
    normal = np.random.default_rng(size).normal(size=(size, columns))
    return np.linalg.qr(normal)[0].astype("float32")


def _look(x: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
    """Each example's columns, `(batch, positions, m)`, along `_LOOKS` directions of its group."""
    m = x.shape[2]
    group = (tf.range(tf.shape(x)[0]) + first) % _groups(m)
    return tf.matmul(x, _signs(m, group)[:, :, None] * tf.one_hot(tf.range(m) % _LOOKS, _LOOKS))


def _signs(m: int, group: tf.Tensor) -> tf.Tensor:
    """`(groups, m)`: the signs with which columns c, c + 8, … add up to a group's direction c.

    Those of a Hadamard matrix, with the columns' own at random: over all groups the directions
    are orthogonal, so that all are looked along alike, and none has to be kept in memory.
    """
    overlap = tf.bitwise.bitwise_and(group[:, None], tf.range(m)[None] // _LOOKS)
    odd = tf.cast(tf.raw_ops.PopulationCount(x=overlap) % 2, "float32")
    return (1 - 2 * odd) * np.random.default_rng(m).choice((-1.0, 1.0), m).astype("float32")


def _groups(m: int) -> int:
    return 1 << (-(-m // _LOOKS) - 1).bit_length()
