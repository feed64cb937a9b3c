"""The matrix of a metric over a sequence of tasks, and what is computed from it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MetricMatrix:
    """Values a[t, j] of a metric on the test data of task j after learning task t.

    Where lower values are better, as of errors and losses, the signs of the definitions below are
    such that forgetting is above 0 where a task was forgotten, and a transfer is above 0 where a
    task gained from others, whatever the metric.

    Attributes:
        after: The matrix a, `(tasks, tasks)`; NaN where the metric was not measured.
        before: Values of the untrained model, `(tasks,)`, for forward transfer.
        name: Name of the metric.
        higher_is_better: Whether higher values are better.

    Example:

    ```python
    values, before = np.array([[1.0, 9.0], [1.5, 2.0]]), np.array([9.0, 9.0])
    errors = MetricMatrix(values, before, "error", higher_is_better=False)
    print(errors.average, errors.forgetting)  # 1.75 and 0.5
    ```

    Reference:
        [Lopez-Paz & Ranzato, 2017](https://arxiv.org/abs/1706.08840), equations 2 to 4;
        [Chaudhry et al., 2018](https://arxiv.org/abs/1801.10112), equation 3 (forgetting).
    """

    after: np.ndarray
    before: np.ndarray
    name: str = "accuracy"
    higher_is_better: bool = True

    @property
    def average(self) -> float:
        """Mean on all tasks after the last one: mean_j a[T, j]."""
        return float(self.after[-1].mean())

    @property
    def learning(self) -> float:
        """Mean on each task right after learning it: mean_j a[j, j]."""
        return float(np.diag(self.after).mean())

    @property
    def forgetting(self) -> float:
        """Mean loss since the best value: mean_{j<T} (max_{j≤t<T} a[t, j] − a[T, j]).

        Where lower is better: mean_{j<T} (a[T, j] − min_{j≤t<T} a[t, j]). 0 for a single task.
        """
        best, last = self._best_and_last()
        return float((self._sign * (best - last)).mean()) if len(best) else 0.0

    @property
    def relative_forgetting(self) -> float:
        """Mean of what each task has forgotten, relative to the size of its best value.

        A task with a best value of 0 counts as 0 where higher is better. Where lower is better, it
        counts as 0 if the value is 0 still; else the mean is infinite.
        """
        best, last = self._best_and_last()
        lost = self._sign * (best - last)
        without = np.zeros_like(best)
        if not self.higher_is_better:
            without[lost > 0] = np.inf
        lost = np.divide(lost, np.abs(best), out=without, where=best != 0)
        return float(lost.mean()) if len(best) else 0.0

    @property
    def backward_transfer(self) -> float:
        """Mean gain of earlier tasks by later ones: mean_{j<T} (a[T, j] − a[j, j]).

        Its negative where lower is better.
        """
        change = self.after[-1, :-1] - np.diag(self.after)[:-1]
        return float((self._sign * change).mean()) if len(change) else 0.0

    @property
    def forward_transfer(self) -> float:
        """Mean gain of the next task by earlier ones: mean_{j>1} (a[j−1, j] − before[j]).

        Its negative where lower is better.
        """
        change = np.diag(self.after, 1) - self.before[1:]
        return float((self._sign * change).mean()) if len(change) else 0.0

    def metrics(self, first: bool = True) -> dict[str, float]:
        """All of the above by their names in result files.

        Args:
            first: Whether this is the metric by which methods are compared; the names of what is
                computed from others have the name of the metric in them.
        """
        of = "" if first else f"{self.name}_"
        return {
            f"average_{self.name}": self.average,
            f"learning_{self.name}": self.learning,
            f"{of}forgetting": self.forgetting,
            f"{of}relative_forgetting": self.relative_forgetting,
            f"{of}backward_transfer": self.backward_transfer,
            f"{of}forward_transfer": self.forward_transfer,
        }

    @property
    def _sign(self) -> int:
        return 1 if self.higher_is_better else -1

    def _best_and_last(self) -> tuple[np.ndarray, np.ndarray]:
        tasks = len(self.after)
        best_of = np.max if self.higher_is_better else np.min
        best = np.array([best_of(self.after[j:-1, j]) for j in range(tasks - 1)])
        return best, self.after[-1, :-1]


class AccuracyMatrix(MetricMatrix):
    """The matrix of accuracies, from 0 to 1, see `MetricMatrix`.

    Example:

    ```python
    matrix = AccuracyMatrix(np.array([[0.9, 0.1], [0.7, 0.8]]), before=np.array([0.1, 0.1]))
    print(matrix.average_accuracy, matrix.forgetting)  # 0.75 and 0.2
    ```
    """

    @property
    def average_accuracy(self) -> float:
        """Mean accuracy on all tasks after the last one, `average`."""
        return self.average

    @property
    def learning_accuracy(self) -> float:
        """Mean accuracy on each task right after learning it, `learning`."""
        return self.learning
