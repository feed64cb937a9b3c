"""Making a `DWDModel` around a model, with settings of its own, and a plain model of it again."""

from typing import Any

import keras

from keras_dwd.regularizer import DWDRegularizer

# What a subclassed model may define and a model around it would not use.
_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")


def wrapped(kind: Any, model: keras.Model, inputs: Any, settings: dict[str, Any]) -> Any:
    """A model of a kind around another one, see `DWDModel.from_model`."""
    from keras_dwd.model import DWDModel  # which is made by this

    if isinstance(model, DWDModel):
        raise ValueError(
            f"`model` is a DWDModel already: {model.name!r}. Wrapping it would lose its state."
        )
    own = [n for n in _STEPS if getattr(type(model), n) is not getattr(keras.Model, n)]
    if own:
        raise ValueError(
            f"`model` has its own {', '.join(own)}, which would be lost: "
            f"{type(model).__name__}. Make them methods of a subclass of DWDModel that call "
            "what they replace."
        )
    if not model.built:
        raise ValueError(
            f"`model` must be built before it can be wrapped. {model.name!r} has no weights "
            "yet: give it an `Input`, call `build`, or call it on data."
        )
    settings.setdefault("name", model.name)
    if inputs is None and not getattr(model, "inputs", None):
        shape = (model.get_build_config() or {}).get("input_shape")
        if shape is None or any(isinstance(s, (list, tuple, dict)) for s in shape):
            raise ValueError(
                f"`inputs` is needed: {model.name!r} is a subclassed model that does not tell "
                "one input shape. Pass the `keras.Input`s to call it on."
            )
        inputs = keras.Input(shape[1:])
    if inputs is not None:
        return kind(inputs, model(inputs), **settings)
    if isinstance(model, keras.Sequential):
        return kind(model.inputs[0], model.outputs[0], **settings)
    return kind(model.input, model.output, **settings)


def copied(name: str, given: Any, kind: Any) -> Any:
    """A setting as given or as `get_config` wrote it, copied: it will hold this model's state."""
    written = isinstance(given, dict) and "class_name" in given
    made = keras.saving.deserialize_keras_object(given) if written else given
    if made is not None and not isinstance(made, kind):
        raise ValueError(f"`{name}` must be a {kind.__name__} or None. Received: {given!r}")
    return made if written or made is None else type(made).from_config(made.get_config())


def strip_dwd(model: keras.Model, compile: bool = True) -> keras.Model:
    """The plain Keras model within a `DWDModel`: what `from_model` does, undone.

    It shares layers and weights with `model`, which stays as it is, and its `.keras` file needs
    no `keras_dwd` to load, unless `TaskHeads` or `KWinners` are among the layers. A layer with a
    `DWDRegularizer` of its own is the exception: the plain model has a copy of it, weights
    included, without that regularizer.

    Args:
        model: A `DWDModel`.
        compile: Whether the plain model is compiled as `model` is, with the same optimizer anew,
            without a `DWDOptimizer` around it. As in `keras.models.load_model`, losses and metrics
            of your own must then be registered.

    Returns:
        A functional `keras.Model`; a subclassed model given to `from_model` is a layer of it.

    Raises:
        ValueError: If `model` is no `DWDModel`, or a subclass with a `call` of its own.

    Example:

    ```python
    strip_dwd(model).save("plain.keras")
    ```
    """
    from keras_dwd.model import DWDModel

    if not isinstance(model, DWDModel):
        raise ValueError(f"`model` must be a DWDModel. Received: {type(model).__name__}")
    if type(model).call is not DWDModel.call:
        raise ValueError(
            f"`model` has a `call` of its own, which would be lost: {type(model).__name__}"
        )
    plain = keras.Model(model.input, model.output, name=model.name)
    copies = {id(layer): (layer, _copy(layer)) for layer in plain.layers if _pulls_itself(layer)}
    if copies:
        plain = keras.models.clone_model(
            plain, clone_function=lambda layer: copies.get(id(layer), (layer, layer))[1]
        )
        for layer, copy in copies.values():  # which only now has weights for certain
            copy.set_weights(layer.get_weights())
    config = model.get_compile_config() if compile else None
    if config:
        del config["sharded"]
        plain.compile_from_config(_plain_config(config))
    return plain


def _pulls_itself(layer: keras.Layer) -> bool:
    return any(isinstance(getattr(v, "regularizer", None), DWDRegularizer) for v in layer.variables)


def _copy(layer: keras.Layer) -> keras.Layer:
    """A copy without `DWDRegularizer`s, as far as its configuration tells of them."""
    config = keras.saving.serialize_keras_object(layer)
    return keras.saving.deserialize_keras_object(_plain_config(config))


def _plain_config(config: Any) -> Any:
    """A configuration without `DWDRegularizer`s, and with what `DWDOptimizer`s wrap."""
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
