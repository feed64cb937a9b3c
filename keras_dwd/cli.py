"""What the subcommands of `keras-dwd` do; their options and help are in `keras_dwd_command`."""

import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import keras
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from keras_dwd.checks import integer, number
from keras_dwd.communicator import INSTALL
from keras_dwd.distributed.horovod import detect_communicator
from keras_dwd.distributed.launch import is_worker, launch
from keras_dwd.evaluation import ablation, tuning
from keras_dwd.evaluation import plan as planning
from keras_dwd.evaluation.comparison import compared, comparison_table, differing
from keras_dwd.evaluation.environment import environment
from keras_dwd.evaluation.experiment import Experiment, Observer
from keras_dwd.evaluation.methods import method_named
from keras_dwd.evaluation.profiles import NETWORKS, network
from keras_dwd.evaluation.report import dry_table, plan_table, table
from keras_dwd.evaluation.scenario import Scenario, Task
from keras_dwd.evaluation.stored import factor_of, results_of
from keras_dwd.files import write_json
from keras_dwd.words import counted
from keras_dwd_command import without_noise


def run(
    context: typer.Context,
    methods: str,
    seeds: int,
    strength: str | None,
    workers: int,
    sharded: bool,
    checkpoint_dir: Path | None,
    resume: bool,
    out: Path | None,
    report: Path | None,
    dry_run: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """`keras-dwd run`."""
    console = Console(stderr=as_json)
    names = _methods(methods)
    strengths = _strengths(strength, names)
    _check_out(out)
    _check_report(report)
    experiment = Experiment(**_settings(context))  # which may take minutes: after the checks
    integer("--workers", workers, 1)
    if resume and checkpoint_dir is None:
        raise ValueError("`--resume` needs `--checkpoint-dir`: where to go on from.")
    if not resume and checkpoint_dir and any(checkpoint_dir.glob("*/*/checkpoint-*")):
        raise ValueError(
            f"`--checkpoint-dir` {str(checkpoint_dir)!r} holds the progress of a run: go on with "
            "`--resume`, or name another folder."
        )
    integer("--seeds", seeds, 1)
    if dry_run:
        known = {name: strengths.get(name, method_named(name).strength) for name in names}
        _show_plan(experiment, known, seeds)
        return
    if workers > 1 and not is_worker():
        raise typer.Exit(launch(_again(context, resume=checkpoint_dir is not None), workers))
    leads = detect_communicator().rank == 0
    finished: dict[str, Any] = {}

    def keep(results: dict[str, Any]) -> None:
        finished.update(results)
        if out is not None and leads:
            write_json(out, results)

    try:
        with _progress(console, leads, experiment.measured[0].name) as observer:
            results = experiment.compare(
                names,
                seeds,
                strengths=strengths,
                observer=observer,
                checkpoint_dir=checkpoint_dir,
                sharded=sharded,
                keep=keep,
            )
    except KeyboardInterrupt:
        if leads:
            _tell_how_to_go_on(context, finished, out, checkpoint_dir)
        raise typer.Exit(130) from None
    if not leads:
        return
    _show(results, as_json, console)
    _write_report(report, results)


def _tell_how_to_go_on(
    context: typer.Context, finished: dict[str, Any], out: Path | None, folder: Path | None
) -> None:
    """Say after an interruption what was finished, and how to go on."""
    console = Console(stderr=True)
    runs = sum(len(method["train_seconds"]) for method in finished.get("methods", {}).values())
    where = f", written to {out}" if out is not None and runs else ""
    lines = [f"Interrupted. Finished: {counted(runs, 'run')}{where}."]
    if folder is not None:
        words = ["keras-dwd", *_again(context, resume=True)[3:]]
        lines.append(f"To go on: {shlex.join(words)}")
    else:
        lines.append("With `--checkpoint-dir FOLDER` a run can be resumed after an interruption.")
    if finished and out is None:
        console.print(table(finished))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def tune(context: typer.Context, methods: str, **options: Any) -> None:
    """`keras-dwd tune`."""
    _tuned(_settings(context), _methods(methods), **options)


def ablate(context: typer.Context, parts: str, **options: Any) -> None:
    """`keras-dwd ablate`."""
    words = [word.strip() for word in parts.split(",") if word.strip()]
    chosen = ablation.parts(words)
    names = ["finetune", ablation.BASELINE, *chosen.values(), "joint"]
    _tuned(_settings(context), names, **options)


def plan(
    model: str | None,
    params: float | None,
    workers: int,
    curvature: str,
    optimizer: str,
    replicated: bool,
    link: float | None,
    as_json: bool,
) -> None:
    """`keras-dwd plan`."""
    if (model is None) == (params is None):
        raise ValueError("Give `--model` or `--params`, one of them.")
    if model is not None and model not in NETWORKS:
        raise ValueError(f"`--model` must be one of {', '.join(NETWORKS)}. Received: {model!r}")
    if params is not None:
        number("--params", params, 1e4)
    integer("--workers", workers, 1)
    if link is None and workers > 1:
        try:
            with without_noise():
                link = planning.measured_link()
        except ModuleNotFoundError:
            Console(stderr=True).print(f"{INSTALL} Without it and `--link` there are no times.")
    if model is not None:
        built = network(model)
        counts = partial(planning.of_model, built)
    else:
        counts = partial(planning.of_transformer, int(params or 0))
    estimate = planning.plan(
        counts, workers, curvature, optimizer, not replicated, link, planning.measured_bandwidth()
    )
    if as_json:
        print(json.dumps(estimate.as_json(), indent=1))
        return
    Console().print(plan_table(estimate, curvature, replicated))


def report(results: list[Path], out: Path) -> None:
    """`keras-dwd report`."""
    from keras_dwd.page import write_report  # which needs matplotlib

    _check_file("--out", out)
    write_report(out, results)
    Console().print(f"Written: {out}", highlight=False, markup=False, soft_wrap=True)


def compare(a: Path, b: Path, metric: str | None, as_json: bool) -> None:
    """`keras-dwd compare`."""
    one, other = (results_of(path) for path in (a, b))
    comparisons = compared(one, other, metric)
    if as_json:
        print(json.dumps([asdict(each) for each in comparisons], indent=1))
        return
    console = Console()
    console.print(comparison_table(comparisons, factor_of(one, comparisons[0].metric)))
    for name, path in (("a", a), ("b", b)):
        console.print(f"{name}: {path}", style="dim", highlight=False, markup=False)
    for name, values in differing(one, other).items():
        first, second = (json.dumps(value) for value in values)
        line = f"The protocols differ in {name}: {first[:60]} and {second[:60]}"
        console.print(line, style="dim", highlight=False, markup=False)


def info(as_json: bool) -> None:
    """`keras-dwd info`."""
    entries = environment()
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    for name, value in entries.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
        print(f"{name:18} {shown}")


def _again(context: typer.Context, **changed: Any) -> list[str]:
    """The current command line, for workers to run, with some options `changed`."""
    words = [sys.executable, "-m", "keras_dwd_command", str(context.info_name)]
    for parameter in context.command.params:
        value = changed.get(str(parameter.name), context.params.get(str(parameter.name)))
        if value is True:
            words.append(parameter.opts[0])
        elif value is False:
            words += parameter.secondary_opts[:1]
        elif value is not None:
            words += [parameter.opts[0], str(value)]
    return words


def _settings(context: typer.Context) -> dict[str, Any]:
    """The options of a command that are arguments of `Experiment`."""
    names = {field.name for field in fields(Experiment)}
    settings = {name: value for name, value in context.params.items() if name in names}
    return settings | {"metrics": tuple(_names(settings["metrics"]))}


def _tuned(
    settings: dict[str, Any],
    methods: list[str],
    seeds: int,
    tuning_seeds: int,
    points: int,
    processes: int | None,
    out: Path | None,
    report: Path | None,
    dry_run: bool,
    as_json: bool,
    **_: Any,
) -> None:
    for name, value in (
        ("seeds", seeds),
        ("tuning-seeds", tuning_seeds),
        ("points", points),
        ("processes", processes),
    ):
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1. Received: {value}")
    _check_out(out)
    _check_report(report)
    if dry_run:
        _show_plan(Experiment(**settings), {n: method_named(n).strength for n in methods}, seeds)
        return
    console = Console(stderr=True)
    results = tuning.tune(
        settings,
        methods,
        grid=lambda name: tuning.grid_around(method_named(name).strength, points),
        seeds=seeds,
        tuning_seeds=range(tuning_seeds),
        out=out,
        processes=processes,
        say=lambda line: console.print(line, style="dim", highlight=False, markup=False),
    )
    _show(results, as_json, Console(stderr=as_json))
    _write_report(report, results)


def _names(methods: str) -> list[str]:
    return [name.strip() for name in methods.split(",") if name.strip()]


def _methods(methods: str) -> list[str]:
    names = _names(methods)
    if not names:
        raise ValueError(f"`--methods` must name at least one. Received: {methods!r}")
    return names


def _check_out(out: Path | None) -> None:
    if out is not None:
        _check_file("--out", out)


def _check_report(report: Path | None) -> None:
    if report is not None:
        _check_file("--report", report)
        importlib.import_module("keras_dwd.page")  # raises if matplotlib is missing


def _write_report(report: Path | None, results: dict[str, Any]) -> None:
    if report is not None:
        from keras_dwd.page import write_report

        write_report(report, results)
        Console(stderr=True).print(
            f"Report: {report}", highlight=False, markup=False, soft_wrap=True
        )


def _check_file(option: str, path: Path) -> None:
    if not path.resolve().parent.is_dir():
        raise ValueError(f"`{option}`: the folder {str(path.parent)!r} does not exist.")
    if path.is_dir():
        raise ValueError(f"`{option}` must be a file. Received the folder {str(path)!r}.")


def _show_plan(experiment: Experiment, strengths: dict[str, float], seeds: int) -> None:
    """What would be run, for `--dry-run`."""
    console = Console()
    console.print(dry_table(experiment, strengths, seeds))
    text = experiment.describe(seeds)["text"]
    console.print(text, style="dim", highlight=False, markup=False)


def _show(results: dict[str, Any], as_json: bool, console: Console) -> None:
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        console.print(table(results))
        text = results["protocol"]["text"]
        console.print(text, style="dim", highlight=False, markup=False)


def _strengths(option: str | None, methods: list[str]) -> dict[str, float]:
    """λ by method, from an option such as `30` or `ewc=1000,dwd=200`."""
    strengths: dict[str, float] = {}
    parts = option.split(",") if option else []
    for part in sorted(parts, key=lambda part: "=" in part):  # a value for all methods comes first
        name, equals, value = part.rpartition("=")
        if equals and name.strip() not in methods:
            raise ValueError(f"`--strength` names {name!r}, which is not in {', '.join(methods)}.")
        try:
            strengths |= dict.fromkeys([name.strip()] if equals else methods, float(value))
        except ValueError:
            raise ValueError(
                f"`--strength` must be a number or METHOD=NUMBER,… Received: {option!r}"
            ) from None
    return strengths


class _EpochBar(keras.callbacks.Callback):
    def __init__(self, progress: Progress, bar: Any, metric: str) -> None:
        super().__init__()
        self.progress, self.bar, self.metric = progress, bar, metric

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        value = (logs or {}).get(self.metric)
        text = "" if value is None else f"training {self.metric} {float(value):.3f}"
        self.progress.update(self.bar, advance=1, running=text)


@contextmanager
def _progress(
    console: Console, shown: bool = True, metric: str = "accuracy"
) -> Iterator[Observer | None]:
    """A progress bar per task that counts epochs and shows a metric on the training data."""
    if not shown:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[running]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bars: list[Any] = []

        def observer(
            method: str, seed: int, scenario: Scenario, epochs: int, t: int, task: Task
        ) -> list[keras.callbacks.Callback]:
            if t == 0:
                while bars:
                    progress.remove_task(bars.pop())
            label = f"{method}, seed {seed}, task {t + 1}: {task.name[:40]}"
            bars.append(progress.add_task(label, total=epochs, running=""))
            return [_EpochBar(progress, bars[-1], metric)]

        yield observer
