"""Learn a sequence of tasks, measuring as it goes."""

import contextlib
import os
import resource
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.distributed.data import TrainingArrays
from keras_dwd.evaluation.checkpoint import Checkpoints
from keras_dwd.evaluation.matrix import AccuracyMatrix
from keras_dwd.evaluation.methods import Method, method_named
from keras_dwd.files import FileError, checksum
from keras_dwd.grouping.policy import GroupingPolicy
from keras_dwd.model import DWDModel
from keras_dwd.optimizer import DWDOptimizer
from keras_dwd.tasks.scenario import Scenario, Task
from keras_dwd.tasks.task_graph import TaskGraph
from keras_dwd.variables import Arrays

FISHER_EXAMPLES = 500
"""Of each task, for a boundary pass: more give nearly the same estimate (van de Ven, 2025)."""

# The share of a task's training data that a `GroupingPolicy` is rewarded by.
_HELD_BACK = 0.1
# Inputs of the first task that a task graph compares representations of.
_PROBES = 500

METRICS = (
    "average_accuracy",
    "learning_accuracy",
    "forgetting",
    "relative_forgetting",
    "backward_transfer",
    "forward_transfer",
)


@dataclass
class SequenceResult:
    """What one run of a method over a scenario gave.

    Attributes:
        matrix: Accuracies after each task. Of a joint run every row is the same.
        steps: Optimizer steps.
        train_seconds: In `fit`, per task; the first includes tracing the graph.
        boundary_seconds: In `consolidate`, per task.
        peak_memory: Largest resident size of the process during the run, bytes.
        model: The model as trained.
    """

    matrix: AccuracyMatrix
    steps: int
    train_seconds: list[float]
    boundary_seconds: list[float]
    peak_memory: int
    model: DWDModel = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """All figures by name: those of the matrix (0 to 1), and what it cost."""
        training, boundaries = sum(self.train_seconds), sum(self.boundary_seconds)
        return {name: getattr(self.matrix, name) for name in METRICS} | {
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
    strength: float | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    fisher_examples: int = FISHER_EXAMPLES,
    seed: int = 0,
    callbacks: Callable[[int, Task], list[keras.callbacks.Callback]] | None = None,
    compile_settings: dict[str, Any] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    sharded: bool = False,
) -> SequenceResult:
    """Train a fresh model on the tasks of a scenario, one after another.

    Args:
        build: Makes the plain Keras model for a scenario; called after the seed is set.
        scenario: The tasks.
        method: A `Method`, or the name of one, see `method_named`.
        strength: λ, the method's default if `None`.
        epochs: Per task. A joint run takes as many over the union: the same number of steps.
        batch_size: For arrays; `tf.data` comes in its own.
        learning_rate: Of Adam, whose state is reset for each task.
        fisher_examples: How many examples of a task, of arrays, a boundary pass takes.
        seed: Of weights, shuffling and dropout.
        callbacks: Makes the callbacks of a task's `fit` from its index and the task.
        compile_settings: More arguments of `compile`, or others in place of the defaults
            (Adam, sparse categorical cross-entropy on logits, accuracy).
        checkpoint_dir: A folder to keep the run's progress in after each epoch and each boundary.
            One that is there already is gone on from, with any number of workers, and ends as the
            run would have without interruption. Tasks must be arrays. What callbacks remember, and
            layers that draw at random from Keras' global generator, begin anew.
        sharded: Whether workers divide the consolidation state, see `DWDModel.compile`.

    Several workers (see `DWDModel.compile`) share each batch: `batch_size` is that of all.

    Returns:
        A `SequenceResult`.
    """
    if isinstance(method, str):
        method = method_named(method)
    keras.utils.set_random_seed(seed)
    strength = method.strength if strength is None else strength
    arrays = all(isinstance(task.train, (tuple, list)) for task in scenario.tasks)
    if checkpoint_dir and not arrays:
        raise ValueError("`checkpoint_dir` needs tasks of arrays: the order of others is lost.")
    chosen = method.settings(strength)
    if method.graph and strength > 0:
        if not isinstance(scenario.tasks[0].train, (tuple, list)):
            raise ValueError(f"{method.name!r} needs tasks of arrays, for a probe: not tf.data.")
        folder = Path(checkpoint_dir or tempfile.mkdtemp(prefix="task_graph_")) / "graph"
        probe, _ = _sample(scenario.tasks[0].train, _PROBES)
        chosen["task_graph"] = TaskGraph(folder, probe, method.graph)
    model = DWDModel.from_model(build(scenario), **chosen)
    if method.graph and strength > 0 and not checkpoint_dir:  # there for as long as the model is
        weakref.finalize(model, shutil.rmtree, folder.parent, ignore_errors=True)

    adam = keras.optimizers.Adam(learning_rate)
    settings = {
        "optimizer": DWDOptimizer(adam) if method.decoupled else adam,
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
        # A small network's step is shorter than what `fit` does between two of them.
        "steps_per_execution": 64,
        "sharded": sharded,
    }
    model.compile(**(settings | (compile_settings or {})))
    model.optimizer.build(model.trainable_variables)
    fresh = [np.asarray(v) for v in model.optimizer.variables]
    tests = [_as_batches(task.test) for task in scenario.tasks]
    count = len(tests)
    after = np.full((count, count), np.nan)
    before = _accuracies(model, tests)
    result = SequenceResult(AccuracyMatrix(after, before), 0, [], [], 0, model)
    policy = model.grouping if isinstance(model.grouping, GroupingPolicy) else None
    if policy is not None:  # what it learns from is not trained on
        scenario = scenario.holdout(_HELD_BACK)
        held_back = [_as_batches(task.test) for task in scenario.tasks]
    asked = {
        "scenario": scenario.name,
        "tasks": [task.name for task in scenario.tasks],
        "method": method.name,
        "settings": method.configuration(strength),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "fisher_examples": fisher_examples,
        "seed": seed,
        "data": _checksum(scenario) if checkpoint_dir else "",
    }
    checkpoints = Checkpoints(checkpoint_dir, asked) if checkpoint_dir else None
    progress = _Progress(result, checkpoints, epochs)
    progress.restore()
    if model.task_graph is not None:
        model.task_graph.rewind(model.tasks_learned)
    memory = _PeakMemory()
    for t, task in enumerate([scenario.joint()] if method.joint else scenario.tasks):
        if t < progress.task:
            continue
        if not progress.epoch:
            # The moments of the last task are not this one's; a new optimizer would trace anew.
            for variable, value in zip(model.optimizer.variables, fresh, strict=True):
                variable.assign(value)
        progress.begin()
        if progress.epoch < epochs:
            ordered = checkpoint_dir or model.workers.several
            order = int(np.random.default_rng([seed, t]).integers(2**31 - 1)) if ordered else None
            data, own = _fit_arguments(model, task.train, batch_size, order)
            shown = callbacks(t, task) if callbacks else []
            model.fit(
                **data,
                initial_epoch=progress.epoch,
                epochs=epochs,
                verbose=0,
                callbacks=[*own, *shown, progress],
            )
            progress.trained()
        progress.end()
        result.steps += int(model.optimizer.iterations)

        started = time.perf_counter()
        if policy is not None:
            policy.reward(_accuracies(model, held_back[: t + 1]).tolist())
        sample = _sample(task.train, fisher_examples) if method.boundary_pass else None
        model.consolidate(sample, batch_size=batch_size)
        result.boundary_seconds.append(time.perf_counter() - started)
        if method.joint:
            after[:] = _accuracies(model, tests)
        else:
            # Of the tasks to come only the next is needed, for forward transfer.
            after[t, : t + 2] = _accuracies(model, tests[: t + 2])
        progress.boundary()
    result.peak_memory = memory.peak()
    return result


