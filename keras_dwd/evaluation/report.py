"""Tables of results for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from keras_dwd.evaluation import ablation
from keras_dwd.evaluation.experiment import Experiment
from keras_dwd.evaluation.methods import strength_of
from keras_dwd.evaluation.metric import TaskMetric, recorded
from keras_dwd.evaluation.plan import Plan
from keras_dwd.words import counted, decimals, sized


def columns(protocol: Mapping[str, Any]) -> dict[str, str]:
    """The headings of a table of results with this protocol, by the keys of what is shown."""
    first, *others = recorded(protocol)
    unit = " %" if first.percent else ""
    return {
        f"average_{first.name}": _heading(first),
        "forgetting": f"forgetting{unit}",
        "relative_forgetting": "relative forgetting %",
        f"learning_{first.name}": f"right after learning{unit}",
        **{f"average_{other.name}": _heading(other) for other in others},
        "steps_per_second_with_boundaries": "steps/s",
    }


def _heading(metric: TaskMetric) -> str:
    lower = "" if metric.higher_is_better else " (lower is better)"
    return f"{metric.name}{' %' if metric.percent else ''}{lower}"


COLUMNS = columns({})
"""The headings of a table of accuracies."""


def table(results: dict[str, Any]) -> Table:
    """Table of methods and metrics, mean ± standard deviation over the seeds.

    If the results contain a tuned EWC, further columns show the difference to it in the first
    metric, such as accuracy, and the p of a paired t-test.
    """
    headings = columns(results["protocol"])
    methods = Table(title=results["protocol"]["title"])
    methods.add_column("method")
    tuned = "tuning" in results
    if tuned:
        methods.add_column("λ", justify="right")
    for heading in headings.values():
        methods.add_column(heading, justify="right")
    comparisons = {}
    if tuned and ablation.BASELINE in results["methods"]:
        comparisons = ablation.compare(results)
        methods.add_column(f"− {ablation.BASELINE}", justify="right")
        methods.add_column("p", justify="right")
    percent = recorded(results["protocol"])[0].percent
    for name, method in results["methods"].items():
        cells = method_cells(name, method, tuned, headings)
        if name in comparisons:
            difference, p = (comparisons[name][key] for key in ("difference", "p"))
            shown = f"{100 * difference:+.1f}" if percent else f"{difference:+.3g}"
            cells += [shown, f"{p:.3f}"]
        methods.add_row(*cells)
    return methods


def method_cells(
    name: str, method: dict[str, Any], tuned: bool, headings: Mapping[str, str] = COLUMNS
) -> list[str]:
    """The cells of a method's row: its name, λ if `tuned`, and what the `headings` name."""
    strength = strength_of(method["settings"])
    shown = [f"{strength:g}" if strength else ""] if tuned else []
    metrics = method["metrics"]
    values = [cell(key, metrics[key], "%" in heading) for key, heading in headings.items()]
    return [name, *shown, *values]


def cell(key: str, metric: dict[str, Any], percent: bool = True) -> str:
    """A metric of a result file as text: mean ± standard deviation, or a rate.

    One seed has no deviation.
    """
    if key.startswith("steps"):
        return f"{metric['mean']:.{decimals(metric['mean'])}f}"
    factor, mean, deviation = (100, ".1f", ".1f") if percent else (1, ".3g", ".2g")
    shown = f"{factor * metric['mean']:{mean}}"
    if len(metric["per_seed"]) == 1:
        return shown
    return f"{shown} ± {factor * metric['std']:{deviation}}"


def dry_table(experiment: Experiment, strengths: dict[str, float], seeds: int) -> Table:
    """Table of what an experiment would run: tasks, sizes, methods and the number of runs."""
    sizes_table = Table(title=experiment.describe(seeds)["title"])
    sizes_table.add_column("")
    sizes_table.add_column("training examples", justify="right")
    sizes_table.add_column("test examples", justify="right")
    for task in experiment.built.tasks:
        sizes = [len(data[1]) for data in (task.train, task.test)]
        sizes_table.add_row(task.name, *(f"{size:,}" for size in sizes))
    batch, epochs = experiment.protocol.batch_size, experiment.epochs or 0
    steps = epochs * sum(-(-len(t.train[1]) // batch) for t in experiment.built.tasks)
    parameters = experiment.protocol.build(experiment.built).count_params()
    known = ", ".join(f"{n} (λ = {s:g})" if s else n for n, s in strengths.items())
    sizes_table.caption = (
        f"{counted(parameters, 'parameter')}; {counted(len(strengths), 'method')}: {known}; "
        f"{counted(seeds, 'seed')}, {counted(len(strengths) * seeds, 'run')} of "
        f"{counted(steps, 'step')}"
    )
    return sizes_table


def plan_table(plan: Plan, curvature: str, replicated: bool) -> Table:
    """Table of a `Plan`: what each worker needs, one use per row."""
    title = (
        f"{counted(plan.parameters, 'parameter')}, {counted(plan.workers, 'worker')}, {curvature}"
    )
    table = Table(title=f"{title}{', replicated' if replicated else ', sharded'}")
    table.add_column("of each worker")
    table.add_column("", justify="right")
    for name, value in plan.memory.items():
        table.add_row(name, sized(value))
    table.add_row("total memory", sized(plan.total), style="bold")
    table.add_row("sent at each step", sized(plan.step_bytes))
    table.add_row("sent at each Fisher update", sized(plan.fisher_bytes))
    table.add_row("sent at a boundary with a pass over data", sized(plan.boundary_bytes))
    if plan.step_seconds is not None and plan.boundary_seconds is not None:
        table.add_row("a step, besides computing", f"{plan.step_seconds:.3g} s")
        table.add_row("a boundary, besides computing", f"{plan.boundary_seconds:.3g} s")
    return table
