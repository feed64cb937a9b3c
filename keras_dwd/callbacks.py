"""Callbacks for `fit`."""

import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import integer, number
from keras_dwd.keras_private import has_schedule
from keras_dwd.streams import ConsolidateEvery, ConsolidateOnDrift
from keras_dwd.variables import by_path

__all__ = [
    "ConsolidateEvery",
    "ConsolidateOnDrift",
    "ConsolidateOnTrainEnd",
    "EvaluatePastTasks",
    "LearningRateWarmup",
    "PenaltyLogger",
    "StopOnForgetting",
]


# Parts of metric names: the lower the better (`_FALL`), the higher the better (`_RISE`).
_FALL = (
    *("loss", "error", "perplexity", "entropy", "divergence", "hinge", "poisson", "false"),
    *("mae", "mse", "mape", "msle", "kld", "logcosh", "log_cosh"),
)
_RISE = (
    *("acc", "auc", "precision", "recall", "f1", "fbeta", "score", "iou", "io_u", "true"),
    *("similarity", "specificity", "sensitivity", "r2"),
)


class PenaltyLogger(keras.callbacks.Callback):
    """Adds what the pull of a `DWDModel` does to the logs of each epoch.

    - `penalty`: the penalty ½ (θ − c)ᵀ Λ (θ − c);
    - `drift`: the distance of the pulled weights from their anchor, relative to the anchor;
    - `pull`: the norm of the pull Λ (θ − c); and `pull_to_gradient`, the same relative to that of
      the gradient of the loss, if `batch` is given;
    - `strength_group_k`: λ_k of group k, where it follows a `Budget`.

    List it before the callbacks that should log the values: `TensorBoard`, `CSVLogger` and those
    of other trackers take whatever is in the logs.

    Args:
        batch: `(x, y)` or `(x, y, sample_weight)`, some examples of the current task, whose
            gradient the pull is compared with.

    Example:

    ```python
    callbacks = [PenaltyLogger(batch=(x[:256], y[:256])), keras.callbacks.TensorBoard("logs")]
    model.fit(x, y, callbacks=callbacks)
    ```
    """

    def __init__(self, batch: Any = None):
        super().__init__()
        self.batch = batch

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the values to the logs."""
        if logs is None:
            return
        model, regularizer = self.model, self.model.regularizer
        variables = by_path(model)
        logs["penalty"] = float(model.penalty())
        if model.workers.sharded:  # each worker has a part of the rest only
            return
        anchors = {path: np.asarray(a, "float64") for path, a in regularizer.anchors.items()}
        moved = sum(float(((np.asarray(variables[p]) - a) ** 2).sum()) for p, a in anchors.items())
        size = sum(float((a**2).sum()) for a in anchors.values())
        logs["drift"] = float(np.sqrt(moved / size)) if size else 0.0
        pull = float(tf.linalg.global_norm([*regularizer.gradients(variables).values()] or [0.0]))
        logs["pull"] = pull
        if self.batch is not None:
            gradient = self._gradient_norm()
            logs["pull_to_gradient"] = pull / gradient if gradient else float("inf")
        for group, strength in regularizer.budget_strengths.values.items():
            logs[f"strength_group_{group}"] = float(strength)

    def _gradient_norm(self) -> float:
        """The norm of the gradient of the loss on the batch, in inference mode."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(self.batch)
        with tf.GradientTape() as tape:
            y_pred = self.model(x, training=False)
            loss = self.model.compute_loss(x, y, y_pred, sample_weight)
        gradients = tape.gradient(loss, [v.value for v in self.model.trainable_variables])
        return float(
            tf.linalg.global_norm([tf.cast(g, "float32") for g in gradients if g is not None])
        )


