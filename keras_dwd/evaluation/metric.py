"""What is measured on each task: metrics of Keras, and functions of the model and the data."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.evaluation.matrix import AccuracyMatrix, MetricMatrix
from keras_dwd.keras_private import higher_is_better

Function = Callable[[Any, Any], float | Mapping[str, float]]
"""Called with the model and the test data of a task; returns a number, or several by name."""

ACCURACY = "accuracy"

# What Keras takes by other names than those of its classes and functions.
_ABBREVIATED = {"acc": True, ACCURACY: True, "ce": False, "crossentropy": False, "loss": False}


@dataclass(frozen=True)
class TaskMetric:
    """A number that is measured on the test data of each task, after each task.

    Attributes:
        name: Name in results.
        source: A metric of Keras; or a function `(model, data)` that returns the number, or a
            dictionary that has it by `name`; or `None` for the value that `evaluate` returns by
            `name`. The data are the test data of a task, as they were given. A function that is the
            source of several metrics is called once for all of them.
        higher_is_better: Whether higher values are better. `None` asks Keras, and is refused where
            Keras does not know, as for functions.
        percent: Whether values are shares of 1, which reports show in percent.

    Raises:
        ValueError: If it is not known whether higher values are better.

    Example:

    ```python
    def scores(model, data):
        x, y = data
        logits = np.asarray(model(x))
        return {"logit": logits.max(), "sure": (logits.max(-1) > 2).mean()}


    metrics = [
        TaskMetric("sure", scores, higher_is_better=True, percent=True),
        TaskMetric("logit", scores, higher_is_better=False),
        TaskMetric("loss"),
    ]
    result = run_sequence(build, scenario, "finetune", metrics=metrics, epochs=1)
    result.matrices["sure"].forgetting
    ```
    """

    name: str
    source: "keras.metrics.Metric | Function | None" = None
    higher_is_better: bool | None = None
    percent: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"`name` must be a text. Received: {self.name!r}")
        if isinstance(self.source, keras.metrics.Metric) and self.source.name != self.name:
            raise ValueError(
                f"`name` must be that of the metric, {self.source.name!r}. Received: {self.name!r}"
            )
        if self.source is not None and not callable(self.source):
            raise ValueError(
                "`source` must be a metric of Keras or a function `(model, data)`. Received: "
                f"{self.source!r}"
            )
        if self.higher_is_better is None:
            object.__setattr__(self, "higher_is_better", self._known_direction())
        if self.percent is None:
            shares = self.of_keras and "accuracy" in self.name
            object.__setattr__(self, "percent", shares or self.name == "acc")

    @property
    def of_keras(self) -> bool:
        """Whether `evaluate` returns it."""
        return self.source is None or isinstance(self.source, keras.metrics.Metric)

    def _known_direction(self) -> bool:
        known = None
        if isinstance(self.source, keras.metrics.Metric):
            known = higher_is_better(self.source)
        elif self.source is None:
            known = _direction_of(self.name)
        if known is None:
            raise ValueError(
                f"Say whether higher values of {self.name!r} are better: "
                f"`TaskMetric({self.name!r}, …, higher_is_better=…)`."
            )
        return known

    def matrix(self, after: np.ndarray, before: np.ndarray) -> MetricMatrix:
        """The values of this metric over a sequence of tasks."""
        assert self.higher_is_better is not None
        kind = AccuracyMatrix if self.name == ACCURACY else MetricMatrix
        return kind(after, before, self.name, self.higher_is_better)

    def best(self, values: Mapping[float, float]) -> float:
        """The key of the best value; the first of several."""
        return (max if self.higher_is_better else min)(values, key=lambda key: values[key])

    def configuration(self) -> dict[str, Any]:
        """Name, direction and unit, for result files."""
        return {
            "name": self.name,
            "higher_is_better": self.higher_is_better,
            "percent": self.percent,
        }


Metrics = Sequence["str | keras.metrics.Metric | TaskMetric"]
"""What is measured: metrics of Keras or their names, `"loss"`, and `TaskMetric`s."""


def task_metrics(metrics: Metrics) -> tuple[TaskMetric, ...]:
    """All as `TaskMetric`s, the first of which is the primary one.

    Raises:
        ValueError: If there is none, if one has no known direction, or if two share a name.
    """
    if isinstance(metrics, str) or not isinstance(metrics, Sequence) or not metrics:
        raise ValueError(f"`metrics` must be a list of at least one. Received: {metrics!r}")
    converted = []
    for metric in metrics:
        if isinstance(metric, str):
            metric = TaskMetric(metric)
        elif isinstance(metric, keras.metrics.Metric):
            metric = TaskMetric(metric.name, metric)
        elif not isinstance(metric, TaskMetric):
            raise ValueError(
                "`metrics` must hold metrics of Keras, their names, or `TaskMetric(name, "
                f"function, higher_is_better)`. Received: {metric!r}"
            )
        converted.append(metric)
    names = [metric.name for metric in converted]
    if len({*names}) < len(names):
        raise ValueError(f"`metrics` must have different names. Received: {', '.join(names)}")
    return tuple(converted)


def primary(protocol: Mapping[str, Any]) -> TaskMetric:
    """The metric by which the results with this protocol are compared.

    Args:
        protocol: That of a result file; if it names no metrics, as in those of accuracy alone, the
            metric is accuracy.
    """
    return recorded(protocol)[0]


def recorded(protocol: Mapping[str, Any]) -> tuple[TaskMetric, ...]:
    """All metrics of the results with this protocol, see `primary`."""
    entries = protocol.get("metrics")
    if not entries:
        return (TaskMetric(ACCURACY),)
    return tuple(TaskMetric(**entry) for entry in entries)


def metric_settings(metrics: Sequence[TaskMetric]) -> dict[str, Any]:
    """The entry of metrics in settings and protocols: none for accuracy alone."""
    if [metric.name for metric in metrics] == [ACCURACY]:
        return {}
    return {"metrics": [metric.configuration() for metric in metrics]}


def of_compile(metrics: Sequence[TaskMetric]) -> list[Any]:
    """The argument `metrics` of `compile` with which `evaluate` returns these metrics."""
    needed = [m for m in metrics if m.of_keras and m.name != "loss"]
    return [m.name if m.source is None else m.source for m in needed]


class Evaluator:
    """Measures a model on the test data of tasks.

    Args:
        metrics: What to measure.
        data: Test data of each task.
    """

    def __init__(self, metrics: Sequence[TaskMetric], data: Sequence[Any]):
        self.metrics = tuple(metrics)
        self._data = data
        keras_too = any(metric.of_keras for metric in metrics)
        self._batches = [_as_batches(part) if keras_too else None for part in data]

    def __call__(self, model: keras.Model, count: int | None = None) -> np.ndarray:
        """The values on the first `count` tasks, `(metrics, tasks)`; on all by default.

        Raises:
            ValueError: If one cannot be found, or is not a finite number.
        """
        pairs = zip(self._batches[:count], self._data[:count], strict=True)
        columns = [self._values(model, batches, data) for batches, data in pairs]
        return np.array(columns).T

    def _values(self, model: keras.Model, batches: Any, data: Any) -> list[float]:
        results: dict[Any, Any] = {}
        if batches is not None:
            results[None] = model.evaluate(batches, verbose=0, return_dict=True)
        for metric in self.metrics:
            if not metric.of_keras and metric.source not in results:
                results[metric.source] = metric.source(model, data)  # type: ignore[misc]
        return [
            _value(metric, results[None if metric.of_keras else metric.source])
            for metric in self.metrics
        ]


def _value(metric: TaskMetric, result: Any) -> float:
    """The value of a metric among those computed with it."""
    if isinstance(result, Mapping):
        if metric.name not in result:
            of = "`compile_settings`" if metric.of_keras else "the function"
            raise ValueError(
                f"{of} must give a metric called {metric.name!r}, which is what is compared. "
                f"Received: {', '.join(map(str, sorted(result)))}"
            )
        result = result[metric.name]
    array = np.asarray(result)
    if array.shape != () or array.dtype.kind not in "iuf" or not np.isfinite(array):
        raise ValueError(f"{metric.name!r} must be a finite number. Received: {result!r}")
    return float(array)


def _as_batches(data: Any) -> tf.data.Dataset:
    """Test data as a cached dataset, prepared once for all evaluations."""
    if isinstance(data, tf.data.Dataset):
        return data
    x = tuple(data[0]) if isinstance(data[0], list) else data[0]  # `tf.data` would stack a list
    return tf.data.Dataset.from_tensor_slices((x, *data[1:])).batch(256).cache().prefetch(1)


def _direction_of(name: str) -> bool | None:
    """Whether higher is better of what `evaluate` calls so; `OUTPUT_mae` is known by its end."""
    words = name.split("_")
    for end in ("_".join(words[start:]) for start in range(len(words))):
        if end in _ABBREVIATED:
            return _ABBREVIATED[end]
        with contextlib.suppress(ValueError, TypeError):
            return higher_is_better(keras.metrics.get(end))
    return None
