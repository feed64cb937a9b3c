"""The command line: `keras-dwd run`."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import keras
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from keras_dwd.evaluation.experiment import Experiment, Observer
from keras_dwd.evaluation.files import write_json
from keras_dwd.evaluation.methods import METHODS
from keras_dwd.tasks.scenario import Scenario, Task

app = typer.Typer(
    help="Continual learning for Keras 3.", no_args_is_help=True, pretty_exceptions_enable=False
)

_COLUMNS = {
    "average_accuracy": "accuracy %",
    "forgetting": "forgetting %",
    "relative_forgetting": "relative forgetting %",
    "learning_accuracy": "right after learning %",
    "steps_per_second_with_boundaries": "steps/s",
}


@app.callback()
def _commands() -> None:
    """Continual learning for Keras 3."""


@app.command()
def run(
    scenario: Annotated[
        str,
        typer.Option(
            help="split:NAME or permuted:NAME, NAME being digits or any classification "
            "data set that is prepared for tensorflow-datasets."
        ),
    ] = "permuted:digits",
    methods: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated, of {', '.join(METHODS)}; NAME:ESTIMATOR for another estimator "
            "of the Fisher information."
        ),
    ] = "finetune,ewc,dwd,joint",
    tasks: Annotated[int, typer.Option(help="Number of tasks.")] = 5,
    setting: Annotated[
        str | None,
        typer.Option(
            help="task (one head per task), domain (shared outputs) or class (an output per "
            "class of each task). By default task for split, domain for permuted."
        ),
    ] = None,
    class_order_seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the order of classes in split, of the permutations in permuted."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of runs per method: seeds 0, 1, …")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Per task; that of the profile.")] = None,
    strength: Annotated[
        str | None,
        typer.Option(
            help="λ of all methods that have one, or of some (ewc=1000,dwd=30); their defaults."
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="cpu (small network, part of the images) or full (for a GPU).")
    ] = "cpu",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of tfds data sets; TFDS_DATA_DIR.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of a table.")
    ] = False,
) -> None:
    """Learn a sequence of tasks by several methods and compare what they retain."""
    console = Console(stderr=as_json)
    experiment = Experiment(
        scenario=scenario,
        tasks=tasks,
        setting=setting,
        class_order_seed=class_order_seed,
        profile=profile,
        epochs=epochs,
        data_dir=data_dir,
    )
    names = [name.strip() for name in methods.split(",") if name.strip()]
    strengths = _strengths(strength, names)
    if out is not None and not out.resolve().parent.is_dir():
        raise ValueError(f"`--out`: the folder {str(out.parent)!r} does not exist.")
    if out is not None and out.is_dir():
        raise ValueError(f"`--out` must be a file. Received the folder {str(out)!r}.")
    with _progress(console) as observer:
        results = experiment.compare(names, seeds, strengths=strengths, observer=observer)
    if out is not None:
        write_json(out, results)
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        console.print(table(results))
        console.print(results["protocol"]["text"], style="dim", highlight=False)


def _strengths(given: str | None, methods: list[str]) -> dict[str, float]:
    """λ by method, from `30` or `ewc=1000,dwd=30`."""
    found: dict[str, float] = {}
    parts = given.split(",") if given else []
    for part in sorted(parts, key=lambda part: "=" in part):  # what is for all of them first
        name, equals, value = part.rpartition("=")
        if equals and name.strip() not in methods:
            raise ValueError(f"`--strength` names {name!r}, which is not in {', '.join(methods)}.")
        try:
            found |= dict.fromkeys([name.strip()] if equals else methods, float(value))
        except ValueError:
            raise ValueError(
                f"`--strength` must be a number or METHOD=NUMBER,… Received: {given!r}"
            ) from None
    return found


def table(results: dict[str, Any]) -> Table:
    """Methods × metrics, mean ± standard deviation over the seeds."""
    made = Table(title=results["protocol"]["title"])
    made.add_column("method")
    for heading in _COLUMNS.values():
        made.add_column(heading, justify="right")
    for name, method in results["methods"].items():
        made.add_row(name, *(_cell(key, method["metrics"][key]) for key in _COLUMNS))
    return made


def _cell(key: str, metric: dict[str, Any]) -> str:
    if key.startswith("steps"):
        return f"{metric['mean']:.0f}"
    return f"{100 * metric['mean']:.1f} ± {100 * metric['std']:.1f}"


class _EpochBar(keras.callbacks.Callback):
    def __init__(self, progress: Progress, bar: Any) -> None:
        super().__init__()
        self.progress, self.bar = progress, bar

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        accuracy = (logs or {}).get("accuracy")
        text = "" if accuracy is None else f"training accuracy {float(accuracy):.3f}"
        self.progress.update(self.bar, advance=1, running=text)


@contextmanager
def _progress(console: Console) -> Iterator[Observer]:
    """A bar per task, of epochs, with the running accuracy."""
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
            return [_EpochBar(progress, bars[-1])]

        yield observer


def main() -> None:
    """Entry point: what a user can mend is said in one line, without a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        if type(error) not in (ValueError, FileNotFoundError):
            raise
        Console(stderr=True).print(
            f"keras-dwd: {error}", style="red", highlight=False, markup=False
        )
        sys.exit(2)