class EvaluatePastTasks(keras.callbacks.Callback):
    """Evaluates earlier tasks after each epoch, and adds the results to the logs.

    Each metric of `compile` on each task is in the logs as `TASK_METRIC`, such as
    `digits_accuracy`, and its mean over the tasks as `past_METRIC`. List it before the callbacks
    that should log the values: `TensorBoard`, `CSVLogger` and those of other trackers take whatever
    is in the logs. `History` and the progress bar have them as well.

    Args:
        tasks: The data of earlier tasks by name: `(x, y)` or `(x, y, sample_weight)` of arrays, or
            a dataset that `evaluate` takes.
        every: Evaluate after each `every`-th epoch.
        batch_size: Batch size for arrays.

    Example:

    ```python
    past = EvaluatePastTasks({"digits": (x_test, y_test)})
    history = model.fit(new_x, new_y, epochs=5, callbacks=[past]).history
    print(history["digits_accuracy"], history["past_accuracy"])
    ```
    """

    def __init__(self, tasks: Mapping[str, Any], every: int = 1, batch_size: int = 256):
        super().__init__()
        if not isinstance(tasks, Mapping) or not tasks:
            raise ValueError(
                "`tasks` must be a dictionary with the data of each earlier task by its name. "
                f"Received: {type(tasks).__name__}"
            )
        self.tasks = dict(tasks)
        self.every = integer("every", every, 1)
        self.batch_size = integer("batch_size", batch_size, 1)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Evaluate the tasks and add the results to the logs."""
        if logs is not None and (epoch + 1) % self.every == 0:
            logs.update(self.evaluate())

    def evaluate(self) -> dict[str, float]:
        """The results on all tasks, by the names that they have in the logs."""
        by_task = {name: self._results(data) for name, data in self.tasks.items()}
        results = {
            f"{name}_{metric}": value
            for name, scores in by_task.items()
            for metric, value in scores.items()
        }
        metrics = dict.fromkeys(metric for scores in by_task.values() for metric in scores)
        means = {
            f"past_{metric}": float(np.mean([scores[metric] for scores in by_task.values()]))
            for metric in metrics
        }
        return results | means

    def _results(self, data: Any) -> dict[str, float]:
        settings: dict[str, Any] = {"verbose": 0, "return_dict": True}
        if isinstance(data, (tuple, list)):
            x, y, weight = keras.utils.unpack_x_y_sample_weight(tuple(data))
            settings |= {"y": y, "sample_weight": weight, "batch_size": self.batch_size}
            data = x
        return {name: float(v) for name, v in self.model.evaluate(data, **settings).items()}


class StopOnForgetting(EvaluatePastTasks):
    """Stops training when earlier tasks have lost too much, and restores the weights before that.

    The results before training are those that later ones are compared with. It also does what
    `EvaluatePastTasks` does. List it before callbacks that should log its results, and before
    `ConsolidateOnTrainEnd`.

    Args:
        tasks: See `EvaluatePastTasks`.
        most: The largest loss ≥ 0 in `monitor`, averaged over the tasks, that is allowed.
        monitor: The metric.
        mode: `"max"` if more is better, `"min"` if less is, `"auto"` to tell by the name: less is
            better of what is called a loss, an error or `mae`, more of an accuracy.
        restore_weights: Whether to restore the weights of the last epoch that lost no more than
            that, or those before training if there was none.
        every: See `EvaluatePastTasks`.
        batch_size: See `EvaluatePastTasks`.

    Attributes:
        stopped_epoch: The epoch in which training was stopped, or `None`.

    Raises:
        ValueError: If the name of `monitor` does not tell whether more or less of it is better, and
            `mode` is `"auto"`.

    Example:

    ```python
    stop = StopOnForgetting({"digits": (x_test, y_test)}, most=0.02)
    model.fit(new_x, new_y, epochs=50, callbacks=[stop])
    ```
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        most: float = 0.05,
        monitor: str = "accuracy",
        mode: str = "auto",
        restore_weights: bool = True,
        every: int = 1,
        batch_size: int = 256,
    ):
        super().__init__(tasks, every, batch_size)
        if mode not in ("auto", "max", "min"):
            raise ValueError(f"`mode` must be 'auto', 'max' or 'min'. Received: {mode!r}")
        self.most = number("most", most, 0)
        self.monitor = monitor
        self.mode = _direction(monitor) if mode == "auto" else mode
        self.restore_weights = restore_weights
        self.stopped_epoch: int | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Evaluate the model as it is before training."""
        self.stopped_epoch = None
        results = self.evaluate()
        if f"past_{self.monitor}" not in results:
            known = sorted(n.removeprefix("past_") for n in results if n.startswith("past_"))
            raise ValueError(
                f"`monitor` must be one of {', '.join(known)}. Received: {self.monitor!r}"
            )
        self._before = results[f"past_{self.monitor}"]
        self._kept = self._weights()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Evaluate the tasks; stop if they have lost too much."""
        if (epoch + 1) % self.every:
            return
        results = self.evaluate()
        if logs is not None:
            logs.update(results)
        lost = self._before - results[f"past_{self.monitor}"]
        if (lost if self.mode == "max" else -lost) <= self.most:
            self._kept = self._weights()
            return
        self.model.stop_training = True
        self.stopped_epoch = epoch

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the weights, which an optimizer with averaged weights exchanges before."""
        if self.stopped_epoch is not None and self.restore_weights:
            for variable, value in zip(self.model.weights, self._kept, strict=True):
                variable.assign(value)

    def _weights(self) -> list[np.ndarray]:
        return [np.array(v) for v in self.model.weights] if self.restore_weights else []


def _direction(monitor: str) -> str:
    """Whether more of a metric is better, `"max"`, or less, `"min"`, by the end of its name."""
    name = monitor.lower()
    falls, rises = (max(name.rfind(word) for word in words) for words in (_FALL, _RISE))
    if falls == rises:
        raise ValueError(
            f"`mode` must be 'max' or 'min' for the `monitor` {monitor!r}, whose name does not "
            "tell whether more of it is better. Received: 'auto'"
        )
    return "min" if falls > rises else "max"


class ConsolidateOnTrainEnd(keras.callbacks.Callback):
    """Calls `consolidate` at the end of `fit`, so that each `fit` is a task.

    List it last: callbacks such as `EarlyStopping` may restore weights at the end of training. If
    they are then those of the last boundary, there is nothing to consolidate, which a warning says.

    Args:
        *args: Arguments of `consolidate`: data of the task, or nothing for the online estimate.
        **kwargs: Keyword arguments of `consolidate`.

    Attributes:
        found: What `consolidate` returned; `None` if there was nothing to consolidate.

    Example:

    ```python
    for x, y in tasks:
        model.fit(x, y, epochs=5, callbacks=[ConsolidateOnTrainEnd()])
    ```
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.args, self.kwargs = args, kwargs
        self.found: Any = None

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Consolidate the task that was trained."""
        self.found = None
        if self.model._consolidation.has_nothing_new(self.model):
            warnings.warn(
                "Nothing was consolidated: at the end of `fit` the weights were those of the last "
                "boundary, as when a callback restores them.",
                stacklevel=2,
            )
            return
        verbose = {"verbose": (self.params or {}).get("verbose") or 0}
        self.found = self.model.consolidate(*self.args, **(verbose | self.kwargs))


class LearningRateWarmup(keras.callbacks.Callback):
    """Raises the learning rate gradually to its value times the number of workers.

    With N workers a step averages over N times as many examples, and an epoch has N times fewer
    steps. A learning rate N times as large makes up for this, but diverges if it is used from the
    start. It therefore rises linearly over the first epochs; at the end of `fit` it is reset. With
    one worker nothing changes.

    Args:
        epochs: Number of epochs ≥ 0 over which the learning rate rises; with 0 it is multiplied at
            once.

    Raises:
        ValueError: At the start of training, if the optimizer has a schedule for its learning rate.

    Example:

    ```python
    model.fit(x, y, epochs=20, callbacks=[LearningRateWarmup(epochs=5)])
    ```

    Reference:
        [Goyal et al., 2017](https://arxiv.org/abs/1706.02677), section 2.
    """

    def __init__(self, epochs: float = 5):
        super().__init__()
        self.epochs = number("epochs", epochs, 0)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Store the learning rate of a single worker."""
        inner = self.model.optimizer
        while hasattr(inner, "inner_optimizer"):
            inner = inner.inner_optimizer
        if has_schedule(inner):
            raise ValueError(
                "`LearningRateWarmup` sets the learning rate, but the optimizer has a schedule for "
                "it: give the schedule the larger learning rate instead."
            )
        self._base = float(self.model.optimizer.learning_rate)
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the learning rate of the beginning of the epoch."""
        self._epoch = epoch
        self._set(float(epoch))

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise the learning rate."""
        if self._epoch < self.epochs:
            steps = (self.params or {}).get("steps") or batch + 1
            self._set(self._epoch + batch / steps)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Reset the learning rate."""
        self.model.optimizer.learning_rate = self._base

    def _set(self, epochs: float) -> None:
        size = self.model.workers.communicator.size
        share = min(1.0, epochs / self.epochs) if self.epochs else 1.0
        self.model.optimizer.learning_rate = self._base * (1 + share * (size - 1))
