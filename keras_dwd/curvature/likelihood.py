"""The distribution of labels given a model's output, for losses that are log-likelihoods."""

from typing import Any

import keras
import tensorflow as tf

from keras_dwd.learner import Learner

_LOSSES = {
    "sparse": (
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.sparse_categorical_crossentropy,
    ),
    "categorical": (keras.losses.CategoricalCrossentropy, keras.losses.categorical_crossentropy),
    "binary": (keras.losses.BinaryCrossentropy, keras.losses.binary_crossentropy),
    "squares": (keras.losses.MeanSquaredError, keras.losses.mean_squared_error),
}


def _known(loss: Any) -> tuple[str, bool] | None:
    """The kind of a known loss, and whether it takes logits; `None` for any other loss."""
    for kind, (as_class, as_function) in _LOSSES.items():
        if isinstance(loss, as_class):
            return kind, bool(loss.get_config().get("from_logits", False))
        if loss is as_function:
            return kind, False
    return None


def _kind(model: Learner, estimator: str, kinds: tuple[str, ...]) -> tuple[str, bool]:
    known = None if tf.nest.is_nested(model.output) else _known(losses_of(model)[0])
    if known is None or known[0] not in kinds:
        names = ", ".join(_LOSSES[kind][0].__name__ for kind in kinds)
        raise ValueError(
            f"The estimator {estimator!r} needs one of the losses {names} on a single output. The "
            f"model's loss is {model.loss!r}. 'empirical' and 'influence' take any loss."
        )
    return known


def by_logits(model: Learner, outputs: Any, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
    """Gradients with respect to the logits, converted from gradients with respect to the outputs.

    Gradients change only for outputs that are probabilities with a cross-entropy.
    """
    converted = []
    for loss, output, g in zip(losses_of(model), tf.nest.flatten(outputs), gradients, strict=True):
        kind, from_logits = _known(loss) or ("", True)
        p = tf.cast(output, g.dtype)
        if kind == "binary" and not from_logits:
            g = p * (1 - p) * g
        elif kind in ("sparse", "categorical") and not from_logits:
            g = p * (g - tf.reduce_sum(p * g, -1, keepdims=True))
        converted.append(g)
    return converted


def squared_margins(model: Learner, outputs: Any) -> tf.Tensor:
    """The squared margin of each example, `(batch,)`, averaged over positions and outputs.

    The margin is how far the logits may move before the prediction changes. For a cross-entropy it
    is the distance between the two highest logits, for a binary cross-entropy the distance of the
    logit from zero. Outputs with other losses have no margin; if there are no others, it is one.
    """
    margins = []
    for loss, output in zip(losses_of(model), tf.nest.flatten(outputs), strict=True):
        kind, from_logits = _known(loss) or ("", True)
        output = tf.cast(tf.stop_gradient(output), "float32")
        if kind == "binary":
            logits = output if from_logits else _log(output) - _log(1 - output)
            squares = logits**2
        elif kind in ("sparse", "categorical") and output.shape[-1] > 1:
            highest = tf.math.top_k(output if from_logits else _log(output), 2).values
            squares = (highest[..., 0] - highest[..., 1]) ** 2
        else:
            continue
        margins.append(tf.reduce_mean(tf.reshape(squares, (tf.shape(squares)[0], -1)), 1))
    if not margins:
        return tf.ones(tf.shape(tf.nest.flatten(outputs)[0])[:1])
    return tf.add_n(margins) / len(margins)


def sample_labels(model: Learner, y: Any, outputs: Any, first: tf.Tensor) -> tf.Tensor:
    """Labels in the shape of `y`, drawn from the model's predictive distribution.

    The random seed depends only on `first`, the number of examples processed before: an
    interrupted run that is resumed draws the same labels.
    """
    kind, from_logits = _kind(model, "mc", tuple(_LOSSES))
    outputs = tf.cast(tf.stop_gradient(outputs), "float32")
    seed = tf.stack([first, 0])
    if kind == "squares":
        # The mean of n squares is −log of a normal density of variance n / 2, up to a constant.
        n = tf.cast(tf.size(outputs[0]), "float32")
        sample = outputs + tf.sqrt(n / 2) * tf.random.stateless_normal(tf.shape(outputs), seed)
        return tf.reshape(sample, tf.shape(y))
    if kind == "binary":
        chance = tf.sigmoid(outputs) if from_logits else outputs
        sample = tf.cast(tf.random.stateless_uniform(tf.shape(chance), seed) < chance, y.dtype)
        return tf.reshape(sample, tf.shape(y))
    logits = outputs if from_logits else _log(outputs)
    classes = outputs.shape[-1]
    rows = tf.reshape(logits, (-1, classes))
    rows = tf.where(tf.math.is_finite(rows), rows, 0.0)  # else labels may be invalid
    sample = tf.random.stateless_categorical(rows, 1, seed)[:, 0]
    if kind == "categorical":
        sample = tf.one_hot(sample, classes)
    return tf.reshape(tf.cast(sample, y.dtype), tf.shape(y))


def negated(model: Learner, outputs: Any) -> tf.Tensor:
    """The outputs, as logits or probabilities, that belong to the negated logits."""
    kind, from_logits = _kind(model, "negated", ("sparse", "categorical", "binary"))
    if from_logits:
        return -outputs
    if kind == "binary":
        return 1 - outputs
    return tf.cast(tf.nn.softmax(-_log(outputs)), outputs.dtype)


def _log(probabilities: tf.Tensor) -> tf.Tensor:
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
