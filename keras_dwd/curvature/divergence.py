"""How far an output of a model is from that of a teacher, in the terms of its loss."""

from typing import Any

import keras
import tensorflow as tf

from keras_dwd.curvature.likelihood import classes_last, computes_as, known_loss, log_of
from keras_dwd.keras_private import set_mask

# Keras losses whose labels look like outputs, so the teacher's output can serve as label.
_OF_VALUES = {
    keras.losses.MeanSquaredError: keras.losses.mean_squared_error,
    keras.losses.MeanAbsoluteError: keras.losses.mean_absolute_error,
    keras.losses.MeanAbsolutePercentageError: keras.losses.mean_absolute_percentage_error,
    keras.losses.MeanSquaredLogarithmicError: keras.losses.mean_squared_logarithmic_error,
    keras.losses.Huber: keras.losses.huber,
    keras.losses.LogCosh: keras.losses.log_cosh,
    keras.losses.Poisson: keras.losses.poisson,
    keras.losses.KLDivergence: keras.losses.kl_divergence,
    keras.losses.CosineSimilarity: keras.losses.cosine_similarity,
}

# In place of the logits of classes that are left out. Finite, as ∞ − ∞ is not a number.
_LEFT_OUT = -1e9


class Divergence:
    """The divergence of an output from that of a teacher, in the form that its loss suggests.

    - Categorical cross-entropies: T² KL(softmax(t / T) ‖ softmax(s / T)) of the logits t and s.
    - Binary cross-entropy: T² times the KL divergence of Bernoulli distributions with logits t / T
      and s / T, as a mean over the last axis.
    - Losses of values, such as the mean squared error: the loss with the teacher's output as label.

    Args:
        loss: The loss of the output: an object or function of Keras.
        temperature: T.

    Raises:
        ValueError: If the loss is none of these, or if it has a `call` of its own.
    """

    def __init__(self, loss: Any, temperature: float):
        self._loss, self._temperature = loss, temperature
        self._known = known_loss(loss)
        self._kind = self._known.kind
        if self._kind in ("", "squares"):
            self._kind = "values"
            if not _is_of_values(loss):
                raise ValueError(
                    "must have a categorical or binary cross-entropy or a loss that compares "
                    "values, of Keras and with no `call` of its own: "
                    f"{', '.join(kind.__name__ for kind in _OF_VALUES)}. Received: {loss!r}"
                )

    @property
    def reduction(self) -> Any:
        """How the loss combines the values of its positions."""
        return getattr(self._loss, "reduction", "sum_over_batch_size")

    def size(self, output: Any) -> int:
        """The number of classes or units of an output, 1 if it is not known."""
        if len(output.shape) < 2:
            return 1
        return output.shape[-1 if self._kind == "values" else self._known.axis] or 1

    def labelled(self, y: Any, output: tf.Tensor, counted: tf.Tensor | None) -> tf.Tensor:
        """Which classes or units have labels in a batch, `(size,)`. Graph code.

        Args:
            y: The labels of the output.
            output: The output.
            counted: Positive at the positions that the loss counts; `None` if it counts all.
        """
        size = self.size(output)
        if self._kind == "values" or size == 1:
            return tf.ones((size,), "bool")
        if self._kind == "sparse":
            labels = tf.reshape(tf.cast(y, "int32"), (-1,))
            valid = (labels >= 0) & (labels < size)
            if counted is not None:
                valid &= tf.reshape(counted, (-1,)) > 0
            labels = tf.where(valid, labels, -1)  # which are not counted
            return tf.math.unsorted_segment_sum(tf.ones_like(labels, "float32"), labels, size) > 0
        # Smoothed labels are above zero at all classes.
        least = 0.5 if self._kind == "binary" else 1 / size
        labels = classes_last(tf.reshape(y, tf.shape(output)), self._known.axis)
        positive = tf.cast(labels, "float32") >= least
        if counted is not None:
            positive &= (counted > 0)[..., None]
        return tf.reduce_any(positive, axis=range(len(positive.shape) - 1))

    def values(
        self, teacher: tf.Tensor, student: tf.Tensor, old: tf.Tensor, axis: int | None = None
    ) -> tf.Tensor:
        """The divergence at each position, without the axis of the classes. Graph code.

        Args:
            teacher: The output of the teacher.
            student: The output of the model, of the same shape.
            old: Which classes or units are compared, `(size,)` boolean.
            axis: The axis of the classes; that of the loss by default.
        """
        teacher, student = (tf.cast(x, "float32") for x in (teacher, student))
        if self._kind == "values":
            call = self._loss.call if isinstance(self._loss, keras.losses.Loss) else self._loss
            return call(teacher, tf.where(old, student, teacher))
        if len(student.shape) == 1:  # (batch,)
            teacher, student = teacher[:, None], student[:, None]
        axis = self._known.axis if axis is None else axis
        teacher, student = (classes_last(self._logits(x), axis) for x in (teacher, student))
        # Logits may be −∞ for classes that are not allowed.
        both = old & tf.math.is_finite(teacher) & tf.math.is_finite(student)
        if self._kind == "binary":
            t, s = (tf.where(both, x, 0.0) / self._temperature for x in (teacher, student))
            on = tf.sigmoid(t) * (tf.math.log_sigmoid(t) - tf.math.log_sigmoid(s))
            off = tf.sigmoid(-t) * (tf.math.log_sigmoid(-t) - tf.math.log_sigmoid(-s))
            return self._temperature**2 * tf.reduce_mean(on + off, -1)
        t, s = (
            tf.nn.log_softmax(tf.where(both, tf.where(both, x, 0.0) / self._temperature, _LEFT_OUT))
            for x in (teacher, student)
        )
        return self._temperature**2 * tf.reduce_sum(tf.exp(t) * (t - s), -1)

    def _logits(self, output: tf.Tensor) -> tf.Tensor:
        if self._known.from_logits:
            return output
        if self._kind == "binary":
            return log_of(output) - log_of(1 - output)
        return log_of(output)

    def reduced(
        self, values: tf.Tensor, output: tf.Tensor, y: Any = None, sample_weight: Any = None
    ) -> tf.Tensor:
        """The values reduced as the loss reduces its own, a float32 scalar. Graph code.

        Positions that Keras masks, or that have a class to be ignored as label, do not count.

        Args:
            values: What `values` gives, or a value for each example.
            output: The output of the model, with its mask.
            y: The labels of the output.
            sample_weight: The sample weights of the output.
        """
        if self._known.ignored is not None:
            not_ignored = tf.cast(y, "float32") != float(self._known.ignored)
            set_mask(values, tf.reshape(not_ignored, tf.shape(values)))
        total = _Values(values, self.reduction)(output, output, sample_weight)
        return tf.reduce_sum(tf.cast(total, "float32"))


class _Values(keras.losses.Loss):
    """A loss whose values are given: Keras applies the mask, the weights and the reduction."""

    def __init__(self, values: tf.Tensor, reduction: Any):
        super().__init__(name="divergence", reduction=reduction)
        self._values = values

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._values


def _is_of_values(loss: Any) -> bool:
    return any(
        loss is function or (isinstance(loss, kind) and computes_as(loss, kind))
        for kind, function in _OF_VALUES.items()
    )
