"""Runs several methods on one scenario with several seeds, for the command line and benchmarks."""

import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import sklearn
import tensorflow as tf

from keras_dwd.checks import integer
from keras_dwd.evaluation import datasets
from keras_dwd.evaluation.methods import Method, method_named
from keras_dwd.evaluation.metric import ACCURACY, Metrics, metric_settings, task_metrics
from keras_dwd.evaluation.prepared import Prepared
from keras_dwd.evaluation.profiles import PROFILES, profile_for
from keras_dwd.evaluation.runner import FISHER_EXAMPLES, SequenceResult, run_sequence
from keras_dwd.evaluation.scenario import KINDS, Scenario, Task, permuted, split
from keras_dwd.evaluation.text.sequence import TextSettings, text_sequence
from keras_dwd.evaluation.trained_model import after_model
from keras_dwd.version import __version__
from keras_dwd.words import counted, nearest

Observer = Callable[[str, int, Scenario, int, int, Task], list[keras.callbacks.Callback]]
"""Called before each `fit` with the method, seed, scenario, epochs, task index and task; returns
callbacks."""

TEXT = "text"
_OF_IMAGES = (
    *("class_order_seed", "images_per_class", "augment", "mixup", "setting", "metrics"),
    *("model", "consolidate_on"),
)
_OF_TEXT = ("examples", "tokenizer", "beams", "run_code", "cache_dir", "preset", "lora")

