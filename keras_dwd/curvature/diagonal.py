"""The diagonal Fisher information: how much each parameter matters to the task at hand."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import number
from keras_dwd.variables import Arrays, Variables, slot

Estimator = Literal["batch", "exact", "influence"]

# Per-example gradients are formed for as many examples at once as fit in this many floats (1 GB).
_MAX_FLOATS = 2**28


@keras.saving.register_keras_serializable("keras_dwd")
class DiagonalFisher:
    """Estimates F_i = E_x[(∂ log p_θ(x) / ∂θ_i)²], online in the training step or in one pass.

    The online estimate is an exponential moving average over training steps,
    `slot ← γ·slot + (1−γ)·F̂`, divided by `1 − γⁿ` when read (the bias correction of Adam). It
    is reset at each task boundary. Both forms see the loss of the data alone: no penalty, no
    weight decay, no regularisation loss.

    Args:
        estimator: How F̂ of a batch of B examples is computed.
            `"batch"` is B times the squared mean gradient: free in the training step, biased. It
            takes the loss for a mean over examples, as Keras losses are by default.
            `"exact"` is the mean of the squared gradients of single examples with their true
            labels (the empirical Fisher), in inference mode.
            `"influence"` is the same with each example's square divided by r + median(r), where
            r is the squared norm of the loss gradient at the model's outputs: examples that are
            learned well, whose gradients vanish, count as much as those that are not.
        gamma: γ in [0, 1) of the online estimate, 0.9 to 0.95 recommended; `None` switches the
            online estimate off, `consolidate` then needs data.

    Reference:
        [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796);
        [van de Ven, 2025](https://arxiv.org/abs/2502.11756) on the estimators.
    """

    def __init__(self, estimator: Estimator = "batch", gamma: float | None = 0.95):
        if estimator not in get_args(Estimator):
            known = ", ".join(get_args(Estimator))
            raise ValueError(f"`estimator` must be one of {known}. Received: {estimator!r}")
        self.estimator = estimator
        self.gamma = None if gamma is None else number("gamma", gamma, 0, 1, closed=False)
        self.slots: dict[str, keras.Variable] = {}
        # 1 − γⁿ, kept as the moving average of ones: exact, and no step counter can overflow.
        self.weight = keras.Variable(0.0, trainable=False, dtype="float32", name="fisher_weight")

    def build(self, variables: Variables) -> None:
        """Create the online slots that `variables` lack; the average then starts anew for all."""
        missing = [path for path in variables if path not in self.slots]
        if self.gamma is not None and missing:
            self.slots |= {path: slot(variables[path], "fisher") for path in missing}
            self.reset()

    def update(self, estimate: dict[str, tf.Tensor], valid: tf.Tensor | None = None) -> None:
        """One step of the moving average; graph code.

        Args:
            estimate: F̂ of this batch per variable path.
            valid: Scalar boolean; where it is false the step leaves no trace.
        """
        if self.gamma is None:
            raise ValueError("The online estimate is switched off: `gamma` is None.")
        averages = [(self.slots[path], new) for path, new in estimate.items()]
        for average, new in [*averages, (self.weight, tf.ones(()))]:
            updated = self.gamma * average.value + (1 - self.gamma) * tf.cast(new, "float32")
            average.assign(updated if valid is None else tf.where(valid, updated, average.value))

    def value(self) -> Arrays:
        """The bias-corrected online estimate per variable path.

        Raises:
            ValueError: If no training step was seen since the last boundary.
        """
        weight = float(np.asarray(self.weight))
        if weight == 0:
            raise ValueError(
                "There is no online Fisher estimate: the model was not trained since the last "
                "boundary, or `gamma` is None. Train it first, or pass `data` to `consolidate`."
            )
        return {path: np.asarray(v, "float32") / weight for path, v in self.slots.items()}

    def reset(self) -> None:
        """Forget the online estimate: a new task starts."""
        for variable in [self.weight, *self.slots.values()]:
            variable.assign(tf.zeros(variable.shape))

    def of_batch(
        self,
        loss: Callable[..., tuple[tf.Tensor, Any]],
        variables: Variables,
        batch: tuple[Any, Any, Any],
        scale: float = 1.0,
    ) -> dict[str, tf.Tensor]:
        """F̂ of one batch, by the configured estimator, in inference mode; graph code.

        Args:
            loss: `loss(x, y, sample_weight)`: the mean data loss of a batch, and the outputs.
            variables: What to differentiate by, by path.
            batch: `(x, y, sample_weight)`; the last may be `None`.
            scale: The loss is multiplied by this before, its gradients divided by it after
                differentiation: small gradients underflow in float16.
        """
        x, y, sample_weight = batch
        if self.estimator != "batch" and tf.nest.is_nested(sample_weight):
            raise ValueError(
                f"The estimator {self.estimator!r} needs one sample weight per example. Received "
                "weights per output."
            )
        examples = tf.shape(tf.nest.flatten(x)[0])[0]
        values = [v.value for v in variables.values()]

        def gradients(*arguments: Any) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
            """By the variables, and by the outputs of the model."""
            with tf.GradientTape() as tape:
                value, outputs = loss(*arguments)
                scaled = scale * value
            sources = (values, tf.nest.flatten(outputs))
            found = tape.gradient(scaled, sources, unconnected_gradients="zero")
            return tf.nest.map_structure(
                lambda g: tf.cast(tf.convert_to_tensor(g), "float32") / scale, found
            )

        if self.estimator == "batch":
            count = tf.cast(examples, "float32")
            squares = [count * tf.square(g) for g in gradients(x, y, sample_weight)[0]]
        else:

            def of_example(example: Any) -> tuple[list[tf.Tensor], tf.Tensor]:
                single = tf.nest.map_structure(lambda t: t[None], example)
                by_variables, by_outputs = gradients(*single, None)
                residual = tf.add_n([tf.reduce_sum(tf.square(g)) for g in by_outputs])
                return [tf.square(g) for g in by_variables], residual

            per_example, residuals = tf.vectorized_map(of_example, (x, y), warn=False)
            share = tf.ones((examples,)) / tf.cast(examples, "float32")
            if sample_weight is not None:
                # A weight of two is the example seen twice: it weighs the square, linearly.
                share *= tf.cast(tf.reshape(sample_weight, (-1,)), "float32")
            if self.estimator == "influence":
                median = tf.sort(residuals)[examples // 2]
                share *= tf.math.reciprocal_no_nan(residuals + median)
            squares = [tf.tensordot(share, s, axes=1) for s in per_example]
        return dict(zip(variables, squares, strict=True))

    def chunk(self, variables: Variables, batch_size: int) -> int:
        """How many examples of a batch to work on at once, for memory's sake."""
        if self.estimator == "batch":
            return batch_size
        parameters = sum(int(np.prod(v.shape)) for v in variables.values())
        return max(1, min(batch_size, _MAX_FLOATS // max(parameters, 1)))

    def check(self, fisher: Arrays) -> None:
        """Raise `ValueError` naming the variable if a value is not finite."""
        for path, values in fisher.items():
            if not np.isfinite(values).all():
                raise ValueError(
                    f"The Fisher information of {path!r} is not finite: the loss or the weights "
                    "have diverged. Nothing was changed."
                )

    def state(self) -> Arrays:
        """The online slots as arrays, under `fisher/PATH`, and `fisher_weight`."""
        arrays = {f"fisher/{path}": np.asarray(v) for path, v in self.slots.items()}
        return arrays | {"fisher_weight": np.asarray(self.weight)}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "estimator": self.estimator,
            "gamma": self.gamma,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DiagonalFisher":
        """The inverse of `get_config`."""
        return cls(**config)
