"""Per-example loss gradients, and other helpers for the single examples of a batch."""

from typing import Any

import tensorflow as tf

from keras_dwd.keras_private import mask_of, set_mask
from keras_dwd.learner import Learner, data_loss


def loss_gradients(
    model: Learner, batch: tuple[Any, ...], masks: dict[int, tf.Tensor], scale: float
) -> list[tf.Tensor]:
    """Per-example gradients of the loss with respect to the model's outputs.

    Differentiates inside the mapped function. With a gradient through the map, XLA would treat
    everything that the outputs depend on as a constant and recompile each step.

    Args:
        model: A compiled model.
        batch: `(x, y, outputs)`, followed by sample weights if they are part of an example's loss.
        masks: Keras masks of the outputs, by index in the flat list of outputs.
        scale: The loss is multiplied by this factor.

    Returns:
        The gradients as a flat list, each in the shape of its output.
    """

    def gradients_of(example: Any) -> list[tf.Tensor]:
        (x, y, outputs, *weights), masked = tf.nest.map_structure(alone, example)
        flat = tf.nest.flatten(outputs)
        for index, mask in masked.items():
            set_mask(flat[index], mask)
        with tf.GradientTape() as tape:
            tape.watch(flat)
            loss = scale * tf.cast(data_loss(model, x, y, outputs, *weights), "float32")
        gradients = tape.gradient(loss, flat, unconnected_gradients="zero")
        return [g[0] for g in gradients]

    return tf.vectorized_map(gradients_of, (batch, masks), warn=False)


def masks_of(outputs: Any) -> dict[int, tf.Tensor]:
    """The Keras masks of the outputs that have one, by index; slices of an output lose them."""
    masks = (mask_of(output) for output in tf.nest.flatten(outputs))
    return {index: mask for index, mask in enumerate(masks) if mask is not None}


def alone(example: tf.Tensor) -> tf.Tensor:
    """A batch that consists of this example alone."""
    return example[None]


def one_each(sample_weight: Any) -> bool:
    """Whether `sample_weight` holds exactly one weight per example."""
    return not tf.nest.is_nested(sample_weight) and set(sample_weight.shape[1:]) <= {1}
