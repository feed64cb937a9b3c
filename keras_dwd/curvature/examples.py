"""Batches in any structure that Keras takes, the single examples in them, and their gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from keras_dwd.keras_private import (
    layers_within,
    mask_of,
    own_trainable_variables,
    set_mask,
)
from keras_dwd.learner import Learner, data_loss

# The loss gradients of the examples alone may differ from those in the batch by this share of their
# squares: rounding stays far below, losses that compare examples are far above.
TOLERANCE = 0.02
# An output may differ by this share of its squares between an example alone and in its batch, from
# rounding. If it differs by more, the examples of the batch influence each other.
_MIXED = 1e-3
# Below this mean square of their gradients the examples are learned, up to rounding.
_LEAST_SQUARE = 1e-9


# Structures, in which Keras allows `None` at any place.


def arrays_in(structure: Any) -> list[Any]:
    """The arrays or tensors in a structure, without `None`."""
    return [leaf for leaf in tf.nest.flatten(structure) if leaf is not None]


def map_arrays(function: Callable[[Any], Any], structure: Any) -> Any:
    """A structure with `function` applied to all its arrays or tensors; `None` stays."""
    return tf.nest.map_structure(lambda a: None if a is None else function(a), structure)


def count_of(batch: Any) -> tf.Tensor:
    """The number of examples of a batch, an int32 scalar. Graph code."""
    first = arrays_in(batch)[0]
    ragged = isinstance(first, tf.RaggedTensor)
    return tf.cast(first.nrows() if ragged else tf.shape(first)[0], "int32")


def part_of(batch: Any, first: Any, count: int) -> Any:
    """A batch of `count` examples from the one at index `first` on. Graph code."""

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, tf.SparseTensor):
            return tf.gather(leaf, first + tf.range(count))
        others = tf.cast(tf.shape(leaf)[1:], "int64")
        start = tf.concat([tf.cast(first, "int64")[None], tf.zeros_like(others)], 0)
        sliced = tf.sparse.slice(leaf, start, tf.concat([[tf.constant(count, "int64")], others], 0))
        sliced.set_shape((count, *leaf.shape[1:]))
        return sliced

    return map_arrays(part, batch)


def one_each(sample_weight: Any) -> bool:
    """Whether `sample_weight` holds exactly one weight per example."""
    return not tf.nest.is_nested(sample_weight) and set(sample_weight.shape[1:]) <= {1}


# States.


def states_of(model: Learner) -> list[keras.Variable]:
    """The variables that a forward pass may change; not frozen weights."""
    trained = {id(v) for layer in layers_within(model) for v in own_trainable_variables(layer)}
    tracked = [v for v in model.non_trainable_variables if id(v) not in trained]
    return [*tracked, *carried_states(model)]


def carries_state(layer: keras.Layer) -> bool:
    """Whether a layer keeps a state for each example of a batch, as with `LSTM(stateful=True)`.

    It takes batches of one size alone, so that no example can be run without the others.
    """
    return bool(getattr(layer, "stateful", False))


def carried_states(model: Learner) -> list[keras.Variable]:
    """The states that are carried over from one batch to the next."""
    layers = [layer for layer in layers_within(model) if carries_state(layer)]
    states = [getattr(layer, "states", None) for layer in layers]  # which Keras does not track
    return [v for v in keras.tree.flatten(states) if isinstance(v, keras.Variable)]


@contextmanager
def restored_after(
    variables: Sequence[keras.Variable], within: Sequence[tf.Tensor] | None = None
) -> Iterator[None]:
    """Context manager that gives variables their current values again at its end. Graph code.

    Args:
        variables: The variables.
        within: The values that they have within the context; their current ones by default.
    """
    values = [tf.identity(v.value) for v in variables]
    if within is not None:
        for variable, value in zip(variables, within, strict=True):
            variable.assign(value)
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


# Gradients.


def loss_gradients(
    model: Learner, batch: tuple[Any, ...], masks: dict[int, tf.Tensor], scale: float
) -> list[tf.Tensor]:
    """Per-example gradients of the loss with respect to the model's outputs.

    Differentiates inside the mapped function. With a gradient through the map, XLA would treat
    everything that the outputs depend on as a constant and recompile each step.

    Args:
        model: A compiled model.
        batch: `(x, y, outputs)`, followed by sample weights if they are part of an example's loss.
        masks: Keras masks of the outputs, by index in the flat list of outputs.
        scale: The loss is multiplied by this factor.

    Returns:
        The gradients as a flat list, each in the shape of its output.
    """
    flattened = tf.nest.flatten((batch, masks))
    present = arrays_in(flattened)

    def gradients_of(example: list[Any]) -> list[tf.Tensor]:
        following = iter(example)
        flat = [None if leaf is None else next(following) for leaf in flattened]
        alone, masked = tf.nest.pack_sequence_as((batch, masks), flat)
        return [g[0] for g in _output_gradients(model, alone, masked, scale)]

    # A function of its own: if tracing it fails, nothing of it is left in the graph.
    @tf.function(autograph=False)
    def vectorized(parts: list[tf.Tensor]) -> list[tf.Tensor]:
        each = lambda example: gradients_of([leaf[None] for leaf in example])  # noqa: E731
        return tf.vectorized_map(each, parts, warn=False)

    if all(isinstance(leaf, tf.Tensor) for leaf in present):
        try:
            return vectorized(present)
        except Exception:  # some operations cannot be vectorized, such as those of CTC
            pass
    return tf.map_fn(
        lambda index: gradients_of(part_of(present, index, 1)),
        tf.range(count_of(batch)),
        fn_output_signature=[
            tf.TensorSpec(output.shape[1:], output.dtype if has_gradient(output) else "float32")
            for output in tf.nest.flatten(batch[2])
        ],
    )


def coupling(
    model: Learner, batch: tuple[Any, ...], alone: list[tf.Tensor], scale: float
) -> tf.Tensor:
    """How much the examples of a batch influence each other in the loss. Graph code.

    Compares the gradient of the batch's loss at each example's outputs with that of the loss of the
    example alone. They have the same direction if the loss is a mean, sum or weighted mean over
    examples; the weights may depend on the batch, as with masks.

    Args:
        model: A compiled model.
        batch: `(x, y, outputs)`, followed by sample weights if they are part of an example's loss.
        alone: What `loss_gradients` returns for the batch.
        scale: The loss is multiplied by this factor.

    Returns:
        The largest share of an output's squared gradients that is in other directions, a float32
        scalar. Zero where this is not known: the loss is random or not defined for the batch, or
        the examples are learned up to rounding.
    """
    try:
        together, again = (_output_gradients(model, batch, {}, scale) for _ in range(2))
    except Exception:  # such as weights with which only single examples have a loss
        return tf.zeros(())
    examples = tf.cast(count_of(batch), "float32")
    shares = [tf.zeros(())]
    for g, same, g_alone in zip(together, again, alone, strict=True):
        g, same, g_alone = (
            examples * tf.reshape(tf.cast(t, "float32"), (tf.shape(t)[0], -1)) / scale
            for t in (g, same, g_alone)
        )
        along = tf.reduce_sum(g * g_alone, 1, keepdims=True)
        factor = tf.math.divide_no_nan(along, tf.reduce_sum(g_alone**2, 1, keepdims=True))
        residual = tf.reduce_sum((g - tf.maximum(factor, 0.0) * g_alone) ** 2)
        square = tf.reduce_sum(g**2)
        random = tf.reduce_sum((g - same) ** 2) > 1e-3 * residual
        counts = tf.math.is_finite(residual) & ~random & (square > _LEAST_SQUARE * examples)
        shares.append(tf.where(counts, tf.math.divide_no_nan(residual, square), 0.0))
    return tf.reduce_max(tf.stack(shares))


def mixing(model: Learner, x: Any, outputs: Any) -> tf.Tensor:
    """1 if the outputs for an example depend on the other examples of its batch, else 0.

    That is so where a model compares examples, as a two-tower model whose outputs are the products
    of all pairs, or takes a mean over the batch. The gradient at a layer's output is then not that
    of one example. Compares the outputs for the first example in its batch and alone. Graph code.

    Args:
        model: A compiled model.
        x: The inputs of the batch.
        outputs: The outputs for `x`, in inference mode.

    Returns:
        A float32 scalar. Zero where this is not known: the outputs are random, or the model cannot
        run on a single example.
    """
    # A function, so that both calls share a graph: that of a large model takes long to trace.
    forward = tf.function(lambda one: model(one, training=False), autograph=False)
    try:
        alone, again = (tf.nest.flatten(forward(part_of(x, 0, 1))) for _ in range(2))
    except Exception:  # such as a model with a fixed batch size
        return tf.zeros(())
    count = count_of(x)
    mixed = [tf.zeros((), "bool")]
    for output, single, same in zip(tf.nest.flatten(outputs), alone, again, strict=True):
        if not (isinstance(output, tf.Tensor) and output.dtype.is_floating):
            continue
        shapes = tf.shape(output)[1:], tf.shape(single)[1:]
        mixed.append(tf.reduce_any((shapes[0] == count) & (shapes[1] == 1) & (count > 1)))
        # Other axes may differ, such as one that is padded to the longest sequence of a batch.
        sizes = tf.concat([[1], tf.minimum(*shapes)], 0)
        in_batch, single, same = (
            tf.cast(tf.slice(t, tf.zeros_like(sizes), sizes), "float32")
            for t in (output, single, same)
        )
        # Values such as −inf for classes that are not allowed tell nothing.
        difference = _square(in_batch - single)
        random = _square(single - same) > 1e-3 * difference
        comparable = tf.reduce_all(shapes[0] == shapes[1]) & ~random
        mixed.append(comparable & (difference > _MIXED * _square(single + in_batch)))
    return tf.cast(tf.reduce_any(tf.stack(mixed)), "float32")


def _square(tensor: tf.Tensor) -> tf.Tensor:
    """The sum of the squares that are finite."""
    squares = tensor**2
    return tf.reduce_sum(tf.where(tf.math.is_finite(squares), squares, 0.0))


def _output_gradients(
    model: Learner, batch: tuple[Any, ...], masks: dict[int, tf.Tensor], scale: float
) -> list[tf.Tensor]:
    """The gradients of a batch's loss with respect to its outputs; zero for integer outputs."""
    x, y, outputs, *weights = batch
    flat = tf.nest.flatten(outputs)
    for index, mask in masks.items():
        set_mask(flat[index], mask)
    watched = [output for output in flat if has_gradient(output)]
    with tf.GradientTape() as tape:
        tape.watch(watched)
        loss = scale * tf.cast(data_loss(model, x, y, outputs, *weights), "float32")
    gradients = iter(tape.gradient(loss, watched, unconnected_gradients="zero"))
    return [
        tf.convert_to_tensor(next(gradients)) if has_gradient(o) else tf.zeros(tf.shape(o))
        for o in flat
    ]


def has_gradient(output: Any) -> bool:
    """Whether a loss can be differentiated with respect to an output: not with integers."""
    return bool(output.dtype.is_floating)


def masks_of(outputs: Any) -> dict[int, tf.Tensor]:
    """The Keras masks of the outputs that have one, by index; slices of an output lose them."""
    masks = (mask_of(output) for output in tf.nest.flatten(outputs))
    return {index: mask for index, mask in enumerate(masks) if mask is not None}
