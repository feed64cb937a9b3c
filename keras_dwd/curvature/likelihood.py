"""The distribution of labels given a model's output, for losses that are log-likelihoods."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.curvature.examples import one_each
from keras_dwd.keras_private import loss_arguments, loss_weights
from keras_dwd.learner import Learner, has_own_loss

_LOSSES = {
    "sparse": (
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.sparse_categorical_crossentropy,
    ),
    "categorical": (keras.losses.CategoricalCrossentropy, keras.losses.categorical_crossentropy),
    "binary": (keras.losses.BinaryCrossentropy, keras.losses.binary_crossentropy),
    "squares": (keras.losses.MeanSquaredError, keras.losses.mean_squared_error),
}


@dataclass(frozen=True)
class KnownLoss:
    """A loss of Keras that is a log-likelihood: its kind in `_LOSSES`, and its arguments."""

    kind: str = ""
    from_logits: bool = True
    axis: int = -1
    ignored: int | None = None
    smoothing: float = 0.0


_OTHER = KnownLoss()


def known_loss(loss: Any) -> KnownLoss:
    """What is known of a loss; `_OTHER` for one that is none of Keras's own log-likelihoods."""
    for kind, (as_class, as_function) in _LOSSES.items():
        if loss is as_function:
            return KnownLoss(kind, from_logits=False)
        if isinstance(loss, as_class) and computes_as(loss, as_class):
            arguments = loss_arguments(loss)
            return KnownLoss(
                kind,
                bool(arguments.get("from_logits", False)),
                int(arguments.get("axis", -1)),
                arguments.get("ignore_class"),
                float(arguments.get("label_smoothing", 0.0)),
            )
    return _OTHER


def name_with_logits(loss: Any) -> str | None:
    """Of a loss of Keras that takes probabilities, the name of the class that can take logits."""
    known = known_loss(loss)
    if known.from_logits or known.kind == "squares":
        return None
    return _LOSSES[known.kind][0].__name__


def computes_as(loss: keras.losses.Loss, parent: type[keras.losses.Loss]) -> bool:
    """Whether a loss runs the code of `parent`: a subclass with a `call` of its own does not."""
    names = ("call", "__call__")
    same = all(getattr(type(loss), name) is getattr(parent, name) for name in names)
    return same and "call" not in vars(loss)


def needs_labels(model: Learner) -> bool:
    """Whether a loss given to `compile` compares outputs with labels."""
    return any(loss is not None for loss in losses_of(model)) and not has_own_loss(model)


def check_likelihoods(model: Learner, unlabelled: bool) -> None:
    """Raise `ValueError` unless labels can be drawn for every output that has a loss.

    Args:
        model: A compiled model.
        unlabelled: Whether they are drawn because there are none, for the message.
    """
    known = ", ".join(as_class.__name__ for as_class, _ in _LOSSES.values())
    losses = losses_of(model)
    for name, loss in zip(output_names(model), losses, strict=True):
        if known_loss(loss).kind or (loss is None and any(other is not None for other in losses)):
            continue
        loss_name = None if loss is None else getattr(loss, "__name__", type(loss).__name__)
        received = f"The loss of {name!r} is {loss_name}."
        if unlabelled:
            raise ValueError(
                "Inputs without labels: the labels are then drawn from the model, whose losses "
                f"must be log-likelihoods for this: {known}, with no `call` of their own. "
                f"{received} Pass the labels: `consolidate(x, y)`."
            )
        raise ValueError(
            f"The estimator 'mc' needs one of the losses {known} at each output, with no `call` "
            f"of its own. {received} 'empirical' and 'influence' take any loss."
        )


