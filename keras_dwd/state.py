"""Saving and restoring what a model consolidated, next to its weights."""

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from keras_dwd.curvature.diagonal import Diagonal
from keras_dwd.curvature.factor import Factor
from keras_dwd.curvature.fisher import Block
from keras_dwd.curvature.kronecker import SIDES, Kronecker, KroneckerFisher
from keras_dwd.curvature.low_rank import LowRank
from keras_dwd.curvature.rules import Matrix, matrices
from keras_dwd.files import FileError
from keras_dwd.grouping.assignment import assignment_of
from keras_dwd.grouping.grouping import Summary
from keras_dwd.variables import Arrays, Variables, by_path

# Raised when a later version could no longer be read by an earlier one.
FORMAT = 1
_SCALARS = {
    *("format", "tasks_learned", "weights_digest"),
    *("fisher_weight", "fisher_looked", "groups", "tie"),
}
_TEXTS = {"weights_digest", "groups"}
GROUPING = "grouping."
_PARTS = ("vectors", "values", "rest", "rows")
LEAVES = {"precision", "correction", *(f"{side}_{part}" for side in SIDES for part in _PARTS)}
STATISTICS = {"fisher", "sketch", "margin", *SIDES, *(f"{side}_trace" for side in SIDES)}
_UNCHANGED = "The model's consolidation state was left as it was."


def has_learned(model: Any) -> bool:
    """Whether there is an estimate, or anything that tasks have left."""
    return bool(model.tasks_learned or model.fisher.slots or float(model.fisher.weight))


def state_of(model: Any) -> Arrays:
    """All of a `DWDModel`'s consolidation state, by `kind/PATH` or by name."""
    if not (has_learned(model) or _not_in_files(model)):
        return {}
    grouping = {} if model.grouping is None else model.grouping.state()
    return {
        **model.regularizer.state(),
        **model.fisher.state(),
        **model.head_gate.state(),
        **{f"value/{path}": np.asarray(v) for path, v in _not_in_files(model).items()},
        **{f"{GROUPING}{name}": array for name, array in grouping.items()},
        **{f"group/{path}": array for path, array in model.assignments.items()},
        "format": np.asarray(FORMAT, "int64"),
        "tasks_learned": np.asarray(model.tasks_learned, "int64"),
        "weights_digest": np.frombuffer(model.weights_digest, "uint8"),
        "groups": json_array(model.groups),
    }


def save(model: Any, store: Any) -> None:
    """Write it under `kind|position|path`.

    By path, and by position for models whose layers get other names in each process.
    """
    positions = {path: index for index, path in enumerate(by_path(model))}
    for name, array in model.workers.whole_state(state_of(model)).items():
        kind, _, path = name.partition("/")
        store[f"{kind}|{positions[path]}|{path.replace('/', '|')}" if path else kind] = array


def restore(model: Any, saved: Arrays) -> None:
    """Take over a saved state, after all of it was found to fit the model.

    Raises:
        FileError: If it does not. The model's state is then as before.
    """
    ordered = list(by_path(model))
    found = {key: key.split("|", 2) for key in saved if "|" in key}
    for key, parts in found.items():
        if len(parts) != 3:
            refuse(parts[0], key, saved[key])
    # A subclassed model numbers its layers anew in each process: go by their order.
    numbered = any(path.replace("|", "/") not in ordered for _, _, path in found.values())
    names: dict[str, str] = {}
    for _, position, saved_path in found.values():
        path = saved_path.replace("|", "/")
        at = int(position) if position.isdigit() else len(ordered)
        other = ordered[at] if at < len(ordered) else ""
        alike = numbered and _unnumbered(other) == _unnumbered(path)
        names[path] = other if alike else path
    taken = {f"{kind}/{path.replace('|', '/')}": saved[k] for k, (kind, _, path) in found.items()}
    taken |= {key: array for key, array in saved.items() if "|" not in key}
    take(model, renamed(taken, names))


def renamed(arrays: Arrays, names: Mapping[str, str]) -> Arrays:
    """A state with other paths, also in the summary of groups."""
    found: Arrays = {}
    for name, array in arrays.items():
        kind, _, path = name.partition("/")
        key = f"{kind}/{names.get(path, path)}" if path else name
        if key in found:
            refuse(kind, path, array)
        found[key] = array
    if "groups" in found:
        groups = groups_of(found["groups"])
        for group in groups:
            group["layers"] = {names.get(path, path): n for path, n in group["layers"].items()}
        found["groups"] = json_array(groups)
    return found


