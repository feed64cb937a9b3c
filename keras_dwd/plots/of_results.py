"""Figures of results, as `keras-dwd run --out` and `Experiment.compare` give them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from keras_dwd.evaluation.metric import primary
from keras_dwd.evaluation.stored import Results, factor_of, matrices_of, results_of, tuned_of
from keras_dwd.plots.style import COLORS, FAINT, figure, heat, numbered, shortened, style

# How many methods a figure with a line for each shows, and which ones it shows in any case.
_MOST_LINES = 7
_REFERENCES = ("finetune", "ewc", "joint")


def chosen_methods(results: Mapping[str, Any], methods: Sequence[str] | None = None) -> list[str]:
    """The methods to draw: those named, or the references and the most accurate ones.

    Raises:
        ValueError: If a method is named that is not in the results.
    """
    known = list(results["methods"])
    if methods is not None:
        missing = [name for name in methods if name not in known]
        if missing:
            raise ValueError(f"`methods` must be of {', '.join(known)}. Received: {missing[0]!r}")
        return list(methods)
    best = sorted(known, key=lambda name: _rank(results, name))
    first = [name for name in _REFERENCES if name in known]
    chosen = [*first, *(name for name in best if name not in first)][:_MOST_LINES]
    return [name for name in known if name in chosen]


def accuracy_over_time(results: Results, methods: Sequence[str] | None = None) -> Figure:
    """The accuracy, or first metric, on each task while the tasks are learned, a panel each.

    Lines are means over the seeds, with a band from the lowest seed to the highest.

    Args:
        results: Results, or the path of their file.
        methods: Names of methods; by default fine-tuning, EWC, joint training and the most accurate
            others, seven in all.

    Returns:
        The figure.

    Raises:
        FileError: If these are no results.

    Example:

    ```python
    plots.accuracy_over_time("results.json", ["finetune", "dwd"]).savefig("over_time.svg")
    ```
    """
    loaded = results_of(results)
    label, factor = _label(loaded)
    names, tasks = chosen_methods(loaded, methods), list(loaded["protocol"]["tasks"])
    columns = min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    with style():
        fig, axes = figure(0.7 + 1.25 * rows, rows, columns, sharex=True, sharey=True)
        learned = np.arange(1, len(tasks) + 1)
        for index, axis in enumerate(axes.flat):
            if index >= len(tasks):
                axis.set_visible(False)
                continue
            axis.grid(axis="y")
            axis.set_title(f"{index + 1}: {shortened(str(tasks[index]), 18)}")
            for name in names:
                values = factor * matrices_of(loaded, name)[:, index:, index]
                x, color = learned[index:], _color(loaded, name)
                dashed = "--" if name == "joint" else "-"
                marker = "o" if len(tasks) <= 10 else None
                axis.plot(
                    x, values.mean(0), dashed, color=color, label=name, marker=marker, markersize=3
                )
                axis.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
            axis.tick_params(labelbottom=index + columns >= len(tasks))
            axis.set_xlim(0.7, len(tasks) + 0.3)
            if factor == 100:
                axis.set_ylim(0, 103)
        axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
        fig.supxlabel("tasks learned", fontsize=9)
        fig.supylabel(label, fontsize=9)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(
            handles, labels, loc="outside upper center", ncols=min(len(names), 4), frameon=False
        )
    return fig


def accuracy_matrix(results: Results, method: str) -> Figure:
    """The accuracy, or first metric, on each task after each, as a heat map, the mean over seeds.

    Args:
        results: Results, or the path of their file.
        method: Name of a method in them.

    Returns:
        The figure.

    Example:

    ```python
    plots.accuracy_matrix("results.json", "dwd").savefig("matrix.svg")
    ```
    """
    loaded = results_of(results)
    chosen_methods(loaded, [method])
    label, factor = _label(loaded)
    values = factor * matrices_of(loaded, method).mean(0)
    values[np.triu_indices(len(values), 1)] = np.nan  # of tasks that are still to come
    with style():
        fig, ((axis,),) = figure(min(0.9 + 0.36 * len(values), 5.0))
        digits = ".0f" if factor == 100 else ".3g"
        limit = 100.0 if factor == 100 else None
        heat(axis, np.ma.masked_invalid(values), limit, lambda value: f"{value:{digits}}")
        numbered(axis, *values.shape)
        axis.set_xlabel(f"{label} on task")
        axis.set_ylabel("after task")
        axis.set_title(shortened(method, 48))
    return fig


def method_comparison(
    results: Results, metric: str | None = None, methods: Sequence[str] | None = None
) -> Figure:
    """The methods side by side: the mean over the seeds, and a dot for each seed.

    Args:
        results: Results, or the path of their file.
        metric: Name of a metric in them, such as `forgetting`; by default the average of the first
            metric, such as `average_accuracy`.
        methods: Names of methods; all by default.

    Returns:
        The figure.

    Example:

    ```python
    plots.method_comparison("results.json", "forgetting").savefig("forgetting.svg")
    ```
    """
    loaded = results_of(results)
    names = list(loaded["methods"]) if methods is None else chosen_methods(loaded, methods)
    metric = metric or f"average_{primary(loaded['protocol']).name}"
    known = set.intersection(*(set(loaded["methods"][name]["metrics"]) for name in names))
    if metric not in known:
        raise ValueError(
            f"`metric` must be one of {', '.join(sorted(known))}. Received: {metric!r}"
        )
    factor = factor_of(loaded, metric)
    with style():
        fig, ((axis,),) = figure(0.7 + 0.24 * len(names))
        for row, name in enumerate(names):
            measured = loaded["methods"][name]["metrics"][metric]
            seeds = factor * np.asarray(measured["per_seed"])
            color = _color(loaded, name)
            axis.barh(row, factor * measured["mean"], height=0.62, color=color, alpha=0.45)
            axis.plot(seeds, np.full(len(seeds), row), "o", color=color, markersize=3.5)
        axis.set_yticks(range(len(names)), [shortened(name) for name in names])
        axis.invert_yaxis()
        axis.axvline(0, color=FAINT, lw=0.8)
        axis.grid(axis="x")
        axis.set_xlabel(f"{metric.replace('_', ' ')}{' %' if factor > 1 else ''}")
    return fig


def strength_curve(results: Results, methods: Sequence[str] | None = None) -> Figure:
    """The result on validation data at each λ that was tried, with a ring around the one chosen.

    Args:
        results: Results of `keras-dwd tune`, or the path of their file.
        methods: Names of methods; by default all that were tuned, seven at most.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing was tuned.

    Example:

    ```python
    plots.strength_curve("tuned.json").savefig("strength.svg")
    ```
    """
    loaded = results_of(results)
    tuned = {n: t for n, t in tuned_of(loaded).items() if methods is None or n in methods}
    if not tuned:
        raise ValueError("The results have no λ that were tried: `keras-dwd tune` tries them.")
    if methods is None:
        best = sorted(tuned, key=lambda n: (n not in _REFERENCES, -max(tuned[n].values())))
        tuned = {name: tuned[name] for name in tuned if name in best[:_MOST_LINES]}
    label, factor = _label(loaded)
    sign = 1 if primary(loaded["protocol"]).higher_is_better else -1
    with style():
        fig, ((axis,),) = figure(2.9)
        for name, tried in tuned.items():
            strengths = sorted(tried)
            values = [factor * tried[s] for s in strengths]
            color = _color(loaded, name, list(tuned))
            axis.plot(strengths, values, "o-", color=color, label=shortened(name), markersize=3)
            best_index = int(np.argmax(sign * np.array(values)))
            axis.plot(strengths[best_index], values[best_index], "o", mfc="none", mec=color, ms=9)
        if min(min(tried) for tried in tuned.values()) > 0:
            axis.set_xscale("log")
        axis.grid()
        axis.set_xlabel("λ")
        axis.set_ylabel(f"{label} on validation data")
        fig.legend(loc="outside upper center", ncols=min(len(tuned), 3), frameon=False)
    return fig


def _rank(results: Mapping[str, Any], name: str) -> float:
    """Lower is better, whatever the metric."""
    metric = primary(results["protocol"])
    mean = float(results["methods"][name]["metrics"][f"average_{metric.name}"]["mean"])
    return -mean if metric.higher_is_better else mean


def _label(results: Mapping[str, Any]) -> tuple[str, int]:
    """The first metric as the label of an axis, and what its values are multiplied by."""
    metric = primary(results["protocol"])
    return (f"{metric.name} %", 100) if metric.percent else (metric.name, 1)


def _color(results: Mapping[str, Any], name: str, names: list[str] | None = None) -> str:
    """The colour of a method, the same in all figures of some results."""
    if name == "joint":
        return COLORS[-1]
    among = chosen_methods(results) if names is None or name in chosen_methods(results) else names
    drawn = [other for other in among if other != "joint"]
    if name not in drawn:
        return COLORS[-1]
    return COLORS[drawn.index(name) % (len(COLORS) - 1)]
