"""The quadratic pull towards what was learned: ½ (θ − c)ᵀ Λ (θ − c)."""

from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import number
from keras_dwd.variables import Arrays, Variables, slot

Anchor = Literal["folded", "latest"]


@keras.saving.register_keras_serializable("keras_dwd")
class DWDRegularizer(keras.regularizers.Regularizer):
    """Pulls each trainable variable towards an anchor, weighted by a precision.

    The penalty on the parameters θ is `½ Σ_i Λ_i (θ_i − c_i)²` with two slots per variable: the
    precision Λ and the anchor c. All tasks learned so far are folded into them, so that neither
    the memory nor the cost of a training step grows with the number of tasks. Task t adds
    `a_t = strength · λ_k · F_t` to the precision. With `anchor="folded"` this is exactly the sum
    of one penalty per task:

        Σ_t ½ a_t (θ − θ*_t)²  =  ½ Λ (θ − c)² + const,   Λ = Σ_t a_t,   c = Σ_t a_t θ*_t / Λ

    `DWDModel` owns one for all its variables. It adds the
    gradient `Λ (θ − c)` to that of the loss in closed form, so nothing is differentiated for it.

    Given to a layer as `kernel_regularizer` (or `bias_regularizer`, …) of a `DWDModel` it holds no
    slots: it sets that variable's own strength in place of the model's; 0 excludes the variable.
    Outside of a `DWDModel` it has no effect.

    Args:
        strength: λ ≥ 0, the weight of the penalty against the loss of the new task. 0 switches
            all of it off: the model then trains as any Keras model does.
        decay: In [0, 1]. What an old task's precision is multiplied by at each later boundary.
            1 keeps the sum over all tasks (EWC); less is the γ of online EWC.
        anchor: `"latest"` moves the anchor to the newest parameters: they are where the sum of
            all tasks' penalties led, so that older optima do not pull twice. `"folded"` keeps the
            exact sum over tasks of EWC as first published.

    Example:

    ```python
    model = DWDModel(inputs, outputs, regularizer=DWDRegularizer(strength=10.0))
    free = keras.layers.Dense(10, kernel_regularizer=DWDRegularizer(strength=0.0))
    ```

    Reference:
        [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796), equation 3;
        [Huszár, 2018](https://arxiv.org/abs/1712.03847), on which anchor the sum should have;
        [Schwarz et al., 2018](https://arxiv.org/abs/1805.06370), section 4 (online EWC).
    """

    def __init__(self, strength: float = 100.0, decay: float = 1.0, anchor: Anchor = "latest"):
        if anchor not in ("folded", "latest"):
            raise ValueError(f"`anchor` must be 'folded' or 'latest'. Received: {anchor!r}")
        self.strength = number("strength", strength, 0)
        self.decay = number("decay", decay, 0, 1)
        self.anchor = anchor
        self.precisions: dict[str, keras.Variable] = {}
        self.anchors: dict[str, keras.Variable] = {}

    def __call__(self, x: Any) -> Any:
        """Zero: the pull enters the training step as a gradient, never through the loss."""
        return tf.zeros(())

    def strength_of(self, variable: keras.Variable) -> float:
        """The strength that applies to `variable`: its layer's own, else that of the model."""
        own = getattr(variable, "regularizer", None)
        return own.strength if isinstance(own, DWDRegularizer) else self.strength

    def fold(self, variables: Variables, importance: Mapping[str, Any]) -> None:
        """Fold one more task, learned just now, into precision and anchor.

        Args:
            variables: Those that the task has trained, by path; their values are its θ*.
            importance: λ_k · F per path, of the variable's shape, ≥ 0.
        """
        folded = []
        for path, variable in variables.items():
            strength = self.strength_of(variable)
            if strength == 0:
                continue
            theta = np.asarray(variable, "float64")
            new = strength * np.asarray(importance[path], "float64")
            old, center = np.zeros_like(theta), np.zeros_like(theta)
            if path in self.precisions:
                old = self.decay * np.asarray(self.precisions[path], "float64")
                center = np.asarray(self.anchors[path], "float64")
            total = old + new
            # c + (new / total)(θ − c): the weighted mean, without cancellation for new << old.
            share = np.divide(new, total, out=np.ones_like(total), where=total > 0)
            anchor = theta if self.anchor == "latest" else center + share * (theta - center)
            folded.append((path, total, anchor))
        for path, precision, anchor in folded:  # only now, with nothing left that can fail
            self.build_slot(path, variables[path])
            self.precisions[path].assign(precision)
            self.anchors[path].assign(anchor)

    def build_slot(self, path: str, variable: keras.Variable) -> None:
        """Create the precision and anchor of `variable`, both zero, unless they exist."""
        if path not in self.precisions:
            self.precisions[path] = slot(variable, "precision")
            self.anchors[path] = slot(variable, "anchor")

    def gradient(self, path: str, variable: keras.Variable) -> tf.Tensor | None:
        """Λ (θ − c), of the variable's shape, or `None` where nothing pulls at it."""
        precision = self.precisions.get(path)
        if precision is None:
            return None
        difference = tf.cast(variable.value, "float32") - self.anchors[path].value
        return tf.cast(precision.value * difference, variable.dtype)

    def value(self, variables: Variables) -> tf.Tensor:
        """The penalty ½ Σ Λ (θ − c)² over `variables`, a float32 scalar, for reporting."""
        total = tf.zeros(())
        for path, variable in variables.items():
            if path in self.precisions:
                difference = tf.cast(variable.value, "float32") - self.anchors[path].value
                total += 0.5 * tf.reduce_sum(self.precisions[path].value * difference**2)
        return total

    def state(self) -> Arrays:
        """All slots as arrays, under `precision/PATH` and `anchor/PATH`."""
        arrays = {f"precision/{path}": np.asarray(v) for path, v in self.precisions.items()}
        return arrays | {f"anchor/{path}": np.asarray(v) for path, v in self.anchors.items()}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strength": self.strength, "decay": self.decay, "anchor": self.anchor}
