"""A grouping that learns which of several groupings retains earlier tasks best."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_dwd.checks import integer, number
from keras_dwd.files import FileError
from keras_dwd.groupings.grouping import BoundaryContext, Described, Grouping, GroupingResult
from keras_dwd.state import UNCHANGED, Commit
from keras_dwd.variables import Arrays, Variables


@keras.saving.register_keras_serializable("keras_dwd")
class GroupingPolicy(Grouping):
    """Picks one of several groupings at each boundary, by the rewards of earlier picks.

    The policy is a contextual bandit (LinUCB). It models the reward of each grouping as a linear
    function of three features of the boundary: whether there was a boundary before, how far the
    parameters moved since, and how unequal their Fisher information is. It picks the grouping with
    the highest upper confidence bound. The reward of a pick is known once the next task has been
    learned: the mean of the accuracy on the new task and of the share of the accuracy on earlier
    tasks that is left. You report these accuracies, on validation data, by calling `reward` before
    `consolidate`. The policy's state is saved with the model; `rewards` transfers it to another
    policy.

    Args:
        groupings: The groupings to pick from, at least two.
        exploration: Width of the confidence bound, ≥ 0: the larger, the more is explored.
        rewards: The `rewards` of another policy with the same groupings, to start from.

    Example:

    ```python
    policy = GroupingPolicy([SingleGroup(), GaussianMixtureGrouping(4), LayerGrouping()])
    model = DWDModel.from_model(network, grouping=policy)
    model.compile("adam", loss, metrics=["accuracy"])
    for t, (x, y) in enumerate(tasks):
        model.fit(x, y)
        accuracies = [model.evaluate(*task)[1] for task in validation[: t + 1]]
        model.grouping.reward(accuracies)
        model.consolidate()
    ```

    Reference:
        [Li et al., 2010](https://arxiv.org/abs/1003.0146), algorithm 1.
    """

    FEATURES = 4

    def __init__(self, groupings: Sequence[Any], exploration: float = 0.1, rewards: Any = None):
        choices = [
            keras.saving.deserialize_keras_object(choice) if isinstance(choice, dict) else choice
            for choice in groupings
        ]
        if len(choices) < 2 or not all(isinstance(choice, Grouping) for choice in choices):
            raise ValueError(f"`groupings` must be two or more. Received: {groupings!r}")
        if any(choice.budget for choice in choices):
            raise ValueError(
                "`groupings` must fix their strengths at the boundary: a policy has none with a "
                "budget."
            )
        self.groupings = choices
        self.exploration = number("exploration", exploration, 0)
        if rewards is not None and not isinstance(rewards, Mapping):
            raise ValueError(f"`rewards` must be what another policy's has. Received: {rewards!r}")
        self._initial_rewards = rewards
        self._begin()

    def _begin(self) -> None:
        rewards, number_of, d = self._initial_rewards or {}, len(self.groupings), self.FEATURES
        self.counts = [integer("rewards", n, 0) for n in rewards.get("counts", [0] * number_of)]
        # Ridge regression of the rewards r on the features x: A = I + Σ x xᵀ and b = Σ r x.
        self._a = np.array(rewards.get("a", [np.eye(d)] * number_of), "float64")
        self._b = np.array(rewards.get("b", [np.zeros(d)] * number_of), "float64")
        shapes = len(self.counts), self._a.shape, self._b.shape
        if shapes != (number_of, (number_of, d, d), (number_of, d)):
            raise ValueError(f"`rewards` must be those of {number_of} groupings.")
        self._accuracies = np.zeros(0)  # as last reported, on each task so far
        # The last pick of `apply` and its features, until `commit`.
        self._next: tuple[int, np.ndarray] | None = None
        # The committed pick that has no reward yet, and its features.
        self._open: tuple[int, np.ndarray] | None = None

    @property
    def rewards(self) -> dict[str, Any]:
        """What the policy has learned so far, as numbers and lists: the argument `rewards`."""
        return {"counts": list(self.counts), "a": self._a.tolist(), "b": self._b.tolist()}

    @property
    def picked(self) -> int | None:
        """Index of the grouping picked at the last boundary; `None` once it was rewarded."""
        return None if self._open is None else self._open[0]

    def reward(self, accuracies: Sequence[float]) -> None:
        """Reward the pick of the last boundary; call this at the end of each task.

        Args:
            accuracies: Accuracies in [0, 1] on validation data of each task so far, the newest
                task last.

        Raises:
            ValueError: If there are not more accuracies than in the last call.
        """
        current = np.array([number("accuracies", accuracy, 0, 1) for accuracy in accuracies])
        previous = self._accuracies
        n = len(previous)
        if len(current) <= n:
            raise ValueError(
                f"`accuracies` must be those of more than the {n} tasks of the last call, "
                f"the newest last. Received: {accuracies!r}"
            )
        if self._open is not None:
            picked, context = self._open
            retained = np.divide(current[:n], previous, out=np.ones(n), where=previous > 0)
            retention = np.minimum(retained, 1).mean() if n else 1.0
            self._a[picked] += np.outer(context, context)
            self._b[picked] += (retention + current[n:].mean()) / 2 * context
            self.counts[picked] += 1
            self._open = None
        self._accuracies = current

    def check(self, variables: Variables) -> None:
        """Raise `ValueError` if one of the groupings does not fit a model's variables."""
        for grouping in self.groupings:
            grouping.check(variables)

    def expected(self, context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Expected rewards and widths of their confidence bounds, each `(groupings,)`."""
        means, widths = [], []
        for a, b in zip(self._a, self._b, strict=True):
            inverse = np.linalg.inv(a)
            means.append(context @ inverse @ b)
            widths.append(np.sqrt(context @ inverse @ context))
        return np.array(means), self.exploration * np.array(widths)

    def pick(self, context: np.ndarray) -> int:
        """Index of the grouping to use: first each one once, then by upper confidence bound."""
        untried = [k for k, count in enumerate(self.counts) if not count]
        means, widths = self.expected(context)
        return untried[0] if untried else int(np.argmax(means + widths))

    def apply(self, context: BoundaryContext) -> GroupingResult:
        """Apply the picked grouping to the Fisher information."""
        features = self.context_features(context)
        picked = self.pick(features)
        result = self.groupings[picked].apply(context)
        self._next = picked, features
        return result

    def commit(self) -> None:
        """Note that the result of the last pick has become part of the model."""
        self._open = self._next

    def state(self) -> Arrays:
        """What the policy has learned, and the pick that has no reward yet."""
        picked, context = (-1, np.zeros(self.FEATURES)) if self._open is None else self._open
        return {
            "counts": np.array(self.counts, "int64"),
            "a": self._a,
            "b": self._b,
            "picked": np.array(picked, "int64"),
            "context": context,
            "accuracies": self._accuracies,
        }

    def prepare_state(self, state: Arrays) -> Commit:
        """Check a saved `state` without applying it yet; an empty one resets the policy.

        Returns:
            A function that applies the state and cannot fail.

        Raises:
            FileError: If this is not the state of a policy with as many groupings.
        """
        if not state:
            return self._begin
        state = {"accuracies": np.zeros(0), **state}
        shapes = {name: array.shape for name, array in state.items()}
        expected = {name: array.shape for name, array in self.state().items()}
        expected["accuracies"] = (state["accuracies"].size,)  # any number of tasks
        finite = all(np.isfinite(array).all() for array in state.values())
        if shapes != expected or not finite or not -1 <= state["picked"] < len(self.groupings):
            raise FileError(
                f"The saved state of a grouping is not of a policy of {len(self.groupings)} "
                f"groupings: {shapes}, expected are {expected}. {UNCHANGED}"
            )

        def commit() -> None:
            self.counts = [int(n) for n in state["counts"]]
            self._a, self._b = (np.array(state[name], "float64") for name in "ab")
            self._accuracies = np.array(state["accuracies"], "float64")
            picked = int(state["picked"])
            self._open = None if picked < 0 else (picked, np.array(state["context"], "float64"))

        return commit

    def context_features(self, context: BoundaryContext) -> np.ndarray:
        """Features of a boundary for the bandit, `(FEATURES,)`, each of the order of one."""
        statistics: Described = {}
        for key, block in context.blocks.items():
            # Count, sum and sum of squares of log F; sums of (θ − c)² and of c².
            sums = np.zeros(5)
            logs = np.log(block.importances()[block.importances() > 0], dtype="float64")
            sums[:3] = logs.size, logs.sum(), (logs**2).sum()
            for path in set(block.paths) & set(context.anchors):
                anchor = context.anchors[path]
                sums[3] += np.square(context.values[path] - anchor, dtype="float64").sum()
                sums[4] += np.square(anchor, dtype="float64").sum()
            statistics[key] = (sums,)
        n, total, squares, moved, size = sum(
            (s for (s,) in context.gather(statistics).values()), np.zeros(5)
        )
        spread = np.sqrt(max(squares / n - (total / n) ** 2, 0.0)) if n else 0.0
        distance = np.sqrt(moved / size) if size else 0.0
        return np.array([1.0, float(size > 0), distance, spread / 10])

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "groupings": [keras.saving.serialize_keras_object(g) for g in self.groupings],
            "exploration": self.exploration,
            "rewards": self._initial_rewards,
        }
