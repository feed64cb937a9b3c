"""The gradient of the data loss within the gradient of a training step; loss scales; checks."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from keras_dwd.keras_private import layers_within
from keras_dwd.learner import Learner

# Per-example gradients underflow in float16, so the loss is multiplied by this before
# differentiation. A power of two: dividing the gradients by it again is exact.
_FLOAT16_SCALE = 1024.0


def loss_scale(model: Learner) -> float:
    """The factor to multiply per-example losses by before differentiation; 1 without float16."""
    reduced = any(layer.compute_dtype == "float16" for layer in (model, *layers_within(model)))
    return _FLOAT16_SCALE if reduced else 1.0


def data_gradients(
    gradients: list[Any], scale: tf.Tensor | None, added: list[Any] | None = None
) -> list[tf.Tensor | None]:
    """Gradients of the data loss: unscaled gradients of the total minus those of added losses."""
    result: list[tf.Tensor | None] = []
    for gradient, extra in zip(gradients, added or [None] * len(gradients), strict=True):
        if gradient is not None:
            gradient = tf.cast(tf.convert_to_tensor(gradient), "float32")
            gradient = gradient if scale is None else gradient / scale
            if extra is not None:
                gradient -= tf.cast(tf.convert_to_tensor(extra), "float32")
        result.append(gradient)
    return result


def all_finite(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """Whether all values are finite, a scalar boolean. Graph code."""
    # The sum is not finite if any element is not: one pass, and no boolean copy of the tensors.
    return tf.math.is_finite(tf.add_n([tf.reduce_sum(t) for t in tensors]))
