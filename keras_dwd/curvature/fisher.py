"""Estimates of the Fisher information, online in the training step or in one pass over data."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, get_args

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import integer, number
from keras_dwd.curvature.closed_forms import flat  # which registers them
from keras_dwd.curvature.diagonal import Diagonal
from keras_dwd.curvature.examples import alone, loss_gradients, masks_of, one_each
from keras_dwd.curvature.likelihood import by_logits, drawn, negated, squared_margins
from keras_dwd.curvature.rules import GENERIC, Flow, RuledLayer, ruled_layers
from keras_dwd.curvature.taps import Taps
from keras_dwd.distributed.communicator import Communicator
from keras_dwd.variables import Arrays, Variables, untracked

Estimator = Literal["batch", "exact", "influence", "sampled", "negated", "adam"]
Statistics = dict[str, tf.Tensor]
"""Means over examples, by `kind/PATH`: all that the estimate of a block is made from."""


class Block(Protocol):
    """A precision matrix over some of a model's variables: `Diagonal` or `Kronecker`.

    Its leaves are arrays while it is made at a boundary, and the variables that hold them in the
    training step.
    """

    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def trace(self) -> float: ...
    def leaves(self) -> dict[str, Any]: ...
    def with_leaves(self, leaves: dict[str, Any]) -> Any: ...
    def multiply(self, differences: list[Any]) -> list[Any]: ...
    def shrink(self, differences: list[Any], stiffness: list[Any]) -> list[Any]: ...
    def weighted(self, strengths: dict[str, float]) -> Any: ...
    def merged(self, new: Any, decay: float) -> Any: ...
    def spectrum(self) -> np.ndarray: ...
    def coordinates(self, values: Arrays) -> np.ndarray: ...
    def scaled(self, strengths: np.ndarray) -> Any: ...


# Squared: what an untrained model has.
_LEAST_MARGIN = 0.1
# Where the count of examples starts again, a power of two.
_TURN = 2**20

# Per-example gradients are formed for as many examples at once as fit in this many floats (1 GB).
_MAX_FLOATS = 2**28


class Fisher:
    """What `DiagonalFisher` and `KroneckerFisher` share; see there.

    A batch gives statistics that are means over its examples. Their moving average over training
    steps is the online estimate; their mean over a pass is the one made at a boundary.
    """

    def __init__(self, estimator: Estimator, gamma: float | None, every: int):
        if estimator not in get_args(Estimator):
            known = ", ".join(get_args(Estimator))
            raise ValueError(f"`estimator` must be one of {known}. Received: {estimator!r}")
        self.estimator = estimator
        self.gamma = None if gamma is None else number("gamma", gamma, 0, 1, closed=False)
        self.every = integer("every", every, 1)
        self.slots: dict[str, keras.Variable] = {}
        # 1 − γⁿ, kept as the moving average of ones: exact, and no step counter can overflow.
        self.weight = keras.Variable(0.0, trainable=False, dtype="float32", name="fisher_weight")
        # How many examples were looked at, modulo `_TURN`. Not int32, which is in the host's
        # memory: out of reach of a step that XLA compiles for a GPU.
        self.looked = keras.Variable(0, trainable=False, dtype="int64", name="fisher_looked")

    @property
    def supports_jit(self) -> bool:
        """Whether XLA can compile a step with it."""
        return True

    @property
    def online(self) -> bool:
        """Whether training keeps an estimate."""
        return self.gamma is not None or self.estimator == "adam"

    def shapes(self, model: keras.Model, variables: Variables) -> dict[str, tuple[int, ...]]:
        """The shape of each statistic, by `kind/PATH`."""
        shapes = self._shapes(model, variables)
        return shapes | dict.fromkeys(self._margins(shapes), ())

    def blocks(
        self, model: keras.Model, variables: Variables, statistics: Arrays
    ) -> dict[str, Block]:
        """The Fisher information made from statistics, block by block."""
        names = [name for name in statistics if not name.startswith("margin/")]
        found = dict(statistics)
        for name in names:
            margin = statistics.get(f"margin/{name.partition('/')[2]}")
            if margin is not None:
                found[name] = statistics[name] / (margin + _LEAST_MARGIN)
        return self._blocks(model, variables, {name: found[name] for name in names})

    def _margins(self, names: Iterable[str]) -> list[str]:
        """The names of the mean squared margin, kept with each block that is divided by it."""
        if self.estimator != "influence":
            return []
        return sorted({f"margin/{name.partition('/')[2]}" for name in names})

    # What a subclass defines.

    def _shapes(self, model: keras.Model, variables: Variables) -> dict[str, tuple[int, ...]]:
        """The shape of each statistic, by `kind/PATH`."""
        if self.estimator == "adam":  # the optimizer has them
            return {}
        return {f"fisher/{path}": tuple(v.shape) for path, v in variables.items()}

    def layer_statistics(
        self, ruled: RuledLayer, flows: list[Flow], weights: tf.Tensor
    ) -> Statistics:
        """The statistics of one layer; graph code.

        Args:
            ruled: The layer.
            flows: Its calls in this batch.
            weights: `(batch,)`, of the squares of the examples' gradients.
        """
        squares = ruled.rule.squares(ruled.layer, flows, weights)
        return {f"fisher/{ruled.paths[name]}": value for name, value in squares.items()}

    def _blocks(
        self, model: keras.Model, variables: Variables, statistics: Arrays
    ) -> dict[str, Block]:
        """The Fisher information made from statistics, block by block."""
        found: dict[str, Block] = {}
        for name, values in statistics.items():
            kind, _, path = name.partition("/")
            if kind == "fisher" and path in variables:
                found[path] = Diagonal(path, values)
        return found

    # The online estimate.

    def build(self, shapes: Mapping[str, tuple[int, ...]], optimizer: Any = None) -> None:
        """Create the online slots that are missing; the average then starts anew for all.

        Args:
            shapes: Of the statistics.
            optimizer: The model's `DWDOptimizer`, if it has one.
        """
        if self.estimator == "adam" and optimizer is None:
            raise ValueError(
                "The estimator 'adam' needs a `DWDOptimizer`: the second moment of any other "
                "optimizer has the pull in it."
            )
        missing = [name for name in shapes if name not in self.slots]
        if self.gamma is not None and missing:
            self.slots |= {name: untracked(np.zeros(shapes[name]), "fisher") for name in missing}
            self.reset()

    def forget_all_but(self, names: Iterable[str]) -> None:
        """Drop slots of what there is no more: that of a layer which LoRA has made another."""
        for name in set(self.slots) - set(names):
            del self.slots[name]

    def update(self, statistics: Statistics, valid: tf.Tensor | None = None) -> None:
        """One step of the moving average; graph code.

        Args:
            statistics: Of this batch.
            valid: Scalar boolean; where it is false the step leaves no trace.
        """
        if self.gamma is None:
            raise ValueError("The online estimate is switched off: `gamma` is None.")
        averages = [(self.slots[name], new) for name, new in statistics.items()]
        for average, new in [*averages, (self.weight, tf.ones(()))]:
            updated = self.gamma * average.value + (1 - self.gamma) * tf.cast(new, "float32")
            average.assign(updated if valid is None else tf.where(valid, updated, average.value))

    def note(self, examples: tf.Tensor) -> None:
        """Remember how many examples a batch has, for the estimator `adam`; graph code."""
        self.weight.assign(tf.maximum(self.weight.value, tf.cast(examples, "float32")))

    def value(self, optimizer: Any = None, variables: Variables | None = None) -> Arrays:
        """The bias-corrected online averages.

        Args:
            optimizer: What the estimator `adam` reads: a `DWDOptimizer`.
            variables: By path; whose estimate `adam` reads.

        Raises:
            ValueError: If no training step was seen since the last boundary.
        """
        weight = float(np.asarray(self.weight))
        if weight == 0:
            raise ValueError(
                "There is no online Fisher estimate: the model was not trained since the last "
                "boundary, or `gamma` is None. Train it first, or pass `data` to `consolidate`."
            )
        if self.estimator == "adam":
            assert variables is not None
            moments = {path: optimizer.second_moment(v) for path, v in variables.items()}
            examples = weight * (optimizer.inner_optimizer.gradient_accumulation_steps or 1)
            return {f"fisher/{p}": examples * np.asarray(m, "float32") for p, m in moments.items()}
        return {name: np.asarray(v, "float32") / weight for name, v in self.slots.items()}

    def reset(self) -> None:
        """Forget the online estimate: a new task starts."""
        for variable in [self.weight, self.looked, *self.slots.values()]:
            variable.assign(tf.zeros(variable.shape, variable.dtype))

    def start(self, examples: int) -> None:
        """Say how many examples of a pass were looked at before the next batch."""
        self.looked.assign(examples % _TURN)

    def state(self) -> Arrays:
        """The online slots as arrays, by `kind/PATH`, `fisher_weight` and `fisher_looked`."""
        arrays = {name: np.asarray(v) for name, v in self.slots.items()}
        counts = {"fisher_weight": self.weight, "fisher_looked": self.looked}
        return arrays | {name: np.asarray(v) for name, v in counts.items()}

    # One batch.

    def of_batch(
        self,
        model: Any,
        variables: Variables,
        batch: tuple[Any, Any, Any],
        scale: float,
        communicator: Communicator,
    ) -> Statistics:
        """The statistics of one batch, in inference mode, of the data loss alone; graph code.

        Args:
            model: A `DWDModel`.
            variables: What to differentiate by, by path.
            batch: `(x, y, sample_weight)`; the last may be `None`. One weight per example weighs
                its square: two is the example seen twice. Any others, of time steps or of
                outputs, are part of the example's loss.
            scale: The loss is multiplied by this before, its gradients divided by it after
                differentiation: small gradients underflow in float16.
            communicator: The workers whose batches, of as many examples each, make up one.
        """
        x, y, sample_weight = batch
        count = tf.shape(tf.nest.flatten(x)[0])[0]
        examples = tf.cast(count, "float32")
        if self.estimator == "adam":
            raise ValueError(
                "The estimator 'adam' is made by training alone, not in a pass: leave `data` out."
            )
        if self.estimator == "batch":
            return self._of_mean_gradient(model, variables, batch, scale)
        looked = tf.cast(self.looked.value, "int32")
        first = looked + communicator.rank * count
        self.looked.assign(tf.cast((looked + communicator.size * count) % _TURN, "int64"))
        weights = tf.fill((count,), 1 / examples)
        within: tuple[Any, ...] = ()
        if sample_weight is not None:
            leaves = tf.nest.flatten(sample_weight)
            sample_weight = leaves[0] if len(leaves) == 1 else sample_weight
            if one_each(sample_weight):
                weights *= tf.cast(tf.reshape(sample_weight, (-1,)), "float32")
            else:
                within = (sample_weight,)
        layers = [ruled for ruled in ruled_layers(model) if ruled.trains(variables)]
        with tf.GradientTape() as tape:
            generic = [ruled.layer for ruled in layers if ruled.rule is GENERIC]
            with Taps((ruled.layer for ruled in layers), activated=generic) as taps:
                outputs = model(x, training=False)
            seen = self._seen(model, outputs)
        labels = drawn(model, y, outputs, first) if self.estimator == "sampled" else y
        by_seen = loss_gradients(model, (x, labels, seen, *within), masks_of(outputs), scale)
        calls = {ruled: taps.calls(ruled.layer) for ruled in layers}
        for ruled, seen_calls in calls.items():
            if ruled.rule is GENERIC and not all(call.plain for call in seen_calls or ()):
                calls[ruled] = None
        tapped = [call for found in calls.values() for call in found or ()]
        by_calls, by_outputs = tape.gradient(
            tf.nest.flatten(seen),
            ([call.output for call in tapped], tf.nest.flatten(outputs)),
            output_gradients=by_seen,
            unconnected_gradients="zero",
        )
        gradients = iter(by_calls)
        margin = tf.zeros(())
        if self.estimator == "influence":
            residuals = tf.add_n(
                [
                    tf.reduce_sum(flat(_unscaled(g, scale)) ** 2, axis=1)
                    for g in by_logits(model, outputs, by_outputs)
                ]
            )
            # Examples without weight are not there, as those that make workers' parts even.
            counted = tf.where(weights > 0, residuals, np.inf)
            margins = squared_margins(model, outputs)
            every = communicator.gather(tf.stack([counted, margins], 1), "residuals")
            there = tf.cast(every[:, 0] < np.inf, "float32")
            count = tf.reduce_sum(there)
            # To XLA the bounds of a slice are constants: it would compile each step anew.
            median = tf.gather(tf.sort(every[:, 0]), tf.cast(count, "int32") // 2)
            margin = tf.math.divide_no_nan(tf.reduce_sum(there * every[:, 1]), count)
            weights *= tf.math.reciprocal_no_nan(residuals + median)

        statistics: Statistics = {}
        for ruled, found in calls.items():
            flows = [
                Flow(
                    tuple(_floats(i) for i in call.inputs),
                    _unscaled(next(gradients), scale),
                    first,
                )
                for call in found or ()
            ]
            if flows:
                statistics |= self.layer_statistics(ruled, flows, weights)
        # A layer that was not called has no gradient at all.
        followed = [ruled for ruled, found in calls.items() if found is not None]
        covered = {path for ruled in followed for path in ruled.paths.values()}
        rest = {path: v for path, v in variables.items() if path not in covered}
        if rest:
            statistics |= self._one_by_one(model, rest, (x, labels, *within), weights, scale)
        wanted = self._shapes(model, variables)
        known = {name: value for name, value in statistics.items() if name in wanted}
        return known | dict.fromkeys(self._margins(known), margin)

    def _of_mean_gradient(
        self, model: Any, variables: Variables, batch: tuple[Any, Any, Any], scale: float
    ) -> Statistics:
        x, y, sample_weight = batch
        count = tf.cast(tf.shape(tf.nest.flatten(x)[0])[0], "float32")
        with tf.GradientTape() as tape:
            loss = scale * model.data_loss(x, y, model(x, training=False), sample_weight)
        gradients = tape.gradient(
            loss, [v.value for v in variables.values()], unconnected_gradients="zero"
        )
        return {
            f"fisher/{path}": count * _unscaled(g, scale) ** 2
            for path, g in zip(variables, gradients, strict=True)
        }

    def _one_by_one(
        self, model: Any, variables: Variables, batch: Any, weights: tf.Tensor, scale: float
    ) -> Statistics:
        """Σ_b w_b g_b² where no layer could be tapped: the whole model, example by example.

        In a loop: vectorised, ops of many axes have given wrong numbers on CPUs (TensorFlow 2.21
        with oneDNN).
        """
        values = [v.value for v in variables.values()]

        def squares(example: Any) -> list[tf.Tensor]:
            weight, (x, y, *within) = example[0], tf.nest.map_structure(alone, example[1])
            with tf.GradientTape() as tape:
                outputs = self._seen(model, model(x, training=False))
                loss = scale * model.data_loss(x, y, outputs, *within)
            found = tape.gradient(loss, values, unconnected_gradients="zero")
            return [weight * _unscaled(g, scale) ** 2 for g in found]

        def add(sums: list[tf.Tensor], example: Any) -> list[tf.Tensor]:
            return [a + b for a, b in zip(sums, squares(example), strict=True)]

        zeros = [tf.zeros(v.shape) for v in variables.values()]
        sums = tf.foldl(add, (weights, batch), zeros)
        return {f"fisher/{path}": s for path, s in zip(variables, sums, strict=True)}

    def _seen(self, model: Any, outputs: Any) -> Any:
        """What the loss is taken of."""
        if self.estimator != "negated":
            return outputs
        seen = negated(model, outputs)
        seen._keras_mask = getattr(outputs, "_keras_mask", None)
        return seen

    def chunk(self, variables: Variables, batch_size: int) -> int:
        """How many examples of a batch to work on at once, for memory's sake."""
        if self.estimator == "batch":
            return batch_size
        parameters = sum(int(np.prod(v.shape)) for v in variables.values())
        return max(1, min(batch_size, _MAX_FLOATS // max(parameters, 1)))

    @staticmethod
    def check(statistics: Arrays) -> None:
        """Raise `ValueError` naming the variable if a value is not finite."""
        for name, values in statistics.items():
            if not np.isfinite(values).all():
                raise ValueError(
                    f"The Fisher information of {name.partition('/')[2]!r} is not finite: the loss "
                    "or the weights have diverged. Nothing was changed."
                )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"estimator": self.estimator, "gamma": self.gamma, "every": self.every}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The inverse of `get_config`."""
        return cls(**config)


@keras.saving.register_keras_serializable("keras_dwd")
class DiagonalFisher(Fisher):
    """Estimates F_i = E_x[(∂ log p_θ(x) / ∂θ_i)²], online in the training step or in one pass.

    The online estimate is an exponential moving average over training steps,
    `slot ← γ·slot + (1−γ)·F̂`, divided by `1 − γⁿ` when read (the bias correction of Adam). It
    is reset at each task boundary. Both forms see the loss of the data alone: no penalty, no
    weight decay, no regularisation loss. All estimators but `batch` work in inference mode on the
    gradient of each example, by closed forms per layer (see `register_rule`) where there are any.

    Args:
        estimator: How F̂ of a batch of B examples is computed.
            `"batch"` is B times the squared mean gradient: free in the training step, biased. It
            takes the loss for a mean over examples, as Keras losses are by default.
            `"exact"` is the mean of the squared gradients of single examples with their true
            labels (the empirical Fisher).
            `"influence"` is the same with each example's square divided by (r + median(r)) · m,
            where r is the squared norm of the loss gradient at the model's outputs, or at the
            logits of a cross-entropy: examples that are learned well, whose gradients vanish, count
            as much as those that are not. And m is the mean squared margin of a cross-entropy, the
            distance between the two highest logits: what matters is how far logits move in
            relation to how far they may.
            `"sampled"` draws the labels from the model's own output (the true Fisher).
            `"negated"` takes the gradient at the negated logits. The last two need a cross-entropy
            loss on a single output; `"sampled"` can do with a mean squared error.
            `"adam"` is B times Adam's second moment: free, also of memory, biased as `"batch"` is.
            It needs a `DWDOptimizer` around an Adam or RMSprop, whose gradients have no pull in
            them; L2 regularisation and clipping are in it. There is no pass over data with it.
        gamma: γ in [0, 1) of the online estimate, 0.9 to 0.95 recommended; `None` switches the
            online estimate off, `consolidate` then needs data.
        every: The online estimate is updated at every n-th training step. Neighbouring steps tell
            much the same; each update is a pass over memory.

    Reference:
        [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796);
        [van de Ven, 2025](https://arxiv.org/abs/2502.11756) on the estimators;
        [EWC-DR](https://arxiv.org/abs/2603.18596) for negated logits.
    """

    def __init__(self, estimator: Estimator = "batch", gamma: float | None = 0.95, every: int = 5):
        super().__init__(estimator, gamma, every)


def _floats(x: Any) -> Any:
    return tf.cast(x, "float32") if tf.is_tensor(x) and x.dtype.is_floating else x


def _unscaled(gradient: Any, scale: float) -> tf.Tensor:
    """Dense, in float32: embeddings and mapped losses have gradients that are slices."""
    return tf.cast(tf.convert_to_tensor(gradient), "float32") / scale