# The seed of the class order of CIFAR-100 in published results, introduced with iCaRL's code.
_CLASS_ORDER_SEEDS = {"cifar100": 1993}


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass
class Experiment:
    """A scenario, given by name, and the training protocol.

    Attributes:
        scenario: `split:NAME` or `permuted:NAME`, where `NAME` is a data set of `datasets.load`,
            or a path of the user's own data; or `text:TASK,TASK…`, see `text_sequence`.
        tasks: Number of tasks.
        setting: `task`, `domain` or `class`; by default `task` for split, `domain` for permuted.
        class_order_seed: Seed of the class order in `split` (by default 1993 for cifar100 and the
            natural order otherwise) and of the permutations in `permuted` (0 by default).
        profile: `cpu` or `full`, see `profile_for`.
        epochs: Epochs per task; the number of the profile if `None`.
        data_dir: Folder of prepared tfds data sets, or of text tasks.
        validation: Fraction of the training data to hold back and evaluate on in place of the test
            data.
        images_per_class: Number of training images per class; the number of the profile if `None`.
        optimizer: See `Recipe`, as the following; that of the profile if `None`.
        learning_rate: By default of the profile, or of `optimizer` if the profile has another one.
        schedule: By default of the profile.
        weight_decay: By default of the profile.
        augment: By default of the profile.
        warmup: By default of the profile.
        mixup: By default of the profile.
        keep_state: By default of the profile.
        metrics: What is measured on images, see `run_sequence`; text has metrics of its own.
        examples: See `TextSettings`, as the following; for text alone.
        tokenizer: By default `bpe`.
        beams: By default 1.
        run_code: By default programs are not run.
        cache_dir: By default that of the user.
        preset: By default the small decoder.
        lora: By default all weights are trained.
        model: A `.keras` file of a trained classifier, which is trained in place of a new network.
            Its outputs are shared by all tasks: the setting is `domain`.
        consolidate_on: The data that it was trained on, as NAME in `scenario`: the first task,
            which is consolidated and not trained.
    """

    scenario: str = "permuted:digits"
    tasks: int = 5
    setting: Any = None
    class_order_seed: int | None = None
    profile: str = "cpu"
    epochs: int | None = None
    data_dir: Path | None = None
    validation: float | None = None
    images_per_class: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    weight_decay: float | None = None
    augment: bool | None = None
    warmup: float | None = None
    mixup: float | None = None
    keep_state: bool | None = None
    metrics: Metrics = (ACCURACY,)
    examples: int | None = None
    tokenizer: str | None = None
    beams: int | None = None
    run_code: bool | None = None
    cache_dir: Path | None = None
    preset: Path | None = None
    lora: int | None = None
    model: Path | None = None
    consolidate_on: str | None = None

    def __post_init__(self) -> None:
        kind, _, name = self.scenario.partition(":")
        if kind not in (*KINDS, TEXT) or not name:
            known = ", ".join(f"{k}:NAME" for k in KINDS)
            near = nearest(kind, (*KINDS, TEXT)) if name else ""
            raise ValueError(
                f"Unknown scenario {self.scenario!r}.{near} Known: {known}, with NAME digits, a "
                f"tfds classification data set or the path of your own data, and {TEXT}:TASK,TASK…"
            )
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"`epochs` must be at least 1. Received: {self.epochs}")
        if self.profile not in PROFILES:
            raise ValueError(
                f"`profile` must be one of {', '.join(PROFILES)}. Received: {self.profile!r}"
            )
        self._refuse(_OF_IMAGES if kind == TEXT else _OF_TEXT, kind)
        prepared = self._text(name) if kind == TEXT else self._images(kind, name)
        recipe = prepared.profile.recipe.changed(
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            augment=self.augment,
            warmup=self.warmup,
            mixup=self.mixup,
            keep_state=self.keep_state,
        )
        self.prepared, self.measured, self.built = prepared, prepared.metrics, prepared.scenario
        self.protocol = replace(prepared.profile, recipe=recipe)
        self.setting, self.tasks = self.built.setting, len(self.built.tasks)
        self.epochs = self.epochs or self.protocol.epochs

    def _refuse(self, names: Sequence[str], kind: str) -> None:
        """Raise `ValueError` if a setting was given that has no meaning for this kind."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"`{name}` is no setting of {kind!r} scenarios. Received: "
                    f"{getattr(self, name)!r}"
                )

    def _images(self, kind: str, name: str) -> Prepared:
        if self.augment and kind == "permuted":
            raise ValueError("`augment` must be off for permuted pixels: these are no images.")
        if self.images_per_class is not None:
            integer("images_per_class", self.images_per_class, 1)
        measured = task_metrics(self.metrics)
        setting: Any = self.setting
        if (self.model is None) != (self.consolidate_on is None):
            raise ValueError(
                "`--model` and `--consolidate-on` need each other: a trained model, and the data "
                "that it knows."
            )
        if setting is None:
            setting = "task" if kind == "split" and self.model is None else "domain"
        if self.model is not None and setting != "domain":
            raise ValueError(
                "`--setting` must be domain with `--model`: its tasks share the outputs of the "
                f"model. Received: {setting!r}"
            )
        data = datasets.load(name, self.data_dir)
        if self.class_order_seed is None:
            self.class_order_seed = _CLASS_ORDER_SEEDS.get(name) if kind == "split" else 0
        seed = self.class_order_seed
        profile = profile_for(data.x_train.shape[1:], kind, self.profile)
        images = self.images_per_class or profile.images_per_class
        used = "all training images" if images is None else counted(images, "training image")
        if kind == "split":
            built = split(data, self.tasks, setting, seed, images)
        else:
            built = permuted(data, self.tasks, setting, seed or 0, images)
        details = _order(kind, seed)
        if self.model is not None and self.consolidate_on is not None:
            known = datasets.load(self.consolidate_on, self.data_dir)
            built, profile, description = after_model(Path(self.model), known, built, profile)
            details += f", {description}"
        if self.validation is not None:
            built = built.holdout(self.validation)
        return Prepared(
            built,
            replace(profile, images_per_class=images),
            measured,
            {
                "class_order_seed": seed,
                "images_per_class": images,
                **({"model": str(self.model), "known": self.consolidate_on} if self.model else {}),
            },
            f"{used} a class",
            details,
            f"{self.validation or 0:.0%} of the training data, held back",
        )

    def _text(self, names: str) -> Prepared:
        if self.profile != "cpu":
            raise ValueError(f"`profile` must be cpu for text. Received: {self.profile!r}")
        chosen = {name: getattr(self, name) for name in _OF_TEXT}
        settings = TextSettings(**{name: g for name, g in chosen.items() if g is not None})
        return text_sequence(names, self.data_dir, settings, self.validation, say=_say)

    def run(
        self,
        method: str | Method,
        seed: int = 0,
        strength: float | None = None,
        observer: Observer | None = None,
        checkpoint_dir: Path | None = None,
        sharded: bool = False,
    ) -> SequenceResult:
        """Run one method with one seed; see `run_sequence`."""
        assert self.epochs is not None
        epochs = self.epochs
        name = method if isinstance(method, str) else method.name

        def callbacks(t: int, task: Task) -> list[keras.callbacks.Callback]:
            return observer(name, seed, self.built, epochs, t, task) if observer else []

        return run_sequence(
            self.protocol.build,
            self.built,
            method,
            metrics=self.measured,
            strength=strength,
            epochs=epochs,
            batch_size=self.protocol.batch_size,
            recipe=self.protocol.recipe,
            seed=seed,
            callbacks=callbacks,
            checkpoint_dir=checkpoint_dir,
            sharded=sharded,
            compile_settings=self.protocol.compiled(),
        )

    def compare(
        self,
        methods: Sequence[str],
        seeds: int = 3,
        strengths: dict[str, float] | None = None,
        observer: Observer | None = None,
        checkpoint_dir: Path | None = None,
        sharded: bool = False,
        keep: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Run several methods, each with the seeds 0 to `seeds − 1`.

        Args:
            methods: Names of methods, see `method_named`.
            seeds: Number of seeds.
            strengths: λ by method; methods that are left out use their default.
            observer: Returns the callbacks of each `fit`.
            checkpoint_dir: Folder for checkpoints, with a subfolder per method and seed.
            sharded: Whether workers divide the consolidation state among themselves.
            keep: Called after each run with the results so far, in which `unfinished` has the
                number of runs that are still to come.

        Returns:
            A JSON-serializable dictionary with `protocol`, `versions` and `methods`. The latter has
            for each method its `settings`, its `metrics` (`mean`, `std` and `per_seed` of each),
            its `accuracy_matrices` (or `mae_matrices`, by the names of the metrics), and the
            `consolidation` of the model of the first seed, see `ConsolidationSummary.as_dict`.
        """
        if not methods:
            raise ValueError(f"`methods` must name at least one. Received: {methods!r}")
        known = {name: method_named(name) for name in methods}
        if seeds < 1:
            raise ValueError(f"`seeds` must be at least 1. Received: {seeds}")
        strengths = strengths or {}
        chosen = {name: strengths.get(name, method.strength) for name, method in known.items()}
        settings = {name: known[name].configuration(s) for name, s in chosen.items()}
        results: dict[str, Any] = {}
        document = {"protocol": self.describe(seeds), "versions": versions(), "methods": results}
        left = len(chosen) * seeds
        for name, strength in chosen.items():
            runs: list[SequenceResult] = []
            for seed in range(seeds):
                folder = name.replace(":", "_")
                subfolder = checkpoint_dir and checkpoint_dir / folder / f"seed_{seed}"
                runs.append(self.run(name, seed, strength, observer, subfolder, sharded))
                left -= 1
                results[name] = {"settings": settings[name], **summarize(runs)}
                if keep is not None:
                    keep(document | ({"unfinished": left} if left else {}))
        return document

    def describe(self, seeds: int) -> dict[str, Any]:
        """The protocol as text (`title`, `text`) and as values."""
        protocol = self.protocol
        title = f"{self.scenario}, {counted(self.tasks, 'task')}, {self.setting}-incremental"
        text = (
            f"{protocol.network}, {protocol.recipe}, batch "
            f"{protocol.batch_size}, {counted(self.epochs or 0, 'epoch')} a task, "
            f"{self.prepared.training_data}, Fisher "
            f"information from a pass over {FISHER_EXAMPLES} of a task, {self.prepared.details}, "
            + (f"seeds 0–{seeds - 1}, mean ± std; " if seeds > 1 else "seed 0; ")
            + "evaluated on "
            f"{'the test data' if self.validation is None else self.prepared.held_back}."
        )
        return {
            "title": title,
            "text": text,
            "scenario": self.scenario,
            "tasks": [task.name for task in self.built.tasks],
            "setting": self.setting,
            "profile": self.profile,
            "network": protocol.network,
            "optimizer": "Adam",
            **protocol.recipe.configuration(),
            "batch_size": protocol.batch_size,
            "epochs": self.epochs,
            **self.prepared.about,
            "fisher_examples": FISHER_EXAMPLES,
            "validation": self.validation,
            "seeds": list(range(seeds)),
            **metric_settings(self.measured),
        }


