"""How the pull enters a step: in the gradient, or as a proximal step after the update."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    This step is stable at any strength. SGD and all optimizers whose steps may be of any size take
    the pull in this form even without the wrapper, since it would diverge as part of the gradient
    once η·λ·F exceeds 2. Adam and others that limit the size of a step take it as part of the
    gradient, where it retains more on most tasks; this wrapper is for those. For a weak pull the
    two forms agree.

    Learning-rate schedules, clipping, weight decay, gradient accumulation, averaged weights and
    loss scaling are those of the wrapped optimizer, and so are its attributes, to read and to set.
    Without a pull it does exactly what the wrapped optimizer does.

    Args:
        inner_optimizer: A Keras optimizer, its name or its configuration. The metric of optimizers
            other than SGD, Adam, AdamW, Nadam, Adamax, RMSprop and Adagrad is measured: for each
            variable, the norm of its gradient relative to that of its step.
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
        super().__init__(inner, name)

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


def proximal_variables(optimizer: Any, variables: Sequence[keras.Variable]) -> set[int]:
    """The `id` of each variable that is pulled by a proximal step, not through its gradient.

    Added to the gradient, a strong pull diverges where an optimizer takes steps in proportion to
    the gradient, as SGD does. The proximal step is stable at any strength and learning rate. Adam
    and others that limit the size of a step, whatever the gradient is, take the pull in the
    gradient, unless they are within a `DWDOptimizer`.

    Args:
        optimizer: The optimizer of a model.
        variables: The variables that it trains.
    """
    if not optimizer.built:  # a `MultiOptimizer` has no parts before
        optimizer.build(variables)
    leaves = _leaves(optimizer)
    if all(proximal for _, proximal in leaves):
        return {id(v) for v in variables}
    if not any(proximal for _, proximal in leaves):
        return set()
    return {id(v) for leaf, proximal in leaves if proximal for v in keras_private.trained_by(leaf)}


def form_of_pull(optimizer: Any) -> str:
    """How the pull enters a step with this optimizer, in words; empty if there is no optimizer."""
    if optimizer is None:
        return ""
    step = "a proximal step after each update of the optimizer"
    forms = {proximal for _, proximal in _leaves(optimizer)}
    if len(forms) > 1:
        return f"part of the gradient of some variables, and {step} of the others"
    return step if forms == {True} else "part of the gradient"


@contextmanager
def proximal_updates(
    optimizer: Any, variables: Sequence[keras.Variable], gradients: Sequence[Any], pull: Pull
) -> Iterator[None]:
    """A context in which proximal steps follow the updates by `optimizer.apply`. Graph code.

    Args:
        optimizer: The optimizer of a model.
        variables: The variables to pull, see `proximal_variables`.
        gradients: The gradient of each of them, or `None`.
        pull: Called with the metric of the optimizer, d/η, by the `id` of each variable, in the
            shape of the variable or as a scalar.
    """
    pulled: set[int] = set()
    variable_ids = {id(v) for v in variables}

    def around(leaf: Any) -> keras_private.Around:
        metric = _metric_of(leaf)

        def update_and_pull(
            update: Callable[[], None], gradients: list[Any], variables: list[Any], rate: Any
        ) -> None:
            before = [None if metric else tf.identity(v.value) for v in variables]
            update()
            stiffness = {
                id(v): tf.maximum(tf.cast(metric(leaf, v), "float32"), _SMALLEST)
                / tf.cast(rate, "float32")
                if metric
                else _measured(gradient, v.value - value)
                for v, gradient, value in zip(variables, gradients, before, strict=True)
                if id(v) in variable_ids
            }
            with keras_private.shifted_iterates(leaf, variables, rate):
                pull(stiffness)
            pulled.update(stiffness)

        return update_and_pull

    before = [tf.identity(v.value) for v in variables]
    # Once per real update, not for each accumulated batch, and before weights are averaged.
    with ExitStack() as stack:
        for leaf, proximal in _leaves(optimizer):
            if proximal:
                stack.enter_context(keras_private.around_each_update(leaf, around(leaf)))
        yield
    # An optimizer with an `apply` of its own may update variables by other means.
    pull(
        {
            id(v): _measured(gradient, tf.identity(v.value) - value)
            for v, gradient, value in zip(variables, gradients, before, strict=True)
            if gradient is not None and id(v) not in pulled
        }
    )


def _leaves(optimizer: Any, decoupled: bool = False) -> list[tuple[Any, bool]]:
    """The optimizers that update variables, and whether the pull is a proximal step after it."""
    decoupled = decoupled or isinstance(optimizer, DWDOptimizer)
    inner = getattr(optimizer, "optimizers", None)  # of a `MultiOptimizer`
    if inner is None and getattr(optimizer, "inner_optimizer", None) is not None:
        inner = [optimizer.inner_optimizer]
    if not inner:
        limited = any(_steps_as(optimizer, kind) for kind in _LIMITED)
        return [(optimizer, decoupled or not limited)]
    return [leaf for each in inner for leaf in _leaves(each, decoupled)]


def _metric_of(leaf: Any) -> Callable[[Any, Any], Any] | None:
    """The metric d of an optimizer, or `None` if it is unknown, as that of a changed subclass."""
    return next((metric for kind, metric in _METRICS.items() if _steps_as(leaf, kind)), None)


def _steps_as(leaf: Any, kind: Any) -> bool:
    """Whether an optimizer takes the steps of a Keras class, and not some of its own."""
    return isinstance(leaf, kind) and all(
        getattr(type(leaf), name) is getattr(kind, name) for name in ("update_step", "apply")
    )


def _measured(gradient: Any, step: Any) -> tf.Tensor:
    """d/η of an unknown optimizer: the norm of a gradient relative to that of its step."""
    gradient_norm = tf.norm(tf.cast(tf.convert_to_tensor(gradient), "float32"))
    step_norm = tf.norm(tf.cast(step, "float32"))
    ratio = gradient_norm / tf.maximum(step_norm, 1 / _LARGEST)
    # Without a gradient, or a step, nothing can be measured, and there is no pull. So it is after a
    # gradient that overflowed.
    known = tf.math.is_finite(ratio) & (gradient_norm > 0) & (step_norm > 0)
    return tf.clip_by_value(tf.where(known, ratio, _LARGEST), _SMALLEST, _LARGEST)


# Limits of the metric, within which (d/η + Λ)⁻¹ Λ is a number.
_SMALLEST, _LARGEST = 1e-12, 1e30


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


# The metric d of each type of optimizer; AdamW is a subclass of Adam. For others it is measured.
_METRICS: dict[Any, Callable[[Any, Any], Any]] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.Nadam: _adam,
    keras.optimizers.Adamax: _adamax,
    keras.optimizers.RMSprop: _rmsprop,
    keras.optimizers.Adagrad: _adagrad,
}

# Optimizers whose steps are limited whatever the gradient, because they divide it by its own recent
# size. Adagrad, Adafactor and Ftrl are none: they overshoot when a gradient grows suddenly.
_LIMITED: tuple[Any, ...] = tuple(
    getattr(keras.optimizers, name)
    for name in (
        "Adam",
        "Nadam",
        "Adamax",
        "RMSprop",
        "Adadelta",
        "Lamb",
        "Lion",
        "Muon",
        "ScheduleFreeAdamW",
    )
    if hasattr(keras.optimizers, name)  # some are not in the oldest versions of Keras
)