def _fit_arguments(
    model: DWDModel, data: Any, batch_size: int, order: int | None
) -> tuple[dict[str, Any], list[keras.callbacks.Callback]]:
    """The data of a task for `fit`, and the callbacks that belong to it.

    Args:
        model: What is to be trained.
        data: Of the task.
        batch_size: Of all workers.
        order: Seed of an order that depends on nothing else, or `None` to leave it to Keras.
    """
    communicator = model.workers.communicator
    if not isinstance(data, (tuple, list)):
        return {"x": data, "shuffle": False}, []  # whoever made the dataset shuffles it
    if batch_size % communicator.size:
        raise ValueError(
            f"`batch_size` must be a multiple of the number of workers, {communicator.size}. "
            f"Received: {batch_size}"
        )
    if order is None:
        return {"x": data[0], "y": data[1], "batch_size": batch_size}, []
    share = batch_size // communicator.size
    made = TrainingArrays(tuple(data), share, communicator.rank, communicator.size, order)
    return {"x": made.batches, "shuffle": False}, [made]


class _Progress(keras.callbacks.Callback):
    """How far a run is, in checkpoints if there are any.

    Attributes:
        task: Index of the next task to learn, or of the one that is being learned.
        epoch: How many of its epochs are done.
    """

    def __init__(self, result: SequenceResult, checkpoints: Checkpoints | None, epochs: int):
        super().__init__()
        self.result, self.checkpoints, self._epochs = result, checkpoints, epochs
        self.task = self.epoch = 0
        self._spent = 0.0  # on the task, before it was interrupted

    def restore(self) -> None:
        """Go on where the checkpoints end."""
        model = self.result.model
        if self.checkpoints is None:
            return
        found = self.checkpoints.restore(model, self._check)
        if found is None:
            return
        self.task, self.epoch = int(found["task"]), int(found["epoch"])
        self._spent = float(found["spent"])
        self.result.steps = int(found["steps"])
        self.result.train_seconds[:] = found["train_seconds"].tolist()
        self.result.boundary_seconds[:] = found["boundary_seconds"].tolist()
        self.result.matrix.after[:] = found["after"]
        self.result.matrix.before[:] = found["before"]

    def _check(self, found: Arrays) -> None:
        """Raise `FileError` if this cannot be the progress of this run."""
        like = self._state(0.0)
        lists = ("train_seconds", "boundary_seconds")  # of as many tasks as are done
        for name in like.keys() | found.keys():
            first = 1 if name in lists else 0
            pair = [arrays[name] for arrays in (like, found) if name in arrays]
            if len(pair) != 2 or len({(a.dtype, a.ndim, a.shape[first:]) for a in pair}) != 1:
                raise FileError(f"The checkpoint's {name!r} does not fit: is it of this run?")
        counts = {int(found["task"]), *(len(found[name]) for name in lists)}
        if len(counts) != 1 or found["epoch"] < 0 or found["steps"] < 0:
            raise FileError("The checkpoint's progress contradicts itself.")

    def begin(self) -> None:
        """A task begins, or goes on."""
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.epoch = epoch + 1
        # After the last epoch `fit` does more: averages of weights, callbacks that restore some.
        if self.epoch < self._epochs and not self.model.stop_training:
            self._save(self._seconds())

    def trained(self) -> None:
        """`fit` has ended, after its last epoch or before."""
        self.epoch = self._epochs
        self._save(self._seconds())

    def end(self) -> None:
        """It was trained on."""
        self.result.train_seconds.append(self._seconds())

    def _seconds(self) -> float:
        return self._spent + time.perf_counter() - self._started

    def boundary(self) -> None:
        """It was learned and evaluated."""
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
            "after": result.matrix.after,
            "before": result.matrix.before,
        }