def _order(kind: str, seed: int | None) -> str:
    """What a scenario of images makes of the seed of its tasks, in words."""
    if kind == "permuted":
        return f"permutations of seed {seed}"
    return "classes in their own order" if seed is None else f"class order of seed {seed}"


def summarize(runs: Sequence[SequenceResult]) -> dict[str, Any]:
    """Mean, standard deviation (n − 1) and values per run of each metric; their matrices."""
    per_run = [run.metrics() for run in runs]
    metrics = {}
    for name in per_run[0]:
        values = [metrics_of_run[name] for metrics_of_run in per_run]
        metrics[name] = {
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            "per_seed": values,
        }
    summary: dict[str, Any] = {
        "metrics": metrics,
        "train_seconds": [run.train_seconds for run in runs],
        "boundary_seconds": [run.boundary_seconds for run in runs],
        "consolidation": runs[0].consolidation,  # of the first seed
    }
    for name in runs[0].matrices:
        matrices = [run.matrices[name] for run in runs]
        summary[f"{name}_matrices"] = [
            [[None if math.isnan(a) else float(a) for a in row] for row in matrix.after]
            for matrix in matrices
        ]
        plural = "accuracies" if name == ACCURACY else name
        summary[f"untrained_{plural}"] = [[float(a) for a in m.before] for m in matrices]
    return summary


def versions() -> dict[str, str]:
    """Versions of the software and the hardware on which results depend."""
    return {
        "keras_dwd": __version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{
            f"gpu {i}": tf.config.experimental.get_device_details(gpu).get("device_name", "unknown")
            for i, gpu in enumerate(tf.config.list_physical_devices("GPU"))
        },
    }
