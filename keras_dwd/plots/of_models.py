"""Figures of what a model retains of earlier tasks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from keras_dwd.model import DWDModel
from keras_dwd.plots.style import COLORS, figure, heat, numbered, shortened, style
from keras_dwd.summary import ConsolidationSummary

Retained = DWDModel | ConsolidationSummary | Mapping[str, Any]
"""A model, its `consolidation`, or the `consolidation` of a method in a file of results."""

_MOST_LAYERS = 40


def retained_of(retained: Retained) -> Mapping[str, Any]:
    """What is retained, as the values of `ConsolidationSummary.as_dict`.

    Raises:
        ValueError: If this is nothing of the kind.
    """
    if isinstance(retained, DWDModel):
        retained = retained.consolidation
    if isinstance(retained, ConsolidationSummary):
        return retained.as_dict()
    if not isinstance(retained, Mapping) or not {"layers", "groups", "histograms"} <= set(retained):
        raise ValueError(
            "`retained` must be a DWDModel, its `consolidation`, or the 'consolidation' of a "
            f"method in a file of results. Received: {type(retained).__name__}"
        )
    return retained


def layer_importance(retained: Retained) -> Figure:
    """How the precision is divided among the layers.

    Args:
        retained: A model, its `consolidation`, or that of a method in a file of results.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is retained.

    Example:

    ```python
    plots.layer_importance(model).savefig("layers.svg")
    ```
    """
    layers = list(retained_of(retained)["layers"])[:_MOST_LAYERS]
    if not layers:
        raise ValueError("Nothing is retained: no layer is held.")
    with style():
        fig, ((axis,),) = figure(0.6 + 0.22 * len(layers))
        axis.barh(range(len(layers)), [100 * layer["share"] for layer in layers], color=COLORS[1])
        axis.set_yticks(range(len(layers)), [shortened(str(x["name"]), 24) for x in layers])
        axis.invert_yaxis()
        axis.grid(axis="x")
        axis.set_xlabel("share of the precision %")
    return fig


def groups(retained: Retained) -> Figure:
    """The groups of the last boundary: λ_k of each, and the Fisher information in it.

    Args:
        retained: A model, its `consolidation`, or that of a method in a file of results.

    Returns:
        The figure; without histograms, as of a model that was loaded, it has the λ_k alone.

    Raises:
        ValueError: If there are no groups.

    Example:

    ```python
    plots.groups(model).savefig("groups.svg")
    ```
    """
    values = retained_of(retained)
    all_groups, histograms = list(values["groups"]), values["histograms"]
    if not all_groups:
        raise ValueError("There are no groups: the model has no grouping, or learned no task.")
    counts = histograms.get("counts", {})
    with style():
        rows = 1 + bool(counts)
        fig, axes = figure(1.0 + 0.2 * len(all_groups) + 2.2 * bool(counts), rows)
        axis = axes[0, 0]
        for row, group in enumerate(all_groups):
            axis.barh(row, group["strength"], color=_color(group["group"]))
        axis.set_yticks(
            range(len(all_groups)), [f"{g['group']}: {g['size']:,}" for g in all_groups]
        )
        axis.invert_yaxis()
        axis.grid(axis="x")
        axis.set_xlabel("λ_k")
        axis.set_ylabel("group: size")
        if counts:
            axis = axes[1, 0]
            bins = len(next(iter(counts.values())))
            edges = (histograms["first"] + np.arange(bins + 1)) / histograms["per_decade"]
            bottom = np.zeros(bins)
            for group, heights in counts.items():
                axis.bar(
                    edges[:-1],
                    heights,
                    1 / histograms["per_decade"],
                    bottom,
                    align="edge",
                    color=_color(int(group)),
                    label=f"group {group}",
                )
                bottom = bottom + np.asarray(heights)
            axis.grid(axis="y")
            axis.set_xlabel("Fisher information of the last task, power of ten")
            axis.set_ylabel("directions")
    return fig


def layers_by_groups(retained: Retained) -> Figure:
    """Which share of each layer is in which group of the last boundary, as a heat map.

    Args:
        retained: A model, its `consolidation`, or that of a method in a file of results.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no groups.

    Example:

    ```python
    plots.layers_by_groups(model).savefig("layers_by_groups.svg")
    ```
    """
    all_groups = list(retained_of(retained)["groups"])
    if not all_groups:
        raise ValueError("There are no groups: the model has no grouping, or learned no task.")
    names = list(dict.fromkeys(name for group in all_groups for name in group["layers"]))
    counts = np.array([[float(g["layers"].get(name, 0)) for g in all_groups] for name in names])
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shown = slice(None, _MOST_LAYERS)
    with style():
        fig, ((axis,),) = figure(0.9 + 0.24 * len(names[shown]))
        heat(axis, np.ma.masked_invalid(shares[shown]), 100.0, lambda share: f"{share:.0f}")
        axis.set_xticklabels([str(group["group"]) for group in all_groups])
        axis.set_yticklabels([shortened(str(name), 24) for name in names[shown]])
        axis.set_xlabel("% of the layer in group")
    return fig


def task_graph(retained: Retained) -> Figure:
    """The edge weights of the task graph: how much tasks resemble each other.

    Args:
        retained: A model, its `consolidation`, or that of a method in a file of results.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no task graph.

    Example:

    ```python
    plots.task_graph(model).savefig("task_graph.svg")
    ```
    """
    weights = np.asarray(retained_of(retained).get("similarity") or [], "float64")
    if weights.ndim != 2 or not len(weights):
        raise ValueError("There is no task graph, or it has no task yet.")
    with style():
        fig, axes = figure(2.6, 1, 2)
        graph, matrix = axes[0]
        angles = np.pi / 2 - 2 * np.pi * np.arange(len(weights)) / len(weights)
        x, y = np.cos(angles), np.sin(angles)
        largest = max(float(np.triu(weights, 1).max(initial=0)), 1e-12)
        for i, j in zip(*np.triu_indices(len(weights), 1), strict=True):
            share = max(float(weights[i, j]) / largest, 0.0)
            graph.plot([x[i], x[j]], [y[i], y[j]], color=COLORS[1], lw=0.3 + 3 * share, alpha=share)
        graph.plot(x, y, "o", color=COLORS[0], markersize=14)
        for task in range(len(weights)):
            graph.text(
                x[task], y[task], str(task + 1), ha="center", va="center", color="white", fontsize=8
            )
        graph.set_aspect("equal")
        graph.margins(0.2)
        graph.axis("off")
        heat(matrix, weights, max(1.0, float(weights.max())))
        numbered(matrix, *weights.shape)
        matrix.set_xlabel("task")
        matrix.set_ylabel("task")
    return fig


def _color(group: int) -> str:
    return COLORS[group % (len(COLORS) - 1)]
