"""The decoupled step: the pull applied after the optimizer's own update, stable at any strength."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

Pull = Callable[[dict[int, tf.Tensor]], None]


@keras.saving.register_keras_serializable("keras_dwd")
class DWDOptimizer(keras.optimizers.Optimizer):
    """Wraps an optimizer; the pull of a `DWDModel` becomes a proximal step after each update.

    As AdamW decouples weight decay from the gradient, this decouples the pull. With θ' the
    parameters after the optimizer's own update, made from the gradient of the loss alone,

        θ ← (d/η + Λ)⁻¹ (d/η · θ' + Λ c),

    which minimises the penalty plus the squared distance to θ' in the metric d/η of the optimizer:
    1/η for SGD, (√v̂ + ε)/η for Adam and its kin, v̂ their second moment; where Λ has Kronecker
    factors, its mean over the layer. The gradient form diverges once η·λ·F exceeds 2 and trembles
    under Adam; this one is stable at any strength. Where the pull is weak, the two agree.

    Learning-rate schedules, clipping, weight decay, gradient accumulation, averaged weights and
    loss scaling are those of the wrapped optimizer. Without a pull it does exactly what the wrapped
    optimizer does.

    Args:
        inner_optimizer: A Keras optimizer, its name or its configuration: SGD, Adam, AdamW, Nadam,
            Adamax, RMSprop or Adagrad.
        name: Of this optimizer.

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
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer: Any = inner

    @contextmanager
    def pulling(self, pull: Pull) -> Iterator[None]:
        """Within this, `pull` is called at the end of each update; `DWDModel` uses it.

        Args:
            pull: Called with d/η per variable, each of the variable's shape or a scalar, by the
                `id` of the variable.
        """
        inner = self.inner_optimizer
        update = inner._backend_update_step

        def update_and_pull(gradients: Any, variables: Any, learning_rate: Any) -> None:
            update(gradients, variables, learning_rate)
            rate = tf.cast(learning_rate, "float32")
            metric = next(m for kind, m in _METRICS.items() if isinstance(inner, kind))
            pull({id(v): tf.cast(metric(inner, v), "float32") / rate for v in variables})

        # Once per real update, in the middle of `apply`: accumulated batches do not count one by
        # one, and what averages the weights afterwards sees them pulled.
        inner.__dict__["_backend_update_step"] = update_and_pull
        try:
            yield
        finally:
            del inner.__dict__["_backend_update_step"]

    def second_moment(self, variable: keras.Variable) -> tf.Tensor:
        """The moving mean of a variable's squared gradients, of its shape, as the optimizer has it.

        That of Adam and its kin is bias-corrected, that of RMSprop is not.

        Raises:
            ValueError: If the wrapped optimizer, Adam or RMSprop or one of their kin, keeps none.
        """
        inner = self.inner_optimizer
        if isinstance(inner, keras.optimizers.RMSprop):
            return inner._velocities[inner._get_variable_index(variable)].value
        if not isinstance(inner, (keras.optimizers.Adam, keras.optimizers.Nadam)):
            raise ValueError(
                "The estimator 'adam' needs a DWDOptimizer around Adam, AdamW, Nadam or RMSprop. "
                f"Received: {type(inner).__name__}"
            )
        return _adam_moment(inner, variable, inner.iterations, inner._velocities)

    def build(self, var_list: Any) -> None:
        self.inner_optimizer.build(var_list)
        super().build(var_list)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        if not self.built:
            self.build(trainable_variables)
        self.inner_optimizer.apply(grads, trainable_variables)

    @property
    def variables(self) -> Any:
        return self._variables + self.inner_optimizer.variables

    @property
    def learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        return self.inner_optimizer.iterations

    def scale_loss(self, loss: Any) -> Any:
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Any) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

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
    """The `DWDOptimizer` in an optimizer, such as one that scales the loss around it."""
    while optimizer is not None and not isinstance(optimizer, DWDOptimizer):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


def _sgd(optimizer: Any, variable: Any) -> Any:
    return 1.0 - optimizer.momentum  # steps add up to η / (1 − momentum)


def _adam(optimizer: Any, variable: Any) -> Any:
    amsgrad = getattr(optimizer, "amsgrad", False)
    slots = optimizer._velocity_hats if amsgrad else optimizer._velocities
    steps = tf.convert_to_tensor(optimizer.iterations) + 1
    moment = _adam_moment(optimizer, variable, steps, slots)
    return tf.sqrt(moment) + optimizer.epsilon


def _adam_moment(optimizer: Any, variable: Any, steps: Any, slots: Any) -> Any:
    v = slots[optimizer._get_variable_index(variable)]
    return v.value / (1 - tf.pow(tf.cast(optimizer.beta_2, v.dtype), tf.cast(steps, v.dtype)))


def _adamax(optimizer: Any, variable: Any) -> Any:
    return optimizer._u[optimizer._get_variable_index(variable)].value + optimizer.epsilon


def _rmsprop(optimizer: Any, variable: Any) -> Any:
    index = optimizer._get_variable_index(variable)
    moment = optimizer._velocities[index].value
    if optimizer.centered:
        moment = moment - tf.square(optimizer._average_gradients[index].value)
    return tf.sqrt(moment + optimizer.epsilon) * (1.0 - optimizer.momentum)


def _adagrad(optimizer: Any, variable: Any) -> Any:
    sums = optimizer._accumulators[optimizer._get_variable_index(variable)]
    return tf.sqrt(sums.value + optimizer.epsilon)


# By type; AdamW is an Adam.
_METRICS: dict[type, Callable[[Any, Any], Any]] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.Nadam: _adam,
    keras.optimizers.Adamax: _adamax,
    keras.optimizers.RMSprop: _rmsprop,
    keras.optimizers.Adagrad: _adagrad,
}
