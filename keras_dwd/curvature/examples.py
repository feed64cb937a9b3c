"""The loss of each example of a batch by itself."""

from typing import Any

import tensorflow as tf


def each_loss(model: Any, batch: tuple[Any, ...], masks: dict[int, tf.Tensor]) -> tf.Tensor:
    """The loss of each example by itself, `(batch,)`.

    Args:
        model: A `DWDModel`.
        batch: `(x, y, outputs)` and, where they are part of the loss, weights.
        masks: Of the outputs.
    """

    def loss_of(example: Any) -> tf.Tensor:
        (x, y, outputs, *within), masked = tf.nest.map_structure(alone, example)
        for index, mask in masked.items():
            tf.nest.flatten(outputs)[index]._keras_mask = mask
        return model.data_loss(x, y, outputs, *within)

    return tf.vectorized_map(loss_of, (batch, masks), warn=False)


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
