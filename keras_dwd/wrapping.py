"""Wraps an existing model in a `DWDModel`, with copies of the settings."""

import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_dwd.curvature.likelihood import losses_of, name_with_logits, output_names
from keras_dwd.hub_tasks import for_hub_tasks, is_hub_task, keep_hub_task
from keras_dwd.keras_private import layer_of, layers_within
from keras_dwd.layers.task_heads import TaskHeads
from keras_dwd.learner import Learner, overridden_steps, runs_its_graph

# Layers of which some weights are zero until they are trained.
_WITH_ZEROS = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
)

# Layers that give logits where they have no activation.
_HEADS = (keras.layers.Dense, keras.layers.EinsumDense, TaskHeads)

# The largest integer up to which a floating-point dtype holds all of them.
_EXACT = {"float16": 2**11, "bfloat16": 2**8, "float32": 2**24, "float64": 2**53}


def wrapped(
    kind: type[keras.Model], model: keras.Model, inputs: Any, settings: dict[str, Any]
) -> Any:
    """A model of class `kind` around another model, see `DWDModel.from_model`."""
    overridden = overridden_steps(model)
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
    # With a quantized policy, Keras would look for a quantized `call` of the functional model.
    policy = model.dtype_policy
    if policy.quantization_mode is None and policy != keras.config.dtype_policy():
        settings = {"dtype": model.dtype_policy} | settings
    if inputs is not None:
        return kind(inputs, model(inputs), **settings)
    if is_hub_task(model):
        wrapper = for_hub_tasks(kind)(model.input, model.output, **settings)
        keep_hub_task(wrapper, model)
        return wrapper
    if not getattr(model, "inputs", None):
        inputs = _inputs_as_built(model)
        try:
            outputs = model(inputs)
        except Exception as error:
            raise ValueError(
                f"`inputs` is needed: {model.name!r} cannot be called on float32 inputs of the "
                f"shapes it was built with. Pass the `keras.Input`s to call it on. {error}"
            ) from error
        return kind(inputs, outputs, **settings)
    if not runs_its_graph(model):
        raise ValueError(
            f"`model` has a `call` of its own, which would be lost: {type(model).__name__}. Pass "
            "`inputs`, the `keras.Input`s to call it on."
        )
    if isinstance(model, keras.Sequential):
        return kind(model.inputs[0], model.outputs[0], **settings)
    return kind(model.input, model.output, **settings)


def was_trained(model: keras.Model) -> bool:
    """Whether a model's own optimizer has trained it, here or before it was saved."""
    optimizer = getattr(model, "optimizer", None)
    return optimizer is not None and int(optimizer.iterations) > 0


def warn_of_nothing_held(model: keras.Model, trained: bool) -> None:
    """Warn that a model which knows something is about to be trained without holding on to it.

    Args:
        model: A `DWDModel` around another model, without any state, at its first `fit`.
        trained: Whether `was_trained` was true of the other model.
    """
    if not (trained or _differs_from_initial(model)):
        return
    reason = "was trained" if trained else "got its weights"
    warnings.warn(
        f"The model {model.name!r} {reason} before this `fit`, and nothing is consolidated: what "
        "it knows will be forgotten. To keep it, call `model.consolidate(x)` with a sample of the "
        "inputs it was trained on, before `fit`. If it is to be forgotten, set `strength=0`.",
        stacklevel=4,
    )


def warn_of_logits(model: Learner) -> None:
    """Warn of a loss that takes probabilities where the outputs are certainly logits.

    Keras computes such a loss without an error, but it is that of no likelihood.
    """
    losses = zip(output_names(model), model.outputs, losses_of(model), strict=False)
    for name, output, loss in losses:
        layer, needed = layer_of(output), name_with_logits(loss)
        linear = getattr(layer, "activation", None) is keras.activations.linear
        if needed and linear and isinstance(layer, _HEADS):
            warnings.warn(
                f"The output {name!r} has no activation, so it gives logits, but its loss takes "
                "probabilities: Keras computes a wrong loss without an error. Pass "
                f"`keras.losses.{needed}(from_logits=True)` to `compile`, or give the output a "
                "softmax or a sigmoid.",
                stacklevel=3,
            )


