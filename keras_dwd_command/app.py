"""The subcommands: their options, help and examples. What they do is in `keras_dwd.cli`."""

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from keras_dwd_command import needs_experiments, without_noise
from keras_dwd_command import options as o

METHODS = "finetune,ewc,dwd,joint"

app = typer.Typer(
    help="Continual learning for Keras 3.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"keras-dwd {importlib.metadata.version('keras_dwd')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Continual learning for Keras 3."""


def _do(name: str, given: dict[str, Any]) -> None:
    """Call the function of that name in `keras_dwd.cli`, which takes seconds to import.

    Args:
        name: The subcommand.
        given: Its arguments, those of `options_of` in `_`.
    """
    shared = given.pop("_", {})
    if "keras_dwd.cli" not in sys.modules:
        with without_noise():
            import tensorflow as tf

            tf.config.list_physical_devices()
            try:
                importlib.import_module("keras_dwd.cli")
            except ModuleNotFoundError as error:
                needs_experiments(error)
    getattr(sys.modules["keras_dwd.cli"], name)(**given, **shared)


@app.command(epilog="Example: keras-dwd run --scenario split:digits --methods finetune,ewc,dwd")
@o.options_of(o.experiment)
def run(
    context: typer.Context,
    methods: o.Methods = METHODS,
    strength: Annotated[
        str | None,
        typer.Option(
            help="λ of all methods, or of some of them (ewc=1000,dwd=200); by default their own."
        ),
    ] = None,
    workers: o.Workers = 1,
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
    out: o.Out = None,
    **_: Any,
) -> None:
    """Train several methods on a sequence of tasks and compare what they learn and forget.

    Ctrl-C ends the run; what was finished is written to `--out`.
    """
    _do("run", locals())


@app.command(
    epilog="Example: keras-dwd tune --scenario split:digits --methods ewc,dwd --out t.json"
)
@o.options_of(o.experiment, o.tuning)
def tune(context: typer.Context, methods: o.Methods = METHODS, **_: Any) -> None:
    """Tune λ of each method on held-back training data, then compare them on the test data.

    Each method that has a λ is tuned with the same number of values around its default, the same
    seeds and the same epochs.
    """
    _do("tune", locals())


@app.command(epilog="Example: keras-dwd ablate --scenario split:digits --parts groups --out a.json")
@o.options_of(o.experiment, o.tuning)
def ablate(
    context: typer.Context,
    parts: Annotated[
        str,
        typer.Option(
            help="Comma-separated words, such as groups, budget, γ, estimator: only parts whose "
            "names contain one of them. By default all parts."
        ),
    ] = "",
    **_: Any,
) -> None:
    """Change one part of DWD at a time and compare the result with tuned EWC, paired by seed.

    λ is the default. For EWC, and where a change affects the scale of the Fisher information, it is
    tuned as by `tune`.
    """
    _do("ablate", locals())


@app.command(epilog="Example: keras-dwd plan --params 1.75e11 --workers 1024")
def plan(
    model: Annotated[
        str | None, typer.Option(help=f"A network of this package: {', '.join(o.NETWORKS)}.")
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(help="Or a transformer with this number of parameters, such as 1.75e11."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of workers.")] = 1,
    curvature: Annotated[str, typer.Option(help=", ".join(o.CURVATURES))] = "kronecker",
    optimizer: Annotated[str, typer.Option(help="sgd, momentum or adam")] = "adam",
    replicated: Annotated[
        bool,
        typer.Option("--replicated", help="Each worker stores the whole consolidation state."),
    ] = False,
    link: Annotated[
        float | None,
        typer.Option(help="Bytes per second between workers; by default measured on this machine."),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Estimate the memory, communication and time that training needs per worker."""
    _do("plan", locals())


@app.command(epilog="Example: keras-dwd report results.json --out report.html")
def report(
    results: Annotated[list[Path], typer.Argument(help="Files that `--out` of `run` has written.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Make one page with figures of results, to look at in a browser; it fetches nothing."""
    _do("report", locals())


@app.command(epilog="Example: keras-dwd compare before.json after.json")
def compare(
    a: Annotated[Path, typer.Argument(help="A file that `--out` of `run` has written.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    metric: Annotated[
        str | None,
        typer.Option(help="What to compare, such as forgetting; by default the average accuracy."),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Compare two files of results by method, paired by seed if the protocol is the same."""
    _do("compare", locals())


@app.command(epilog="Example: keras-dwd info")
def info(as_json: o.Json = False) -> None:
    """Print versions, devices, whether Horovod is there, and what optional packages are missing."""
    _do("info", locals())


def main() -> None:
    """Entry point; prints errors that the user can correct in one line, without a traceback."""
    try:
        app(prog_name="keras-dwd")
    except KeyboardInterrupt:
        Console(stderr=True).print("keras-dwd: interrupted", style="red")
        sys.exit(130)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        if type(error) not in (ValueError, FileNotFoundError) and not _is_known(error):
            raise
        Console(stderr=True).print(
            f"keras-dwd: {error}", style="red", highlight=False, markup=False
        )
        sys.exit(2)


def _is_known(error: Exception) -> bool:
    """Whether an error of the package tells the user what to do."""
    from keras_dwd.communicator import INSTALL
    from keras_dwd.files import FileError

    plots = getattr(error, "name", "") == "matplotlib"
    return type(error) is FileError or str(error) == INSTALL or plots
