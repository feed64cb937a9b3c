"""Addresses variables by path, because positions in a list change when a layer is frozen."""

import hashlib
from collections.abc import Iterator

import keras
import numpy as np

from keras_dwd.keras_private import layers_within, own_variables

Arrays = dict[str, np.ndarray]
"""One array per variable, keyed by its path in the model."""

Variables = dict[str, keras.Variable]
"""Variables, keyed by their path in the model."""


def by_path(model: keras.Model) -> Variables:
    """All variables of a model by path: the names of their layers, outermost first, and their own.

    `variable.path` does not work for this: it starts with the name of the model that was being
    built when the variable was created, and changes when the model is loaded.

    Raises:
        ValueError: If two variables share a path.
    """
    variables: Variables = {}
    for path, variable in _walk(model, "", set()):
        if path in variables:
            raise ValueError(
                f"Two variables of the model are called {path!r}, and nothing tells them apart. "
                "Give the layers distinct names."
            )
        variables[path] = variable
    return variables


def trainable_by_path(model: keras.Model) -> Variables:
    """The trainable variables by path, in the order of `model.trainable_variables`."""
    paths = {id(v): path for path, v in by_path(model).items()}
    return {paths[id(v)]: v for v in model.trainable_variables}


def weights_by_path(model: keras.Model) -> Variables:
    """The weights by path: all variables except the states of random generators."""
    weights = {id(v) for v in model.weights}
    return {path: v for path, v in by_path(model).items() if id(v) in weights}


def _walk(layer: keras.Layer, prefix: str, seen: set[int]) -> Iterator[tuple[str, keras.Variable]]:
    for inner in getattr(layer, "layers", []):
        yield from _walk(inner, f"{prefix}{inner.name}/", seen)
    for variable in layer.variables:
        if id(variable) not in seen:
            seen.add(id(variable))
            _, inside, rest = f"/{variable.path}".rpartition(f"/{layer.name}/")
            yield prefix + (rest if inside else variable.path), variable


def kinds_of(model: keras.Model) -> dict[str, str]:
    """The class of each variable's layer, by path, in the order of `by_path`."""
    kinds: dict[int, str] = {}
    for layer in layers_within(model):
        kinds |= {id(v): type(layer).__name__ for v in own_variables(layer)}
    return {path: kinds[id(v)] for path, v in by_path(model).items() if id(v) in kinds}


def untracked(values: np.ndarray, name: str, dtype: str = "float32") -> keras.Variable:
    """A variable that no model tracks, holding `values`."""
    return keras.Variable(np.asarray(values, dtype), trainable=False, dtype=dtype, name=name)


def digest_of(variables: Variables) -> bytes:
    """A digest of the values of variables, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for variable in variables.values():  # paths may change on loading
        digest.update(np.ascontiguousarray(variable).view("uint8").data)
    return digest.digest()
