"""Trains a model on a sequence of tasks and measures it on all of them after each."""

import contextlib
import functools
import os
import resource
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.distributed.data import TrainingArrays, cut
from keras_dwd.evaluation.checkpoint import Checkpoints
from keras_dwd.evaluation.matrix import MetricMatrix
from keras_dwd.evaluation.methods import Method, method_named
from keras_dwd.evaluation.metric import (
    ACCURACY,
    Evaluator,
    Metrics,
    TaskMetric,
    metric_settings,
    of_compile,
    task_metrics,
)
from keras_dwd.evaluation.peers import Replay
from keras_dwd.evaluation.recipe import (
    CosineOfTask,
    Recipe,
    check_floats,
    check_images,
    check_time_steps,
    cropped_and_flipped,
)
from keras_dwd.evaluation.scenario import Scenario, Task, are_classes
from keras_dwd.evaluation.technique import Technique, TechniqueModel
from keras_dwd.files import FileError, checksum
from keras_dwd.groupings.policy import GroupingPolicy
from keras_dwd.layers.converting import with_task_normalization
from keras_dwd.model import DWDModel
from keras_dwd.task_graph.graph import TaskGraph
from keras_dwd.training.optimizer import DWDOptimizer
from keras_dwd.variables import Arrays

FISHER_EXAMPLES = 500
"""Examples per task for a boundary pass; more give nearly the same estimate (van de Ven, 2025)."""

# Share of a task's training data held back as validation data for a `GroupingPolicy`.
_HELD_BACK = 0.1
# Number of probe inputs of a task graph, taken from the first task.
_PROBES = 500


@dataclass
class SequenceResult:
    """The result of one run of a method on a scenario.

    Attributes:
        matrix: The values of the first metric after each task; all rows are equal for a joint run.
        steps: Number of optimizer steps.
        train_seconds: Seconds in `fit`, per task; the first includes tracing the graph.
        boundary_seconds: Seconds of the task boundary, per task.
        peak_memory: Peak resident memory of the process during the run, in bytes.
        model: The trained model.
        others: The matrices of further metrics, by name.
        consolidation: What the model retains, see `ConsolidationSummary.as_dict`.

    Example:

    ```python
    result = run_sequence(build, scenario, "finetune", epochs=1)
    print(result.matrix.after, sum(result.train_seconds), result.model.tasks_learned)
    ```
    """

    matrix: MetricMatrix
    steps: int
    train_seconds: list[float]
    boundary_seconds: list[float]
    peak_memory: int
    model: DWDModel = field(repr=False)
    others: dict[str, MetricMatrix] = field(default_factory=dict)
    consolidation: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def matrices(self) -> dict[str, MetricMatrix]:
        """The matrices of all metrics by name, the first one first."""
        return {self.matrix.name: self.matrix, **self.others}

    def metrics(self) -> dict[str, float]:
        """All metrics by name, see `MetricMatrix.metrics`, time and memory.

        What is computed from a further metric has its name in it: `loss_forgetting`.
        """
        training, boundaries = sum(self.train_seconds), sum(self.boundary_seconds)
        results = self.matrix.metrics()
        for matrix in self.others.values():
            results |= matrix.metrics(first=False)
        return results | {
            "steps_per_second": self.steps / training,
            "steps_per_second_with_boundaries": self.steps / (training + boundaries),
            "seconds": training + boundaries,
            "peak_memory_mb": self.peak_memory / 2**20,
        }


