"""Making a `DWDModel` around a model, with settings of its own."""

from typing import Any

import keras

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
    if isinstance(given, dict):
        return keras.saving.deserialize_keras_object(given)
    if given is not None and not isinstance(given, kind):
        raise ValueError(f"`{name}` must be a {kind.__name__} or None. Received: {given!r}")
    return given if given is None else type(given).from_config(given.get_config())
