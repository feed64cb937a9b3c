"""The command line: `keras-dwd run`, `tune`, `ablate` and `plan`."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import keras
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from keras_dwd.checks import integer, number
from keras_dwd.communicator import INSTALL
from keras_dwd.distributed.horovod import detect_communicator
from keras_dwd.distributed.launch import is_worker, launch
from keras_dwd.evaluation import ablation, tuning
from keras_dwd.evaluation import plan as planning
from keras_dwd.evaluation.experiment import Experiment, Observer
from keras_dwd.evaluation.methods import METHODS, VARIANTS, method_named
from keras_dwd.evaluation.profiles import NETWORKS, network
from keras_dwd.evaluation.recipe import OPTIMIZERS
from keras_dwd.evaluation.report import plan_table, table
from keras_dwd.evaluation.scenario import Scenario, Task
from keras_dwd.files import FileError, write_json

app = typer.Typer(
    help="Continual learning for Keras 3.", no_args_is_help=True, pretty_exceptions_enable=False
)

_Scenario = Annotated[
    str,
    typer.Option(
        help="split:NAME or permuted:NAME, where NAME is digits or a prepared classification "
        "data set of tensorflow-datasets."
    ),
]
_Methods = Annotated[
    str,
    typer.Option(
        help=f"Comma-separated methods: {', '.join(METHODS)}. NAME:ESTIMATOR uses another "
        f"estimator of the Fisher information, NAME+VARIANT one of {', '.join(VARIANTS)}."
    ),
]
_Tasks = Annotated[int, typer.Option(help="Number of tasks.")]
_Setting = Annotated[
    str | None,
    typer.Option(
        help="task (one head per task), domain (shared outputs) or class (an output per "
        "class of each task). By default task for split, domain for permuted."
    ),
]
_ClassOrderSeed = Annotated[
    int | None,
    typer.Option(help="Seed of the class order (split) or of the permutations (permuted)."),
]
_Seeds = Annotated[int, typer.Option(help="Number of runs per method: seeds 0, 1, …")]
_TuningSeeds = Annotated[int, typer.Option(help="Number of runs per λ on validation data.")]
_Points = Annotated[
    int, typer.Option(help="Number of values of λ to try per method, over six decades.")
]
_Processes = Annotated[
    int | None, typer.Option(help="Number of parallel runs; by default one per core.")
]
_Epochs = Annotated[int | None, typer.Option(help="Epochs per task; by default of the profile.")]
_Profile = Annotated[
    str, typer.Option(help="cpu (small network, part of the images) or full (for a GPU).")
]
_Images = Annotated[
    int | None,
    typer.Option(help="Training images per class; by default of the profile."),
]
_Optimizer = Annotated[
    str | None, typer.Option(help=f"{' or '.join(OPTIMIZERS)}; by default of the profile.")
]
_LearningRate = Annotated[
    float | None,
    typer.Option(help="Learning rate; by default of the profile, or of another --optimizer."),
]
_Schedule = Annotated[
    str | None,
    typer.Option(help="constant, or cosine: to 0 in each task; by default of the profile."),
]
_WeightDecay = Annotated[
    float | None, typer.Option(help="Weight decay; by default of the profile.")
]
_Augment = Annotated[
    bool | None,
    typer.Option(
        "--augment/--no-augment",
        help="Crop and flip training images at random; by default of the profile.",
        show_default=False,
    ),
]
_KeepState = Annotated[
    bool | None,
    typer.Option(
        "--keep-state/--reset-state",
        help="Whether the optimizer keeps its state from task to task; by default of the profile.",
        show_default=False,
    ),
]
_Warmup = Annotated[
    float | None,
    typer.Option(help="Epochs in which the learning rate rises; by default of the profile."),
]
_Mixup = Annotated[
    float | None,
    typer.Option(help="Mix training examples in pairs, 0 for not; by default of the profile."),
]
_Metrics = Annotated[
    str,
    typer.Option(
        help="Comma-separated metrics of Keras, or loss; methods are compared by the first."
    ),
]
_DataDir = Annotated[
    Path | None, typer.Option(help="Folder of tfds data sets; by default TFDS_DATA_DIR.")
]
_Out = Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")]
_Resumed = Annotated[
    Path | None,
    typer.Option(
        help="Write the results to this JSON file as runs are completed. Results that it already "
        "has are not run again."
    ),
]
_Workers = Annotated[
    int, typer.Option(help="Number of workers on this machine that train together, by Horovod.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON, not as a table.")]


@app.callback()
def _commands() -> None:
    """Continual learning for Keras 3."""


@app.command()
def run(
    context: typer.Context,
    scenario: _Scenario = "permuted:digits",
    methods: _Methods = "finetune,ewc,dwd,joint",
    tasks: _Tasks = 5,
    setting: _Setting = None,
    class_order_seed: _ClassOrderSeed = None,
    seeds: _Seeds = 3,
    epochs: _Epochs = None,
    strength: Annotated[
        str | None,
        typer.Option(
            help="λ of all methods, or of some of them (ewc=1000,dwd=200); by default their own."
        ),
    ] = None,
    profile: _Profile = "cpu",
    images_per_class: _Images = None,
    optimizer: _Optimizer = None,
    learning_rate: _LearningRate = None,
    schedule: _Schedule = None,
    weight_decay: _WeightDecay = None,
    augment: _Augment = None,
    keep_state: _KeepState = None,
    warmup: _Warmup = None,
    mixup: _Mixup = None,
    metrics: _Metrics = "accuracy",
    data_dir: _DataDir = None,
    workers: _Workers = 1,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Divide the consolidation state among the workers.")
    ] = False,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for a checkpoint after each epoch and each task."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the checkpoints in `--checkpoint-dir`.")
    ] = False,
    out: _Out = None,
    as_json: _Json = False,
) -> None:
    """Train several methods on a sequence of tasks and compare what they learn and forget."""
    console = Console(stderr=as_json)
    experiment = Experiment(**_settings(context))
    names = _names(methods)
    strengths = _strengths(strength, names)
    _check_out(out)
    integer("--workers", workers, 1)
    if resume and checkpoint_dir is None:
        raise ValueError("`--resume` needs `--checkpoint-dir`: where to go on from.")
    if not resume and checkpoint_dir and any(checkpoint_dir.glob("*/*/checkpoint-*")):
        raise ValueError(
            f"`--checkpoint-dir` {str(checkpoint_dir)!r} holds the progress of a run: go on with "
            "`--resume`, or name another folder."
        )
    if workers > 1 and not is_worker():
        raise typer.Exit(launch(_again(context, resume=checkpoint_dir is not None), workers))
    leads = detect_communicator().rank == 0
    with _progress(console, leads, experiment.measured[0].name) as observer:
        results = experiment.compare(
            names,
            seeds,
            strengths=strengths,
            observer=observer,
            checkpoint_dir=checkpoint_dir,
            sharded=sharded,
        )
    if not leads:
        return
    _show(results, as_json, console)
    if out is not None:
        write_json(out, results)


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


@app.command()
def tune(
    context: typer.Context,
    scenario: _Scenario = "permuted:digits",
    methods: _Methods = "finetune,ewc,dwd,joint",
    tasks: _Tasks = 5,
    setting: _Setting = None,
    class_order_seed: _ClassOrderSeed = None,
    seeds: _Seeds = 3,
    tuning_seeds: _TuningSeeds = 1,
    points: _Points = 7,
    epochs: _Epochs = None,
    profile: _Profile = "cpu",
    images_per_class: _Images = None,
    optimizer: _Optimizer = None,
    learning_rate: _LearningRate = None,
    schedule: _Schedule = None,
    weight_decay: _WeightDecay = None,
    augment: _Augment = None,
    keep_state: _KeepState = None,
    warmup: _Warmup = None,
    mixup: _Mixup = None,
    metrics: _Metrics = "accuracy",
    data_dir: _DataDir = None,
    processes: _Processes = None,
    out: _Resumed = None,
    as_json: _Json = False,
) -> None:
    """Tune λ of each method on held-back training data, then compare them on the test data.

    Each method that has a λ is tuned with the same number of values around its default, the same
    seeds and the same epochs.
    """
    settings = _settings(context)
    _tuned(settings, _names(methods), seeds, tuning_seeds, points, processes, out, as_json)


@app.command()
def ablate(
    context: typer.Context,
    scenario: _Scenario = "permuted:digits",
    parts: Annotated[
        str,
        typer.Option(
            help="Comma-separated words, such as groups, budget, γ, estimator: only parts whose "
            "names contain one of them. By default all parts."
        ),
    ] = "",
    tasks: _Tasks = 5,
    setting: _Setting = None,
    class_order_seed: _ClassOrderSeed = None,
    seeds: _Seeds = 3,
    tuning_seeds: _TuningSeeds = 1,
    points: _Points = 7,
    epochs: _Epochs = None,
    profile: _Profile = "cpu",
    images_per_class: _Images = None,
    optimizer: _Optimizer = None,
    learning_rate: _LearningRate = None,
    schedule: _Schedule = None,
    weight_decay: _WeightDecay = None,
    augment: _Augment = None,
    keep_state: _KeepState = None,
    warmup: _Warmup = None,
    mixup: _Mixup = None,
    metrics: _Metrics = "accuracy",
    data_dir: _DataDir = None,
    processes: _Processes = None,
    out: _Resumed = None,
    as_json: _Json = False,
) -> None:
    """Change one part of DWD at a time and compare the result with tuned EWC, paired by seed.

    λ is the default. For EWC, and where a change affects the scale of the Fisher information, it is
    tuned as by `tune`.
    """
    words = [word.strip() for word in parts.split(",") if word.strip()]
    chosen = ablation.parts(words)
    settings = _settings(context)
    names = ["finetune", ablation.BASELINE, *chosen.values(), "joint"]
    _tuned(settings, names, seeds, tuning_seeds, points, processes, out, as_json)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Option(help=f"A network of this package: {', '.join(NETWORKS)}.")
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(help="Or a transformer with this number of parameters, such as 1.75e11."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of workers.")] = 1,
    curvature: Annotated[str, typer.Option(help=", ".join(planning.CURVATURES))] = "kronecker",
    optimizer: Annotated[str, typer.Option(help="sgd, momentum or adam")] = "adam",
    replicated: Annotated[
        bool,
        typer.Option("--replicated", help="Each worker stores the whole consolidation state."),
    ] = False,
    link: Annotated[
        float | None,
        typer.Option(help="Bytes per second between workers; by default measured on this machine."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Estimate the memory, communication and time that training needs per worker."""
    if (model is None) == (params is None):
        raise ValueError("Give `--model` or `--params`, one of them.")
    if model is not None and model not in NETWORKS:
        raise ValueError(f"`--model` must be one of {', '.join(NETWORKS)}. Received: {model!r}")
    if params is not None:
        number("--params", params, 1e4)
    integer("--workers", workers, 1)
    if link is None and workers > 1:
        try:
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


