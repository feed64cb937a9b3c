"""How the estimator `influence` puts all losses, outputs and examples on one scale."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_dwd.communicator import Communicator
from keras_dwd.curvature.closed_forms import flat
from keras_dwd.curvature.likelihood import (
    Counted,
    at_positions,
    by_output,
    classes_last,
    known_loss,
    log_of,
    loss_weights_of,
    losses_of,
    present,
    with_an_axis,
)
from keras_dwd.learner import Learner, has_own_loss

LEAST_MARGIN = 0.1
"""Added to the mean squared margin: a typical value before training, which bounds the divisor."""
# The squared margin where a loss compares no classes, about that of a trained classifier.
_NO_CLASSES = 25.0
# The least cosine between gradients and errors for a loss to be a distance. It is 1 for squared
# errors and positive for all that grow with the error of each value.
_LEAST_COSINE = 0.1
_CROSS_ENTROPIES = ("sparse", "categorical", "binary")


def squared_margins(
    model: Learner, outputs: Any, counted: Counted | None = None, weights: Any = None
) -> list[tf.Tensor]:
    """The squared margin of each example at each output, `(batch,)`, averaged over positions.

    The margin is how far the logits may move before the prediction changes. For a cross-entropy it
    is the distance between the two highest logits, for a binary cross-entropy the distance of the
    logit from zero. Outputs with other losses have one for all examples.

    Args:
        model: A compiled model.
        outputs: The outputs of the model.
        counted: See `counted_positions`; all positions if left out.
        weights: Sample weights of positions, by which these are averaged.
    """
    targets, losses = tf.nest.flatten(outputs), losses_of(model)
    all_of_each = [None] * len(targets)
    margins = []
    for loss, output, where, weight in zip(
        losses, targets, counted or all_of_each, by_output(weights, losses), strict=True
    ):
        known = known_loss(loss)
        output = tf.cast(tf.stop_gradient(with_an_axis(output)), "float32")
        output = classes_last(output, known.axis)
        if known.kind == "binary":
            logits = output if known.from_logits else log_of(output) - log_of(1 - output)
            squares = tf.reduce_mean(logits**2, -1)
        elif known.kind in _CROSS_ENTROPIES and output.shape[-1] > 1:
            highest = tf.math.top_k(output if known.from_logits else log_of(output), 2).values
            squares = (highest[..., 0] - highest[..., 1]) ** 2
        else:
            squares = tf.fill(tf.shape(output)[:-1], _NO_CLASSES)
        where = tf.ones_like(squares) if where is None else where
        if weight is not None:
            where *= tf.cast(at_positions(weight, tf.shape(squares), output), where.dtype)
        where = flat(where)
        # Where all classes but one are masked by −inf, there is nothing to decide.
        where *= tf.cast(tf.math.is_finite(flat(squares)), where.dtype)
        squares = tf.where(tf.math.is_finite(squares), squares, 0.0)
        total = tf.reduce_sum(flat(squares) * where, 1)
        margins.append(tf.math.divide_no_nan(total, tf.reduce_sum(where, 1)))
    return margins


def influence(
    model: Learner,
    y: Any,
    outputs: Any,
    gradients: Sequence[tf.Tensor],
    counted: Counted,
    has_weight: tf.Tensor,
    communicator: Communicator,
    weights: Any = None,
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """What the estimator `influence` multiplies squared gradients by, and divides blocks by.

    An example counts less the larger its gradient by the outputs is, so that all count about the
    same. Each loss counts by its curvature, relative to the squared margin of its output. Graph
    code.

    Args:
        model: A compiled model.
        y: The labels.
        outputs: The outputs of the model.
        gradients: The gradient of each example's loss by the logits of each output.
        counted: See `counted_positions`.
        has_weight: Whether an example has a weight, `(batch,)`.
        communicator: The workers whose batches form one.
        weights: Sample weights of positions, if there are any.

    Returns:
        A factor for each example, `(batch,)`, by output, and the mean squared margin.
    """
    parts, margins = _parts(model), squared_margins(model, outputs, counted, weights)
    columns = []
    for part in parts:
        g = tf.concat([flat(gradients[i]) for i in part], 1)
        counts = has_weight & present([counted[i] for i in part], outputs)
        columns.append(tf.where(counts, tf.reduce_sum(g**2, 1), np.inf))
        columns += [margins[part[0]], *_along(model, y, outputs, gradients, part)]
    of_all = communicator.gather(tf.stack(columns, 1), "residuals")
    by_part = []
    for k, part in enumerate(parts):
        squares, margin, along, lengths = (of_all[:, 4 * k + i] for i in range(4))
        exist = squares < np.inf
        count = tf.reduce_sum(tf.cast(exist, "float32"))
        # Not by a slice, whose bounds XLA treats as constants: it would recompile each step.
        median = tf.gather(tf.sort(squares), tf.cast(count, "int32") // 2)
        share = tf.math.reciprocal_no_nan(squares + median)
        margin = tf.math.divide_no_nan(tf.reduce_sum(tf.where(exist, margin, 0.0)), count)
        existing = tf.where(exist, squares, 0.0)
        bend = _bend(model, part, *(share * column for column in (existing, along, lengths)))
        has_gradient = tf.reduce_any(exist & (squares > 0)) | (len(parts) == 1)
        mine = tf.math.reciprocal_no_nan(columns[4 * k] + median)
        by_part.append((mine * bend, margin, tf.cast(has_gradient & (count > 0), "float32")))
    weight = tf.add_n([counted_in for _, _, counted_in in by_part])
    overall = tf.math.divide_no_nan(
        tf.add_n([m * counted_in for _, m, counted_in in by_part]), weight
    )
    factors = [tf.zeros_like(has_weight, "float32")] * len(gradients)
    for part, (factor, margin, _) in zip(parts, by_part, strict=True):
        for index in part:
            factors[index] = factor * ((overall + LEAST_MARGIN) / (margin + LEAST_MARGIN))
    return factors, overall


def _parts(model: Learner) -> list[list[int]]:
    """The outputs that have a loss each, and those that share one that the model defines."""
    losses = losses_of(model)
    parts = [[index] for index, loss in enumerate(losses) if loss is not None]
    others = [index for index, loss in enumerate(losses) if loss is None]
    return [*parts, others] if others and (has_own_loss(model) or not parts) else parts


def _bend(
    model: Learner, part: list[int], squares: tf.Tensor, along: tf.Tensor, lengths: tf.Tensor
) -> tf.Tensor:
    """The curvature b of the loss in the error e, estimated as g² / (g·e): exact for ½ b e².

    That is 2 for the squared error of one value, at any size of the errors. Cross-entropies, whose
    curvature vanishes as they are learned, count by their weight alone. So do losses that are no
    distance to the labels: whose gradients do not point along the errors.
    """
    if all(known_loss(losses_of(model)[i]).kind in _CROSS_ENTROPIES for i in part):
        return tf.constant(loss_weights_of(model)[part[0]], "float32")
    total = tf.reduce_sum(along)
    is_distance = total > _LEAST_COSINE * tf.reduce_sum(lengths)
    return tf.where(is_distance, tf.math.divide_no_nan(tf.reduce_sum(squares), total), 1.0)


def _along(
    model: Learner, y: Any, outputs: Any, gradients: Sequence[tf.Tensor], part: list[int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Per example: the inner product of gradient and error, and its upper bound |g| |e|.

    Zero if there is no error: there is one where the labels have the shape of the outputs.
    """
    labels, targets = by_output(y, losses_of(model)), tf.nest.flatten(outputs)
    nothing = tf.zeros((tf.shape(targets[0])[0],))
    product, lengths = nothing, nothing
    for index in part:
        label, output = labels[index], targets[index]
        if not (tf.is_tensor(label) and _sizes(label) == _sizes(output)):
            return nothing, nothing
        error = flat(tf.cast(output, "float32")) - flat(tf.cast(label, "float32"))
        gradient = flat(gradients[index])
        product += tf.reduce_sum(gradient * error, 1)
        lengths += tf.norm(gradient, axis=1) * tf.norm(error, axis=1)
    return product, lengths


def _sizes(tensor: tf.Tensor) -> list[int | None]:
    """The sizes of the axes of an example; Keras adds and drops those of one."""
    return [size for size in tensor.shape[1:] if size != 1]