def run_sequence(
    build: Callable[[Scenario], keras.Model],
    scenario: Scenario,
    method: str | Method = "dwd",
    *,
    metrics: Metrics = (ACCURACY,),
    strength: float | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float | None = None,
    recipe: Recipe | None = None,
    fisher_examples: int = FISHER_EXAMPLES,
    seed: int = 0,
    callbacks: Callable[[int, Task], list[keras.callbacks.Callback]] | None = None,
    compile_settings: dict[str, Any] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    sharded: bool = False,
) -> SequenceResult:
    """Train a new model on the tasks of a scenario, one after another.

    Args:
        build: Function that builds the plain Keras model for a scenario; called after the seed is
            set.
        scenario: The sequence of tasks.
        method: A `Method` or the name of one, see `method_named`.
        metrics: What is measured on all tasks after each: metrics of Keras or their names,
            `"loss"`, or `TaskMetric`s with functions of your own. The first is the one by which
            methods are compared.
        strength: λ; the default of the method if `None`.
        epochs: Epochs per task. A joint run trains this many epochs on the union of all tasks,
            which gives the same number of steps.
        batch_size: Batch size for arrays; a `tf.data.Dataset` is batched already. Several workers
            (see `DWDModel.compile`) share each batch.
        learning_rate: Learning rate of Adam; short for `recipe=Recipe(learning_rate=…)`.
        recipe: Optimizer, whose state is reset for each task unless the recipe keeps it, learning
            rate and augmentation; by default Adam with the learning rate 0.001.
        fisher_examples: Number of examples per task for a boundary pass, if tasks are arrays.
        seed: Seed of weights, shuffling and dropout.
        callbacks: Function that returns the callbacks of a task's `fit`, called with the index of
            the task and the task.
        compile_settings: Further arguments of `compile`, or replacements of the defaults (the
            optimizer of the recipe, sparse categorical cross-entropy on logits, `metrics`). Names
            in `metrics` then are of what `evaluate` returns, such as `OUTPUT_mae`.
        checkpoint_dir: Folder for a checkpoint after each epoch and each task boundary. If it has
            checkpoints of the same run already, the run is resumed, with any number of workers, and
            gives the same result as an uninterrupted run. Tasks must be arrays. Not restored are
            the state of callbacks and of layers that use Keras' global random generator.
        sharded: Whether workers divide the consolidation state, see `DWDModel.compile`.

    Returns:
        A `SequenceResult`.

    Raises:
        ValueError: If arguments exclude each other, or do not fit the tasks.

    Example:

    ```python
    result = run_sequence(build, scenario, "dwd-online", epochs=1)
    print(result.metrics())
    ```
    """
    if recipe is not None and learning_rate is not None:
        raise ValueError("Give `learning_rate` or `recipe`, not both.")
    recipe = Recipe(learning_rate=learning_rate) if recipe is None else recipe
    if isinstance(method, str):
        method = method_named(method)
    if method.keep_state:
        recipe = replace(recipe, keep_state=True)
    measured = task_metrics(metrics)
    keras.utils.set_random_seed(seed)
    strength = method.strength if strength is None else strength
    arrays = all(isinstance(task.train, (tuple, list)) for task in scenario.tasks)
    if checkpoint_dir and not arrays:
        raise ValueError("`checkpoint_dir` needs tasks of arrays: the order of others is lost.")
    _check_recipe(recipe, scenario, compile_settings or {})
    loss: keras.losses.Loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if "loss" not in (compile_settings or {}):
        _check_classes(scenario)
        if recipe.mixup:
            scenario = scenario.one_hot()
            loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model = _wrapped(build, scenario, method, strength, checkpoint_dir)
    technique = model.technique if isinstance(model, TechniqueModel) else None
    if isinstance(technique, Replay):  # replayed examples are as long as they were given
        recipe = replace(recipe, bucket=None)
    if technique and recipe.augment:
        technique.augment = cropped_and_flipped

    rate = recipe.rate()
    optimizer = recipe.build_optimizer(rate)
    settings = {
        "optimizer": DWDOptimizer(optimizer) if method.decoupled else optimizer,
        "loss": loss,
        "metrics": of_compile(measured),
        # For small networks the overhead of `fit` between two steps exceeds the step itself.
        "steps_per_execution": 64,
        "sharded": sharded,
    }
    model.compile(**(settings | (compile_settings or {})))
    if technique and model.workers.several:
        raise ValueError(f"{method.name!r} works with one worker only.")
    model.optimizer.build(model.trainable_variables)
    evaluate = Evaluator(measured, [task.test for task in scenario.tasks])
    count = len(scenario.tasks)
    after = np.full((len(measured), count, count), np.nan)
    before = evaluate(model)
    matrix, *others = (m.matrix(a, b) for m, a, b in zip(measured, after, before, strict=True))
    result = SequenceResult(matrix, 0, [], [], 0, model, {other.name: other for other in others})
    if isinstance(model.grouping, GroupingPolicy):  # hold back validation data for its rewards
        scenario = scenario.holdout(_HELD_BACK)
    asked = {
        "scenario": scenario.name,
        "tasks": [task.name for task in scenario.tasks],
        "method": method.name,
        "settings": method.configuration(strength),
        "epochs": epochs,
        "batch_size": batch_size,
        **recipe.configuration(),
        "fisher_examples": fisher_examples,
        "seed": seed,
        "data": _checksum(scenario) if checkpoint_dir else "",
        **metric_settings(measured),
    }
    checkpoints = Checkpoints(checkpoint_dir, asked) if checkpoint_dir else None
    progress = _Progress(result, checkpoints, epochs)
    run = _Run(
        model,
        scenario,
        method,
        recipe,
        rate,
        technique,
        epochs,
        batch_size,
        fisher_examples,
        seed,
        callbacks,
        result,
        progress,
    )
    progress.restore()
    if model.task_graph is not None:
        model.task_graph.rewind(model.tasks_learned)
    memory = _PeakMemory()
    for t, task in enumerate([scenario.joint()] if method.joint else scenario.tasks):
        if t < progress.task:
            continue
        run.train(t, task)
        run.consolidate(t, task)
        if method.joint:
            after[:] = evaluate(model)[:, None]
        else:
            # Among future tasks only the next one is needed, for forward transfer.
            after[:, t, : t + 2] = evaluate(model, t + 2)
        progress.boundary()
    result.peak_memory = memory.peak()
    result.consolidation = model.consolidation.as_dict()
    return result