def by_logits(model: Learner, outputs: Any, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
    """Gradients with respect to the logits, converted from gradients with respect to the outputs.

    Gradients change only for outputs that are probabilities with a cross-entropy.
    """
    converted = []
    for loss, output, g in zip(losses_of(model), tf.nest.flatten(outputs), gradients, strict=True):
        known = known_loss(loss)
        p = tf.cast(output, g.dtype)
        if known.kind == "binary" and not known.from_logits:
            g = p * (1 - p) * g
        elif known.kind in ("sparse", "categorical") and not known.from_logits:
            g = p * (g - tf.reduce_sum(p * g, known.axis, keepdims=True))
        converted.append(g)
    return converted


Counted = list[tf.Tensor | None]
"""By output: 1.0 at positions that the loss counts, 0.0 at others; `None` if it counts all."""


def counted_positions(
    model: Learner, y: Any, outputs: Any, masks: Mapping[int, tf.Tensor], weights: Any = None
) -> Counted:
    """Which positions of each output the loss counts: none that is masked or of an ignored class.

    Args:
        model: A compiled model.
        y: The labels; `None` if there are none, so that none is of an ignored class.
        outputs: The outputs of the model.
        masks: Keras masks of the outputs, by index in the flat list of outputs.
        weights: Sample weights of positions; those of weight zero do not count either.

    Returns:
        The positions of each output, in its shape without the axis of the classes.
    """
    positions: Counted = []
    flat, losses = [with_an_axis(t) for t in tf.nest.flatten(outputs)], losses_of(model)
    labels, each_weight = (by_output(values, losses) for values in (y, weights))
    for index, (loss, output) in enumerate(zip(losses, flat, strict=True)):
        known, counted = known_loss(loss), []
        shape = tf.shape(classes_last(output, known.axis))[:-1]
        if index in masks:
            counted.append(at_positions(tf.cast(masks[index], "bool"), shape, output))
        if known.ignored is not None and labels[index] is not None:
            not_ignored = tf.cast(labels[index], "float32") != float(known.ignored)
            counted.append(tf.reshape(not_ignored, shape))
        if each_weight[index] is not None:
            positive = tf.cast(each_weight[index], "float32") > 0
            counted.append(at_positions(positive, shape, output))
        together = tf.reduce_all(tf.stack(counted), 0) if counted else None
        positions.append(None if together is None else tf.cast(together, "float32"))
    return positions


def by_output(values: Any, losses: list[Any]) -> list[Any]:
    """Labels or weights for each output, given for all, for those with a loss, or once."""
    flat = tf.nest.flatten(values)
    if len(flat) == 1:
        return flat * len(losses)
    left = iter(flat)
    every = len(flat) == len(losses)
    return [next(left, None) if every or loss is not None else None for loss in losses]


def at_positions(x: tf.Tensor, shape: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    """A mask or weights, with axes added or dropped at the end, in the shape of the positions."""
    rank = len(output.shape) - 1
    if len(x.shape) == rank + 1 and x.shape[-1] == 1:
        x = tf.squeeze(x, -1)
    while len(x.shape) < rank:
        x = x[..., None]
    return tf.broadcast_to(x, shape)


def present(counted: Counted, outputs: Any) -> tf.Tensor:
    """Whether the loss counts any position of an example, `(batch,)`."""
    examples = tf.shape(tf.nest.flatten(outputs)[0])[0]
    any_of_each = [
        tf.ones((examples,), "bool") if each is None else tf.reduce_any(_flat(each) > 0, 1)
        for each in counted
    ]
    return tf.reduce_any(tf.stack(any_of_each), 0)


def positions_of(
    model: Learner, outputs: Any, counted: Counted, weights: Any = None
) -> list[tf.Tensor] | None:
    """Of how many positions the loss of an example at each output is a mean, `(batch,)`.

    Such as the tokens of a sequence. The cross-entropy of an example is Σ_t c_t ℓ_t. The gradients
    of the ℓ_t do not correlate under the model: the expected square of their sum is Σ_t c_t² times
    that of one. Multiplied by 1 / Σ_t c_t², it depends neither on how many positions there are nor
    on how many are padded. With n equal weights that is n, for a mean.

    Args:
        model: A compiled model.
        outputs: The outputs of the model.
        counted: Which positions the loss counts, by output.
        weights: Sample weights of positions, if there are any.

    Returns:
        1 / Σ_t c_t² by output, ones where there are no positions or the loss is no cross-entropy;
        `None` if no output has positions, or if the model has a loss of its own.
    """
    losses, flat = losses_of(model), tf.nest.flatten(outputs)
    factors, several = [], False
    for loss, output, each, weight in zip(
        losses, flat, counted, by_output(weights, losses), strict=True
    ):
        known = known_loss(loss)
        if known.kind not in ("sparse", "categorical", "binary") or len(output.shape) < 3:
            factors.append(tf.ones(tf.shape(output)[:1]))
            continue
        several = True
        shape = tf.shape(classes_last(output, known.axis))[:-1]
        weighted = mask = tf.ones(shape) if each is None else each
        if weight is not None and not one_each(weight):
            weighted = mask * at_positions(tf.cast(weight, "float32"), shape, output)
        divisor = {"mean": mask, "weighted mean": weighted}.get(_reduction(loss))
        total = 1.0 if divisor is None else tf.reduce_sum(_flat(divisor), 1)
        squares = tf.reduce_sum(_flat(weighted) ** 2, 1)
        factors.append(tf.math.divide_no_nan(total**2, squares))
    return factors if several and not has_own_loss(model) else None


def sample_labels(
    model: Learner, y: Any, outputs: Any, first: tf.Tensor, counted: Counted | None = None
) -> Any:
    """Labels drawn from the model's predictive distribution, for each output on its own.

    The random seed depends only on `first`, the number of examples processed before, and on the
    place of the output: an interrupted run that is resumed draws the same labels.

    Args:
        model: A compiled model.
        y: The labels, whose shape and dtype the drawn ones get. Those of a class to be ignored are
            kept. `None` if there are none.
        outputs: The outputs of the model.
        first: The number of examples processed before.
        counted: The positions that the loss counts, as `counted_positions` gives them.

    Returns:
        The labels in the structure of `outputs`; zeros for an output that has no loss.

    Raises:
        ValueError: If the loss of an output is no log-likelihood.
    """
    check_likelihoods(model, unlabelled=y is None)
    flat, losses = tf.nest.flatten(outputs), losses_of(model)
    true_labels, positions = by_output(y, losses), counted or [None] * len(flat)
    drawn = [
        tf.zeros(tf.shape(output)[:1])
        if loss is None
        else _sample_output_labels(loss, labels, output, tf.stack([first, place]), where)
        for place, (loss, labels, output, where) in enumerate(
            zip(losses, true_labels, flat, positions, strict=True)
        )
    ]
    return tf.nest.pack_sequence_as(outputs, drawn) if tf.nest.is_nested(outputs) else drawn[0]


def _sample_output_labels(
    loss: Any, y: Any, output: tf.Tensor, seed: tf.Tensor, counted: tf.Tensor | None
) -> tf.Tensor:
    """Labels of one output, see `sample_labels`."""
    known = known_loss(loss)
    output = tf.cast(tf.stop_gradient(output), "float32")
    shape = tf.shape(output if y is None else y)
    dtype = tf.float32 if y is None else y.dtype
    if known.kind == "squares":
        # The mean of n squares is −log of a normal density of variance n / 2, up to a constant.
        n = tf.cast(tf.size(output[0]), "float32")
        last = tf.cast(tf.shape(with_an_axis(output))[-1], "float32")
        if _reduction(loss) == "sum":  # of means over the last axis
            n = last
        elif counted is not None:
            n = last * tf.reduce_sum(_flat(counted), 1)
            n = tf.reshape(n, [-1] + [1] * (len(output.shape) - 1))
        sample = output + tf.sqrt(n / 2) * tf.random.stateless_normal(tf.shape(output), seed)
        return tf.reshape(sample, shape)
    if known.kind == "binary":
        chance = tf.sigmoid(output) if known.from_logits else output
        success = tf.random.stateless_uniform(tf.shape(chance), seed) < chance
        sample = tf.reshape(tf.cast(success, "float32"), shape)
        return _before_smoothing(sample, known.smoothing, 2, dtype)
    logits = classes_last(output if known.from_logits else log_of(output), known.axis)
    classes = logits.shape[-1]
    rows = tf.reshape(logits, (-1, classes))
    # Classes masked by −inf are not drawn; other values would give invalid labels.
    rows = tf.where(tf.math.is_finite(rows), rows, tf.where(rows < 0, -1e30, 0.0))
    sample = tf.random.stateless_categorical(rows, 1, seed)[:, 0]
    if known.kind == "categorical":
        one_hot = tf.reshape(tf.one_hot(sample, classes), tf.shape(logits))
        sample = tf.reshape(_classes_back(one_hot, known.axis), shape)
        width = (output if y is None else y).shape[-1]
        return _before_smoothing(sample, known.smoothing, width, dtype)
    if y is None:
        return tf.reshape(sample, tf.shape(logits)[:-1])
    sample = tf.reshape(tf.cast(sample, dtype), shape)
    if known.ignored is not None:
        sample = tf.where(tf.cast(y, "float32") == float(known.ignored), y, sample)
    return sample


def _before_smoothing(labels: tf.Tensor, smoothing: float, classes: int, dtype: Any) -> tf.Tensor:
    """The labels from which `label_smoothing` makes `labels`: the loss is then −log p of these."""
    if not 0 < smoothing < 1:
        return tf.cast(labels, dtype)
    return (labels - smoothing / classes) / (1 - smoothing)


def negated(model: Learner, outputs: Any) -> tf.Tensor:
    """The outputs, as logits or probabilities, that belong to the negated logits."""
    known = _OTHER if tf.nest.is_nested(model.output) else known_loss(losses_of(model)[0])
    kinds = ("sparse", "categorical", "binary")
    if known.kind not in kinds:
        names = ", ".join(_LOSSES[kind][0].__name__ for kind in kinds)
        raise ValueError(
            f"The estimator 'negated' needs one of the losses {names} on a single output, with no "
            f"`call` of its own. The model's loss is {model.loss!r}. 'empirical' and 'influence' "
            "take any loss."
        )
    if known.from_logits:
        return -outputs
    if known.kind == "binary":
        return 1 - outputs
    return tf.cast(tf.nn.softmax(-log_of(outputs), known.axis), outputs.dtype)


_REDUCTIONS = {
    "sum_over_batch_size": "mean",
    "mean": "mean",
    "mean_with_sample_weight": "weighted mean",
    "sum": "sum",
    "none": "sum",  # the gradient of several losses is that of their sum
    None: "sum",
}


def reductions(model: Learner) -> set[str]:
    """How the losses combine examples: `"mean"`, `"weighted mean"` or `"sum"`.

    A weighted mean divides by the sum of the sample weights of the batch.
    """
    return {_reduction(loss) for loss in losses_of(model) if loss is not None}


def _reduction(loss: Any) -> str:
    return _REDUCTIONS.get(getattr(loss, "reduction", "mean"), "mean")


def sums_examples(model: Learner) -> bool:
    """Whether the loss is a sum over the examples of a batch instead of a mean.

    Raises:
        ValueError: If it is a sum at some outputs and a mean at others.
    """
    kinds = reductions(model)
    if "sum" in kinds and len(kinds) > 1:
        raise ValueError(
            "The estimators 'batch' and 'adam' need losses that are all sums over the batch or all "
            "means. Of this model some have the reduction 'sum' or None, others do not: give all "
            "the same `reduction`, or use the estimator 'empirical' or 'influence'."
        )
    return kinds == {"sum"}


def example_weights(
    model: Learner, sample_weight: Any, counted: Counted, per_example: bool
) -> tf.Tensor | None:
    """What the squared gradient of each example is multiplied by, `(batch,)`; `None` for ones.

    A loss that is a weighted mean gives an example its part of the sum of all weights. Then
    weights of a hundred do what weights of one do, as they do in the loss.

    Args:
        model: A compiled model.
        sample_weight: A tensor, or a structure of them for several outputs.
        counted: Which positions the loss counts, by output.
        per_example: Whether `sample_weight` has one weight per example. Weights of positions are
            part of the loss of each example already.

    Raises:
        ValueError: If the losses would need different weights.
    """
    kinds = reductions(model)
    if "weighted mean" not in kinds:
        return tf.cast(tf.reshape(sample_weight, (-1,)), "float32") if per_example else None
    if len(kinds) > 1 or (len(counted) > 1 and not per_example):
        raise ValueError(
            "With the reduction 'mean_with_sample_weight' and several outputs, `sample_weight` "
            "must be one array with a weight per example, and all losses must have this reduction: "
            "otherwise no single weight says how much an example counts. Use the estimator "
            "'batch', or the reduction 'sum_over_batch_size'."
        )
    weights = tf.cast(sample_weight, "float32")
    if per_example:
        weights = tf.reshape(weights, (-1,))
    elif counted[0] is None:
        weights = tf.reduce_mean(_flat(weights), 1)
    else:
        while len(weights.shape) < len(counted[0].shape):
            weights = weights[..., None]
        weights = tf.reshape(tf.broadcast_to(weights, tf.shape(counted[0])), tf.shape(counted[0]))
        total = tf.reduce_sum(_flat(weights * counted[0]), 1)
        weights = tf.math.divide_no_nan(total, tf.reduce_sum(_flat(counted[0]), 1))
    return tf.math.divide_no_nan(weights, tf.reduce_mean(weights))


def with_an_axis(x: tf.Tensor) -> tf.Tensor:
    """Outputs of shape `(batch,)` with an axis more."""
    return x[:, None] if len(x.shape) == 1 else x


def classes_last(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Move the axis of the classes to the end."""
    order = [i for i in range(len(x.shape)) if i != axis % len(x.shape)]
    return x if axis in (-1, len(x.shape) - 1) else tf.transpose(x, [*order, axis % len(x.shape)])


def _classes_back(x: tf.Tensor, axis: int) -> tf.Tensor:
    """The inverse of `classes_last`."""
    order = [i for i in range(len(x.shape)) if i != axis % len(x.shape)]
    order.append(axis % len(x.shape))
    return tf.transpose(x, np.argsort(order))


def _flat(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, (tf.shape(x)[0], -1))


def log_of(probabilities: tf.Tensor) -> tf.Tensor:
    """The logarithm of probabilities, as float32, from the smallest that losses of Keras take."""
    return tf.math.log(tf.maximum(tf.cast(probabilities, "float32"), keras.config.epsilon()))


def output_names(model: Learner) -> list[str]:
    """The names of the outputs in `compile` and `fit`, in the order of `model.outputs`."""
    return sorted(model.output) if isinstance(model.output, dict) else list(model.output_names)


def losses_of(model: Learner) -> list[Any]:
    """The loss of each output, in the order of `model.outputs`; `None` for outputs without one."""
    loss: Any = model.loss
    if isinstance(loss, dict):
        losses = [loss.get(name) for name in output_names(model)]
    else:
        losses = list(loss) if isinstance(loss, (list, tuple)) else [loss]
    losses += [losses[-1] if len(losses) == 1 else None] * (len(model.outputs) - len(losses))
    return [keras.losses.get(item) if isinstance(item, str) else item for item in losses]


def loss_weights_of(model: Learner) -> list[float]:
    """The factor of the loss of each output, in the order of `model.outputs`."""
    weights, losses = loss_weights(model), losses_of(model)
    if isinstance(weights, dict):
        return [float(weights.get(name, 1.0)) for name in output_names(model)]
    return [1.0 if weight is None else float(weight) for weight in by_output(weights, losses)]
