"""Squared gradients of single examples: at the calls of layers, or example by example."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from keras_dwd.curvature.examples import (
    carried_states,
    carries_state,
    count_of,
    has_gradient,
    masks_of,
    part_of,
    restored_after,
)
from keras_dwd.curvature.layer_recorder import Call
from keras_dwd.curvature.rules import GENERIC, LayerIO, RuledLayer
from keras_dwd.keras_private import layers_within, mask_of, set_mask
from keras_dwd.learner import Learner, data_loss
from keras_dwd.variables import Variables


def taken_calls(ruled: RuledLayer, calls: list[Call] | None) -> list[Call] | None:
    """The recorded calls of a layer; `None` if its rule does not hold for all of them."""
    of_layer = calls or []
    if ruled.random and any(call.trains for call in of_layer):
        return None
    taken = all(
        call.plain if ruled.rule is GENERIC else ruled.rule.takes(call.arguments)
        for call in of_layer
    )
    return calls if taken else None


def layer_flows(
    tape: tf.GradientTape,
    calls: Mapping[RuledLayer, list[Call] | None],
    targets: list[tf.Tensor],
    by_targets: list[tf.Tensor],
    scale: float,
    first: tf.Tensor,
) -> dict[RuledLayer, list[LayerIO] | None]:
    """Inputs and gradients of all calls of each layer, from one backward pass. Graph code.

    Args:
        tape: Has recorded the calls.
        calls: The recorded calls of each layer; `None` for those to differentiate otherwise.
        targets: The outputs that the loss is computed from.
        by_targets: The gradient of each example's loss by them.
        scale: The factor in these gradients.
        first: The number of examples processed before.
    """
    known = {id(call): call for of_layer in calls.values() for call in of_layer or ()}
    differentiable = [has_gradient(target) for target in targets]
    gradients = tape.gradient(
        list(itertools.compress(targets, differentiable)),
        [call.output for call in known.values()],
        output_gradients=list(itertools.compress(by_targets, differentiable)),
        unconnected_gradients="zero",
    )
    flows = {
        key: LayerIO(
            tuple(_floats(i) for i in call.inputs),
            tf.nest.map_structure(lambda g: unscaled(g, scale), gradient),
            first,
            tf.nest.map_structure(_floats, call.initial_state),
            call.mask,
        )
        for (key, call), gradient in zip(known.items(), gradients, strict=True)
    }
    return {
        ruled: None if of_layer is None else [flows[id(call)] for call in of_layer]
        for ruled, of_layer in calls.items()
    }


def one_by_one(
    model: Learner,
    variables: Variables,
    batch: tuple[Any, ...],
    weights: tf.Tensor,
    scale: float,
    before: list[tf.Tensor],
    roots: list[tf.Tensor] | None,
    loss_outputs: Callable[[Any], Any],
) -> dict[str, tf.Tensor]:
    """Σ_b w_b g_b² by path, for layers without recorded calls: runs the model example by example.

    A model with states for each example is run on the whole batch for each of them instead.

    Uses a loop: `tf.vectorized_map` computes wrong values for ops of many axes on CPUs
    (TensorFlow 2.21 with oneDNN).

    Args:
        model: A compiled model.
        variables: The variables to differentiate with respect to, by path.
        batch: `(x, y)`, followed by sample weights if they are part of an example's loss.
        weights: The weights w_b.
        scale: The loss is multiplied by this factor before differentiation.
        before: The values of `carried_states(model)` before the batch.
        roots: By output, what the gradient by it is multiplied by, `(batch,)`; `None` for ones.
        loss_outputs: The outputs that the loss is computed from, of those of the model.
    """
    values = [v.value for v in variables.values()]
    states = carried_states(model)
    together = any(carries_state(layer) for layer in layers_within(model))

    def squares(weight: tf.Tensor, index: tf.Tensor) -> list[tf.Tensor]:
        x, y, *inner_weights = part_of(batch, index, 1)
        with tf.GradientTape() as tape, restored_after(states, before):
            outputs = loss_outputs(model(batch[0] if together else x, training=False))
            if together:
                masks = part_of(masks_of(outputs), index, 1)
                outputs = part_of(outputs, index, 1)
                for place, mask in masks.items():
                    set_mask(tf.nest.flatten(outputs)[place], mask)
            if roots is not None:
                outputs = _rescaled(outputs, [tf.gather(root, [index]) for root in roots])
            loss = scale * data_loss(model, x, y, outputs, *inner_weights)
        gradients = tape.gradient(loss, values, unconnected_gradients="zero")
        return [weight * unscaled(g, scale) ** 2 for g in gradients]

    def add(sums: list[tf.Tensor], example: Any) -> list[tf.Tensor]:
        return [a + b for a, b in zip(sums, squares(*example), strict=True)]

    zeros = [tf.zeros(v.shape) for v in variables.values()]
    sums = tf.foldl(add, (weights, tf.range(count_of(batch))), zeros)
    return dict(zip(variables, sums, strict=True))


def times(factors: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    """The gradient of each example times its factor, multiplied in float32."""
    factors = tf.reshape(factors, [-1] + [1] * (len(gradient.shape) - 1))
    return tf.cast(factors * tf.cast(gradient, "float32"), gradient.dtype)


def _rescaled(outputs: Any, factors: list[tf.Tensor]) -> Any:
    """The outputs as they are, but their gradients multiplied by a factor for each example."""

    def one(output: Any, factor: tf.Tensor) -> Any:
        @tf.custom_gradient
        def same(values: tf.Tensor) -> Any:
            return tf.identity(values), lambda g: times(factor, g)

        if not has_gradient(output):
            return output
        rescaled = same(output)
        set_mask(rescaled, mask_of(output))
        return rescaled

    flat = [one(o, f) for o, f in zip(tf.nest.flatten(outputs), factors, strict=True)]
    return tf.nest.pack_sequence_as(outputs, flat) if tf.nest.is_nested(outputs) else flat[0]


def _floats(x: Any) -> Any:
    """Floating-point tensors in float32; anything else as it is."""
    return tf.cast(x, "float32") if tf.is_tensor(x) and x.dtype.is_floating else x


def unscaled(gradient: Any, scale: float) -> tf.Tensor:
    """The gradient divided by `scale`, dense and in float32; embeddings give `tf.IndexedSlices`."""
    return tf.cast(tf.convert_to_tensor(gradient), "float32") / scale
