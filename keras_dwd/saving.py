"""Saving, copying and cloning of a model that holds a consolidation state."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.consolidation import Consolidation
from keras_dwd.keras_private import layers_within
from keras_dwd.learner import Learner

# The model's attribute that holds the state. Keras saves and loads attributes in the order of their
# names. This one comes last, because it holds values that Keras changes while saving the others.
# Plain models have no such attribute and ignore it in files.
_STATE_ATTRIBUTE = "~consolidation"


class _Store(keras.layers.Layer):
    """A layer that saves and loads the consolidation state, next to the layers of the model.

    The state is not among the weights of the model. These are saved where a plain model saves
    them, so files of weights can be exchanged with a plain model in both directions.
    """

    def __init__(self, model: Learner, consolidation: Consolidation):
        super().__init__(name="consolidation")
        # Weak references, because Keras would visit the model again as an attribute of this layer.
        self._model = weakref.ref(model)
        self._consolidation = weakref.ref(consolidation)

    def save_own_variables(self, store: Any) -> None:
        model, consolidation = self._model(), self._consolidation()
        assert model is not None
        assert consolidation is not None
        for name, array in consolidation.save(model).items():
            store[name] = array

    def load_own_variables(self, store: Any) -> None:
        # Keras' store has `keys` but does not support iteration.
        saved = {key: np.asarray(store[key]) for key in list(store.keys())}
        model, consolidation = self._model(), self._consolidation()
        assert model is not None
        assert consolidation is not None
        if saved:
            consolidation.load(model, saved)


def keep_in_files(model: Learner, consolidation: Consolidation) -> None:
    """Let Keras save and load a state with the model, without tracking it as a layer."""
    model.__dict__[_STATE_ATTRIBUTE] = _Store(model, consolidation)


def subclassed_within(model: keras.Model) -> keras.Model | None:
    """The subclassed model that `from_model` wrapped in a model, or `None` for other models."""
    layers = [x for x in model.layers if not isinstance(x, keras.layers.InputLayer)]
    inner = layers[0] if len(layers) == 1 else None
    subclassed = isinstance(inner, keras.Model) and not getattr(inner, "inputs", None)
    return inner if subclassed else None


@contextmanager
def as_plain(model: keras.Model) -> Iterator[keras.Model]:
    """A context with the model whose files have the layout of the plain model's, plus the state.

    This is the model itself, except for a subclassed model that `from_model` wrapped: then it is
    the subclassed model, which borrows the state and the optimizer within the context.
    """
    plain = subclassed_within(model)
    if plain is None:
        yield model
        return
    borrowed = {_STATE_ATTRIBUTE: model.__dict__[_STATE_ATTRIBUTE]}
    if model.compiled:
        borrowed["optimizer"] = model.optimizer
    attributes = vars(plain)  # `setattr` would track them
    original = {name: attributes[name] for name in borrowed if name in attributes}
    attributes.update(borrowed)
    try:
        yield plain
    finally:
        for name in borrowed:
            del attributes[name]
        attributes.update(original)


def deep_copy(model: keras.Model, memo: dict[int, Any]) -> keras.Model:
    """A copy of the model, as if saved and loaded, that shares nothing with the original."""
    types = {type(layer).__name__: type(layer) for layer in (model, *layers_within(model))}
    with keras.saving.custom_object_scope(types):
        from_file: Any = model.__reduce__()  # Keras saves to a file in memory, without pickle
        load, arguments = from_file
        memo[id(model)] = result = load(*arguments)
    return result


def mark_clone(outputs: Any, settings: dict[str, Any]) -> None:
    """Attach the settings of a model to the outputs that `keras.models.clone_model` creates."""
    for tensor in outputs:
        tensor._settings_of_clone = settings


def cloned_settings(outputs: Any) -> dict[str, Any]:
    """The settings attached by `mark_clone`; empty if `outputs` do not belong to a clone.

    `keras.models.clone_model` calls the class of a model with inputs and outputs only.
    """
    settings: dict[str, Any] = {}
    for tensor in tf.nest.flatten(outputs):
        settings = getattr(tensor, "__dict__", {}).pop("_settings_of_clone", settings)
    return settings
