"""Callbacks for `fit`."""

from typing import Any

import keras

from keras_dwd.checks import number


class PenaltyLogger(keras.callbacks.Callback):
    """Adds the penalty of a `DWDModel` to the logs of each epoch, as `penalty`.

    Put it before the callbacks that should see it.

    Example:

    ```python
    model.fit(x, y, callbacks=[PenaltyLogger(), keras.callbacks.CSVLogger("log.csv")])
    ```
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Compute and add it."""
        if logs is not None:
            logs["penalty"] = float(self.model.penalty())


class LearningRateWarmup(keras.callbacks.Callback):
    """Multiplies the learning rate by the number of workers, little by little.

    N workers make steps of N times as many examples, and N times fewer of them: the learning rate
    is multiplied by N to make up for it. At once that would diverge: it rises linearly over the
    first epochs, and is set back at the end of `fit`. With one worker nothing changes.

    Args:
        epochs: ≥ 0, over which it rises; 0 multiplies it at once.

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
        """Note the learning rate of one worker."""
        inner = self.model.optimizer
        while hasattr(inner, "inner_optimizer"):
            inner = inner.inner_optimizer
        given = getattr(inner, "_learning_rate", None)
        if isinstance(given, keras.optimizers.schedules.LearningRateSchedule):
            raise ValueError(
                "`LearningRateWarmup` sets the learning rate, but the optimizer has a schedule for "
                "it: give the schedule the larger learning rate instead."
            )
        self._base = float(self.model.optimizer.learning_rate)
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note it."""
        self._epoch = epoch
        self._set(float(epoch))

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise the learning rate a little."""
        if self._epoch < self.epochs:
            steps = (self.params or {}).get("steps") or batch + 1
            self._set(self._epoch + batch / steps)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Set it back."""
        self.model.optimizer.learning_rate = self._base

    def _set(self, epochs: float) -> None:
        size = self.model.workers.communicator.size
        share = min(1.0, epochs / self.epochs) if self.epochs else 1.0
        self.model.optimizer.learning_rate = self._base * (1 + share * (size - 1))
