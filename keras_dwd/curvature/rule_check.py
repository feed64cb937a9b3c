"""Checks the rules of users against differentiation, example by example."""

from collections.abc import Mapping, Sequence

import tensorflow as tf

from keras_dwd.curvature.rules import LayerIO, Rule, RuledLayer

# How far squared gradients may differ, relative to the largest: those of half precision do.
TOLERANCE = 0.1


def is_of_user(rule: Rule) -> bool:
    """Whether a rule is none of this package, whose rules are proven by its tests."""
    return type(rule).__module__.partition(".")[0] != __name__.partition(".")[0]


def contradiction(
    ruled: RuledLayer, flows: Sequence[LayerIO], true: Mapping[str, tf.Tensor]
) -> tf.Tensor:
    """How far the squared gradients by a rule are from the true ones. Graph code.

    Args:
        ruled: The layer and its rule.
        flows: Its calls in a batch.
        true: The sum of the squared gradients of single examples, by path of the variable.

    Returns:
        The largest difference relative to the largest square, a float32 scalar.
    """
    ones = tf.ones(tf.shape(flows[0].gradient)[:1])
    squares = ruled.rule.squares(ruled.layer, list(flows), ones)
    by_path = {ruled.paths[name]: value for name, value in squares.items()}
    if ruled.form is not None:  # the factors are made of these rows
        a, g = ruled.all_rows(list(flows))
        if ruled.form.bias_shape is not None:
            a = tf.concat([a, tf.ones_like(a[..., :1])], 2)
        matrix = tf.reduce_sum(tf.einsum("bpi,bpo->bio", a, g) ** 2, 0)
        of_rows = dict(zip(ruled.matrix_paths, ruled.form.split(matrix), strict=True))
        pairs = [(value, true[path]) for path, value in of_rows.items() if path in true]
    else:
        pairs = []
    pairs += [(value, true[path]) for path, value in by_path.items() if path in true]
    shares = [tf.zeros(())]
    for value, expected in pairs:
        largest = tf.maximum(tf.reduce_max(tf.abs(value)), tf.reduce_max(expected))
        shares.append(tf.math.divide_no_nan(tf.reduce_max(tf.abs(value - expected)), largest))
    return tf.reduce_max(tf.stack(shares))
