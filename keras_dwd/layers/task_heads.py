"""One output layer per task, chosen by a task id."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_dwd.checks import integer
from keras_dwd.curvature.rules import Flow, Rule, register_rule
from keras_dwd.variables import Arrays, Variables


@keras.saving.register_keras_serializable("keras_dwd")
class TaskHeads(keras.layers.Layer):
    """A dense output layer for each task; every example uses the one of its own task.

    For task-incremental models: the task of an example is known, also at inference. In a
    `DWDModel` a head is neither trained nor pulled until examples of its task arrive: momentum,
    weight decay, regularisation and penalty leave the heads of other tasks exactly as they are.
    (An optimizer with `use_ema=True` keeps an average of its own that the model cannot mend.)

    Args:
        tasks: Number of tasks.
        units: Outputs (classes) per task.
        activation: Applied to the outputs; `None` gives logits.
        kernel_initializer: For the kernel of each head.
        kernel_regularizer: For all kernels, for instance a `DWDRegularizer` with its own strength.
        **kwargs: Of `keras.layers.Layer`.

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
            # Head by head: an initializer takes the fan-in from the shape it is asked for.
            # A clone per head, as a seeded initializer returns the same values each time.
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
        # What `DWDModel` knows them by: the first axis is the task.
        self.kernel.per_task = self.bias.per_task = True

    def call(self, features: Any, task: Any) -> Any:
        task = ops.reshape(ops.cast(task, "int32"), (-1, 1))
        # All heads in one matrix product, then each example's own: cheaper than gathering a
        # kernel per example, and the gradient of every other head is exactly zero.
        kernel = ops.reshape(ops.transpose(self.kernel, (1, 0, 2)), (features.shape[-1], -1))
        outputs = ops.matmul(features, kernel) + ops.reshape(self.bias, (-1,))
        outputs = ops.reshape(outputs, (-1, self.tasks, self.units))
        return self.activation(ops.take_along_axis(outputs, task[:, :, None], axis=1)[:, 0])

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


@register_rule(TaskHeads)
class _TaskHeadsRule(Rule):
    def squares(
        self, layer: keras.Layer, flows: list[Flow], weights: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        if len(flows) > 1:  # squares of different calls do not add up
            return super().squares(layer, flows, weights)
        (features, task), g = flows[0].inputs, flows[0].gradient
        chosen = weights[:, None] * self._chosen(layer, task)
        kernel = tf.einsum("bt,bi,bo->tio", chosen, features**2, g**2)
        return {"kernel": kernel, "bias": tf.einsum("bt,bo->to", chosen, g**2)}

    def gradients(self, layer: keras.Layer, flow: Flow) -> dict[str, tf.Tensor]:
        (features, task), g = flow.inputs, flow.gradient
        chosen = self._chosen(layer, task)
        kernel = tf.einsum("bt,bi,bo->btio", chosen, features, g)
        return {"kernel": kernel, "bias": tf.einsum("bt,bo->bto", chosen, g)}

    def _chosen(self, layer: keras.Layer, task: tf.Tensor) -> tf.Tensor:
        return tf.one_hot(tf.cast(tf.reshape(task, (-1,)), "int32"), layer.tasks)


def check_task_ids(model: keras.Model, x: Any) -> None:
    """Raise `ValueError` if a task id that is an input of the model, of arrays, is of no head."""
    heads = [layer for layer in model._flatten_layers() if isinstance(layer, TaskHeads)]
    asked = {id(node.input_tensors[-1]): h.tasks for h in heads for node in h._inbound_nodes}
    given = [x.get(i.name) for i in model.inputs] if isinstance(x, dict) else tf.nest.flatten(x)
    for tensor, ids in zip(model.inputs, given, strict=False):
        tasks = asked.get(id(tensor))
        if tasks is None or not isinstance(ids, (np.ndarray, tf.Tensor)) or not np.size(ids):
            continue
        low, high = int(np.min(ids)), int(np.max(ids))
        if low < 0 or high >= tasks:
            raise ValueError(
                f"Task ids must be in [0, {tasks}), the number of tasks of `TaskHeads`. Received "
                f"ids from {low} to {high} as the input {tensor.name!r}."
            )


class HeadGate:
    """Lets training touch only the heads that had examples since the last task boundary.

    An optimizer moves a weight also where its gradient is zero: by momentum, or weight decay. The
    gate remembers per head whether a gradient ever reached it and undoes any other update.
    """

    def __init__(self) -> None:
        self.in_use: dict[str, keras.Variable] = {}

    def build(self, variables: Variables) -> None:
        """Create the flags of those variables that belong to a `TaskHeads`."""
        for path, variable in variables.items():
            if getattr(variable, "per_task", False) and path not in self.in_use:
                self.in_use[path] = keras.Variable(
                    np.zeros(variable.shape[0], bool), trainable=False, dtype="bool", name="in_use"
                )

    def open(self, variables: Variables, gradients: list[Any]) -> list[tuple[Any, ...]]:
        """Note which heads have a gradient; give `close` what it needs. Graph code."""
        kept = []
        for (path, variable), gradient in zip(variables.items(), gradients, strict=True):
            if path in self.in_use and gradient is not None:
                in_use = self.in_use[path]
                # In a step that overflows float16 every head's gradient is NaN.
                real = (gradient != 0) & tf.math.is_finite(gradient)
                touched = tf.reduce_any(real, axis=range(1, len(variable.shape)))
                in_use.assign(tf.logical_or(in_use.value, touched))
                mask = tf.reshape(in_use.value, (-1, *[1] * (len(variable.shape) - 1)))
                kept.append((variable, tf.identity(variable.value), mask))
        return kept

    def within(self, pulls: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Pulls without those of heads that are not in use. Graph code."""
        found = dict(pulls)
        for path in set(pulls) & set(self.in_use):
            ones = [1] * (len(pulls[path].shape) - 1)
            found[path] *= tf.reshape(tf.cast(self.in_use[path].value, "float32"), (-1, *ones))
        return found

    def close(self, kept: list[tuple[Any, ...]]) -> None:
        """Put back what the optimizer did to heads that are not in use. Graph code."""
        for variable, before, mask in kept:
            variable.assign(tf.where(mask, variable.value, before))

    def reset(self) -> None:
        """A new task starts: no head is in use."""
        for flags in self.in_use.values():
            flags.assign(tf.zeros(flags.shape, "bool"))

    def state(self) -> Arrays:
        """The flags as arrays, under `in_use/PATH`."""
        return {f"in_use/{path}": np.asarray(flags) for path, flags in self.in_use.items()}
