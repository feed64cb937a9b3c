"""Learn a sequence of tasks, measuring as it goes."""

import contextlib
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.evaluation.matrix import AccuracyMatrix
from keras_dwd.evaluation.methods import Method, method_named
from keras_dwd.grouping.policy import GroupingPolicy
from keras_dwd.model import DWDModel
from keras_dwd.optimizer import DWDOptimizer
from keras_dwd.tasks.scenario import Scenario, Task
from keras_dwd.tasks.task_graph import TaskGraph

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

    Returns:
        A `SequenceResult`.
    """
    if isinstance(method, str):
        method = method_named(method)
    keras.utils.set_random_seed(seed)
    strength = method.strength if strength is None else strength
    chosen = method.settings(strength)
    if method.graph and strength > 0:
        if not isinstance(scenario.tasks[0].train, (tuple, list)):
            raise ValueError(f"{method.name!r} needs tasks of arrays, for a probe: not tf.data.")
        folder = tempfile.TemporaryDirectory(prefix="task_graph_")
        probe, _ = _sample(scenario.tasks[0].train, _PROBES)
        chosen["task_graph"] = TaskGraph(Path(folder.name) / "graph", probe, method.graph)
    model = DWDModel.from_model(build(scenario), **chosen)
    if method.graph and strength > 0:
        model._graph_folder = folder  # there for as long as the model is

    adam = keras.optimizers.Adam(learning_rate)
    settings = {
        "optimizer": DWDOptimizer(adam) if method.decoupled else adam,
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
        # A small network's step is shorter than what `fit` does between two of them.
        "steps_per_execution": 64,
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
    memory = _PeakMemory()
    for t, task in enumerate([scenario.joint()] if method.joint else scenario.tasks):
        # The moments of the last task are not this one's; a new optimizer would trace anew.
        for variable, value in zip(model.optimizer.variables, fresh, strict=True):
            variable.assign(value)
        started = time.perf_counter()
        data = _fit_arguments(task.train, batch_size)
        model.fit(
            **data, epochs=epochs, verbose=0, callbacks=callbacks(t, task) if callbacks else None
        )
        result.train_seconds.append(time.perf_counter() - started)
        result.steps += int(model.optimizer.iterations)

        started = time.perf_counter()
        if policy is not None:
            policy.reward(float(_accuracies(model, held_back[: t + 1]).mean()))
        sample = _sample(task.train, fisher_examples) if method.boundary_pass else None
        model.consolidate(sample, batch_size=batch_size)
        result.boundary_seconds.append(time.perf_counter() - started)
        if method.joint:
            after[:] = _accuracies(model, tests)
        else:
            # Of the tasks to come only the next is needed, for forward transfer.
            after[t, : t + 2] = _accuracies(model, tests[: t + 2])
    result.peak_memory = memory.peak()
    return result


def _fit_arguments(data: Any, batch_size: int) -> dict[str, Any]:
    if isinstance(data, (tuple, list)):
        return {"x": data[0], "y": data[1], "batch_size": batch_size}
    return {"x": data, "shuffle": False}  # whoever made the dataset shuffles it


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
