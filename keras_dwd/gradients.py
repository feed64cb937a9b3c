"""Which part of a training step's gradient is that of the data."""

from typing import Any

import tensorflow as tf


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
