"""How labels are distributed given a model's output: what its loss is the log-likelihood of."""

from typing import Any

import keras
import tensorflow as tf

_LOSSES = {
    "sparse": (
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.sparse_categorical_crossentropy,
    ),
    "categorical": (keras.losses.CategoricalCrossentropy, keras.losses.categorical_crossentropy),
    "binary": (keras.losses.BinaryCrossentropy, keras.losses.binary_crossentropy),
    "squares": (keras.losses.MeanSquaredError, keras.losses.mean_squared_error),
}


def _kind(model: Any, estimator: str, known: tuple[str, ...]) -> tuple[str, bool]:
    """Which of the known losses the model has, and whether it is one of logits."""
    loss = keras.losses.get(model.loss) if isinstance(model.loss, str) else model.loss
    for kind in known:
        as_class, as_function = _LOSSES[kind]
        if isinstance(loss, as_class):
            return kind, bool(loss.get_config().get("from_logits", False))
        if loss is as_function:
            return kind, False
    names = ", ".join(_LOSSES[kind][0].__name__ for kind in known)
    raise ValueError(
        f"The estimator {estimator!r} needs one of the losses {names} on a single output. The "
        f"model's loss is {model.loss!r}. 'exact' and 'influence' take any loss."
    )


def drawn(model: Any, y: Any, outputs: Any) -> tf.Tensor:
    """Labels, shaped as `y`, drawn from the distribution that the model's output stands for."""
    kind, from_logits = _kind(model, "sampled", tuple(_LOSSES))
    outputs = tf.cast(tf.stop_gradient(outputs), "float32")
    if kind == "squares":
        # A mean of n squares is −log of a normal density of variance n / 2, up to a constant.
        n = tf.cast(tf.size(outputs[0]), "float32")
        sample = outputs + tf.sqrt(n / 2) * tf.random.normal(tf.shape(outputs))
        return tf.reshape(sample, tf.shape(y))
    if kind == "binary":
        chance = tf.sigmoid(outputs) if from_logits else outputs
        sample = tf.cast(tf.random.uniform(tf.shape(chance)) < chance, y.dtype)
        return tf.reshape(sample, tf.shape(y))
    logits = outputs if from_logits else tf.math.log(outputs)
    classes = outputs.shape[-1]
    sample = tf.random.categorical(tf.reshape(logits, (-1, classes)), 1)[:, 0]
    if kind == "categorical":
        sample = tf.one_hot(sample, classes)
    return tf.reshape(tf.cast(sample, y.dtype), tf.shape(y))


def negated(model: Any, outputs: Any) -> tf.Tensor:
    """The outputs with the sign of the logits turned."""
    kind, from_logits = _kind(model, "negated", ("sparse", "categorical", "binary"))
    if from_logits:
        return -outputs
    if kind == "binary":
        return 1 - outputs
    return tf.nn.softmax(-tf.math.log(outputs))