def _wrapped(
    build: Callable[[Scenario], keras.Model],
    scenario: Scenario,
    method: Method,
    strength: float,
    checkpoint_dir: str | os.PathLike[str] | None,
) -> DWDModel:
    """A new network, as the `DWDModel` that a method trains, with its technique if it has one."""
    if method.task_norm and scenario.setting != "task":
        raise ValueError(
            f"{method.name!r} needs a scenario in the setting 'task', in which each example comes "
            f"with its task id. Received: {scenario.setting!r}"
        )
    arguments = method.settings(strength)
    folder = None
    if method.graph and strength > 0:
        if not isinstance(scenario.tasks[0].train, (tuple, list)):
            raise ValueError(f"{method.name!r} needs tasks of arrays, for a probe: not tf.data.")
        folder = Path(checkpoint_dir or tempfile.mkdtemp(prefix="task_graph_")) / "graph"
        probe, *_ = _sample(scenario.tasks[0].train, _PROBES)
        arguments["task_graph"] = TaskGraph(folder, probe, method.graph)
    network = build(scenario)
    if method.task_norm:
        network = with_task_normalization(network, len(scenario.tasks))
    technique = method.technique and method.technique(strength)
    kind = TechniqueModel if technique else DWDModel
    model = kind.from_model(network, **arguments)
    model._wraps_trained = None  # what the network knows before is no task of the scenario
    model._checks_strength = False  # extreme strengths are tried when it is tuned
    if isinstance(model, TechniqueModel):
        model.technique = technique
    if folder is not None and not checkpoint_dir:
        # The temporary folder is removed when the model is.
        weakref.finalize(model, shutil.rmtree, folder.parent, ignore_errors=True)
    return model


