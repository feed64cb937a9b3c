"""Estimates of the Fisher information, online in the training step or in one pass over data."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import FixedSettings, integer, number
from keras_dwd.communicator import Communicator
from keras_dwd.curvature import (  # noqa: F401  (to register the rules)
    closed_forms,
    language_rules,
    lora_rules,
    recurrent,
)
from keras_dwd.curvature.example_gradients import (
    layer_flows,
    one_by_one,
    taken_calls,
    times,
    unscaled,
)
from keras_dwd.curvature.examples import (
    TOLERANCE,
    arrays_in,
    carried_states,
    carries_state,
    count_of,
    coupling,
    loss_gradients,
    masks_of,
    mixing,
    one_each,
)
from keras_dwd.curvature.influence import LEAST_MARGIN, influence
from keras_dwd.curvature.layer_recorder import LayerRecorder
from keras_dwd.curvature.likelihood import (
    by_logits,
    counted_positions,
    example_weights,
    needs_labels,
    negated,
    positions_of,
    reductions,
    sample_labels,
    sums_examples,
)
from keras_dwd.curvature.rule_check import TOLERANCE as RULE_TOLERANCE
from keras_dwd.curvature.rule_check import contradiction, is_of_user
from keras_dwd.curvature.rules import GENERIC, LayerIO, RuledLayer, methods_of, ruled_layers
from keras_dwd.keras_private import mask_of, set_mask
from keras_dwd.learner import Learner, data_loss, has_own_loss
from keras_dwd.precision.block import Block
from keras_dwd.precision.diagonal import Diagonal
from keras_dwd.precision.kronecker import SIDES
from keras_dwd.state import Commit, refuse
from keras_dwd.variables import Arrays, Variables, untracked

Estimator = Literal["batch", "empirical", "influence", "mc", "negated", "adam"]
EARLIER_NAMES = {"exact": "empirical", "sampled": "mc"}
"""Names of estimators in version 0.1, still accepted as arguments and in files."""

Statistics = dict[str, tf.Tensor]
"""Means over examples, by `NAME/PATH`, from which the Fisher information is built."""

NAMES = {"fisher", "sketch", "margin", *SIDES, *(f"{side}_trace" for side in SIDES)}
"""The names of statistics."""
SCALARS = {"fisher_weight", "fisher_looked"}
"""The names of the other arrays of an online estimate in files, scalars."""


_USE_BATCH = 'use `fisher=DiagonalFisher("batch")`, which takes the gradients of whole batches'

# The counter of examples restarts at zero when it reaches this power of two.
_TURN = 2**20
# The largest number of floats in the per-example gradients that are computed at once (1 GB).
_MAX_FLOATS = 2**28


class Fisher(FixedSettings):
    """The base of `DiagonalFisher` and `KroneckerFisher`, which document the arguments.

    A batch yields statistics, which are means over its examples. Their moving average over training
    steps is the online estimate; their mean over one pass through the data is the estimate made at
    a boundary.
    """

    # Largest ranks of the blocks in a loaded state; `KroneckerFisher` has settings for them.
    rank = 256
    correction = 1

    def __init__(self, estimator: str, gamma: float | None, every: int):
        estimator = EARLIER_NAMES.get(estimator, estimator)
        if estimator not in get_args(Estimator):
            known = ", ".join(get_args(Estimator))
            raise ValueError(f"`estimator` must be one of {known}. Received: {estimator!r}")
        self.estimator: str = estimator
        self.gamma = None if gamma is None else number("gamma", gamma, 0, 1, closed=False)
        self.every = integer("every", every, 1)
        self.slots: dict[str, keras.Variable] = {}
        self.failure = ""  # why the training step cannot update the online estimate
        # 1 − γⁿ as the moving average of ones: exact, and there is no step counter to overflow.
        self.weight = keras.Variable(0.0, trainable=False, dtype="float32", name="fisher_weight")
        # The number of examples processed, modulo `_TURN`. Not int32, which TensorFlow keeps in
        # host memory, where a step that XLA compiles for a GPU cannot access it.
        self.examples_seen = keras.Variable(0, trainable=False, dtype="int64", name="fisher_looked")
        # The largest `coupling` and `mixing` of examples since the last boundary.
        self.coupling = keras.Variable(0.0, trainable=False, dtype="float32", name="coupling")
        # The largest `contradiction` of a user's rule since the last boundary, and those rules.
        self.contradiction = keras.Variable(
            0.0, trainable=False, dtype="float32", name="contradiction"
        )
        self._checked_rules: list[str] = []

    @property
    def supports_jit(self) -> bool:
        """Whether XLA can compile a training step that updates this estimate."""
        return True

    @property
    def online(self) -> bool:
        """Whether the training step updates an online estimate."""
        return self.gamma is not None or self.estimator == "adam"

    def shapes(self, model: Learner, variables: Variables) -> dict[str, tuple[int, ...]]:
        """The shape of each statistic, by `NAME/PATH`."""
        shapes = self._shapes(model, variables)
        return shapes | dict.fromkeys(self._margins(shapes), ())

    def blocks(self, model: Learner, variables: Variables, statistics: Arrays) -> dict[str, Block]:
        """The blocks of the Fisher information, by path, built from statistics."""
        names = [name for name in statistics if not name.startswith("margin/")]
        normalized = dict(statistics)
        for name in names:
            margin = statistics.get(f"margin/{name.partition('/')[2]}")
            if margin is not None:
                normalized[name] = statistics[name] / (margin + LEAST_MARGIN)
        return self._blocks(model, variables, {name: normalized[name] for name in names})

    def _margins(self, names: Iterable[str]) -> list[str]:
        """The names of the mean squared margins, one for each block that is divided by it."""
        if self.estimator != "influence":
            return []
        return sorted({f"margin/{name.partition('/')[2]}" for name in names})

    # Overridden by subclasses.

    def _shapes(self, model: Learner, variables: Variables) -> dict[str, tuple[int, ...]]:
        """The shape of each statistic, by `NAME/PATH`, without margins."""
        if self.estimator == "adam":  # the optimizer has the statistics
            return {}
        return {f"fisher/{path}": tuple(v.shape) for path, v in variables.items()}

    def layer_statistics(
        self, ruled: RuledLayer, flows: list[LayerIO], weights: tf.Tensor
    ) -> Statistics:
        """The statistics of one layer; graph code.

        Args:
            ruled: The layer.
            flows: Its calls in this batch.
            weights: `(batch,)`, the weight of each example's squared gradient.
        """
        squares = ruled.rule.squares(ruled.layer, flows, weights)
        return {f"fisher/{ruled.paths[name]}": value for name, value in squares.items()}

    def _blocks(self, model: Learner, variables: Variables, statistics: Arrays) -> dict[str, Block]:
        """The blocks of the Fisher information, by path, built from normalized statistics."""
        blocks: dict[str, Block] = {}
        for name, values in statistics.items():
            kind, _, path = name.partition("/")
            if kind == "fisher" and path in variables:
                blocks[path] = Diagonal(path, values)
        return blocks

    # The online estimate.

    def build(self, shapes: Mapping[str, tuple[int, ...]], optimizer: Any = None) -> None:
        """Create the missing slots of the online estimate, which then restarts for all slots.

        Args:
            shapes: Shapes of the statistics, by `NAME/PATH`.
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
        """Drop the slots of statistics that no longer exist, as when LoRA changes a layer."""
        for name in set(self.slots) - set(names):
            del self.slots[name]

    def update(self, statistics: Statistics, valid: tf.Tensor | None = None) -> None:
        """Update the moving averages with the statistics of one batch; graph code.

        Args:
            statistics: The statistics of the batch.
            valid: Scalar boolean; if it is false, nothing is updated.
        """
        if self.gamma is None:
            raise ValueError("The online estimate is switched off: `gamma` is None.")
        averages = [(self.slots[name], new) for name, new in statistics.items()]
        for average, new in [*averages, (self.weight, tf.ones(()))]:
            updated = self.gamma * average.value + (1 - self.gamma) * tf.cast(new, "float32")
            average.assign(updated if valid is None else tf.where(valid, updated, average.value))

    def record_batch_size(self, examples: tf.Tensor) -> None:
        """Record the largest batch size so far, for the estimator `adam`; graph code."""
        self.weight.assign(tf.maximum(self.weight.value, tf.cast(examples, "float32")))

    def estimate(
        self, optimizer: Any = None, variables: Variables | None = None, summed: bool = False
    ) -> Arrays:
        """The bias-corrected moving averages, by `NAME/PATH`.

        Args:
            optimizer: The `DWDOptimizer` whose second moments the estimator `adam` reads.
            variables: The variables, by path, whose second moments `adam` reads.
            summed: Whether the loss is a sum over the examples of a batch, for `adam`.

        Raises:
            ValueError: If there was no training step since the last boundary, or if the training
                step could not update the estimate.
        """
        if self.failure:
            raise ValueError(self.failure)
        weight = float(np.asarray(self.weight))
        if weight == 0 and not self.online:
            raise ValueError(
                "There is no online Fisher estimate: with `gamma=None`, as in `ewc` and "
                "`online_ewc`, the Fisher information is estimated from data. Call "
                "`consolidate(x, y)` with the data of the task."
            )
        if weight == 0:
            raise ValueError(
                "There is no online Fisher estimate: the model was not trained since the last "
                "boundary. Train it first, or pass a sample of the data: `consolidate(x, y)`."
            )
        if self.estimator == "adam":
            assert variables is not None
            moments = {path: optimizer.second_moment(v) for path, v in variables.items()}
            steps = optimizer.inner_optimizer.gradient_accumulation_steps or 1
            examples = steps * (1 / weight if summed else weight)
            return {f"fisher/{p}": examples * np.asarray(m, "float32") for p, m in moments.items()}
        return {name: np.asarray(v, "float32") / weight for name, v in self.slots.items()}

    def reset(self) -> None:
        """Reset the online estimate at the start of a new task."""
        scalars = [self.weight, self.examples_seen, self.coupling, self.contradiction]
        for variable in [*scalars, *self.slots.values()]:
            variable.assign(tf.zeros(variable.shape, variable.dtype))

    def set_examples_seen(self, examples: int) -> None:
        """Set the number of examples that were processed before the next batch."""
        self.examples_seen.assign(examples % _TURN)

    def state(self) -> Arrays:
        """The online slots by `NAME/PATH`, `fisher_weight` and `fisher_looked`, as arrays."""
        arrays = {name: np.asarray(v) for name, v in self.slots.items()}
        counts = {"fisher_weight": self.weight, "fisher_looked": self.examples_seen}
        return arrays | {name: np.asarray(v) for name, v in counts.items()}

    def prepare_state(
        self,
        state: Arrays,
        shapes: Mapping[str, tuple[int, ...]],
        local_shard: Callable[[Arrays], Arrays],
    ) -> Commit:
        """Check a state, as returned by `state` for any model, without changing anything yet.

        An online estimate of another type than this one is dropped: the estimate of the current
        task then restarts.

        Args:
            state: The statistics by `NAME/PATH`, `fisher_weight` and `fisher_looked`.
            shapes: Shapes of the statistics of this model, by `NAME/PATH`.
            local_shard: Picks the statistics that this worker keeps.

        Returns:
            A function that applies the state and cannot fail.

        Raises:
            FileError: If an array does not fit the model.
        """
        slots = {key: array for key, array in state.items() if "/" in key}
        for key, array in slots.items():
            if array.shape != shapes.get(key, array.shape):
                name, _, path = key.partition("/")
                refuse(name, path, array)
        foreign = not slots.keys() <= shapes.keys()

        def commit() -> None:
            self.slots.clear()
            local = local_shard(slots)
            if self.gamma is not None and local and not foreign:
                self.build({key: array.shape for key, array in local.items()})
                for key, array in local.items():
                    self.slots[key].assign(array)
            self.weight.assign(0.0 if foreign else state["fisher_weight"])
            self.examples_seen.assign(state["fisher_looked"])

        return commit

    # One batch.

    def batch_statistics(
        self,
        model: Learner,
        variables: Variables,
        batch: tuple[Any, Any, Any],
        scale: float,
        communicator: Communicator,
    ) -> Statistics:
        """The statistics of one batch, in inference mode, of the data loss alone; graph code.

        Args:
            model: A compiled model.
            variables: The variables to differentiate with respect to, by path.
            batch: `(x, y, sample_weight)`, the last two of which may be `None`. Without labels
                every estimator takes labels drawn from the model's output. One weight per example
                multiplies its squared gradient: an example of weight two counts twice. Weights of
                time steps or outputs are part of the example's loss. See `example_weights` for
                losses that are weighted means.
            scale: The loss is multiplied by this factor before differentiation and the gradients
                are divided by it afterwards, because small gradients underflow in float16.
            communicator: The workers whose batches, all of the same size, form one global batch.
        """
        x, y, sample_weight = batch
        count = count_of(batch)
        if self.estimator == "adam":
            raise ValueError(
                "The estimator 'adam' is made by training alone, not in a pass: leave `x` out."
            )
        if self.estimator == "batch":
            return self._mean_gradient_statistics(model, variables, batch, scale)
        processed = tf.cast(self.examples_seen.value, "int32")
        first = processed + communicator.rank * count
        self.examples_seen.assign(tf.cast((processed + communicator.size * count) % _TURN, "int64"))
        inner_weights: tuple[Any, ...] = ()
        if sample_weight is not None:
            weight_arrays = tf.nest.flatten(sample_weight)
            sample_weight = weight_arrays[0] if len(weight_arrays) == 1 else sample_weight
            if not one_each(sample_weight):
                inner_weights = (sample_weight,)
        before = [tf.identity(v.value) for v in carried_states(model)]
        layers = [
            ruled
            for ruled in ruled_layers(model)
            if ruled.trains(variables) and not carries_state(ruled.layer)
        ]
        with tf.GradientTape() as tape:
            generic = [ruled.layer for ruled in layers if ruled.rule is GENERIC]
            recorded = [ruled.recorded for ruled in layers]
            recorder = LayerRecorder(recorded, activated=generic, methods=methods_of(layers))
            with recorder:
                outputs = model(x, training=False)
            loss_outputs = self._loss_outputs(model, outputs)
        masks = masks_of(outputs)
        labels = self._labels(model, y, outputs, masks, first, *inner_weights)
        y = labels if y is None else y
        weights = tf.fill((count,), 1 / tf.cast(count, "float32"))
        if sample_weight is not None:
            counted = counted_positions(model, y, outputs, masks)
            factors = example_weights(model, sample_weight, counted, not inner_weights)
            weights *= 1.0 if factors is None else factors
        of_loss = (x, labels, loss_outputs, *inner_weights)
        by_outputs = loss_gradients(model, of_loss, masks, scale)
        self._record_coupling(coupling(model, of_loss, by_outputs, scale))
        if not before:
            once = tf.cond(processed == 0, lambda: mixing(model, x, outputs), lambda: tf.zeros(()))
            self._record_coupling(once)
        margin, roots = self._roots(
            model, y, outputs, by_outputs, masks, weights > 0, scale, communicator, *inner_weights
        )
        if roots is not None:
            by_outputs = [times(r, g) for r, g in zip(roots, by_outputs, strict=True)]
        calls = {ruled: taken_calls(ruled, recorder.calls(ruled.recorded)) for ruled in layers}
        flows = layer_flows(tape, calls, tf.nest.flatten(loss_outputs), by_outputs, scale, first)

        statistics: Statistics = {}
        covered: set[str] = set()
        of_users: dict[RuledLayer, list[LayerIO]] = {}
        for ruled, of_layer in flows.items():
            if of_layer:
                layer_statistics = self.layer_statistics(ruled, of_layer, weights)
                statistics |= layer_statistics
                covered |= {name.partition("/")[2] for name in layer_statistics}
                covered |= set(ruled.matrix_paths if ruled.form else ())
                if is_of_user(ruled.rule):
                    of_users[ruled] = of_layer
            elif of_layer is not None:  # was not called: has no gradient and no statistics
                covered |= set(ruled.paths.values())
        rest = {path: v for path, v in variables.items() if path not in covered}
        batch = (x, labels, *inner_weights)
        if of_users and not before:
            self._check_rules(model, variables, of_users, batch, scale, processed == 0, roots)
        if rest:
            of_model = functools.partial(self._loss_outputs, model)
            sums = one_by_one(model, rest, batch, weights, scale, before, roots, of_model)
            statistics |= {f"fisher/{path}": squares for path, squares in sums.items()}
        shapes = self._shapes(model, variables)
        known = {name: value for name, value in statistics.items() if name in shapes}
        return known | dict.fromkeys(self._margins(known), margin)

    def _roots(
        self,
        model: Learner,
        y: Any,
        outputs: Any,
        by_outputs: list[tf.Tensor],
        masks: dict[int, tf.Tensor],
        has_weight: tf.Tensor,
        scale: float,
        communicator: Communicator,
        *weights: Any,
    ) -> tuple[tf.Tensor, list[tf.Tensor] | None]:
        """The mean squared margin, and by output the factor for the gradient of each example.

        Args:
            model: A compiled model.
            y: The labels.
            outputs: The outputs of the model.
            by_outputs: The gradients of each example's loss by the outputs of the loss, scaled.
            masks: Keras masks of the outputs, by index in the flat list of outputs.
            has_weight: Whether an example has a weight, `(batch,)`. Those without are ignored, such
                as those that pad the batches of workers.
            scale: The factor in the gradients.
            communicator: The workers whose batches form one global batch.
            *weights: Sample weights of positions, if there are any.

        Returns:
            The margin, and by output the factors, `(batch,)`, or `None` for ones.
        """
        counted = counted_positions(model, y, outputs, masks)
        positions = positions_of(model, outputs, counted, *weights)
        roots = None if positions is None else [tf.sqrt(count) for count in positions]
        if self.estimator != "influence":
            return tf.zeros(()), roots
        if roots is not None:
            by_outputs = [times(r, g) for r, g in zip(roots, by_outputs, strict=True)]
        of_logits = [unscaled(g, scale) for g in by_logits(model, outputs, by_outputs)]
        counted = counted_positions(model, y, outputs, masks, *weights)
        factors, margin = influence(
            model, y, outputs, of_logits, counted, has_weight, communicator, *weights
        )
        more = [tf.sqrt(factor) for factor in factors]
        return margin, more if roots is None else [r * m for r, m in zip(roots, more, strict=True)]

    def _labels(
        self,
        model: Learner,
        y: Any,
        outputs: Any,
        masks: dict[int, tf.Tensor],
        first: tf.Tensor,
        *weights: Any,
    ) -> Any:
        """The labels that the gradients are taken with: those given, or drawn from the model.

        Args:
            model: A compiled model.
            y: The labels, or `None`.
            outputs: The outputs of the model.
            masks: Keras masks of the outputs, by index in the flat list of outputs.
            first: The number of examples processed before.
            *weights: Sample weights of positions, if there are any.
        """
        if self.estimator != "mc" and (y is not None or not needs_labels(model)):
            return y
        heeded = weights if reductions(model) == {"weighted mean"} else ()  # zeros act as a mask
        counted = counted_positions(model, y, outputs, masks, *heeded)
        return sample_labels(model, y, outputs, first, counted)

    def _check_rules(
        self,
        model: Learner,
        variables: Variables,
        of_users: Mapping[RuledLayer, list[LayerIO]],
        batch: tuple[Any, ...],
        scale: float,
        due: tf.Tensor,
        roots: list[tf.Tensor] | None,
    ) -> None:
        """Compare rules of users with the gradients of single examples, if it is due. Graph code.

        Args:
            model: A compiled model.
            variables: The variables to differentiate with respect to, by path.
            of_users: The calls of the layers with such rules.
            batch: `(x, y)`, followed by sample weights if they are part of an example's loss.
            scale: The loss is multiplied by this factor before differentiation.
            due: Scalar boolean.
            roots: See `one_by_one`.
        """
        self._checked_rules = [
            f"{type(ruled.rule).__name__} of {ruled.layer.name!r}" for ruled in of_users
        ]
        paths = {path for ruled in of_users for path in ruled.paths.values()}
        named = {path: v for path, v in variables.items() if path in paths}

        def largest() -> tf.Tensor:
            ones = tf.ones((count_of(batch),))
            of_model = functools.partial(self._loss_outputs, model)
            true = one_by_one(model, named, batch, ones, scale, [], roots, of_model)
            deviations = [contradiction(ruled, flows, true) for ruled, flows in of_users.items()]
            return tf.reduce_max(tf.stack(deviations))

        share = tf.cond(due, largest, lambda: tf.zeros(()))
        self.contradiction.assign(tf.maximum(self.contradiction.value, share))

    def _mean_gradient_statistics(
        self, model: Learner, variables: Variables, batch: tuple[Any, Any, Any], scale: float
    ) -> Statistics:
        """The statistics of the estimator `batch`: B times the squared mean gradient."""
        x, y, sample_weight = batch
        examples = tf.cast(count_of(batch), "float32")
        first = tf.cast(self.examples_seen.value, "int32")
        with tf.GradientTape() as tape:
            outputs = model(x, training=False)
            labels = self._labels(model, y, outputs, masks_of(outputs), first)
            loss = scale * data_loss(model, x, labels, outputs, sample_weight)
        gradients = tape.gradient(
            loss, [v.value for v in variables.values()], unconnected_gradients="zero"
        )
        return mean_gradient_statistics(
            model, variables, [unscaled(g, scale) for g in gradients], examples
        )

    def _loss_outputs(self, model: Learner, outputs: Any) -> Any:
        """The outputs that the loss is computed from; negated for the estimator `negated`."""
        if self.estimator != "negated":
            return outputs
        negated_outputs = negated(model, outputs)
        set_mask(negated_outputs, mask_of(outputs))
        return negated_outputs

    def chunk(self, variables: Variables, batch_size: int) -> int:
        """The number of examples of a batch to process at once, limited by memory."""
        if self.estimator == "batch":
            return batch_size
        parameters = sum(int(np.prod(v.shape)) for v in variables.values())
        return max(1, min(batch_size, _MAX_FLOATS // max(parameters, 1)))

    def check(self, statistics: Arrays, information: float, model: Learner) -> None:
        """Raise `ValueError` if an estimate is not finite, or zero at all variables.

        Args:
            statistics: The statistics of the task that this worker keeps.
            information: The sum of the absolute statistics of all workers.
            model: The model.
        """
        for name, values in statistics.items():
            if not np.isfinite(values).all():
                advice = ""
                if self.estimator in ("influence", "mc", "negated"):
                    advice = (
                        "With logits that are masked with -inf use the estimator 'empirical', "
                        "which needs no more than the gradients of the loss. "
                    )
                raise ValueError(
                    f"The Fisher information of {name.partition('/')[2]!r} is not finite, although "
                    "the weights are: the loss of some examples, its gradient or the outputs of "
                    f"the model are infinite or not defined. {advice}Nothing was changed."
                )
        if information == 0:
            raise ValueError(
                "The Fisher information of this task is zero at all weights, so that nothing would "
                f"be protected: {self._cause_of_zero(model)} Nothing was changed."
            )

    def _cause_of_zero(self, model: Learner) -> str:
        if not arrays_in(model.loss) and not has_own_loss(model):
            return (
                "the model has no loss in `compile`, and losses that layers add with `add_loss` "
                "are not part of it. Pass a loss to `compile`, or define `compute_loss` in a "
                "subclass of DWDModel."
            )
        if self.estimator in ("batch", "adam"):
            return "the loss has no gradient at the weights."
        return (
            "the loss of a single example has no gradient at the weights. If the loss compares the "
            f"examples of a batch, {_USE_BATCH}. If all examples are learned perfectly, leave "
            "`x` and `y` out, to use the estimate made while they were learned."
        )

    @property
    def compares_examples(self) -> bool:
        """Whether the loss, or the model, is known to compare the examples of a batch."""
        return float(np.asarray(self.coupling)) > TOLERANCE

    def refuse_coupling(self) -> None:
        """Raise `ValueError` because the loss, or the model, compares the examples of a batch."""
        raise ValueError(
            "The loss or the model compares the examples of a batch: the gradient of the loss is "
            "not a mean of those of single examples, which the estimator "
            f"{self.estimator!r} needs. Instead, {_USE_BATCH}. Nothing was changed."
        )

    @property
    def contradicts(self) -> bool:
        """Whether a rule of the user is known to give other gradients than a layer has."""
        return float(np.asarray(self.contradiction)) > RULE_TOLERANCE

    def refuse_rules(self) -> None:
        """Raise `ValueError` because a rule of the user gives other gradients than a layer has."""
        raise ValueError(
            "A rule registered by `register_rule` gives other gradients than those that its layer "
            f"has for single examples: {', '.join(self._checked_rules)}. Mend it, or leave it "
            "out: the layer is then differentiated example by example. Nothing was changed."
        )

    def forget_loss(self) -> None:
        """Forget what is known about a loss that is replaced, and whether it can be estimated."""
        self.failure = ""
        self.coupling.assign(0.0)

    def _record_coupling(self, share: tf.Tensor) -> None:
        self.coupling.assign(tf.maximum(self.coupling.value, share))

    @property
    def takes_any_loss(self) -> bool:
        """Whether the estimator is meant for every model that Keras trains."""
        return self.estimator in ("empirical", "influence")

    def without_examples(self, error: Exception) -> str:
        """What to tell where the gradients of single examples cannot be computed."""
        # Keras puts the reason below a line on the layer, between codes for bold face.
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = " ".join(re.sub(r"\x1b\[\d+m", "", line).strip() for line in lines[:2])
        return (
            "The Fisher information of this model cannot be estimated from single examples "
            f"({type(error).__name__}: {reason}). Instead, {_USE_BATCH}."
        )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"estimator": self.estimator, "gamma": self.gamma, "every": self.every}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The inverse of `get_config`."""
        return cls(**config)


def mean_gradient_statistics(
    model: Learner, paths: Iterable[str], gradients: Sequence[Any], examples: tf.Tensor
) -> Statistics:
    """The statistics of the estimator `batch`: B times the squared mean gradient. Graph code.

    Args:
        model: A compiled model.
        paths: Of the variables.
        gradients: The gradient of the loss by each variable, or `None`.
        examples: B, the number of examples.
    """
    count = tf.cast(examples, "float32")
    count = 1 / count if sums_examples(model) else count  # B times the mean, squared
    return {
        f"fisher/{path}": count * tf.square(tf.cast(tf.convert_to_tensor(g), "float32"))
        for path, g in zip(paths, gradients, strict=True)
        if g is not None
    }
