"""Converts a plain model to one that normalizes each task by its own statistics."""

from typing import Any

import keras
import numpy as np

from keras_dwd.checks import integer
from keras_dwd.keras_private import layers_within, set_dtype_policy
from keras_dwd.layers.task_normalization import TaskNormalization
from keras_dwd.learner import overridden_steps, runs_its_graph

_TASK = "task"


def with_task_normalization(
    model: keras.Model, tasks: int, per_task_affine: bool = False
) -> keras.Model:
    """A copy of a model with a `TaskNormalization` in place of every `BatchNormalization`.

    The copy has a further input, `task`, after those of the model: the task id of each example. A
    model that has an integer input of this name, as for `TaskHeads`, keeps its inputs. All other
    layers are cloned, the weights are copied, and each task starts with the moving statistics of
    the model: right after the conversion its outputs are those of the model, for every task. The
    model itself is not changed. Compile the copy, or pass it to `DWDModel.from_model`.

    Args:
        model: A sequential or functional model, which may contain such models.
        tasks: Number of tasks.
        per_task_affine: Whether each task has its own γ and β, see `TaskNormalization`.

    Returns:
        A functional model, not compiled.

    Raises:
        ValueError: If the model has no `BatchNormalization`, or one within a layer or a subclassed
            model, which cannot be converted; if it is a subclassed model or a `DWDModel`; or if
            its input `task` is not one integer for each example.

    Example:

    ```python
    normalized = keras.Sequential(
        [
            keras.Input((20,)),
            keras.layers.Dense(16),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model = DWDModel.from_model(with_task_normalization(normalized, tasks=5))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit([x, np.zeros(len(x), "int32")], y)
    ```
    """
    tasks = integer("tasks", tasks, 1)
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model. Received: {model!r}")
    if not runs_its_graph(model):
        raise ValueError(
            "`model` must be a functional or sequential model that is built. Received "
            f"{model.name!r}, a {type(model).__name__}. In a subclassed model, use "
            "`TaskNormalization` in place of `BatchNormalization`."
        )
    overridden = overridden_steps(model)
    if overridden:
        raise ValueError(
            f"`model` has its own {', '.join(overridden)}, which would be lost: "
            f"{type(model).__name__}. Convert the plain model before it becomes a DWDModel."
        )
    if not any(map(_to_convert, layers_within(model))):
        raise ValueError(
            f"`model` must have a BatchNormalization to convert. {model.name!r} has none."
        )
    conversion = _Conversion(tasks, per_task_affine)
    converted = conversion.converted(model)
    conversion.copy_weights()
    set_dtype_policy(converted, model.dtype_policy)
    return converted


def _to_convert(layer: keras.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization) and not isinstance(
        layer, TaskNormalization
    )


class _Conversion:
    """The layers of a new model, by the layers that they are made of."""

    def __init__(self, tasks: int, per_task_affine: bool):
        self._settings = {"tasks": tasks, "per_task_affine": per_task_affine}
        self._new_layers: dict[int, tuple[keras.Layer, keras.Layer]] = {}  # original and new, by id
        self._takes_task: set[int] = set()  # ids of new layers that take the task as well

    def converted(self, model: keras.Model) -> keras.Model:
        """A new functional model, which takes the task as well."""
        sequential = isinstance(model, keras.Sequential)
        inputs, outputs = (
            (model.inputs[0], model.outputs[0]) if sequential else (model.input, model.output)
        )
        if not any(tensor.name == _TASK for tensor in model.inputs):
            task = keras.Input((), dtype="int32", name=_TASK)
            keras.layers.Identity()(task)  # Keras 3.10 refuses an input that leads nowhere
            inputs = _with_task(inputs, task)
        # With the task among the inputs already, though no layer takes it yet.
        source = keras.Model(inputs, outputs, name=model.name)
        fresh = {
            id(layer.output): type(layer).from_config(layer.get_config()).output
            for layer in source.layers
            if isinstance(layer, keras.layers.InputLayer)
        }
        tensors = keras.tree.map_structure(lambda tensor: fresh[id(tensor)], source.input)
        (task,) = (tensor for tensor in keras.tree.flatten(tensors) if tensor.name == _TASK)
        if "int" not in task.dtype or tuple(task.shape[1:]) not in ((), (1,)):
            raise ValueError(
                "The input 'task' must be integers of shape (batch,) or (batch, 1). "
                f"{model.name!r} has one of dtype {task.dtype} and shape {tuple(task.shape)}."
            )

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if id(layer) not in self._takes_task:
                return layer(*args, **kwargs)
            if isinstance(layer, TaskNormalization):
                return layer(*args, task=task, **kwargs)
            first, *others = args or (kwargs.pop("inputs"),)
            return layer(_with_task(first, task), *others, **kwargs)

        return keras.models.clone_model(source, tensors, self._clone, call)

    def _clone(self, layer: Any) -> Any:
        """The new layer for a layer; operations, which have no state, are shared."""
        if not isinstance(layer, keras.Layer):
            return layer
        if id(layer) not in self._new_layers:
            self._new_layers[id(layer)] = layer, self._new(layer)
        return self._new_layers[id(layer)][1]

    def _new(self, layer: keras.Layer) -> keras.Layer:
        graph = isinstance(layer, keras.Model) and runs_its_graph(layer)
        if type(layer) is keras.layers.BatchNormalization:
            new = TaskNormalization.from_config(layer.get_config() | self._settings)
            self._takes_task.add(id(new))
        elif not any(map(_to_convert, [layer, *layers_within(layer)])):
            if graph:
                return keras.models.clone_model(layer, clone_function=self._clone)
            return type(layer).from_config(layer.get_config())
        elif graph and not overridden_steps(layer):
            new = self.converted(layer)
            if not any(tensor.name == _TASK for tensor in layer.inputs):
                self._takes_task.add(id(new))
        else:
            raise ValueError(
                f"The layer {layer.name!r}, a {type(layer).__name__}, cannot be converted: only "
                "layers of the type BatchNormalization itself can, in functional and sequential "
                "models. Build it with `TaskNormalization`."
            )
        return new

    def copy_weights(self) -> None:
        """Copy the weights of the original layers, for each task where it has its own."""
        for layer, new in self._new_layers.values():
            if isinstance(layer, keras.Model) and runs_its_graph(layer):
                continue  # its layers are copied one by one
            if type(layer) is keras.layers.BatchNormalization:
                for name in ("gamma", "beta", "moving_mean", "moving_variance"):
                    value, variable = getattr(layer, name), getattr(new, name)
                    if value is not None:
                        variable.assign(np.broadcast_to(np.asarray(value), variable.shape))
                continue
            weights = layer.get_weights()
            if [w.shape for w in weights] != [tuple(w.shape) for w in new.weights]:
                raise ValueError(
                    f"The layer {layer.name!r} has other weights than one that is built of its "
                    "configuration, as with LoRA or quantization. Convert the model before."
                )
            new.set_weights(weights)


def _with_task(inputs: Any, task: Any) -> Any:
    """Inputs of a model with the task after them, in their structure."""
    if isinstance(inputs, dict):
        return {**inputs, _TASK: task}
    return [*inputs, task] if isinstance(inputs, (list, tuple)) else [inputs, task]