class _Run:
    """Training and boundaries of the tasks of one run; see `run_sequence` for the arguments."""

    def __init__(
        self,
        model: DWDModel,
        scenario: Scenario,
        method: Method,
        recipe: Recipe,
        rate: Any,
        technique: Technique | None,
        epochs: int,
        batch_size: int,
        fisher_examples: int,
        seed: int,
        callbacks: Callable[[int, Task], list[keras.callbacks.Callback]] | None,
        result: SequenceResult,
        progress: "_Progress",
    ):
        self.model, self.method, self.recipe, self.rate = model, method, recipe, rate
        self.technique, self.epochs, self.batch_size = technique, epochs, batch_size
        self.fisher_examples, self.seed, self.callbacks = fisher_examples, seed, callbacks
        self.result, self.progress = result, progress
        self._new_state = [np.asarray(v) for v in model.optimizer.variables]
        self._tests = [task.test for task in scenario.tasks]

    @functools.cached_property
    def _accuracies(self) -> Evaluator:
        return Evaluator([TaskMetric(ACCURACY)], self._tests)

    def train(self, t: int, task: Task) -> None:
        """Train on a task, from the epoch on in which an interrupted run was."""
        model, progress, recipe = self.model, self.progress, self.recipe
        if not progress.epoch:
            # Reset the optimizer's state; a new optimizer would make Keras retrace the step.
            if not recipe.keep_state:
                for variable, value in zip(model.optimizer.variables, self._new_state, strict=True):
                    variable.assign(value)
            if self.technique:
                self.technique.begin_task(model)
        if self.technique:
            self.technique.start(_seed_of_task(self.seed, t))
        workers = model.workers
        if isinstance(self.rate, CosineOfTask):
            batches = _batches(task.train, self.batch_size, workers.communicator.size)
            self.rate.begin_task(self.epochs, batches, recipe.warmup)
        progress.begin()
        if progress.epoch < self.epochs and not task.known:
            changed = recipe.changes_batches or recipe.bucket
            ordered = progress.checkpoints is not None or workers.several or changed
            order = _seed_of_task(self.seed, t) if ordered else None
            data, own = _fit_arguments(model, task.train, self.batch_size, order, recipe)
            shown = self.callbacks(t, task) if self.callbacks else []
            model.fit(
                **data,
                initial_epoch=progress.epoch,
                epochs=self.epochs,
                verbose=0,
                callbacks=[*own, *shown, progress],
            )
            progress.trained()
        progress.end()
        steps = int(model.optimizer.iterations)
        self.result.steps = steps if recipe.keep_state else self.result.steps + steps

    def consolidate(self, t: int, task: Task) -> None:
        """The boundary after a task."""
        model, started = self.model, time.perf_counter()
        if isinstance(model.grouping, GroupingPolicy):
            model.grouping.reward(self._accuracies(model, t + 1)[0].tolist())
        sample = _sample(task.train, self.fisher_examples)
        if self.recipe.bucket is not None:
            sample = tf.nest.map_structure(np.asarray, cut(sample, self.recipe.bucket))
        if isinstance(model, TechniqueModel):
            model.end_task(task.train, sample, np.random.default_rng([self.seed, t, 1]))
        pass_data = sample if self.method.boundary_pass or task.known else None
        model.consolidate(pass_data, batch_size=self.batch_size, verbose=0)
        self.result.boundary_seconds.append(time.perf_counter() - started)


