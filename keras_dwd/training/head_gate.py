"""Keeps training from changing what other tasks have of their own, such as heads."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.state import Commit, refuse
from keras_dwd.variables import Arrays, Variables


class HeadGate:
    """Lets training change only the heads that had examples since the last task boundary.

    Through momentum or weight decay, an optimizer changes weights even if their gradient is zero.
    The gate records which heads have had a gradient and undoes updates of the other heads.
    """

    def __init__(self) -> None:
        self.in_use: dict[str, keras.Variable] = {}

    def build(self, variables: Variables) -> None:
        """Create one flag per head for the variables that have a part for each task."""
        for path, variable in variables.items():
            if getattr(variable, "per_task", False) and path not in self.in_use:
                self.in_use[path] = keras.Variable(
                    np.zeros(variable.shape[0], bool), trainable=False, dtype="bool", name="in_use"
                )

    def mark_active(self, variables: Variables, gradients: list[Any]) -> list[tuple[Any, ...]]:
        """Record which heads have a gradient. Graph code.

        Returns:
            The argument of `restore_inactive`: for each variable with heads the variable, its
            current value and a mask of the heads in use.
        """
        snapshots = []
        for (path, variable), gradient in zip(variables.items(), gradients, strict=True):
            if path in self.in_use and gradient is not None:
                in_use = self.in_use[path]
                # In a step that overflows float16 every head's gradient is NaN.
                real = (gradient != 0) & tf.math.is_finite(gradient)
                touched = tf.reduce_any(real, axis=range(1, len(variable.shape)))
                in_use.assign(tf.logical_or(in_use.value, touched))
                mask = tf.reshape(in_use.value, (-1, *[1] * (len(variable.shape) - 1)))
                snapshots.append((variable, tf.identity(variable.value), mask))
        return snapshots

    def of_active(self, pulls: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The pulls, with zeros for the heads that are not in use. Graph code."""
        active = dict(pulls)
        for path in set(pulls) & set(self.in_use):
            ones = [1] * (len(pulls[path].shape) - 1)
            active[path] *= tf.reshape(tf.cast(self.in_use[path].value, "float32"), (-1, *ones))
        return active

    def restore_inactive(self, entries: list[tuple[Any, ...]]) -> None:
        """Undo the optimizer's update of the heads that are not in use. Graph code."""
        for variable, before, mask in entries:
            variable.assign(tf.where(mask, variable.value, before))

    def reset(self) -> None:
        """Mark all heads as not in use, at the start of a new task."""
        for flags in self.in_use.values():
            flags.assign(tf.zeros(flags.shape, "bool"))

    def state(self) -> Arrays:
        """The flags as arrays, under `in_use/PATH`."""
        return {f"in_use/{path}": np.asarray(flags) for path, flags in self.in_use.items()}

    def prepare_state(self, state: Arrays, variables: Variables) -> Commit:
        """Check a state, as returned by `state` for any model, without changing anything yet.

        Args:
            state: The flags under `in_use/PATH`.
            variables: Variables of the model, by path.

        Returns:
            A function that applies the state and cannot fail.

        Raises:
            FileError: If an array does not fit the model.
        """
        flags = {key.removeprefix("in_use/"): array for key, array in state.items()}
        for path, array in flags.items():
            shape = tuple(variables[path].shape)
            if not shape or array.shape != shape[:1]:
                refuse("in_use", path, array)

        def commit() -> None:
            self.in_use.clear()
            self.build({path: variables[path] for path in flags})
            for path, array in flags.items():
                if path in self.in_use:
                    self.in_use[path].assign(array)

        return commit
