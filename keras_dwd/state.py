"""The format of a consolidation state in files: the names of its arrays."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from keras_dwd.files import FileError
from keras_dwd.variables import Arrays

FORMAT = 2
"""Version of the file format, increased when earlier versions of the package cannot read it."""

Commit = Callable[[], None]
"""Applies a change that was prepared and checked before; cannot fail."""

UNCHANGED = "The model's consolidation state was left as it was."


def to_file(state: Arrays, paths: Iterable[str]) -> Arrays:
    """Convert the keys of a state from `NAME/PATH` to those in files, `NAME|POSITION|PATH`.

    The position identifies variables of models whose layers get other names in each process.

    Args:
        state: The arrays by `NAME/PATH`, or by `NAME` alone.
        paths: Paths of the model's variables, in order.
    """
    positions = {path: index for index, path in enumerate(paths)}
    saved: Arrays = {}
    for key, array in state.items():
        name, _, path = key.partition("/")
        saved[f"{name}|{positions[path]}|{path.replace('/', '|')}" if path else name] = array
    return saved


def from_file(saved: Arrays, paths: Sequence[str]) -> Arrays:
    """The inverse of `to_file`, for a model whose layer names may have other numbers.

    Args:
        saved: The arrays of a file.
        paths: Paths of the model's variables, in order.

    Raises:
        FileError: If a name in the file is not the name of an array of a state.
    """
    parts = {key: key.split("|", 2) for key in saved if "|" in key}
    for key, fields in parts.items():
        if len(fields) != 3:
            refuse(fields[0], key, saved[key])
    # Layers of a subclassed model get new numbers in each process: match them by position.
    numbered = any(path.replace("|", "/") not in paths for _, _, path in parts.values())
    names: dict[str, str] = {}
    for _, position, saved_path in parts.values():
        path = saved_path.replace("|", "/")
        at = int(position) if position.isdigit() else len(paths)
        other = paths[at] if at < len(paths) else ""
        matches = numbered and _unnumbered(other) == _unnumbered(path)
        names[path] = other if matches else path
    state = {f"{name}/{path.replace('|', '/')}": saved[k] for k, (name, _, path) in parts.items()}
    state |= {key: array for key, array in saved.items() if "|" not in key}
    return renamed(state, names)


def renamed(state: Arrays, names: Mapping[str, str]) -> Arrays:
    """A state with renamed paths, in its keys and in the summary of groups."""
    renamed_state: Arrays = {}
    for key, array in state.items():
        name, _, path = key.partition("/")
        new = f"{name}/{names.get(path, path)}" if path else key
        if new in renamed_state:
            refuse(name, path, array)
        renamed_state[new] = array
    if "groups" in renamed_state:
        groups = groups_of(renamed_state["groups"])
        for group in groups:
            group["layers"] = {names.get(path, path): n for path, n in group["layers"].items()}
        renamed_state["groups"] = json_array(groups)
    return renamed_state


def check_numbers(state: Arrays) -> None:
    """Raise `FileError` if an array of a state holds no numbers, or others than finite float32."""
    for name, array in state.items():
        numeric = array.dtype.kind in "biufV"  # V: bfloat16
        if numeric and array.dtype.kind in "fV":
            with np.errstate(over="ignore"):
                numeric = bool(np.isfinite(np.asarray(array, "float32")).all())
        if not numeric:
            raise FileError(f"The saved {name!r} has numbers that cannot be. {UNCHANGED}")


def refuse(name: str, path: str, array: np.ndarray) -> NoReturn:
    """Raise `FileError` because an array of a state fits no variable of the model."""
    raise FileError(
        f"The saved {name} of {path!r}, of shape {array.shape}, fits no variable of the model. "
        f"{UNCHANGED}"
    )


def json_array(content: Any) -> np.ndarray:
    """An array of the bytes of JSON, for content that is not an array."""
    return np.frombuffer(json.dumps(content).encode(), "uint8")


def groups_of(saved: np.ndarray) -> list[dict[str, Any]]:
    """The summary of groups that `json_array` has encoded.

    Raises:
        FileError: If the array does not hold a summary of groups.
    """
    try:
        groups = json.loads(saved.tobytes().decode())
        for group in groups:
            for name in ("group", "size", "mean_fisher", "magnitude", "strength"):
                float(group[name])
            group["layers"] = {path: int(count) for path, count in group["layers"].items()}
        return list(groups)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise FileError(f"The saved summary of groups cannot be read. {UNCHANGED}") from None


def _unnumbered(path: str) -> str:
    """A path without the numbers that Keras appends to layer names."""
    return re.sub(r"_\d+(?=/|$)", "", path)
