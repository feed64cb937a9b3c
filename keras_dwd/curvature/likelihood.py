"""How labels are distributed given a model's output: what its loss is the log-likelihood of."""

from typing import Any

import keras
import tensorflow as tf

from keras_dwd.checks import losses_of

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
    """Which of the known losses it is, and whether it is one of logits."""
    for kind, (as_class, as_function) in _LOSSES.items():
        if isinstance(loss, as_class):
            return kind, bool(loss.get_config().get("from_logits", False))
        if loss is as_function:
            return kind, False
    return None


def _kind(model: Any, estimator: str, kinds: tuple[str, ...]) -> tuple[str, bool]:
    known = None if tf.nest.is_nested(model.output) else _known(losses_of(model)[0])
    if known is None or known[0] not in kinds:
        names = ", ".join(_LOSSES[kind][0].__name__ for kind in kinds)
        raise ValueError(
            f"The estimator {estimator!r} needs one of the losses {names} on a single output. The "
            f"model's loss is {model.loss!r}. 'exact' and 'influence' take any loss."
        )
    return known


def by_logits(model: Any, outputs: Any, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
    """Gradients by the logits, from those by the outputs, of cross-entropies of probabilities."""
    found = []
    for loss, output, g in zip(losses_of(model), tf.nest.flatten(outputs), gradients, strict=True):
        kind, from_logits = _known(loss) or ("", True)
        p = tf.cast(output, g.dtype)
        if kind == "binary" and not from_logits:
            g = p * (1 - p) * g
        elif kind in ("sparse", "categorical") and not from_logits:
            g = p * (g - tf.reduce_sum(p * g, -1, keepdims=True))
        found.append(g)
    return found


def squared_margins(model: Any, outputs: Any) -> tf.Tensor:
    """The squared margin of each example, `(batch,)`: how far logits may move before it is lost.

    That of a cross-entropy is the distance between the two highest logits, or of a binary one from
    the logit to zero; of any other loss there is none, and it counts as one.
    """
    found = []
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
        found.append(tf.reduce_mean(tf.reshape(squares, (tf.shape(squares)[0], -1)), 1))
    if not found:
        return tf.ones(tf.shape(tf.nest.flatten(outputs)[0])[:1])
    return tf.add_n(found) / len(found)


def drawn(model: Any, y: Any, outputs: Any, first: tf.Tensor) -> tf.Tensor:
    """Labels, shaped as `y`, drawn from the distribution that the model's output stands for.

    Which ones depends on how many examples came before, `first`, and nothing else: a run that was
    interrupted goes on as it would have.
    """
    kind, from_logits = _kind(model, "sampled", tuple(_LOSSES))
    outputs = tf.cast(tf.stop_gradient(outputs), "float32")
    seed = tf.stack([first, 0])
    if kind == "squares":
        # A mean of n squares is −log of a normal density of variance n / 2, up to a constant.
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
    rows = tf.where(tf.math.is_finite(rows), rows, 0.0)  # or labels may be of no class
    sample = tf.random.stateless_categorical(rows, 1, seed)[:, 0]
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
    return tf.cast(tf.nn.softmax(-_log(outputs)), outputs.dtype)


def _log(probabilities: tf.Tensor) -> tf.Tensor:
    return tf.math.log(tf.maximum(tf.cast(probabilities, "float32"), keras.config.epsilon()))
