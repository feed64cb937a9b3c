"""A model that goes on from another one, of which it is a grown version."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import keras
import numpy as np

from keras_dwd import state
from keras_dwd.curvature.rules import Matrix, matrices
from keras_dwd.variables import Arrays, Variables, by_path, digest_of

# What is of the task that is being learned, of the task graph, of files alone, or of a basis that
# will be another one.
_LEFT = {*state.STATISTICS, "in_use", "center", "value", "group"}

# All directions of as many rows are made explicit, where that is needed.
_MANY = 4096


def inherit(model: Any, previous: Any, names_of: Mapping[str, str], dropped: Sequence[str]) -> None:
    """See `DWDModel.inherit`."""
    if not hasattr(previous, "regularizer") or previous is model:
        raise ValueError(f"`previous` must be another DWDModel. Received: {previous!r}")
    for name, each in (("previous", previous), ("this model", model)):
        if each.task_graph is not None:
            raise ValueError(
                f"`{name}` has a task graph, whose files are of one architecture: a model that "
                "grows has to do without. Nothing was changed."
            )
    old, new = _weights(previous), _weights(model)
    names = _names(old, new, names_of, dropped)
    grown = {path: tuple(new[other].shape) for path, other in names.items()}
    arrays = previous.workers.whole_state(state.state_of(previous))
    if arrays:
        kept = _kept(arrays, names)
        before, after = matrices(previous), matrices(model)
        values = _values(old, new, names)
        for name in list(kept):
            kind, _, path = name.partition("/")
            if kind == "anchor":
                whole = values[names[path]].astype("float32")
                whole[_corner(kept[name].shape)] = kept[name]
                kept[name] = whole
            elif kind == "precision":
                kept[name] = _padded(kept[name], grown[path])
            elif kind == "correction":
                shape = (*old[path].shape, kept[name].shape[1])
                columns = _padded(kept[name].reshape(shape), (*grown[path], shape[-1]))
                kept[name] = columns.reshape(-1, shape[-1])
            elif kind == "output_vectors" and path in before and names[path] in after:
                kept |= _grown_factors(path, kept, before[path], after[names[path]])
        mine = {} if model.grouping is None else model.grouping.state()
        learned = {n: a for n, a in kept.items() if n.startswith(state.GROUPING)}
        if {n.removeprefix(state.GROUPING) for n in learned} != set(mine):
            kept = {n: a for n, a in kept.items() if n not in learned}
        state.take(model, state.renamed(kept, names))
    at_boundary = bool(arrays) and previous.weights_digest == digest_of(old)
    for path, value in _values(old, new, names).items():
        new[path].assign(value)
    if at_boundary:
        model.weights_digest = digest_of(new)


def _weights(model: keras.Model) -> Variables:
    """A model's variables without the states of random generators."""
    weights = {id(v) for v in model.weights}
    return {path: v for path, v in by_path(model).items() if id(v) in weights}


def _names(
    old: Variables, new: Variables, renamed: Mapping[str, str], dropped: Sequence[str]
) -> dict[str, str]:
    """The new path of each old variable that is not dropped, after all of them were found."""
    for what, given in (("renamed", renamed), ("dropped", dropped)):
        for pattern in given:
            inside = f"{pattern}/*" if what == "renamed" else pattern
            if not any(fnmatchcase(path, inside) or path == pattern for path in old):
                raise ValueError(
                    f"`{what}` has {pattern!r}, which is nothing in `previous`: that has "
                    f"{', '.join(old)}. Nothing was changed."
                )
    names: dict[str, str] = {}
    lost: list[str] = []
    for path, variable in old.items():
        if any(fnmatchcase(path, pattern) for pattern in dropped):
            continue
        # The longest name that fits: that of a variable or of the innermost layer.
        fitting = [n for n in renamed if path == n or path.startswith(f"{n}/")]
        name = max(fitting, key=len, default="")
        other = renamed[name] + path[len(name) :] if fitting else path
        shape = tuple(variable.shape)
        if other not in new:
            lost.append(f"{path!r} {shape}")
        elif not _fits(variable, new[other]):
            place = f"{other!r} {tuple(new[other].shape)} of {new[other].dtype}"
            lost.append(f"{path!r} {shape} of {variable.dtype}, where this one has {place}")
        elif other in names.values():
            raise ValueError(f"`renamed` gives {other!r} to two variables. Nothing was changed.")
        else:
            names[path] = other
    if lost:
        unused = [f"{path!r} {tuple(v.shape)}" for path, v in new.items()]
        unused = [u for u, path in zip(unused, new, strict=True) if path not in names.values()]
        raise ValueError(
            f"`previous` has variables that have no place in this model: {'; '.join(lost)}. Say "
            "in `renamed` what they, or their layers, are called here, or give them up in "
            f"`dropped`. New in this model are: {', '.join(unused) or 'none'}. Nothing was changed."
        )
    return names