def _differs_from_initial(model: keras.Model) -> bool:
    """Whether all weights that layers create as zeros, and at least two, have other values.

    So new models have only what their user has set, and models with a new head are no finished
    ones. Of weights that are all frozen nothing can be forgotten.
    """
    zeros = [
        getattr(layer, name)
        for layer in layers_within(model)
        if isinstance(layer, _WITH_ZEROS)
        for name in ("bias", "beta")
        if isinstance(getattr(layer, f"{name}_initializer", None), keras.initializers.Zeros)
        and getattr(layer, name, None) is not None
    ]
    if len(zeros) < 2 or not any(v.trainable for v in zeros):
        return False
    return all(np.asarray(v, "float32").any() for v in zeros)


def _inputs_as_built(model: keras.Model) -> Any:
    """Float32 inputs of the shapes that a subclassed model was built with.

    Raises:
        ValueError: If the shapes are unknown, or if the inputs may be integers that would not be
            exact.
    """
    shapes = (model.get_build_config() or {}).get("input_shape")
    leaves = list(_leaves(shapes))
    if not leaves or not all(_is_shape(leaf) and leaf for leaf in leaves):
        raise ValueError(
            f"`inputs` is needed: {model.name!r} is a subclassed model that does not tell the "
            "shapes of one argument. Pass the `keras.Input`s to call it on; if its `call` takes "
            "several arguments, wrap `keras.Model(inputs, model(...))` instead."
        )
    for layer in layers_within(model):
        if isinstance(layer, keras.layers.Embedding):
            around = [x for x in (model, *layers_within(model)) if layer in layers_within(x)]
            exact = min(_EXACT.get(x.compute_dtype, 2**24) for x in around)
            if layer.input_dim > min(exact, 2**24):
                raise ValueError(
                    f"`inputs` is needed: {model.name!r} embeds {layer.input_dim} integers, which "
                    "float32 inputs, cast to the dtype it computes in, do not hold exactly. Pass "
                    "the `keras.Input`s to call it on, with `dtype='int32'`."
                )
    return _named_inputs(shapes, "")


def _leaves(shapes: Any) -> Iterator[Any]:
    if _is_shape(shapes) or not isinstance(shapes, (list, tuple, dict)):
        yield shapes
        return
    for value in shapes.values() if isinstance(shapes, dict) else shapes:
        yield from _leaves(value)


def _is_shape(shapes: Any) -> bool:
    return isinstance(shapes, (list, tuple)) and all(
        n is None or isinstance(n, int) for n in shapes
    )


def _named_inputs(shapes: Any, name: str) -> Any:
    """A `keras.Input` for each shape in a structure, named by its keys as Keras expects."""
    if _is_shape(shapes):
        return keras.Input(shapes[1:], name=name or None)
    prefix = f"{name}_" if name else ""
    if isinstance(shapes, dict):
        return {key: _named_inputs(value, f"{prefix}{key}") for key, value in shapes.items()}
    return type(shapes)(
        _named_inputs(value, f"{prefix}{i}" if name else "") for i, value in enumerate(shapes)
    )


def copied(name: str, setting: Any, kind: type[keras.Model]) -> Any:
    """A copy of a setting or of its serialized form; the copy will hold the model's state."""
    serialized = isinstance(setting, dict) and "class_name" in setting
    copy = keras.saving.deserialize_keras_object(setting) if serialized else setting
    if copy is not None and not isinstance(copy, kind):
        raise ValueError(f"`{name}` must be a {kind.__name__} or None. Received: {setting!r}")
    return copy if serialized or copy is None else type(copy).from_config(copy.get_config())
