"""The decoupled step: applies the pull after the optimizer's own update, stable at any strength."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from keras_dwd import keras_private

Pull = Callable[[dict[int, tf.Tensor]], None]


@keras.saving.register_keras_serializable("keras_dwd")
class DWDOptimizer(keras_private.OptimizerWrapper):
    """Wraps an optimizer; the pull of a `DWDModel` becomes a proximal step after each update.

    As AdamW decouples weight decay from the gradient, this decouples the pull. Let θ' be the
    parameters after the optimizer's own update with the gradient of the loss alone. Then

        θ ← (d/η + Λ)⁻¹ (d/η · θ' + Λ c),

    which minimizes the penalty plus half the squared distance to θ' in the metric d/η of the
    optimizer. With the learning rate η, the metric is 1/η for SGD and (√v̂ + ε)/η for Adam and its
    variants with the second moment v̂; where Λ has Kronecker factors, it is the mean over the layer.
    Adding the pull to the gradient diverges once η·λ·F exceeds 2 and oscillates under Adam; this
    step is stable at any strength. For a weak pull the two agree.

    Learning-rate schedules, clipping, weight decay, gradient accumulation, averaged weights and
    loss scaling are those of the wrapped optimizer, and so are its attributes, to read and to set.
    Without a pull it does exactly what the wrapped optimizer does.

    Args:
        inner_optimizer: A Keras optimizer, its name or its configuration: SGD, Adam, AdamW, Nadam,
            Adamax, RMSprop or Adagrad.
        name: Name of this optimizer.

    Example:

    ```python
    model.compile(DWDOptimizer(keras.optimizers.Adam(1e-3)), loss)
    ```

    Reference:
        [Loshchilov & Hutter, 2019](https://arxiv.org/abs/1711.05101), for decoupling;
        [Parikh & Boyd, 2014](https://web.stanford.edu/~boyd/papers/prox_algs.html), section 1.1,
        for proximal steps.
    """

    def __init__(self, inner_optimizer: Any = "adam", name: str = "dwd_optimizer"):
        inner: Any = keras.optimizers.get(inner_optimizer)
        if not isinstance(inner, tuple(_METRICS)):
            known = ", ".join(kind.__name__ for kind in _METRICS)
            raise ValueError(
                f"`inner_optimizer` must be one whose metric is known: {known}. Received: "
                f"{inner_optimizer!r}"
            )
        super().__init__(inner, name)

    @contextmanager
    def pulling(self, pull: Pull) -> Iterator[None]:
        """A context in which `pull` is called after each update; used by `DWDModel`.

        Args:
            pull: Called with d/η by the `id` of each variable, in the shape of the variable or as a
                scalar.
        """
        inner = self.inner_optimizer

        def then(variables: list[Any], learning_rate: Any) -> None:
            rate = tf.cast(learning_rate, "float32")
            metric = next(m for kind, m in _METRICS.items() if isinstance(inner, kind))
            pull({id(v): tf.cast(metric(inner, v), "float32") / rate for v in variables})

        # Called once per real update, within `apply`: not for each accumulated batch, and before
        # the optimizer averages the weights.
        with keras_private.after_each_update(inner, then):
            yield

    def second_moment(self, variable: keras.Variable) -> tf.Tensor:
        """The optimizer's moving average of a variable's squared gradients, in its shape.

        It is bias-corrected for Adam, AdamW and Nadam, and not for RMSprop.

        Raises:
            ValueError: If the wrapped optimizer is none of these.
        """
        inner = self.inner_optimizer
        if isinstance(inner, keras.optimizers.RMSprop):
            return keras_private.second_moment(inner, variable).value
        if not isinstance(inner, (keras.optimizers.Adam, keras.optimizers.Nadam)):
            raise ValueError(
                "The estimator 'adam' needs a DWDOptimizer around Adam, AdamW, Nadam or RMSprop. "
                f"Received: {type(inner).__name__}"
            )
        return _corrected(inner, keras_private.second_moment(inner, variable), inner.iterations)

    def get_config(self) -> dict[str, Any]:
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        return {"name": self.name, "inner_optimizer": inner}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "DWDOptimizer":
        inner = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )
        return cls(inner, config["name"])


def find(optimizer: Any) -> DWDOptimizer | None:
    """The `DWDOptimizer` inside an optimizer, such as a `LossScaleOptimizer`, or `None`."""
    while optimizer is not None and not isinstance(optimizer, DWDOptimizer):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


def _sgd(optimizer: Any, variable: Any) -> Any:
    return 1.0 - optimizer.momentum  # with momentum, steps add up to η / (1 − momentum)


def _adam(optimizer: Any, variable: Any) -> Any:
    amsgrad = getattr(optimizer, "amsgrad", False)
    slot = keras_private.largest_second_moment if amsgrad else keras_private.second_moment
    steps = tf.convert_to_tensor(optimizer.iterations) + 1
    return tf.sqrt(_corrected(optimizer, slot(optimizer, variable), steps)) + optimizer.epsilon


def _corrected(optimizer: Any, v: Any, steps: Any) -> Any:
    """A second moment with the bias correction of Adam."""
    return v.value / (1 - tf.pow(tf.cast(optimizer.beta_2, v.dtype), tf.cast(steps, v.dtype)))


def _adamax(optimizer: Any, variable: Any) -> Any:
    return keras_private.largest_gradient(optimizer, variable).value + optimizer.epsilon


def _rmsprop(optimizer: Any, variable: Any) -> Any:
    moment = keras_private.second_moment(optimizer, variable).value
    if optimizer.centered:
        moment = moment - tf.square(keras_private.mean_gradient(optimizer, variable).value)
    return tf.sqrt(moment + optimizer.epsilon) * (1.0 - optimizer.momentum)


def _adagrad(optimizer: Any, variable: Any) -> Any:
    sums = keras_private.sum_of_squares(optimizer, variable)
    return tf.sqrt(sums.value + optimizer.epsilon)


# The metric d of each type of optimizer; AdamW is a subclass of Adam.
_METRICS: dict[type, Callable[[Any, Any], Any]] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.Nadam: _adam,
    keras.optimizers.Adamax: _adamax,
    keras.optimizers.RMSprop: _rmsprop,
    keras.optimizers.Adagrad: _adagrad,
}
