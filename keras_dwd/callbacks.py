"""Callbacks for `fit`."""

from typing import Any

import keras


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
