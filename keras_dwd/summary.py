"""`ConsolidationSummary`: what a model retains of earlier tasks, in words and numbers."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from keras_dwd.consolidation import Consolidation
from keras_dwd.groupings.histograms import concentration
from keras_dwd.learner import Learner
from keras_dwd.training.optimizer import form_of_pull
from keras_dwd.variables import Variables, by_path, trainable_by_path
from keras_dwd.words import counted, sized

# `ConsolidationSummary.directions` is the number of directions with this share of the precision.
_MOST = 0.9


@dataclass(frozen=True)
class LayerSummary:
    """How strongly a layer is held.

    Attributes:
        name: Name of the layer, with those of the layers around it.
        parameters: Number of its parameters that are held.
        share: The layer's share of the precision, from 0 to 1.
        reach: How far all parameters of the layer may move at random, relative to their size (both
            root mean squares), until the penalty is 1: infinite where nothing pulls.
    """

    name: str
    parameters: int
    share: float
    reach: float


@dataclass(frozen=True)
class ConsolidationSummary:
    """What a model retains of earlier tasks; `print` it to read it in words.

    Attributes:
        tasks: Number of tasks learned.
        strength: The current λ.
        held: Number of parameters that the penalty holds.
        trainable: Number of trainable parameters.
        layers: The layers, most important first.
        directions: The share of directions of the parameters that have 90 % of the precision.
        bytes: Size of the state in memory, on this worker.
        pull: How the pull enters a step with the model's optimizer; empty before `compile`.
        groups: The groups of the last boundary, see `DWDModel.groups`.
        histograms: Histograms of the last task's Fisher information by group, with `per_decade`,
            `first` and `counts`: bin i begins at `10 ** ((first + i) / per_decade)`. Empty for a
            model that was loaded.
        similarity: Edge weights of the task graph; empty without one.
        distils: Whether outputs are kept by distillation too.
        examples: Number of examples that the pass over the last task's data saw; `None` without a
            pass, or for a model that was loaded.
        seconds: Duration of the last boundary; `None` for a model that was loaded.
        workers: Number of workers; if they divide the state, the numbers are about this worker's
            share of it.

    Example:

    ```python
    found = model.consolidate(x, y)
    print(found)
    print(found.layers[0].name, found.layers[0].share)
    ```
    """

    tasks: int
    strength: float
    held: int
    trainable: int
    layers: tuple[LayerSummary, ...]
    directions: float
    bytes: int
    pull: str
    groups: list[dict[str, Any]] = field(default_factory=list)
    histograms: dict[str, Any] = field(default_factory=dict)
    similarity: list[list[float]] = field(default_factory=list)
    distils: bool = False
    examples: int | None = None
    seconds: float | None = None
    workers: int = 1

    def as_dict(self) -> dict[str, Any]:
        """The summary as values of JSON; an infinite `reach` is `None`."""
        values = asdict(self)
        for layer in values["layers"]:
            layer["reach"] = layer["reach"] if math.isfinite(layer["reach"]) else None
        return values | {"layers": list(values["layers"])}

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *self._layer_lines(), *self._details()])

    __repr__ = __str__

    def lines(self) -> list[str]:
        """The two lines that `DWDModel.summary` prints."""
        if not self.tasks:
            return [
                "No task is consolidated yet: training holds on to nothing that the model knows. "
                "Call `consolidate` at the end of a task."
            ]
        of_this = f", share of one of {self.workers} workers" if self.workers > 1 else ""
        first = (
            f"{counted(self.tasks, 'task')} consolidated: {self.held:,} of {self.trainable:,} "
            f"trainable parameters are held with λ = {self.strength:g} ({sized(self.bytes)} of "
            f"state{of_this})."
        )
        if self.distils:
            first += " The outputs are kept by distillation."
        return [first, f"The pull is {self.pull}."] if self.pull and self.held else [first]

    def _layer_lines(self) -> list[str]:
        if not self.layers:
            return []
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        head = f"{'layer':{width}}  parameters  importance  may move"
        rows = [
            f"{x.name:{width}}  {x.parameters:10,}  {100 * x.share:9.1f}%  "
            + (f"{100 * x.reach:7.2g}%" if math.isfinite(x.reach) else "  freely")
            for x in self.layers
        ]
        return [head, *rows]

    def _details(self) -> list[str]:
        if not self.layers:
            return []
        lines = [
            "May move: all weights of the layer at random, relative to their size, until the "
            "penalty is 1.",
            f"{100 * _MOST:.0f}% of the importance is in {100 * self.directions:.1f}% of the "
            "directions.",
        ]
        strengths = [group["strength"] for group in self.groups]
        if strengths:
            lines.append(
                f"{counted(len(strengths), 'group')}, with λ_k from "
                f"{min(strengths):.3g} to {max(strengths):.3g}."
            )
        if self.seconds is not None:
            data = (
                "by the online estimate"
                if self.examples is None
                else f"from {counted(self.examples, 'example')}"
            )
            lines.append(f"The last task was estimated {data}, in {self.seconds:.1f} s.")
        return lines


def summary_of(model: Learner, consolidation: Consolidation) -> ConsolidationSummary:
    """The summary of what a model retains."""
    variables = by_path(model)
    trainable = trainable_by_path(model)
    regularizer, graph = consolidation.regularizer, consolidation.task_graph
    sums, importances = _importances(consolidation, variables)
    total = sum(sums.values())
    anchored = _anchored_by_layer(consolidation, trainable)
    layers = [
        LayerSummary(
            name,
            sum(_size(v) for v in of_layer.values()),
            sums.get(name, 0.0) / total if total else 0.0,
            _reach(sums.get(name, 0.0), consolidation, of_layer),
        )
        for name, of_layer in anchored.items()
    ]
    last, several = consolidation.last_boundary, consolidation.workers.sharded
    return ConsolidationSummary(
        tasks=consolidation.tasks_learned,
        strength=regularizer.strength,
        held=sum(layer.parameters for layer in layers),
        trainable=sum(map(_size, trainable.values())),
        layers=tuple(sorted(layers, key=lambda layer: -layer.share)),
        directions=concentration(importances, _MOST),
        bytes=consolidation.bytes,
        pull=form_of_pull(getattr(model, "optimizer", None)),
        groups=consolidation.groups,
        histograms=last.histograms,
        similarity=[] if graph is None else graph.matrix.tolist(),
        distils=consolidation.distillation is not None and consolidation.distillation.has_state,
        examples=last.examples,
        seconds=last.seconds,
        workers=consolidation.workers.communicator.size if several else 1,
    )


def importance_by_layer(consolidation: Consolidation, variables: Variables) -> dict[str, float]:
    """The trace of the precision, with its strength, by layer."""
    return _importances(consolidation, variables)[0]


def _importances(
    consolidation: Consolidation, variables: Variables
) -> tuple[dict[str, float], list[np.ndarray]]:
    """The sum of the current precision by layer, and its values block by block."""
    regularizer = consolidation.regularizer
    sums: dict[str, float] = {}
    arrays = []
    for key, block in regularizer.precisions.items():
        path = block.paths[0]
        folded = regularizer.folded.get(path, 0.0)
        factor = regularizer.strength_of(variables[path]) / folded if folded else 0.0
        budget_strength = regularizer.budget_strengths.of(key)
        factor *= 1.0 if budget_strength is None else float(budget_strength)
        arrays.append(factor * np.asarray(block.importances()))
        sums[_layer(path)] = sums.get(_layer(path), 0.0) + float(arrays[-1].sum(dtype="float64"))
    return sums, arrays


def _anchored_by_layer(consolidation: Consolidation, trainable: Variables) -> dict[str, Variables]:
    """The trainable variables that have an anchor here, by layer."""
    by_layer: dict[str, Variables] = {}
    for path, variable in trainable.items():
        if path in consolidation.regularizer.anchors:
            by_layer.setdefault(_layer(path), {})[path] = variable
    return by_layer


def _reach(total: float, consolidation: Consolidation, paths: Mapping[str, Any]) -> float:
    """See `LayerSummary.reach`: ½ δ² tr Λ = 1."""
    if total <= 0:
        return math.inf
    anchors = [np.asarray(consolidation.regularizer.anchors[path], "float64") for path in paths]
    size = math.sqrt(sum(float((a**2).sum()) for a in anchors) / sum(a.size for a in anchors))
    return math.sqrt(2 / total) / size if size else math.inf


def _layer(path: str) -> str:
    return path.rpartition("/")[0] or path


def _size(variable: Any) -> int:
    return int(np.prod(variable.shape))