def _settings(context: typer.Context) -> dict[str, Any]:
    """The options of a command that are arguments of `Experiment`."""
    names = {field.name for field in fields(Experiment)}
    found = {name: value for name, value in context.params.items() if name in names}
    return found | {"metrics": _names(found["metrics"])}


def _tuned(
    settings: dict[str, Any],
    methods: list[str],
    seeds: int,
    tuning_seeds: int,
    points: int,
    processes: int | None,
    out: Path | None,
    as_json: bool,
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


def _names(methods: str) -> list[str]:
    return [name.strip() for name in methods.split(",") if name.strip()]


def _check_out(out: Path | None) -> None:
    if out is not None and not out.resolve().parent.is_dir():
        raise ValueError(f"`--out`: the folder {str(out.parent)!r} does not exist.")
    if out is not None and out.is_dir():
        raise ValueError(f"`--out` must be a file. Received the folder {str(out)!r}.")


def _show(results: dict[str, Any], as_json: bool, console: Console) -> None:
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        console.print(table(results))
        console.print(results["protocol"]["text"], style="dim", highlight=False)


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


def main() -> None:
    """Entry point; prints errors that the user can correct in one line, without a traceback."""
    try:
        app(prog_name="keras-dwd")
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        known = (ValueError, FileError, FileNotFoundError)
        if type(error) not in known and str(error) != INSTALL:
            raise
        Console(stderr=True).print(
            f"keras-dwd: {error}", style="red", highlight=False, markup=False
        )
        sys.exit(2)
