"""Wraps an existing model in a `DWDModel`, with copies of the settings."""

from typing import Any

import keras

# Methods that a subclassed model may override and that a model around it would not call.
_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")


def wrapped(
    kind: type[keras.Model], model: keras.Model, inputs: Any, settings: dict[str, Any]
) -> Any:
    """A model of class `kind` around another model, see `DWDModel.from_model`."""
    overridden = [n for n in _STEPS if getattr(type(model), n) is not getattr(keras.Model, n)]
    if overridden:
        raise ValueError(
            f"`model` has its own {', '.join(overridden)}, which would be lost: "
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


def copied(name: str, given: Any, kind: type[keras.Model]) -> Any:
    """A copy of a setting or of its serialized form; the copy will hold the model's state."""
    serialized = isinstance(given, dict) and "class_name" in given
    copy = keras.saving.deserialize_keras_object(given) if serialized else given
    if copy is not None and not isinstance(copy, kind):
        raise ValueError(f"`{name}` must be a {kind.__name__} or None. Received: {given!r}")
    return copy if serialized or copy is None else type(copy).from_config(copy.get_config())
