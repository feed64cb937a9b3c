"""The options of the command line, which know nothing of TensorFlow: so help comes at once."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_dwd_command import config

# What the package has: `tests/test_command.py` compares.
METHODS = (
    "finetune",
    "ewc",
    "online-ewc",
    "dwd",
    "dwd-online",
    "dwd-diagonal",
    "lwf",
    "l2",
    "mas",
    "si",
    "rwalk",
    "freeze",
    "er",
    "der++",
    "a-gem",
    "joint",
)
VARIANTS = (
    "no-groups",
    "layers",
    "spectral",
    "bic",
    "units",
    "variables",
    "movement",
    "soft",
    "levelled",
    "evidence",
    "budget",
    "one-budget",
    "policy",
    "gamma-0.9",
    "gamma-0.99",
    "decay-0.5",
    "decay-0.8",
    "diagonal",
    "damping-0",
    "damping-1",
    "every-step",
    "pass",
    "decoupled",
    "graph",
    "task-norm",
    "keep-state",
    "distill",
    "er",
)
OPTIMIZERS = ("adam", "sgd")
NETWORKS = ("mlp", "conv", "resnet32", "resnet18_like")
CURVATURES = ("diagonal", "kronecker")

Scenario = Annotated[
    str,
    typer.Option(
        help="split:NAME or permuted:NAME, where NAME is digits, a prepared classification data "
        "set of tensorflow-datasets, or your own data: a folder with a folder of images for each "
        "class, an .npz file with x and y, or a .csv file with a column label; or text:TASK,TASK…, "
        "where TASK is a folder of JSONL files in --data-dir, a path, or one of summarize, "
        "translate, code and qa."
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        help=f"Comma-separated methods: {', '.join(METHODS)}. NAME:ESTIMATOR uses another "
        f"estimator of the Fisher information, NAME+VARIANT one of {', '.join(VARIANTS)}."
    ),
]
Tasks = Annotated[int, typer.Option(help="Number of tasks.")]
Setting = Annotated[
    str | None,
    typer.Option(
        help="task (one head per task), domain (shared outputs) or class (an output per "
        "class of each task). By default task for split, domain for permuted."
    ),
]
ClassOrderSeed = Annotated[
    int | None,
    typer.Option(help="Seed of the class order (split) or of the permutations (permuted)."),
]
Model = Annotated[
    Path | None,
    typer.Option(
        help="A trained classifier, a .keras file, in place of a new network; no code in it is run."
    ),
]
ConsolidateOn = Annotated[
    str | None,
    typer.Option(
        help="The data that --model knows, as NAME in --scenario: the first task, which is "
        "consolidated and not trained."
    ),
]
Seeds = Annotated[int, typer.Option(help="Number of runs per method: seeds 0, 1, …")]
TuningSeeds = Annotated[int, typer.Option(help="Number of runs per λ on validation data.")]
Points = Annotated[
    int, typer.Option(help="Number of values of λ to try per method, over six decades.")
]
Processes = Annotated[
    int | None, typer.Option(help="Number of parallel runs; by default one per core.")
]
Epochs = Annotated[int | None, typer.Option(help="Epochs per task; by default of the profile.")]
Profile = Annotated[
    str, typer.Option(help="cpu (small network, part of the images) or full (for a GPU).")
]
Images = Annotated[
    int | None,
    typer.Option(help="Training images per class; by default of the profile."),
]
Optimizer = Annotated[
    str | None, typer.Option(help=f"{' or '.join(OPTIMIZERS)}; by default of the profile.")
]
LearningRate = Annotated[
    float | None,
    typer.Option(help="Learning rate; by default of the profile, or of another --optimizer."),
]
Schedule = Annotated[
    str | None,
    typer.Option(help="constant, or cosine: to 0 in each task; by default of the profile."),
]
WeightDecay = Annotated[float | None, typer.Option(help="Weight decay; by default of the profile.")]
Augment = Annotated[
    bool | None,
    typer.Option(
        "--augment/--no-augment",
        help="Crop and flip training images at random; by default of the profile.",
        show_default=False,
    ),
]
Warmup = Annotated[
    float | None,
    typer.Option(help="Epochs in which the learning rate rises; by default of the profile."),
]
Mixup = Annotated[
    float | None,
    typer.Option(help="Mix training examples in pairs, 0 for not; by default of the profile."),
]
KeepState = Annotated[
    bool | None,
    typer.Option(
        "--keep-state/--reset-state",
        help="Whether the optimizer keeps its state from task to task; by default of the profile.",
        show_default=False,
    ),
]
Metrics = Annotated[
    str,
    typer.Option(
        help="Comma-separated metrics of Keras, or loss; methods are compared by the first."
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder of tfds data sets, by default TFDS_DATA_DIR; or of text tasks, by default the "
        "current one."
    ),
]
Examples = Annotated[int | None, typer.Option(help="Text: the most training rows of a task.")]
Tokenizer = Annotated[str | None, typer.Option(help="Text: bpe (the default) or byte.")]
Beams = Annotated[int | None, typer.Option(help="Text: beams of the search; 1 by default.")]
RunCode = Annotated[
    bool | None,
    typer.Option(
        "--run-code",
        help="Text: run programs that the model writes with their tests, with limits of time and "
        "memory and without network.",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Text: folder for the pretrained model, by default in ~/.cache."),
]
Preset = Annotated[
    Path | None,
    typer.Option(
        help="Text: folder with a preset of a causal language model of KerasHub, which is trained "
        "in place of the small model."
    ),
]
Lora = Annotated[
    int | None,
    typer.Option(help="Text: train only adapters of this rank, with --preset."),
]
Out = Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")]
Resumed = Annotated[
    Path | None,
    typer.Option(
        help="Write the results to this JSON file as runs are completed. Results that it already "
        "has are not run again."
    ),
]
Workers = Annotated[
    int, typer.Option(help="Number of workers on this machine that train together, by Horovod.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON, not as a table.")]
Report = Annotated[
    Path | None,
    typer.Option(help="Write a page with figures to this HTML file; needs keras_dwd[plots]."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Tell what would be run, with its sizes, and end."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=config.from_file,
        is_eager=True,
        expose_value=False,
        help="TOML file with options of this command by their names, such as seeds = 5. What is "
        "given otherwise takes precedence.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        callback=config.from_pairs,
        is_eager=True,
        expose_value=False,
        help="An option in place of that in --config; may be repeated.",
    ),
]


def experiment(
    scenario: Scenario = "permuted:digits",
    tasks: Tasks = 5,
    setting: Setting = None,
    class_order_seed: ClassOrderSeed = None,
    model: Model = None,
    consolidate_on: ConsolidateOn = None,
    seeds: Seeds = 3,
    epochs: Epochs = None,
    profile: Profile = "cpu",
    images_per_class: Images = None,
    optimizer: Optimizer = None,
    learning_rate: LearningRate = None,
    schedule: Schedule = None,
    weight_decay: WeightDecay = None,
    augment: Augment = None,
    warmup: Warmup = None,
    mixup: Mixup = None,
    keep_state: KeepState = None,
    metrics: Metrics = "accuracy",
    data_dir: DataDir = None,
    examples: Examples = None,
    tokenizer: Tokenizer = None,
    beams: Beams = None,
    run_code: RunCode = None,
    cache_dir: CacheDir = None,
    preset: Preset = None,
    lora: Lora = None,
    report: Report = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    config: Config = None,
    sets: Set = None,
) -> None:
    """The options of all commands that run an experiment."""


def tuning(
    tuning_seeds: TuningSeeds = 1,
    points: Points = 7,
    processes: Processes = None,
    out: Resumed = None,
) -> None:
    """The options of all commands that tune."""


def options_of(*shared: Callable[..., None]) -> Callable[[Any], Any]:
    """A decorator that gives a command the options of these functions in place of its `**`."""

    def decorated(command: Any) -> Any:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
        more = [p for function in shared for p in inspect.signature(function).parameters.values()]
        parameters = [own[0], *more, *own[1:]]  # the context comes first
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorated
