"""Which part of a training step's gradient is that of the data, and whether it is finite."""

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

# Gradients of single examples underflow in float16; the loss is scaled by this before they are
# taken. A power of two, so that dividing by it again is exact.
_FLOAT16_SCALE = 1024.0


def loss_scale(model: keras.Model) -> float:
    """What to multiply the losses of single examples by before they are differentiated."""
    reduced = any(layer.compute_dtype == "float16" for layer in model._flatten_layers())
    return _FLOAT16_SCALE if reduced else 1.0


def data_gradients(
    gradients: list[Any], added: list[Any], scale: tf.Tensor | None
) -> list[tf.Tensor | None]:
    """Gradients of the data loss: those of the total, unscaled, less those of added losses."""
    result: list[tf.Tensor | None] = []
    for gradient, extra in zip(gradients, added, strict=True):
        if gradient is not None:
            gradient = tf.cast(tf.convert_to_tensor(gradient), "float32")
            gradient = gradient if scale is None else gradient / scale
            if extra is not None:
                gradient -= tf.cast(tf.convert_to_tensor(extra), "float32")
        result.append(gradient)
    return result


def all_finite(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """Whether all values are finite, a scalar boolean. Graph code."""
    # A sum is not finite if a part is not: one pass without a boolean copy of everything.
    return tf.math.is_finite(tf.add_n([tf.reduce_sum(t) for t in tensors]))
