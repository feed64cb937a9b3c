"""Converts a `DWDModel` back to a plain Keras model."""

from typing import Any

import keras

from keras_dwd.hub_tasks import hub_task_of
from keras_dwd.keras_private import set_dtype_policy
from keras_dwd.model import DWDModel
from keras_dwd.regularizer import DWDRegularizer


def strip_dwd(model: keras.Model, compile: bool = True) -> keras.Model:
    """The plain Keras model inside a `DWDModel`; the inverse of `DWDModel.from_model`.

    The plain model shares layers and weights with `model`, which is not changed. Its `.keras` file
    loads without `keras_dwd`, unless layers of `keras_dwd.layers` are among its own. Layers with a
    `DWDRegularizer` of their own are not shared but copied, with their weights and without that
    regularizer.

    Args:
        model: A `DWDModel`.
        compile: Whether to compile the plain model like `model`, with a new optimizer of the same
            configuration, not wrapped in a `DWDOptimizer`. As in `keras.models.load_model`, custom
            losses and metrics must then be registered.

    Returns:
        A functional `keras.Model`. A subclassed model that was wrapped is a layer of it. A task
        model of KerasHub that was wrapped is returned itself.

    Raises:
        ValueError: If `model` is not a `DWDModel`, or is of a subclass that overrides `call`.

    Example:

    ```python
    strip_dwd(model).save("plain.keras")
    ```
    """
    if not isinstance(model, DWDModel):
        raise ValueError(f"`model` must be a DWDModel. Received: {type(model).__name__}")
    if type(model).call is not DWDModel.call:
        raise ValueError(
            f"`model` has a `call` of its own, which would be lost: {type(model).__name__}"
        )
    task = hub_task_of(model)
    if task is not None:
        if compile and model.compiled:
            config = _plain_config(model.get_compile_config())
            sampler = {"sampler": task.sampler} if hasattr(task, "sampler") else {}
            task.compile(**keras.saving.deserialize_keras_object(config), **sampler)
        return task
    plain = keras.Model(model.input, model.output, name=model.name)
    copies = {id(layer): (layer, _copy(layer)) for layer in plain.layers if _pulls_itself(layer)}
    if copies:
        plain = keras.models.clone_model(
            plain, clone_function=lambda layer: copies.get(id(layer), (layer, layer))[1]
        )
        for layer, copy in copies.values():  # copies are certain to have weights only now
            copy.set_weights(layer.get_weights())
    set_dtype_policy(plain, model.dtype_policy)
    config = model.get_compile_config() if compile else None
    if config:
        plain.compile_from_config(_plain_config(config))
    return plain


def _pulls_itself(layer: keras.Layer) -> bool:
    """Whether a variable of the layer has a `DWDRegularizer` of its own."""
    return any(isinstance(getattr(v, "regularizer", None), DWDRegularizer) for v in layer.variables)


def _copy(layer: keras.Layer) -> keras.Layer:
    """A copy of a layer without the `DWDRegularizer`s in its configuration."""
    config = keras.saving.serialize_keras_object(layer)
    return keras.saving.deserialize_keras_object(_plain_config(config))


def _plain_config(config: Any) -> Any:
    """A configuration without `DWDRegularizer`s, and with `DWDOptimizer`s unwrapped."""
    if isinstance(config, dict):
        name = config.get("registered_name")
        if name == "keras_dwd>DWDRegularizer":
            return None
        if name == "keras_dwd>DWDOptimizer":
            return _plain_config(config["config"]["inner_optimizer"])
        return {key: _plain_config(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_plain_config(value) for value in config)
    return config
