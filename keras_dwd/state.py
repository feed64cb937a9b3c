"""Saving and restoring what a model consolidated, next to its weights."""

import json
from typing import Any, NoReturn

import numpy as np

from keras_dwd.curvature.diagonal import Diagonal
from keras_dwd.curvature.factor import Factor
from keras_dwd.curvature.fisher import Block
from keras_dwd.curvature.kronecker import Kronecker, KroneckerFisher
from keras_dwd.curvature.low_rank import LowRank
from keras_dwd.curvature.rules import RuledLayer, ruled_layers
from keras_dwd.grouping.grouping import Summary
from keras_dwd.variables import Arrays, by_path

_SCALARS = {"tasks_learned", "weights_digest", "fisher_weight", "fisher_looked", "groups", "tie"}
_SIDES = ("input", "output")
_PARTS = ("vectors", "values", "rest")
_LEAVES = {
    "precision",
    "correction",
    "input_rows",
    *(f"{side}_{part}" for side in _SIDES for part in _PARTS),
}
_STATISTICS = {"fisher", "sketch", "margin", *_SIDES, *(f"{side}_trace" for side in _SIDES)}


def state_of(model: Any) -> Arrays:
    """All of a `DWDModel`'s consolidation state, by `kind/PATH` or by name."""
    if not (model.tasks_learned or model.fisher.slots or float(model.fisher.weight)):
        return {}
    return {
        **model.regularizer.state(),
        **model.fisher.state(),
        **model.head_gate.state(),
        "tasks_learned": np.asarray(model.tasks_learned, "int64"),
        "weights_digest": np.frombuffer(model.weights_digest, "uint8"),
        "groups": np.frombuffer(json.dumps(model.groups).encode(), "uint8"),
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
        ValueError: If it does not. The model's state is then as before.
    """
    variables = by_path(model)
    scalars = {key: array for key, array in saved.items() if "|" not in key}
    found = [(key.split("|", 2), array) for key, array in saved.items() if "|" in key]
    paths = [path.replace("|", "/") for (_, _, path), _ in found]
    if any(path not in variables for path in paths):
        # A subclassed model does not keep the names of its layers: go by their order.
        ordered = dict(enumerate(variables))
        paths = [ordered.get(int(p) if p.isdigit() else -1, "") for (_, p, _), _ in found]
    if set(scalars) != _SCALARS:
        raise ValueError(
            f"The file holds an incomplete or unknown consolidation state: {sorted(scalars)}. "
            "That of the model was left as it was."
        )
    names = {saved.replace("|", "/"): p for ((_, _, saved), _), p in zip(found, paths, strict=True)}
    groups = _groups(scalars["groups"], names)
    statistics = model.fisher.shapes(model, variables)
    anchors: Arrays = {}
    levels: Arrays = {}
    centers: Arrays = {}
    online: Arrays = {}
    in_use: Arrays = {}
    leaves: dict[str, Arrays] = {}
    foreign = False  # the file's online estimate is of another kind than this model keeps
    for ((kind, _, saved_path), array), path in zip(found, paths, strict=True):
        shape = tuple(variables[path].shape) if path in variables else None
        name = f"{kind}/{path}"
        if shape is not None and kind in _LEAVES:
            leaves.setdefault(path, {})[kind] = array
            continue
        if kind == "level" and shape is not None:
            expected, held, key = (2,), levels, path
        elif kind == "anchor" and shape is not None:
            expected, held, key = shape, anchors, path
        elif kind == "center" and shape is not None:
            expected, held, key = shape, centers, path
        elif kind == "in_use" and shape:
            expected, held, key = shape[:1], in_use, path
        elif kind in _STATISTICS and shape is not None:
            expected, held, key = statistics.get(name, array.shape), online, name
            foreign |= name not in statistics
        else:
            expected, held, key = None, {}, ""
        if array.shape != expected or key in held:
            _refuse(kind, saved_path, array.shape)
        held[key] = array
    matrices = {r.kernel: r for r in ruled_layers(model) if r.form is not None}
    rank = getattr(model.fisher, "rank", KroneckerFisher().rank)
    correction = getattr(model.fisher, "correction", 1)
    blocks: dict[str, Block] = {}
    for path, parts in leaves.items():
        try:
            shape = tuple(variables[path].shape)
            blocks[path] = _block(path, parts, shape, matrices.get(path), rank, correction)
        except ValueError:
            kind, array = next(iter(parts.items()))
            _refuse(kind, path, array.shape)
        missing = [p for p in blocks[path].paths if p not in anchors]
        if missing:
            raise ValueError(
                f"The saved precision of {missing[0]!r} has no anchor. The model's consolidation "
                "state was left as it was."
            )
    # All of it fits: from here on nothing can fail.
    online = model.kept(online)
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
            model.regularizer.hold(path, block, {p: anchors[p] for p in block.paths})
    if model.fisher.gamma is not None and online and not foreign:
        model.fisher.build({name: array.shape for name, array in online.items()})
        for name, array in online.items():
            model.fisher.slots[name].assign(array)
    model.fisher.weight.assign(0.0 if foreign else scalars["fisher_weight"])
    model.fisher.looked.assign(scalars["fisher_looked"])
    model.head_gate.build({p: variables[p] for p in in_use})
    for path, array in in_use.items():
        if path in model.head_gate.in_use:
            model.head_gate.in_use[path].assign(array)
    model.tasks_learned = int(scalars["tasks_learned"])
    model.weights_digest = scalars["weights_digest"].tobytes()
    model.groups = groups
    model.regularizer.tie_to(float(scalars["tie"]), centers)
    for key, (group, level) in levels.items():
        model.regularizer.follow({key: int(group)})
        model.regularizer.levels[int(group)].assign(level)
    model.retrace()


def _groups(saved: np.ndarray, names: dict[str, str]) -> Summary:
    """The summary of groups, from JSON, with the paths of this model for those of the file."""
    try:
        groups = json.loads(saved.tobytes())
        for group in groups:
            for name in ("group", "size", "mean_fisher", "magnitude", "strength"):
                float(group[name])
            members = group["layers"].items()
            group["layers"] = {names.get(path, path): int(count) for path, count in members}
        return list(groups)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            "The saved summary of groups cannot be read. The model's consolidation state was left "
            "as it was."
        ) from None


def _block(
    path: str,
    parts: Arrays,
    shape: tuple[int, ...],
    matrix: RuledLayer | None,
    rank: int,
    correction: int,
) -> Block:
    if "precision" in parts:
        if parts["precision"].shape != shape or set(parts) - {"precision", "correction"}:
            raise ValueError
        if "correction" not in parts:
            return Diagonal(path, parts["precision"])
        return LowRank(path, np.zeros(shape), np.zeros((1, 1)), correction).with_leaves(parts)
    if matrix is None or matrix.form is None:
        raise ValueError
    if "input_rows" in parts:
        rows = np.asarray(parts["input_rows"])
        within = rows.ndim == 1 and rows.size and rows[0] >= 0 and rows[-1] < matrix.form.rows
        if not within or np.any(np.diff(rows) < 1) or np.any(rows != np.floor(rows)):
            raise ValueError
    nothing = Factor(np.zeros((1, 1)), np.zeros(1), np.zeros(()))
    empty = Kronecker(matrix.matrix_paths, matrix.form, nothing, nothing, rank)
    return empty.with_leaves(parts)


def _refuse(kind: str, path: str, shape: tuple[int, ...]) -> NoReturn:
    raise ValueError(
        f"The saved {kind} of {path.replace('|', '/')!r}, of shape {shape}, fits no variable of "
        "the model. Its consolidation state was left as it was."
    )
