"""Several methods over one scenario and several seeds: what the command line and benchmarks run."""

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import sklearn
import tensorflow as tf

from keras_dwd.evaluation.methods import Method, method_named
from keras_dwd.evaluation.profiles import Profile, profile_for
from keras_dwd.evaluation.runner import FISHER_EXAMPLES, SequenceResult, run_sequence
from keras_dwd.tasks import datasets
from keras_dwd.tasks.scenario import KINDS, Scenario, Task, permuted, split
from keras_dwd.version import __version__

Observer = Callable[[str, int, Scenario, int, int, Task], list[keras.callbacks.Callback]]
"""Called with method, seed, scenario, epochs, index of the task and task before each `fit`."""

# The order of CIFAR-100's classes that published results use, from iCaRL's code on.
_CLASS_ORDER_SEEDS = {"cifar100": 1993}


@dataclass
class Experiment:
    """A scenario by name and the protocol it is learned under.

    Attributes:
        scenario: `split:NAME` or `permuted:NAME`.
        tasks: Number of tasks.
        setting: `task`, `domain` or `class`; by default `task` for split, `domain` for permuted.
        class_order_seed: Of the order of classes in `split` (1993 for cifar100, else the natural
            order, by default) and of the permutations in `permuted` (0 by default).
        profile: `cpu` or `full`.
        epochs: Per task; that of the profile if `None`.
        data_dir: Folder of prepared tfds data sets.
        validation: Fraction of the training data to evaluate on in place of the test data.
    """

    scenario: str = "permuted:digits"
    tasks: int = 5
    setting: Any = None
    class_order_seed: int | None = None
    profile: str = "cpu"
    epochs: int | None = None
    data_dir: Path | None = None
    validation: float | None = None

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
        if self.setting is None:
            self.setting = "task" if kind == "split" else "domain"
        data = datasets.load(name, self.data_dir)
        if self.class_order_seed is None:
            self.class_order_seed = _CLASS_ORDER_SEEDS.get(name) if kind == "split" else 0
        self.protocol: Profile = profile_for(data.x_train.shape[1:], kind, self.profile)
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
        """One method, one seed; see `run_sequence`."""
        assert self.epochs is not None
        epochs = self.epochs
        name = method if isinstance(method, str) else method.name

        def callbacks(t: int, task: Task) -> list[keras.callbacks.Callback]:
            return observer(name, seed, self.built, epochs, t, task) if observer else []

        return run_sequence(
            self.protocol.build,
            self.built,
            method,
            strength=strength,
            epochs=epochs,
            batch_size=self.protocol.batch_size,
            learning_rate=self.protocol.learning_rate,
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
        """Several methods, each with the seeds 0 to `seeds − 1`.

        Args:
            methods: Names in `METHODS`, or `NAME:ESTIMATOR`.
            seeds: Number of seeds.
            strengths: λ by method, where not its default.
            observer: Gives the callbacks of each `fit`.
            checkpoint_dir: Of each run's progress, in a folder per method and seed.
            sharded: Whether workers divide the consolidation state.

        Returns:
            A JSON-able dictionary: `protocol`, `versions`, and per method its `settings`, `metrics`
            (`mean`, `std`, `per_seed` of each) and `accuracy_matrices`.
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
        """The protocol, for people (`title`, `text`) and for programs."""
        protocol, images = self.protocol, self.protocol.images_per_class
        title = f"{self.scenario}, {self.tasks} tasks, {self.setting}-incremental"
        text = (
            f"{protocol.network}, Adam {protocol.learning_rate:g} reset for each task, batch "
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
            "learning_rate": protocol.learning_rate,
            "batch_size": protocol.batch_size,
            "epochs": self.epochs,
            "images_per_class": images,
            "fisher_examples": FISHER_EXAMPLES,
            "validation": self.validation,
            "seeds": list(range(seeds)),
        }


def summarize(runs: Sequence[SequenceResult]) -> dict[str, Any]:
    """Mean, standard deviation (n − 1) and single values of each metric, and the matrices."""
    per_run = [run.metrics() for run in runs]
    metrics = {}
    for name in per_run[0]:
        values = [metrics_of_run[name] for metrics_of_run in per_run]
        metrics[name] = {
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            "per_seed": values,
        }
    return {
        "metrics": metrics,
        "train_seconds": [run.train_seconds for run in runs],
        "boundary_seconds": [run.boundary_seconds for run in runs],
        "accuracy_matrices": [
            [[None if math.isnan(a) else float(a) for a in row] for row in run.matrix.after]
            for run in runs
        ],
        "untrained_accuracies": [[float(a) for a in run.matrix.before] for run in runs],
    }


def versions() -> dict[str, str]:
    """What the figures depend on besides the protocol."""
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
