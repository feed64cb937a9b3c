"""Transfers a state to a grown model: names, values and precision matrices."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import keras
import numpy as np

from keras_dwd.curvature.fisher import NAMES as STATISTICS
from keras_dwd.precision.block import Place, corner
from keras_dwd.precision.blocks import NAMES as BLOCK_ARRAYS
from keras_dwd.precision.blocks import arrays_by_path, block_from
from keras_dwd.state import groups_of, json_array, refuse, renamed
from keras_dwd.variables import Arrays, Variables

# Not inherited: the online estimate of the unfinished task, the heads it uses, the anchors of the
# task graph, variables that Keras does not save, and groups of eigenvectors of the old matrices.
_NOT_INHERITED = {*STATISTICS, "in_use", "center", "value", "group"}


def names_of(
    old: Variables, new: Variables, renamed: Mapping[str, str], dropped: Sequence[str]
) -> dict[str, str]:
    """The new path of each old variable that is not dropped.

    Args:
        old: Variables of the previous model.
        new: Variables of the grown model.
        renamed: New paths by old paths, of variables or layers.
        dropped: Patterns of old paths to drop.

    Raises:
        ValueError: If an old variable has no counterpart in the grown model.
    """
    for what, patterns in (("renamed", renamed), ("dropped", dropped)):
        for pattern in patterns:
            inside = f"{pattern}/*" if what == "renamed" else pattern
            if not any(fnmatchcase(path, inside) or path == pattern for path in old):
                raise ValueError(
                    f"`{what}` has {pattern!r}, which is nothing in `previous`: that has "
                    f"{', '.join(old)}. Nothing was changed."
                )
    names: dict[str, str] = {}
    unplaced: list[str] = []
    for path, variable in old.items():
        if any(fnmatchcase(path, pattern) for pattern in dropped):
            continue
        # The longest matching name belongs to the variable itself or to its innermost layer.
        matching = [n for n in renamed if path == n or path.startswith(f"{n}/")]
        name = max(matching, key=len, default="")
        other = renamed[name] + path[len(name) :] if matching else path
        shape = tuple(variable.shape)
        if other not in new:
            unplaced.append(f"{path!r} {shape}")
        elif not _fits(variable, new[other]):
            place = f"{other!r} {tuple(new[other].shape)} of {new[other].dtype}"
            unplaced.append(f"{path!r} {shape} of {variable.dtype}, where this one has {place}")
        elif other in names.values():
            raise ValueError(f"`renamed` gives {other!r} to two variables. Nothing was changed.")
        else:
            names[path] = other
    if unplaced:
        unused = [f"{path!r} {tuple(v.shape)}" for path, v in new.items()]
        unused = [u for u, path in zip(unused, new, strict=True) if path not in names.values()]
        raise ValueError(
            f"`previous` has variables that have no place in this model: {'; '.join(unplaced)}. "
            "Say in `renamed` what they, or their layers, are called here, or give them up in "
            f"`dropped`. New in this model are: {', '.join(unused) or 'none'}. Nothing was changed."
        )
    return names


def values_of(old: Variables, new: Variables, names: Mapping[str, str]) -> Arrays:
    """The values of the grown variables, by new path.

    Args:
        old: Variables of the previous model, whose values come first along every axis.
        new: Variables of the grown model, whose values are kept in all new elements.
        names: The new path of each old path.
    """
    values: Arrays = {}
    for path, other in names.items():
        value = np.array(new[other])
        value[corner(tuple(old[path].shape))] = np.asarray(old[path])
        values[other] = value
    return values


def grown_state(
    state: Arrays,
    names: Mapping[str, str],
    values: Arrays,
    before: Mapping[str, Place],
    after: Mapping[str, Place],
    grouping: set[str],
) -> Arrays:
    """The state of the previous model for the grown model; new elements have zero precision.

    Args:
        state: State of the previous model, by `NAME/PATH` or `NAME`.
        names: The new path of each old path that is not dropped.
        values: Values of the grown variables, by new path.
        before: Places in the previous model, by old path.
        after: Places in the grown model, by new path.
        grouping: Names of the arrays of the grown model's grouping; if those in `state` are not the
            same, they are dropped.

    Raises:
        FileError: If a block does not fit the grown model.
    """
    new_state: Arrays = {}
    block_arrays: Arrays = {}
    distils = bool(state.get("distillation.boundaries", 0))
    for key, array in state.items():
        name, _, path = key.partition("/")
        if path and (path not in names or name in _NOT_INHERITED):
            continue
        if name in BLOCK_ARRAYS:
            block_arrays[key] = array
        elif name == "anchor":
            anchor = values[names[path]].astype("float32")
            anchor[corner(array.shape)] = array
            new_state[key] = anchor
            # The teacher of a distillation has these values where it has none of its own. Its new
            # elements are zero, so that it gives the outputs of the previous model.
            teacher = f"teacher/{path}"
            if distils and teacher not in state and anchor.shape != array.shape:
                new_state[teacher] = _with_zeros(array, anchor.shape)
        elif name in ("teacher", "old_heads"):
            shape = values[names[path]].shape
            new_state[key] = _with_zeros(array, shape[: array.ndim])
        else:
            new_state[key] = array
    for path, arrays in arrays_by_path(block_arrays).items():
        # The ranks only matter when tasks are merged, so any values will do.
        try:
            block = block_from(arrays, before[path], rank=1, correction=1)
            grown = block.grown(after[names[path]])
        except ValueError:
            refuse(*next((name, path, array) for name, array in arrays.items()))
        new_state |= {f"{name}/{path}": np.asarray(a) for name, a in grown.arrays().items()}
    grouping_keys = {key for key in new_state if key.startswith("grouping.")}
    if grouping_keys != grouping:
        new_state = {key: array for key, array in new_state.items() if key not in grouping_keys}
    groups = groups_of(new_state["groups"])
    for group in groups:
        group["layers"] = {path: n for path, n in group["layers"].items() if path in names}
        group["size"] = sum(group["layers"].values())
    zeros = {
        name: np.zeros_like(new_state[name]) for name in ("fisher_weight", "fisher_looked", "tie")
    }
    new_state |= zeros | {"groups": json_array([g for g in groups if g["size"]])}
    return renamed(new_state, names)


def _with_zeros(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array in the corner of a larger one of zeros."""
    grown = np.zeros(shape, array.dtype)
    grown[corner(array.shape)] = array
    return grown


def _fits(old: keras.Variable, new: keras.Variable) -> bool:
    """Whether `new` is a variable like `old`, of the same shape or larger."""
    same_kind = keras.backend.is_float_dtype(old.dtype) == keras.backend.is_float_dtype(new.dtype)
    larger = len(old.shape) == len(new.shape) and all(
        a <= b for a, b in zip(old.shape, new.shape, strict=True)
    )
    return same_kind and larger