def take(model: Any, state: Arrays) -> None:
    """Take over a state by `kind/PATH`, as of `state_of`, see `restore`."""
    variables = by_path(model)
    scalars = {name: array for name, array in state.items() if "/" not in name}
    grouping = {n: scalars.pop(n) for n in list(scalars) if n.startswith(GROUPING)}
    version = scalars.get("format", np.ones(()))
    if version.shape != () or version > FORMAT:
        raise FileError(
            f"The consolidation state was saved by a newer version of keras_dwd, in format "
            f"{version}: this one reads formats up to {FORMAT}. Install that version. {_UNCHANGED}"
        )
    odd = {
        n
        for n, a in scalars.items()
        if n not in _TEXTS and (a.shape or not 0 <= float(a) < 2.0**63)
    }
    if scalars.keys() | {"format"} != _SCALARS or odd:
        raise FileError(
            "The file holds an incomplete or unknown consolidation state: "
            f"{sorted(scalars)}. {_UNCHANGED}"
        )
    missing = {name.partition("/")[2] for name in state if "/" in name} - set(variables)
    if missing:
        raise FileError(
            f"The saved state is about {', '.join(map(repr, sorted(missing)))}, which the model "
            "has not. Load it into a model with the same layers, of the same names; another one "
            f"can then `inherit` from that. {_UNCHANGED}"
        )
    groups = groups_of(scalars["groups"])
    numbers = {group["group"] for group in groups}
    known = matrices(model)
    statistics = model.fisher.shapes(model, variables)
    kinds: dict[str, Arrays] = {
        kind: {} for kind in ("level", "anchor", "center", "in_use", "value", "online", "group")
    }
    leaves: dict[str, Arrays] = {}
    foreign = False  # the file's online estimate is of another kind than this model keeps
    for name, array in state.items():
        kind, _, path = name.partition("/")
        if not path:
            continue
        shape: tuple[int, ...] | None = tuple(variables[path].shape)
        if kind in LEAVES:
            leaves.setdefault(path, {})[kind] = array
            continue
        held = kinds.get(kind, {})
        if kind == "group":
            try:
                assigned = assignment_of(array)
            except ValueError:
                refuse(kind, path, array)
            if path in known and len(assigned.shape) == 2:  # of directions of its matrix
                shape = (known[path][1].rows, known[path][1].shape[1])
            fits = assigned.within(numbers) and _broadcasts(assigned.shape, shape or ())
            shape = array.shape if fits else None
        elif kind == "level":
            shape = (2,)
        elif kind == "in_use":
            shape = shape[:1] if shape else None
        elif kind in STATISTICS:
            shape, held, path = statistics.get(name, array.shape), kinds["online"], name
            foreign |= name not in statistics
        elif kind not in kinds:
            shape = None
        if array.shape != shape:
            refuse(kind, path, array)
        held[path] = array
    for name, array in state.items():
        real = array.dtype.kind not in "fV" or np.isfinite(np.asarray(array, "float64")).all()
        if not real or (name.startswith("level/") and array[0] != np.floor(array[0])):
            raise FileError(f"The saved {name!r} has numbers that cannot be. {_UNCHANGED}")
    blocks = _blocks(model, variables, known, leaves, kinds["anchor"])
    if model.grouping is not None:
        model.grouping.restore({n.removeprefix(GROUPING): a for n, a in grouping.items()})
    # All of it fits: from here on nothing can fail.
    online = model.kept(kinds["online"])
    emptied: tuple[dict[Any, Any], ...] = (
        model.regularizer.precisions,
        model.regularizer.anchors,
        model.regularizer.levels,
        model.regularizer.group_of,
        model.regularizer.centers,
        model.fisher.slots,
        model.head_gate.in_use,
    )
    for slots in emptied:
        slots.clear()
    for path, block in blocks.items():
        if model.workers.keeps(path):
            model.regularizer.hold(path, block, {p: kinds["anchor"][p] for p in block.paths})
    if model.fisher.gamma is not None and online and not foreign:
        model.fisher.build({name: array.shape for name, array in online.items()})
        for name, array in online.items():
            model.fisher.slots[name].assign(array)
    model.fisher.weight.assign(0.0 if foreign else scalars["fisher_weight"])
    model.fisher.looked.assign(scalars["fisher_looked"])
    model.head_gate.build({p: variables[p] for p in kinds["in_use"]})
    for path, array in kinds["in_use"].items():
        if path in model.head_gate.in_use:
            model.head_gate.in_use[path].assign(array)
    for path, array in kinds["value"].items():
        variables[path].assign(array)
    model.tasks_learned = int(scalars["tasks_learned"])
    model.weights_digest = scalars["weights_digest"].tobytes()
    model.groups = groups
    model.assignments = {p: a for p, a in kinds["group"].items() if model.workers.keeps(p)}
    model.regularizer.tie_to(float(scalars["tie"]), kinds["center"])
    for key, (group, level) in kinds["level"].items():
        model.regularizer.follow({key: int(group)})
        model.regularizer.levels[int(group)].assign(level)
    model.retrace()