def _fits(old: keras.Variable, new: keras.Variable) -> bool:
    """Whether a variable is the other one, or that one grown."""
    alike = keras.backend.is_float_dtype(old.dtype) == keras.backend.is_float_dtype(new.dtype)
    larger = len(old.shape) == len(new.shape) and all(
        a <= b for a, b in zip(old.shape, new.shape, strict=True)
    )
    return alike and larger


def _values(old: Variables, new: Variables, names: Mapping[str, str]) -> Arrays:
    """The new values by new path: what was there, and around it what is there now."""
    values: Arrays = {}
    for path, other in names.items():
        value = np.array(new[other])
        value[_corner(tuple(old[path].shape))] = np.asarray(old[path])
        values[other] = value
    return values


def _kept(arrays: Arrays, names: Mapping[str, str]) -> Arrays:
    """The state of tasks learned, without what was dropped."""
    kept: Arrays = {}
    for name, array in arrays.items():
        kind, _, path = name.partition("/")
        if not path or (path in names and kind not in _LEFT):
            kept[name] = array
    groups = state.groups_of(kept["groups"])
    for group in groups:
        group["layers"] = {path: n for path, n in group["layers"].items() if path in names}
        group["size"] = sum(group["layers"].values())
    zeros = {name: np.zeros_like(kept[name]) for name in ("fisher_weight", "fisher_looked", "tie")}
    return kept | zeros | {"groups": state.json_array([g for g in groups if g["size"]])}


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(n) for n in shape)


def _padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """With zeros at the ends of the axes."""
    whole = np.zeros(shape, array.dtype)
    whole[_corner(array.shape)] = array
    return whole


def _grown_factors(path: str, kept: Arrays, before: Matrix, after: Matrix) -> Arrays:
    """The factors of a matrix with new rows or columns, in which these are free."""
    (_, old), (_, new) = before, after
    # Where in the new matrix each row and column of the old one is.
    numbers = new.split(np.arange(new.rows * new.shape[1]).reshape(new.rows, new.shape[1]))
    if old.bias_shape is not None and new.bias_shape is None:
        return {}
    parts = [numbers[0][_corner(old.kernel_shape)]]
    if old.bias_shape is not None:
        parts.append(numbers[1][_corner(old.bias_shape)])
    at = old.join(*parts)
    rows, columns = at[:, 0] // new.shape[1], at[0] % new.shape[1]
    found: Arrays = {}
    for side, places, size in (("input", rows, new.rows), ("output", columns, new.shape[1])):
        held = kept.get(f"{side}_rows/{path}")
        if held is not None:  # all others are free already
            found[f"{side}_rows/{path}"] = places[held.astype(int)].astype(held.dtype)
            continue
        if len(places) == size:
            continue
        vectors, values, rest = (kept[f"{side}_{p}/{path}"] for p in ("vectors", "values", "rest"))
        left = np.zeros(())
        if rest > 0 and len(places) > _MANY:  # its trace is spread over the new ones too
            left = rest * (len(places) - len(values)) / (size - len(values))
        elif rest > 0:  # it is that of the old ones alone: their directions become explicit
            others = np.linalg.svd(vectors.astype("float64"))[0][:, vectors.shape[1] :]
            values = np.concatenate([values, np.full(others.shape[1], rest)])
            vectors = np.concatenate([vectors, others], 1)
        whole = np.zeros((size, vectors.shape[1]))
        whole[places] = vectors
        found[f"{side}_vectors/{path}"] = whole
        found[f"{side}_values/{path}"] = np.asarray(values)
        found[f"{side}_rest/{path}"] = left
    return found
