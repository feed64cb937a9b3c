"""Each example of a batch by itself."""

from typing import Any

import tensorflow as tf


def loss_gradients(
    model: Any, batch: tuple[Any, ...], masks: dict[int, tf.Tensor], scale: float
) -> list[tf.Tensor]:
    """The gradient of each example's loss by the model's outputs, flat, of their shapes.

    Differentiated within the mapped function: with a gradient through the map XLA takes all that
    the outputs are made of for constants, and compiles each step anew.

    Args:
        model: A `DWDModel`.
        batch: `(x, y, outputs)` and, where they are part of the loss, weights.
        masks: Of the outputs.
        scale: The loss is multiplied by this.
    """

    def gradients_of(example: Any) -> list[tf.Tensor]:
        (x, y, outputs, *within), masked = tf.nest.map_structure(alone, example)
        flat = tf.nest.flatten(outputs)
        for index, mask in masked.items():
            flat[index]._keras_mask = mask
        with tf.GradientTape() as tape:
            tape.watch(flat)
            loss = scale * tf.cast(model.data_loss(x, y, outputs, *within), "float32")
        found = tape.gradient(loss, flat, unconnected_gradients="zero")
        return [g[0] for g in found]

    return tf.vectorized_map(gradients_of, (batch, masks), warn=False)


def masks_of(outputs: Any) -> dict[int, tf.Tensor]:
    """The Keras masks of those outputs that have one: slices of a tensor have none."""
    masks = (getattr(output, "_keras_mask", None) for output in tf.nest.flatten(outputs))
    return {index: mask for index, mask in enumerate(masks) if mask is not None}


def alone(example: tf.Tensor) -> tf.Tensor:
    """A batch of one."""
    return example[None]


def one_each(sample_weight: Any) -> bool:
    """Whether there is one weight per example."""
    return not tf.nest.is_nested(sample_weight) and set(sample_weight.shape[1:]) <= {1}