def refuse(kind: str, path: str, array: np.ndarray) -> NoReturn:
    """Raise `FileError`: a part of a state has no place in the model."""
    raise FileError(
        f"The saved {kind} of {path!r}, of shape {array.shape}, fits no variable of the model. "
        f"{_UNCHANGED}"
    )


def json_array(content: Any) -> np.ndarray:
    """What is no array, as one."""
    return np.frombuffer(json.dumps(content).encode(), "uint8")


def _not_in_files(model: Any) -> Variables:
    """Variables that Keras does not save as they are.

    The states of random generators it leaves out; LoRA it saves merged with the kernel.
    """
    adapted = [x for x in model._flatten_layers() if getattr(x, "lora_enabled", False)]
    kept = {id(v) for v in model.weights} - {id(v) for x in adapted for v in x.variables}
    return {path: v for path, v in by_path(model).items() if id(v) not in kept}


def _unnumbered(path: str) -> str:
    """A path without the numbers that Keras appends to names."""
    return re.sub(r"_\d+(?=/|$)", "", path)


def groups_of(saved: np.ndarray) -> Summary:
    """The summary of groups, from JSON."""
    try:
        groups = json.loads(saved.tobytes().decode())
        for group in groups:
            for name in ("group", "size", "mean_fisher", "magnitude", "strength"):
                float(group[name])
            group["layers"] = {path: int(count) for path, count in group["layers"].items()}
        return list(groups)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise FileError(f"The saved summary of groups cannot be read. {_UNCHANGED}") from None


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether it is that of as many parameters, or of at most as many directions."""
    return len(shape) <= len(to) and all(
        a <= b for a, b in zip(shape, to[len(to) - len(shape) :], strict=True)
    )


def _blocks(
    model: Any,
    variables: Variables,
    known: Mapping[str, Matrix],
    leaves: dict[str, Arrays],
    anchors: Arrays,
) -> dict[str, Block]:
    rank = getattr(model.fisher, "rank", KroneckerFisher().rank)
    correction = getattr(model.fisher, "correction", 1)
    blocks: dict[str, Block] = {}
    for path, parts in leaves.items():
        try:
            shape = tuple(variables[path].shape)
            blocks[path] = _block(path, parts, shape, known.get(path), rank, correction)
        except ValueError:
            kind, array = next(iter(parts.items()))
            refuse(kind, path, array)
        missing = [p for p in blocks[path].paths if p not in anchors]
        if missing:
            raise FileError(f"The saved precision of {missing[0]!r} has no anchor. {_UNCHANGED}")
    return blocks


def _block(
    path: str,
    parts: Arrays,
    shape: tuple[int, ...],
    matrix: Matrix | None,
    rank: int,
    correction: int,
) -> Block:
    if "precision" in parts:
        if parts["precision"].shape != shape or set(parts) - {"precision", "correction"}:
            raise ValueError
        if "correction" not in parts:
            return Diagonal(path, parts["precision"])
        return LowRank(path, np.zeros(shape), np.zeros((1, 1)), correction).with_leaves(parts)
    if matrix is None:
        raise ValueError
    paths, form = matrix
    for side, size in zip(SIDES, (form.rows, form.shape[1]), strict=True):
        rows = np.asarray(parts.get(f"{side}_rows", [0]))
        within = rows.ndim == 1 and rows.size and rows[0] >= 0 and rows[-1] < size
        if not within or np.any(np.diff(rows) < 1) or np.any(rows != np.floor(rows)):
            raise ValueError
    nothing = Factor(np.zeros((1, 1)), np.zeros(1), np.zeros(()))
    return Kronecker(paths, form, nothing, nothing, rank).with_leaves(parts)
