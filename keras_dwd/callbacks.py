"""Callbacks for `fit`."""

from typing import Any

import keras

from keras_dwd.checks import number
from keras_dwd.keras_private import has_schedule

__all__ = ["LearningRateWarmup", "PenaltyLogger"]


class PenaltyLogger(keras.callbacks.Callback):
    """Adds the penalty of a `DWDModel` to the logs of each epoch, as `penalty`.

    List it before the callbacks that should log the value.

    Example:

    ```python
    model.fit(x, y, callbacks=[PenaltyLogger(), keras.callbacks.CSVLogger("log.csv")])
    ```
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the penalty to the logs."""
        if logs is not None:
            logs["penalty"] = float(self.model.penalty())


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