def _check_recipe(recipe: Recipe, scenario: Scenario, compile_settings: dict[str, Any]) -> None:
    """Raise `ValueError` if a recipe has settings that would have no effect or no meaning."""
    own = replace(recipe, augment=False, mixup=0.0, keep_state=False)
    if "optimizer" in compile_settings and own != Recipe():
        raise ValueError(
            "Give the optimizer and its learning rate in `recipe` or in `compile_settings`, not in "
            f"both. Received: {recipe}"
        )
    for task in scenario.tasks:
        arrays = isinstance(task.train, (tuple, list))
        if recipe.changes_batches and not arrays:
            name = "augment" if recipe.augment else "mixup"
            raise ValueError(
                f"`{name}` needs tasks of arrays. Task {task.name!r} is `tf.data`: change it by "
                "its `map`."
            )
        if recipe.mixup and "loss" in compile_settings:
            labels = [np.asarray(part) for part in tf.nest.flatten(task.train[1])]
            if any(part.dtype.kind != "f" for part in labels):
                raise ValueError(
                    "`mixup` mixes labels, which must be floats for a `loss` of your own, such as "
                    f"one-hot vectors. Received, in task {task.name!r}: "
                    f"{', '.join(str(part.dtype) for part in labels)}."
                )
        if recipe.mixup:
            check_floats(task.train[0])
        if recipe.augment:
            check_images(task.train[0])
        if recipe.bucket is not None:
            check_time_steps(task)
        if recipe.schedule == "cosine" and not arrays and int(task.train.cardinality()) < 0:
            raise ValueError(
                "`schedule` 'cosine' needs to know the number of steps. The dataset of task "
                f"{task.name!r} does not tell its length: give it one by "
                "`tf.data.experimental.assert_cardinality`."
            )


def _check_classes(scenario: Scenario) -> None:
    """Raise `ValueError` if labels are not class numbers, which the default loss takes."""
    for task in scenario.tasks:
        if isinstance(task.train, (tuple, list)) and not are_classes(task.train[1]):
            raise ValueError(
                f"The labels of task {task.name!r} are no class numbers: give the `loss` in "
                "`compile_settings`."
            )


def _seed_of_task(seed: int, task: int) -> int:
    """A seed that depends on those of the run and on the task."""
    return int(np.random.default_rng([seed, task]).integers(2**31 - 1))


