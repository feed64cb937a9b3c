"""Addressing variables by path: a position in a list shifts when a layer is frozen."""

import hashlib
from collections.abc import Iterator

import keras
import numpy as np

Arrays = dict[str, np.ndarray]
"""One array per variable, keyed by its path in the model."""

Variables = dict[str, keras.Variable]
"""Variables, keyed by their path in the model."""


def by_path(model: keras.Model) -> Variables:
    """All variables of a model by the names of the layers they are in, outermost first.

    `variable.path` will not do: it starts with the name of whatever model was being built at the
    time, and is another one after loading.

    Raises:
        ValueError: If two variables share a path.
    """
    found: Variables = {}
    for path, variable in _walk(model, "", set()):
        if path in found:
            raise ValueError(
                f"Two variables of the model are called {path!r}, and nothing tells them apart. "
                "Give the layers distinct names."
            )
        found[path] = variable
    return found


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
    for layer in model._flatten_layers(include_self=False):
        own = [*layer._trainable_variables, *layer._non_trainable_variables]
        kinds |= {id(v): type(layer).__name__ for v in own}
    return {path: kinds[id(v)] for path, v in by_path(model).items() if id(v) in kinds}


def untracked(values: np.ndarray, name: str, dtype: str = "float32") -> keras.Variable:
    """A variable that no model tracks, holding `values`."""
    return keras.Variable(np.asarray(values, dtype), trainable=False, dtype=dtype, name=name)


def digest_of(variables: Variables) -> bytes:
    """A digest of the values of variables, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for variable in variables.values():  # not of their paths, which may be others after loading
        digest.update(np.ascontiguousarray(variable).view("uint8").data)
    return digest.digest()
