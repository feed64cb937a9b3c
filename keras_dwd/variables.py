"""Addresses variables by path, because positions in a list change when a layer is frozen."""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

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

    Keras allows layers of the same name in different places, and variables of the same name in a
    layer. The second one is numbered `_1`, and so on, in the order of the model's layers, which is
    the same whenever the model is built.
    """
    named = list(_walk(model, "", set()))
    if len({path for path, _ in named}) < len(named):
        named = _told_apart(named, model)
    return dict(named)


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


def _told_apart(
    named: list[tuple[str, keras.Variable]], model: keras.Model
) -> list[tuple[str, keras.Variable]]:
    """Number the layers, or else the variables, that share a path with earlier ones."""
    owners = {id(v): id(layer) for layer in layers_within(model) for v in own_variables(layer)}
    first: dict[str, int] = {}  # the owner of the first variable with a path
    namesakes: set[tuple[str, int]] = set()  # layers to be numbered, with their path
    for path, variable in named:
        owner = owners.get(id(variable))
        if owner is not None and "/" in path and first.setdefault(path, owner) != owner:
            namesakes.add((path.rpartition("/")[0], owner))
    taken = {path for path, _ in named} | {path.rpartition("/")[0] for path, _ in named}
    names: dict[tuple[str, int], str] = {}
    result: dict[str, keras.Variable] = {}
    for path, variable in named:
        layer, slash, name = path.rpartition("/")
        key = (layer, owners.get(id(variable), 0))
        if key in namesakes:
            if key not in names:
                names[key] = _numbered(layer, taken)
            path = f"{names[key]}{slash}{name}"
        if path in result:
            path = _numbered(path, taken)
        result[path] = variable
    return list(result.items())


def _numbered(name: str, taken: set[str]) -> str:
    """The name with the lowest number that is not taken, which is taken then."""
    number = next(n for n in itertools.count(1) if f"{name}_{n}" not in taken)
    taken.add(f"{name}_{number}")
    return f"{name}_{number}"


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


def insert(entries: dict[Any, Any], key: Any, value: Any) -> None:
    """Insert into a dictionary that is kept in the order of its keys.

    Graphs built from it are then the same in any order of insertion, for example after loading,
    and sums in them agree to the last bit.
    """
    entries[key] = value
    ordered = sorted(entries.items())
    entries.clear()
    entries.update(ordered)
