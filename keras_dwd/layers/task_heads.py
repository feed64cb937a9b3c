"""One output layer per task, chosen by a task id."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_dwd.checks import integer
from keras_dwd.curvature.rules import LayerIO, Rule, register_rule


@keras.saving.register_keras_serializable("keras_dwd")
class TaskHeads(keras.layers.Layer):
    """A dense output layer for each task; every example uses the head of its own task.

    For task-incremental models, in which the task of an example is known, also at inference. In a
    `DWDModel` only heads that have had examples since the last task boundary change: momentum,
    weight decay, regularisation and penalty leave all other heads exactly as they are. (The
    exception is an optimizer with `use_ema=True`, whose moving average the model cannot correct.)

    Args:
        tasks: Number of tasks.
        units: Number of outputs (classes) per task.
        activation: Activation of the outputs; `None` gives logits.
        kernel_initializer: Initializer of the kernel of each head.
        kernel_regularizer: Regularizer of all kernels, for instance a `DWDRegularizer` with its
            own strength.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        features: `(batch, features)`.
        task: Task ids in `[0, tasks)`, of shape `(batch,)` or `(batch, 1)`.

    Returns:
        `(batch, units)`: the outputs of each example's own head.

    Example:

    ```python
    images, task = keras.Input((28, 28)), keras.Input((), dtype="int32")
    features = keras.layers.Dense(100, activation="relu")(keras.layers.Flatten()(images))
    model = DWDModel([images, task], TaskHeads(tasks=5, units=2)(features, task))
    ```
    """

    def __init__(
        self,
        tasks: int,
        units: int,
        activation: Any = None,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.tasks = integer("tasks", tasks, 1)
        self.units = integer("units", units, 1)
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def build(self, features_shape: Any, task_shape: Any = None) -> None:
        if len(features_shape) != 2 or features_shape[-1] is None:
            raise ValueError(
                "`TaskHeads` expects features of shape (batch, features) with a known last "
                f"dimension. Received: {tuple(features_shape)}"
            )
        shape = (self.tasks, features_shape[-1], self.units)

        def initialize(shape: Any, dtype: Any = None) -> Any:
            # Each head is initialized on its own, as initializers compute the fan-in from the
            # shape, and by a clone, as a seeded initializer returns the same values each time.
            heads = [
                self.kernel_initializer.clone()(shape[1:], dtype=dtype) for _ in range(shape[0])
            ]
            return ops.stack(heads)

        self.kernel = self.add_weight(
            shape=shape,
            initializer=initialize,
            regularizer=self.kernel_regularizer,
            name="kernel",
        )
        self.bias = self.add_weight(
            shape=(self.tasks, self.units), initializer="zeros", name="bias"
        )
        # Tells `DWDModel` that the first axis of these variables is the task.
        self.kernel.per_task = self.bias.per_task = True

    def call(self, features: Any, task: Any) -> Any:
        task = ops.reshape(ops.cast(task, "int32"), (-1, 1))
        # Compute the outputs of all heads in one matrix product, then select each example's head:
        # cheaper than gathering a kernel per example, and other heads get exactly zero gradient.
        outputs = self._logits_of_all(features, self.kernel, self.bias)
        outputs = self.activation(ops.take_along_axis(outputs, task[:, :, None], axis=1)[:, 0])
        for calls in getattr(_RECORDING, "open", ()):
            calls.append(HeadsCall(self, features, outputs))
        return outputs

    def outputs_of_all(self, features: Any, kernel: Any, bias: Any) -> Any:
        """The outputs of all heads for each example, `(batch, tasks, units)`. Graph code.

        Args:
            features: `(batch, features)`, float32 as `kernel` and `bias`.
            kernel: A value of the layer's `kernel`.
            bias: A value of its `bias`.
        """
        return self.activation(self._logits_of_all(features, kernel, bias))

    def _logits_of_all(self, features: Any, kernel: Any, bias: Any) -> Any:
        kernel = ops.reshape(ops.transpose(kernel, (1, 0, 2)), (features.shape[-1], -1))
        outputs = ops.matmul(features, kernel) + ops.reshape(bias, (-1,))
        return ops.reshape(outputs, (-1, self.tasks, self.units))

    def compute_output_shape(self, features_shape: Any, task_shape: Any = None) -> Any:
        return (features_shape[0], self.units)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "tasks": self.tasks,
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }


@dataclass(frozen=True)
class HeadsCall:
    """A call of a `TaskHeads`.

    Attributes:
        layer: The layer.
        features: What it was called on, without the task ids.
        outputs: What it returned.
    """

    layer: TaskHeads
    features: Any
    outputs: Any


_RECORDING = threading.local()  # other threads may run the model too


@contextmanager
def recorded_heads() -> Iterator[list[HeadsCall]]:
    """A context with a list of the calls of all `TaskHeads` in this thread. Graph code."""
    if not hasattr(_RECORDING, "open"):
        _RECORDING.open = []
    calls: list[HeadsCall] = []
    _RECORDING.open.append(calls)
    try:
        yield calls
    finally:
        _RECORDING.open.pop()


@register_rule(TaskHeads)
class _TaskHeadsRule(Rule):
    variables = ("kernel", "bias")

    def squares(
        self, layer: keras.Layer, flows: list[LayerIO], weights: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        if len(flows) > 1:  # gradients of several calls must be added before squaring
            return super().squares(layer, flows, weights)
        (features, task), g = flows[0].inputs, flows[0].gradient
        chosen = weights[:, None] * self._chosen(layer, task)
        kernel = tf.einsum("bt,bi,bo->tio", chosen, features**2, g**2)
        return {"kernel": kernel, "bias": tf.einsum("bt,bo->to", chosen, g**2)}

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        (features, task), g = flow.inputs, flow.gradient
        chosen = self._chosen(layer, task)
        kernel = tf.einsum("bt,bi,bo->btio", chosen, features, g)
        return {"kernel": kernel, "bias": tf.einsum("bt,bo->bto", chosen, g)}

    def _chosen(self, layer: keras.Layer, task: tf.Tensor) -> tf.Tensor:
        return tf.one_hot(tf.cast(tf.reshape(task, (-1,)), "int32"), layer.tasks)
