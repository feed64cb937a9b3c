"""The strengths λ_k that follow a `Budget` while a model is trained."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.groupings.strength import Budget
from keras_dwd.variables import Arrays, insert, untracked

# λ_k stay between 1 / `_RANGE` and `_RANGE`.
_RANGE = 1000.0


class BudgetStrengths:
    """λ_k of the groups whose share of the gradient is adjusted at each training step.

    Attributes:
        values: λ_k by group, as variables.
        group_of: The group of each block, by its path.
    """

    def __init__(self) -> None:
        self.values: dict[int, keras.Variable] = {}
        self.group_of: dict[str, int] = {}

    def add(self, group_of: Mapping[str, int]) -> None:
        """Add blocks to groups; a new group starts with a λ_k of 1."""
        for key, group in group_of.items():
            insert(self.group_of, key, group)
            if group not in self.values:
                insert(self.values, group, untracked(np.ones(()), "group_strength"))

    def of(self, key: str) -> tf.Tensor | None:
        """λ_k of a block's group, or `None` if it is not adjusted. Graph code."""
        return self.values[self.group_of[key]].value if key in self.group_of else None

    def adjust(
        self,
        paths_of: Mapping[str, tuple[str, ...]],
        pulls: Mapping[str, tf.Tensor],
        gradients: Mapping[str, Any],
        scale: tf.Tensor | None,
        budget: Budget,
    ) -> None:
        """Adjust λ_k by the share of the pull in the total gradient of each group. Graph code.

        Args:
            paths_of: Paths of the variables of each block.
            pulls: The pull by path.
            gradients: Gradients of the loss by path, each a tensor or `None`.
            scale: The loss scale, if the loss was scaled before differentiation.
            budget: The rule, with the share to aim for.
        """
        groups = {path: self.group_of.get(key) for key, paths in paths_of.items() for path in paths}
        for group, strength in self.values.items():
            squares = [tf.zeros(()), tf.zeros(())]
            for path, gradient in gradients.items():
                if groups.get(path) == group and path in pulls and gradient is not None:
                    for i, part in enumerate((pulls[path], tf.convert_to_tensor(gradient))):
                        squares[i] += tf.reduce_sum(tf.cast(part, "float32") ** 2)
            pull, gradient = tf.sqrt(squares[0]), tf.sqrt(squares[1])
            gradient = gradient if scale is None else gradient / tf.cast(scale, "float32")
            share = tf.math.divide_no_nan(pull, pull + gradient)
            adjusted = strength.value * tf.exp(budget.rate * (budget.share - share))
            adjusted = tf.clip_by_value(adjusted, 1 / _RANGE, _RANGE)
            # Keep λ_k where nothing pulls, and in a step that overflowed and will be skipped.
            valid = (pull > 0) & tf.math.is_finite(pull) & tf.math.is_finite(gradient)
            strength.assign(tf.where(valid, adjusted, strength.value))

    def state(self) -> Arrays:
        """The number of its group and λ_k of each block, by path."""
        return {
            key: np.array([group, float(self.values[group])])
            for key, group in self.group_of.items()
        }

    def load_state(self, state: Arrays) -> None:
        """Load what `state` returned, in place of all groups so far."""
        self.values.clear()
        self.group_of.clear()
        for key, (group, strength) in state.items():
            self.add({key: int(group)})
            self.values[int(group)].assign(strength)
