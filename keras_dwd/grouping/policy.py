"""A grouping that learns which grouping retains best."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_dwd.checks import integer, number
from keras_dwd.files import FileError
from keras_dwd.grouping.grouping import Described, Grouped, Grouping, Learned
from keras_dwd.variables import Arrays, Variables


@keras.saving.register_keras_serializable("keras_dwd")
class GroupingPolicy(Grouping):
    """Picks one of several groupings at each boundary, by what earlier picks were worth.

    A contextual bandit: it expects of each grouping a reward that is linear in what is known at the
    boundary (whether there was one before, how far parameters moved since, how unequal their Fisher
    information is) and picks the one with the highest upper confidence bound (LinUCB). What a pick
    is worth shows when the next task was learned: half of it is how much of the accuracy on
    earlier tasks is left, half the accuracy on the new one, both on validation data, which you give
    before `consolidate`. What was learned is saved with the model; `rewards` carries it to the
    policy of another one.

    Args:
        groupings: To pick from, two or more.
        exploration: ≥ 0, the width of the bound: how much is tried out.
        rewards: How often each was rewarded and what was learned from it: the `rewards` of another
            policy with these groupings.

    Example:

    ```python
    policy = GroupingPolicy([SingleGroup(), GaussianMixtureGrouping(4), LayerGrouping()])
    model = DWDModel.from_model(network, grouping=policy)
    for t, task in enumerate(tasks):
        model.fit(*task.train)
        model.grouping.reward([accuracy(model, each.validation) for each in tasks[: t + 1]])
        model.consolidate()
    ```

    Reference:
        [Li et al., 2010](https://arxiv.org/abs/1003.0146), algorithm 1.
    """

    FEATURES = 4

    def __init__(self, groupings: Sequence[Any], exploration: float = 0.1, rewards: Any = None):
        made = [
            keras.saving.deserialize_keras_object(each) if isinstance(each, dict) else each
            for each in groupings
        ]
        if len(made) < 2 or not all(isinstance(each, Grouping) for each in made):
            raise ValueError(f"`groupings` must be two or more. Received: {groupings!r}")
        if any(each.budget for each in made):
            raise ValueError(
                "`groupings` must fix their strengths at the boundary: a policy has none with a "
                "budget."
            )
        self.groupings = made
        self.exploration = number("exploration", exploration, 0)
        if rewards is not None and not isinstance(rewards, Mapping):
            raise ValueError(f"`rewards` must be what another policy's has. Received: {rewards!r}")
        self._given = rewards
        self._begin()

    def _begin(self) -> None:
        rewards, number_of, d = self._given or {}, len(self.groupings), self.FEATURES
        self.counts = [integer("rewards", n, 0) for n in rewards.get("counts", [0] * number_of)]
        # Of each grouping the ridge regression of rewards: A = I + Σ x xᵀ and b = Σ r x.
        self._a = np.array(rewards.get("a", [np.eye(d)] * number_of), "float64")
        self._b = np.array(rewards.get("b", [np.zeros(d)] * number_of), "float64")
        shapes = len(self.counts), self._a.shape, self._b.shape
        if shapes != (number_of, (number_of, d, d), (number_of, d)):
            raise ValueError(f"`rewards` must be those of {number_of} groupings.")
        self._accuracies = np.zeros(0)  # on the tasks so far
        self._next: tuple[int, np.ndarray] | None = None
        # The pick that waits for its reward, and the context it was made in.
        self._open: tuple[int, np.ndarray] | None = None

    @property
    def rewards(self) -> dict[str, Any]:
        """What was learned so far, in numbers and lists."""
        return {"counts": list(self.counts), "a": self._a.tolist(), "b": self._b.tolist()}

    @property
    def picked(self) -> int | None:
        """Which of `groupings` the last boundary took, if it was not rewarded yet."""
        return None if self._open is None else self._open[0]

    def reward(self, accuracies: Sequence[float]) -> None:
        """Say what is known at the end of a task, by which the pick of the last boundary is judged.

        Args:
            accuracies: In [0, 1], on validation data of each task so far; the newest comes last.

        Raises:
            ValueError: If there are no more than when it was called last.
        """
        now = np.array([number("accuracies", accuracy, 0, 1) for accuracy in accuracies])
        then = self._accuracies
        if len(now) <= len(then):
            raise ValueError(
                f"`accuracies` must be those of more than the {len(then)} tasks of the last call, "
                f"the newest last. Received: {accuracies!r}"
            )
        if self._open is not None:
            picked, context = self._open
            kept = np.divide(now[: len(then)], then, out=np.ones(len(then)), where=then > 0)
            left = np.minimum(kept, 1).mean() if len(then) else 1.0
            self._a[picked] += np.outer(context, context)
            self._b[picked] += (left + now[len(then) :].mean()) / 2 * context
            self.counts[picked] += 1
            self._open = None
        self._accuracies = now

    def check(self, variables: Variables) -> None:
        """Raise `ValueError` if one of the groupings does not fit a model's variables, by path."""
        for each in self.groupings:
            each.check(variables)

    def expected(self, context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The reward expected of each grouping, and the width of its confidence bound."""
        means, widths = [], []
        for a, b in zip(self._a, self._b, strict=True):
            inverse = np.linalg.inv(a)
            means.append(context @ inverse @ b)
            widths.append(np.sqrt(context @ inverse @ context))
        return np.array(means), self.exploration * np.array(widths)

    def pick(self, context: np.ndarray) -> int:
        """Which of `groupings` to take: each once, then by the upper bound of its reward."""
        untried = [k for k, count in enumerate(self.counts) if not count]
        means, widths = self.expected(context)
        return untried[0] if untried else int(np.argmax(means + widths))

    def apply(self, learned: Learned) -> Grouped:
        """Weigh the Fisher information by the grouping that is picked."""
        context = self.context(learned)
        picked = self.pick(context)
        result = self.groupings[picked].apply(learned)
        self._next = picked, context
        return result

    def commit(self) -> None:
        """What was picked last has become part of the model."""
        self._open = self._next

    def state(self) -> Arrays:
        """What was learned, and the pick that waits for its reward."""
        picked, context = (-1, np.zeros(self.FEATURES)) if self._open is None else self._open
        return {
            "counts": np.array(self.counts, "int64"),
            "a": self._a,
            "b": self._b,
            "picked": np.array(picked, "int64"),
            "context": context,
            "accuracies": self._accuracies,
        }

    def restore(self, state: Arrays) -> None:
        """Take over what `state` gave; of nothing, be as new.

        Raises:
            FileError: If it is not that of as many groupings. Nothing changes then.
        """
        if not state:
            self._begin()
            return
        state = {"accuracies": np.zeros(0), **state}
        shapes = {name: array.shape for name, array in state.items()}
        expected = {name: array.shape for name, array in self.state().items()}
        expected["accuracies"] = (state["accuracies"].size,)  # of any number of tasks
        finite = all(np.isfinite(array).all() for array in state.values())
        if shapes != expected or not finite or not -1 <= state["picked"] < len(self.groupings):
            raise FileError(
                f"The saved state of a grouping is not of a policy of {len(self.groupings)} "
                f"groupings: {shapes}, expected are {expected}. The model's consolidation state "
                "was left as it was."
            )
        self.counts = [int(n) for n in state["counts"]]
        self._a, self._b = (np.array(state[name], "float64") for name in "ab")
        self._accuracies = np.array(state["accuracies"], "float64")
        picked = int(state["picked"])
        self._open = None if picked < 0 else (picked, np.array(state["context"], "float64"))

    def context(self, learned: Learned) -> np.ndarray:
        """What is known at a boundary, `(FEATURES,)`, each of the order of one."""
        mine: Described = {}
        for key, block in learned.blocks.items():
            sums = np.zeros(5)  # of log F: number, sum, of squares; of (θ − c)², of c²
            logs = np.log(block.spectrum()[block.spectrum() > 0], dtype="float64")
            sums[:3] = logs.size, logs.sum(), (logs**2).sum()
            for path in set(block.paths) & set(learned.anchors):
                anchor = learned.anchors[path]
                sums[3] += np.square(learned.values[path] - anchor, dtype="float64").sum()
                sums[4] += np.square(anchor, dtype="float64").sum()
            mine[key] = (sums,)
        n, total, squares, moved, size = sum(
            (s for (s,) in learned.of_all(mine).values()), np.zeros(5)
        )
        spread = np.sqrt(max(squares / n - (total / n) ** 2, 0.0)) if n else 0.0
        distance = np.sqrt(moved / size) if size else 0.0
        return np.array([1.0, float(size > 0), distance, spread / 10])

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "groupings": [keras.saving.serialize_keras_object(g) for g in self.groupings],
            "exploration": self.exploration,
            "rewards": self._given,
        }
