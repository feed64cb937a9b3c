"""Callbacks that consolidate within `fit`, for streams whose task boundaries nobody tells."""

import math
from typing import Any

import keras

from keras_dwd.checks import integer, number

# A step's rise is clipped to this many standard deviations, so that no single batch is a drift.
_MOST = 4.0


class _WithinFit(keras.callbacks.Callback):
    """Consolidates at the end of steps.

    Attributes:
        boundaries: The training steps, counted from the first `fit`, after which it consolidated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.boundaries: list[int] = []
        self._steps = 0

    @property
    def _since_boundary(self) -> int:
        return self._steps - (self.boundaries[-1] if self.boundaries else 0)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note that Keras counts the steps of an epoch from 0, and averages over them."""
        self._in_epoch, self._sum = 0, 0.0

    def _count(self, batch: int) -> int:
        """The number of steps since this was last called: several per call of the step."""
        passed = batch + 1 - self._in_epoch
        self._in_epoch += passed
        self._steps += passed
        return passed

    def _consolidate(self) -> None:
        self.model.consolidate(verbose=0)
        self.boundaries.append(self._steps)


class ConsolidateEvery(_WithinFit):
    """Calls `consolidate` within `fit` after each number of steps, by the online estimate.

    For streams without tasks, in which what is learned changes all the time. Each part of the
    stream is held as a task is; `decay` of a `DWDRegularizer` lets earlier parts fade.

    Args:
        steps: The number of training steps between two boundaries.

    Attributes:
        boundaries: The training steps after which it consolidated.

    Example:

    ```python
    model.fit(x, y, epochs=1, callbacks=[ConsolidateEvery(steps=500)])
    ```
    """

    def __init__(self, steps: int):
        super().__init__()
        self.steps = integer("steps", steps, 1)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Consolidate if it is time."""
        self._count(batch)
        if self._since_boundary >= self.steps:
            self._consolidate()


class ConsolidateOnDrift(_WithinFit):
    """Calls `consolidate` within `fit` where the loss rises as it does when a new task begins.

    For streams whose boundaries nobody tells. The loss of each step is compared with its mean and
    standard deviation over the last steps, which fade exponentially. What exceeds `slack` standard
    deviations is added up, as far as it stays above 0; where the sum exceeds `threshold`, there is
    a drift: the Page-Hinkley test. The model is consolidated by its online estimate, which is
    still that of the steps before, and the test starts anew.

    The loss is known after each step only with `steps_per_execution=1` in `compile`; otherwise the
    mean of several steps counts as one. It works with one worker.

    Args:
        threshold: The sum above which there is a drift. Higher values find fewer.
        slack: Rises of so many standard deviations are not counted.
        memory: Number of steps over which the mean and the deviation fade.
        least: The least number of steps between two boundaries, and before the first.

    Attributes:
        boundaries: The training steps after which it consolidated.

    Raises:
        ValueError: At the start of training, if there are several workers.

    Example:

    ```python
    drift = ConsolidateOnDrift()
    model.fit(x, y, epochs=1, shuffle=False, callbacks=[drift])
    print(drift.boundaries)
    ```

    Reference:
        [Page, 1954](https://doi.org/10.1093/biomet/41.1-2.100); Hinkley, 1971, Inference about the
        change-point from cumulative sum tests, Biometrika 58(3).
    """

    def __init__(
        self, threshold: float = 10.0, slack: float = 0.5, memory: int = 30, least: int = 50
    ):
        super().__init__()
        self.threshold = number("threshold", threshold, 0)
        self.slack = number("slack", slack, 0)
        self.memory = integer("memory", memory, 2)
        self.least = integer("least", least, 1)
        self._begin()

    def _begin(self) -> None:
        self._seen, self._mean, self._variance, self._excess = 0, 0.0, 0.0, 0.0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refuse several workers, each of which would find other boundaries."""
        if self.model.workers.several:
            raise ValueError(
                "`ConsolidateOnDrift` works with one worker: each would find other boundaries. Use "
                "`ConsolidateEvery`."
            )

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Test for a drift, and consolidate after one."""
        passed = self._count(batch)
        total = float((logs or {})["loss"]) * self._in_epoch  # Keras gives the mean of the epoch
        drifted = self.drifts((total - self._sum) / passed)
        self._sum = total
        if drifted and self._since_boundary >= self.least:
            self._consolidate()
            self._begin()

    def drifts(self, loss: float) -> bool:
        """Add the loss of a step to the test; whether there is a drift."""
        if not math.isfinite(loss):
            return False
        rise = loss - self._mean
        deviation = math.sqrt(self._variance)
        if self._seen >= self.memory and deviation:  # before, neither is known well
            rise = min(rise, _MOST * deviation)
            self._excess = max(0.0, self._excess + rise / deviation - self.slack)
        self._seen += 1
        share = max(1 / self.memory, 1 / self._seen)
        self._mean += share * rise
        self._variance = (1 - share) * (self._variance + share * rise**2)
        return self._excess > self.threshold