def _batches(data: Any, batch_size: int, workers: int) -> int:
    """The number of steps in an epoch."""
    if isinstance(data, tf.data.Dataset):
        return -(-int(data.cardinality()) // workers)
    return -(-len(tf.nest.flatten(data)[0]) // batch_size)


def _fit_arguments(
    model: DWDModel, data: Any, batch_size: int, order: int | None, recipe: Recipe
) -> tuple[dict[str, Any], list[keras.callbacks.Callback]]:
    """The arguments of `fit` for a task's data, and the callbacks that this data needs.

    Args:
        model: The model to train.
        data: Training data of the task.
        batch_size: Batch size of all workers together.
        order: Seed that alone determines the order of the examples, or `None` for Keras' shuffling.
        recipe: Says how batches are changed at random, by draws that `order` alone determines too,
            and how sequences are batched.
    """
    communicator = model.workers.communicator
    if not isinstance(data, (tuple, list)):
        return {"x": data, "shuffle": False}, []  # a dataset does its own shuffling
    if batch_size % communicator.size:
        raise ValueError(
            f"`batch_size` must be a multiple of the number of workers, {communicator.size}. "
            f"Received: {batch_size}"
        )
    if order is None:
        parts = dict(zip(("x", "y", "sample_weight"), data, strict=False))
        return {**parts, "batch_size": batch_size}, []
    share = batch_size // communicator.size
    ordered = TrainingArrays(
        tuple(data),
        share,
        communicator.rank,
        communicator.size,
        order,
        recipe.changed_batch if recipe.changes_batches else None,
        recipe.bucket,
    )
    return {"x": ordered.batches, "shuffle": False}, [ordered]


class _Progress(keras.callbacks.Callback):
    """The progress of a run, which it saves to checkpoints if there is a folder for them.

    Attributes:
        task: Index of the current task.
        epoch: Number of epochs of this task that are complete.
    """

    def __init__(self, result: SequenceResult, checkpoints: Checkpoints | None, epochs: int):
        super().__init__()
        self.result, self.checkpoints, self._epochs = result, checkpoints, epochs
        self.task = self.epoch = 0
        self._spent = 0.0  # seconds trained on the task before an interruption

    def restore(self) -> None:
        """Restore the model and the progress from the newest checkpoint, if there is one."""
        model = self.result.model
        if self.checkpoints is None:
            return
        saved = self.checkpoints.restore(model, self._check)
        if saved is None:
            return
        self.task, self.epoch = int(saved["task"]), int(saved["epoch"])
        self._spent = float(saved["spent"])
        self.result.steps = int(saved["steps"])
        self.result.train_seconds[:] = saved["train_seconds"].tolist()
        self.result.boundary_seconds[:] = saved["boundary_seconds"].tolist()
        for matrix, (after, before) in self._names():
            matrix.after[:], matrix.before[:] = saved[after], saved[before]

    def _check(self, saved: Arrays) -> None:
        """Raise `FileError` if this cannot be the progress of this run."""
        expected = self._state(0.0)
        lists = ("train_seconds", "boundary_seconds")  # one entry per completed task
        for name in expected.keys() | saved.keys():
            first = 1 if name in lists else 0
            pair = [arrays[name] for arrays in (expected, saved) if name in arrays]
            if len(pair) != 2 or len({(a.dtype, a.ndim, a.shape[first:]) for a in pair}) != 1:
                raise FileError(f"The checkpoint's {name!r} does not fit: is it of this run?")
        counts = {int(saved["task"]), *(len(saved[name]) for name in lists)}
        if len(counts) != 1 or saved["epoch"] < 0 or saved["steps"] < 0:
            raise FileError("The checkpoint's progress contradicts itself.")

    def begin(self) -> None:
        """Start the clock as training on a task begins or is resumed."""
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.epoch = epoch + 1
        # After the last epoch `trained` saves, as `fit` may still change the weights at its end.
        if self.epoch < self._epochs and not self.model.stop_training:
            self._save(self._seconds())

    def trained(self) -> None:
        """Save a checkpoint after `fit`, which may have stopped before its last epoch."""
        self.epoch = self._epochs
        self._save(self._seconds())

    def end(self) -> None:
        """Record the training time of the task."""
        self.result.train_seconds.append(self._seconds())

    def _seconds(self) -> float:
        return self._spent + time.perf_counter() - self._started

    def boundary(self) -> None:
        """Save a checkpoint after the task boundary and evaluation, and go to the next task."""
        self.task, self.epoch, self._spent = self.task + 1, 0, 0.0
        self._save(0.0)

    def _save(self, spent: float) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(self.result.model, self._state(spent))

    def _state(self, spent: float) -> Arrays:
        result = self.result
        return {
            "task": np.array(self.task),
            "epoch": np.array(self.epoch),
            "spent": np.array(spent),
            "steps": np.array(result.steps),
            "train_seconds": np.array(result.train_seconds),
            "boundary_seconds": np.array(result.boundary_seconds),
            **{
                name: values
                for matrix, names in self._names()
                for name, values in zip(names, (matrix.after, matrix.before), strict=True)
            },
        }

    def _names(self) -> list[tuple[MetricMatrix, tuple[str, str]]]:
        """The matrices, and the names of their arrays: `after` and `before` of the first metric."""
        named = [(self.result.matrix, ("after", "before"))]
        others = self.result.others.items()
        return named + [(m, (f"after/{name}", f"before/{name}")) for name, m in others]


def _checksum(scenario: Scenario) -> str:
    """Checksum of all data, as a run must not be resumed with other data."""
    crc = 0
    for task in scenario.tasks:
        for array in map(np.ascontiguousarray, tf.nest.flatten((task.train, task.test))):
            crc = checksum(array, crc)
    return f"{crc:08x}"


def _sample(data: Any, count: int) -> Any:
    """`count` randomly drawn examples of arrays; other data is returned unchanged."""
    if not isinstance(data, (tuple, list)):
        return data
    size = len(tf.nest.flatten(data)[0])
    chosen = np.random.default_rng(0).permutation(size)[:count]
    return tuple(tf.nest.map_structure(lambda a: a[chosen], part) for part in data)


class _PeakMemory:
    """Peak resident memory since this object was created, or the process if not on Linux."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        try:
            status = Path("/proc/self/status").read_text()
            (line,) = (s for s in status.splitlines() if s.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        except (OSError, ValueError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
