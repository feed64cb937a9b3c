"""The accuracy matrix of a sequence of tasks, and the metrics computed from it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracies a[t, j] on the test data of task j after learning task t, from 0 to 1.

    Attributes:
        after: The matrix a, `(tasks, tasks)`; NaN where the accuracy was not measured.
        before: Accuracies of the untrained model, `(tasks,)`, for forward transfer.

    Example:

    ```python
    matrix = AccuracyMatrix(np.array([[0.9, 0.1], [0.7, 0.8]]), before=np.array([0.1, 0.1]))
    print(matrix.average_accuracy, matrix.forgetting)  # 0.75 and 0.2
    ```

    Reference:
        [Lopez-Paz & Ranzato, 2017](https://arxiv.org/abs/1706.08840), equations 2 to 4;
        [Chaudhry et al., 2018](https://arxiv.org/abs/1801.10112), equation 3 (forgetting).
    """

    after: np.ndarray
    before: np.ndarray

    @property
    def average_accuracy(self) -> float:
        """Mean accuracy on all tasks after the last one: mean_j a[T, j]."""
        return float(self.after[-1].mean())

    @property
    def learning_accuracy(self) -> float:
        """Mean accuracy on each task right after learning it: mean_j a[j, j]."""
        return float(np.diag(self.after).mean())

    @property
    def forgetting(self) -> float:
        """Mean drop from the peak accuracy: mean_{j<T} (max_{j≤t<T} a[t, j] − a[T, j]).

        0 for a single task.
        """
        peak, last = self._peak_and_last()
        return float((peak - last).mean()) if len(peak) else 0.0

    @property
    def relative_forgetting(self) -> float:
        """Mean drop relative to the peak accuracy: mean_{j<T} (peak_j − a[T, j]) / peak_j.

        A task with a peak accuracy of 0 counts as 0.
        """
        peak, last = self._peak_and_last()
        lost = np.divide(peak - last, peak, out=np.zeros_like(peak), where=peak > 0)
        return float(lost.mean()) if len(peak) else 0.0

    @property
    def backward_transfer(self) -> float:
        """Mean effect of later tasks on earlier ones: mean_{j<T} (a[T, j] − a[j, j])."""
        change = self.after[-1, :-1] - np.diag(self.after)[:-1]
        return float(change.mean()) if len(change) else 0.0

    @property
    def forward_transfer(self) -> float:
        """Mean effect of earlier tasks on the next one: mean_{j>1} (a[j−1, j] − before[j])."""
        change = np.diag(self.after, 1) - self.before[1:]
        return float(change.mean()) if len(change) else 0.0

    def _peak_and_last(self) -> tuple[np.ndarray, np.ndarray]:
        tasks = len(self.after)
        peak = np.array([self.after[j:-1, j].max() for j in range(tasks - 1)])
        return peak, self.after[-1, :-1]
