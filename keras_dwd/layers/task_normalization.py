"""Batch normalization with statistics for each task, chosen by a task id."""

import math
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_dwd.checks import integer, number
from keras_dwd.curvature.rules import LayerIO, Rule, register_rule


@keras.saving.register_keras_serializable("keras_dwd")
class TaskNormalization(keras.layers.BatchNormalization):
    """A `BatchNormalization` that keeps the moving mean and variance of each task.

    The moving statistics of a `BatchNormalization` follow the current task, so that the model
    forgets earlier ones even if no weight changes. Here every example is normalized by the
    statistics of its own task: in training by those of the examples of this task in the batch, in
    inference by the moving statistics of the task. Only the tasks in a batch update theirs. For
    task-incremental models, in which the task of an example is known, also at inference.

    A task that was never trained uses the moving statistics of the task that was trained last (of
    several in one batch, the first), and its own continue these from its first batch on. So on a
    sequence of tasks, with one task per batch, the current task gets exactly what a
    `BatchNormalization` would give it; only earlier tasks get back what they had.

    Args:
        tasks: Number of tasks.
        axis: The axis of the channels; not the first one.
        momentum: Momentum of the moving statistics.
        epsilon: Added to the variance.
        center: Whether to add an offset β.
        scale: Whether to multiply by a factor γ.
        per_task_affine: Whether each task has its own γ and β. In a `DWDModel` those of other tasks
            stay exactly as they are, as the heads of `TaskHeads` do.
        **kwargs: Other arguments of `keras.layers.BatchNormalization`, except `synchronized` and
            `renorm`.

    Call arguments:
        inputs: `(batch, …, channels)`, or with the channels at `axis`.
        task: Task ids in `[0, tasks)`, of shape `(batch,)` or `(batch, 1)`.
        training: Whether to normalize by the batch, unless the layer is frozen.
        mask: As in `BatchNormalization`: positions of `inputs` that do not count are false. By
            default the mask that Keras has attached to `inputs`.

    Returns:
        A tensor of the shape of `inputs`.

    Example:

    ```python
    image, task = keras.Input((32, 32, 3)), keras.Input((), dtype="int32")
    x = keras.layers.Conv2D(16, 3, use_bias=False)(image)
    x = TaskNormalization(tasks=5)(x, task)
    ```
    """

    def __init__(
        self,
        tasks: int,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        per_task_affine: bool = False,
        **kwargs: Any,
    ):
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise ValueError(f"`axis` must be an integer. Received: {axis!r}")
        super().__init__(
            axis,
            number("momentum", momentum, 0, 1),
            number("epsilon", epsilon, 0),
            bool(center),
            bool(scale),
            **kwargs,
        )
        for setting in ("synchronized", "renorm"):
            if getattr(self, setting, False):
                raise ValueError(
                    f"`{setting}` must be False: TaskNormalization does not support it. "
                    f"Received: {setting}=True"
                )
        self.tasks = integer("tasks", tasks, 1)
        self.per_task_affine = bool(per_task_affine)

    def build(self, inputs_shape: Any, task_shape: Any = None) -> None:
        rank = len(inputs_shape)
        if not (-rank < self.axis < rank and self.axis and inputs_shape[self.axis]):
            raise ValueError(
                "`axis` must be an axis of known size of the inputs, other than the first. "
                f"Received: axis={self.axis}, for inputs of shape {tuple(inputs_shape)}"
            )
        channels = inputs_shape[self.axis]

        def variable(name: str, per_task: bool, trained: bool) -> keras.Variable:
            initializer = getattr(self, f"{name}_initializer")

            def initialize(shape: Any, dtype: Any = None) -> Any:  # all tasks alike
                return ops.broadcast_to(initializer((channels,), dtype=dtype), shape)

            weight = self.add_weight(
                shape=(self.tasks, channels) if per_task else (channels,),
                initializer=initialize,
                regularizer=getattr(self, f"{name}_regularizer") if trained else None,
                constraint=getattr(self, f"{name}_constraint") if trained else None,
                trainable=trained,
                autocast=False,
                name=name,
            )
            if per_task:  # tells `DWDModel` that the first axis is the task
                weight.per_task = True
            return weight

        self.gamma = variable("gamma", self.per_task_affine, True) if self.scale else None
        self.beta = variable("beta", self.per_task_affine, True) if self.center else None
        self.moving_mean = variable("moving_mean", True, False)
        self.moving_variance = variable("moving_variance", True, False)
        # When each task was trained last, in batches, counted across tasks; zero for never.
        self.updated = self.add_weight(
            shape=(self.tasks,), initializer="zeros", trainable=False, dtype="int64", name="updated"
        )
        self.input_spec = keras.layers.InputSpec(ndim=rank, axes={self.axis: channels})

    def call(
        self,
        inputs: Any,
        task: Any,
        training: bool | None = None,
        mask: Any = None,
        inputs_mask: Any = None,  # the name by which Keras passes the mask of `inputs`
    ) -> Any:
        x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        task = ops.reshape(ops.cast(task, "int32"), (-1,))
        mean, variance = self.statistics(x.dtype)
        if training and self.trainable:
            mask = inputs_mask if mask is None else mask
            mean, variance = self._update(x, task, mask, mean, variance)
        # In the order in which TensorFlow's batch normalization computes them.
        scale = ops.rsqrt(variance + self.epsilon)
        scale = scale if self.gamma is None else scale * ops.cast(self.gamma, x.dtype)
        shift = -mean * scale
        shift = shift if self.beta is None else ops.cast(self.beta, x.dtype) + shift
        rank = len(x.shape)
        normalized = x * self.of_examples(scale, task, rank) + self.of_examples(shift, task, rank)
        return ops.cast(normalized, self.compute_dtype)

    def statistics(self, dtype: Any = "float32") -> tuple[Any, Any]:
        """The moving mean and variance that each task uses, `(tasks, channels)`."""
        updated = ops.convert_to_tensor(self.updated)
        latest = ops.cast(ops.argmax(updated), "int32")
        rows = ops.where(updated > 0, ops.arange(self.tasks, dtype="int32"), latest)
        mean, variance = (
            ops.take(ops.cast(moving, dtype), rows, axis=0)
            for moving in (self.moving_mean, self.moving_variance)
        )
        return mean, variance

    def of_examples(self, of_tasks: Any, task: Any, rank: int) -> Any:
        """The row of each example's task, with an axis of size one for each axis of positions."""
        # The gradient of a reshaped tensor is dense, that of one that is gathered from is not.
        table = ops.reshape(of_tasks, (self.tasks, of_tasks.shape[-1]))
        shape = [-1] + [1] * (rank - 1)
        shape[self.axis] = of_tasks.shape[-1]
        return ops.reshape(ops.take(table, task, axis=0), shape)

    def _update(self, x: Any, task: Any, mask: Any, mean: Any, variance: Any) -> tuple[Any, Any]:
        """Update the moving statistics; returns those of the batch, of absent tasks the moving."""
        count, of_batch = self._moments(x, task, mask)
        occurs = count > 0
        for moving, old, new in zip(
            (self.moving_mean, self.moving_variance), (mean, variance), of_batch, strict=True
        ):
            moved = old * self.momentum + new * (1.0 - self.momentum)
            moving.assign(ops.where(occurs, moved, ops.cast(moving, x.dtype)))
        now = ops.max(self.updated) + 1
        self.updated.assign(ops.where(ops.any(occurs, axis=-1), now, self.updated))
        return ops.where(occurs, of_batch[0], mean), ops.where(occurs, of_batch[1], variance)

    def _moments(self, x: Any, task: Any, mask: Any) -> tuple[Any, tuple[Any, Any]]:
        """How many values of each task count, and their mean and variance, by channel."""
        rank, present = len(x.shape), None
        positions = [i for i in range(1, rank) if i != self.axis % rank]
        if mask is not None:
            if len(mask.shape) != rank - 1:
                raise ValueError(
                    "`mask` must have one dimension less than the inputs. Received: mask of shape "
                    f"{tuple(mask.shape)}, inputs of shape {tuple(x.shape)}"
                )
            present = ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), -1), ops.shape(x))

        def total(values: Any) -> Any:
            counted = (
                values if present is None else ops.where(present, values, ops.zeros_like(values))
            )
            return ops.segment_sum(ops.sum(counted, axis=tuple(positions)), task, self.tasks)

        if present is None:
            each = math.prod(ops.shape(x)[i] for i in positions)
            examples = ops.segment_sum(ops.ones_like(task, dtype=x.dtype), task, self.tasks)
            count = ops.expand_dims(examples * ops.cast(each, x.dtype), -1)
        else:
            count = total(ops.cast(present, x.dtype))
        divisor = ops.maximum(count, 1)
        mean = total(x) / divisor
        variance = total(ops.square(x - self.of_examples(mean, task, rank))) / divisor
        return count, (mean, variance)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "tasks": self.tasks,
            "per_task_affine": self.per_task_affine,
        }


@register_rule(TaskNormalization)
class _TaskNormalizationRule(Rule):
    variables = ("gamma", "beta", "moving_mean", "moving_variance", "updated")

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        (x, task), g = flow.inputs, flow.gradient
        task, rank = tf.cast(tf.reshape(task, (-1,)), "int32"), len(x.shape)
        mean, variance = (layer.of_examples(s, task, rank) for s in layer.statistics())
        normalized = (x - mean) * tf.math.rsqrt(variance + layer.epsilon)
        positions = [i for i in range(1, rank) if i != layer.axis % rank]
        gradients = {}
        if layer.scale:
            gradients["gamma"] = tf.reduce_sum(normalized * g, positions)
        if layer.center:
            gradients["beta"] = tf.reduce_sum(g, positions)
        if layer.per_task_affine:
            chosen = tf.one_hot(task, layer.tasks)[:, :, None]
            gradients = {name: chosen * each[:, None] for name, each in gradients.items()}
        return gradients