def _checksum(scenario: Scenario) -> str:
    """Of all arrays: a run cannot go on with other data."""
    found = 0
    for task in scenario.tasks:
        for array in map(np.ascontiguousarray, tf.nest.flatten((task.train, task.test))):
            found = checksum(array, found)
    return f"{found:08x}"


def _sample(data: Any, count: int) -> Any:
    """`count` examples of arrays, drawn evenly; anything else as it is."""
    if not isinstance(data, (tuple, list)):
        return data
    size = len(tf.nest.flatten(data)[0])
    chosen = np.random.default_rng(0).permutation(size)[:count]
    return tuple(tf.nest.map_structure(lambda a: a[chosen], part) for part in data)


def _as_batches(data: Any) -> tf.data.Dataset:
    """Test data, made ready once instead of at each of the many evaluations."""
    if isinstance(data, tf.data.Dataset):
        return data
    x, y = data
    x = tuple(x) if isinstance(x, list) else x  # a list would be stacked
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(256).cache().prefetch(1)


def _accuracies(model: DWDModel, tests: list[tf.data.Dataset]) -> np.ndarray:
    results = [model.evaluate(test, verbose=0, return_dict=True) for test in tests]
    if "accuracy" not in results[0]:
        raise ValueError(
            "`compile_settings` must keep a metric called 'accuracy', which is what is compared. "
            f"Received metrics {sorted(results[0])}."
        )
    return np.array([result["accuracy"] for result in results])


class _PeakMemory:
    """The largest resident size since it was made; since the process began if not on Linux."""

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
