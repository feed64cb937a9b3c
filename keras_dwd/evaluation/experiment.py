"""Runs several methods on one scenario with several seeds, for the command line and benchmarks."""

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from keras_dwd.evaluation.profiles import Profile, profile_for
from keras_dwd.evaluation.runner import FISHER_EXAMPLES, SequenceResult, run_sequence
from keras_dwd.evaluation.scenario import KINDS, Scenario, Task, permuted, split
from keras_dwd.version import __version__

Observer = Callable[[str, int, Scenario, int, int, Task], list[keras.callbacks.Callback]]
"""Called before each `fit` with the method, seed, scenario, epochs, task index and task; returns
callbacks."""

# The seed of the class order of CIFAR-100 in published results, introduced with iCaRL's code.
_CLASS_ORDER_SEEDS = {"cifar100": 1993}


@dataclass
class Experiment:
    """A scenario, given by name, and the training protocol.

    Attributes:
        scenario: `split:NAME` or `permuted:NAME`, where `NAME` is a data set of `datasets.load`.
        tasks: Number of tasks.
        setting: `task`, `domain` or `class`; by default `task` for split, `domain` for permuted.
        class_order_seed: Seed of the class order in `split` (by default 1993 for cifar100 and the
            natural order otherwise) and of the permutations in `permuted` (0 by default).
        profile: `cpu` or `full`, see `profile_for`.
        epochs: Epochs per task; the number of the profile if `None`.
        data_dir: Folder of prepared tfds data sets.
        validation: Fraction of the training data to hold back and evaluate on in place of the test
            data.
        images_per_class: Number of training images per class; the number of the profile if `None`.
        optimizer: See `Recipe`, as the following; that of the profile if `None`.
        learning_rate: By default of the profile, or of `optimizer` if the profile has another one.
        schedule: By default of the profile.
        weight_decay: By default of the profile.
        augment: By default of the profile.
        keep_state: By default of the profile.
        warmup: By default of the profile.
        mixup: By default of the profile.
        metrics: What is measured, see `run_sequence`.
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
    keep_state: bool | None = None
    warmup: float | None = None
    mixup: float | None = None
    metrics: Metrics = (ACCURACY,)

    def __post_init__(self) -> None:
        kind, _, name = self.scenario.partition(":")
        if kind not in KINDS or not name:
            known = ", ".join(f"{k}:NAME" for k in KINDS)
            raise ValueError(
                f"Unknown scenario {self.scenario!r}. Known: {known}, with NAME digits or a tfds "
                "classification data set."
            )
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"`epochs` must be at least 1. Received: {self.epochs}")
        if self.augment and kind == "permuted":
            raise ValueError("`augment` must be off for permuted pixels: these are no images.")
        if self.images_per_class is not None:
            integer("images_per_class", self.images_per_class, 1)
        self.measured = task_metrics(self.metrics)
        if self.setting is None:
            self.setting = "task" if kind == "split" else "domain"
        data = datasets.load(name, self.data_dir)
        if self.class_order_seed is None:
            self.class_order_seed = _CLASS_ORDER_SEEDS.get(name) if kind == "split" else 0
        profile = profile_for(data.x_train.shape[1:], kind, self.profile)
        self.protocol: Profile = replace(
            profile,
            images_per_class=self.images_per_class or profile.images_per_class,
            recipe=profile.recipe.changed(
                optimizer=self.optimizer,
                learning_rate=self.learning_rate,
                schedule=self.schedule,
                weight_decay=self.weight_decay,
                augment=self.augment,
                keep_state=self.keep_state,
                warmup=self.warmup,
                mixup=self.mixup,
            ),
        )
        images = self.protocol.images_per_class
        if kind == "split":
            self.built = split(data, self.tasks, self.setting, self.class_order_seed, images)
        else:
            self.built = permuted(
                data, self.tasks, self.setting, self.class_order_seed or 0, images
            )
        if self.validation is not None:
            self.built = self.built.holdout(self.validation)
        self.epochs = self.epochs or self.protocol.epochs

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
        )

    def compare(
        self,
        methods: Sequence[str],
        seeds: int = 3,
        strengths: dict[str, float] | None = None,
        observer: Observer | None = None,
        checkpoint_dir: Path | None = None,
        sharded: bool = False,
    ) -> dict[str, Any]:
        """Run several methods, each with the seeds 0 to `seeds − 1`.

        Args:
            methods: Names of methods, see `method_named`.
            seeds: Number of seeds.
            strengths: λ by method; methods that are left out use their default.
            observer: Returns the callbacks of each `fit`.
            checkpoint_dir: Folder for checkpoints, with a subfolder per method and seed.
            sharded: Whether workers divide the consolidation state among themselves.

        Returns:
            A JSON-serializable dictionary with `protocol`, `versions` and `methods`. The latter has
            for each method its `settings`, its `metrics` (`mean`, `std` and `per_seed` of each) and
            its `accuracy_matrices` (or `mae_matrices`, by the names of the metrics).
        """
        if not methods:
            raise ValueError(f"`methods` must name at least one. Received: {methods!r}")
        known = {name: method_named(name) for name in methods}
        if seeds < 1:
            raise ValueError(f"`seeds` must be at least 1. Received: {seeds}")
        strengths = strengths or {}
        chosen = {name: strengths.get(name, method.strength) for name, method in known.items()}
        settings = {name: known[name].configuration(s) for name, s in chosen.items()}
        results = {}
        for name, strength in chosen.items():
            runs = [
                self.run(
                    name,
                    seed,
                    strength,
                    observer,
                    checkpoint_dir and checkpoint_dir / name.replace(":", "_") / f"seed_{seed}",
                    sharded,
                )
                for seed in range(seeds)
            ]
            results[name] = {"settings": settings[name], **summarize(runs)}
        return {"protocol": self.describe(seeds), "versions": versions(), "methods": results}

    def describe(self, seeds: int) -> dict[str, Any]:
        """The protocol as text (`title`, `text`) and as values."""
        protocol, images = self.protocol, self.protocol.images_per_class
        title = f"{self.scenario}, {self.tasks} tasks, {self.setting}-incremental"
        text = (
            f"{protocol.network}, {protocol.recipe}, batch "
            f"{protocol.batch_size}, {self.epochs} epochs a task, "
            f"{'all' if images is None else images} training images a class, Fisher "
            f"information from a pass over {FISHER_EXAMPLES} of a task, class order or "
            f"permutation seed {self.class_order_seed}, seeds 0–{seeds - 1}, mean ± std; "
            + (
                f"evaluated on {self.validation:.0%} of the training data, held back."
                if self.validation
                else "evaluated on the test data."
            )
        )
        return {
            "title": title,
            "text": text,
            "scenario": self.scenario,
            "tasks": [task.name for task in self.built.tasks],
            "setting": self.setting,
            "class_order_seed": self.class_order_seed,
            "profile": self.profile,
            "network": protocol.network,
            "optimizer": "Adam",
            **protocol.recipe.configuration(),
            "batch_size": protocol.batch_size,
            "epochs": self.epochs,
            "images_per_class": images,
            "fisher_examples": FISHER_EXAMPLES,
            "validation": self.validation,
            "seeds": list(range(seeds)),
            **metric_settings(self.measured),
        }


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
    summary = {
        "metrics": metrics,
        "train_seconds": [run.train_seconds for run in runs],
        "boundary_seconds": [run.boundary_seconds for run in runs],
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
