"""Recurrent layers, unfolded: for their variables they are dense layers over time.

A recurrent layer multiplies its input at each time step by one kernel, and its previous state by
another. From these inputs and states, and the loss gradients at the products, the gradients of
single examples follow as for a dense layer that is called at each time step.
"""

from typing import Any

import keras
import tensorflow as tf
from keras import layers

from keras_dwd.curvature.closed_forms import MatrixRule
from keras_dwd.curvature.rules import (
    LayerIO,
    NestedRule,
    Part,
    Rule,
    computes_as,
    has_variables,
    register_nested,
)
from keras_dwd.precision.matrix_form import MatrixForm

_VARIABLES = ("kernel", "recurrent_kernel", "bias")


@register_nested(layers.RNN, layers.SimpleRNN, layers.GRU, layers.LSTM)
class _RecurrentRule(NestedRule):
    """`RNN` around a cell of Keras, and the layers that are made of these cells."""

    def supports(self, layer: keras.Layer) -> bool:
        cell = layer.cell
        kind = next((kind for kind in _RECURRENCES if isinstance(cell, kind)), None)
        return kind is not None and computes_as(cell, kind) and has_variables(cell, _VARIABLES)

    def within(self, layer: keras.Layer) -> keras.Layer:
        return layer.cell

    def random(self, layer: keras.Layer) -> bool:
        return bool(layer.cell.dropout or layer.cell.recurrent_dropout)

    def parts(self, layer: keras.Layer) -> list[Part]:
        cell, unfolded = layer.cell, _Unfolded(layer)
        of_input, of_state = {"kernel": cell.kernel}, {"kernel": cell.recurrent_kernel}
        parts = [Part(_InputRule(unfolded), of_input)]
        parts.append(Part(_StateRule(unfolded), of_state))
        if _has_two_biases(cell):
            parts.append(Part(_BiasesRule(unfolded), {"bias": cell.bias}))
        elif cell.bias is not None:
            of_input["bias"] = cell.bias
        return parts


class _Unfolded:
    """The calls of a recurrent layer as inputs and gradients over time."""

    def __init__(self, layer: keras.Layer):
        self._layer = layer
        self._known: list[tuple[LayerIO, tuple[LayerIO, LayerIO]]] = []

    def of(self, flow: LayerIO) -> tuple[LayerIO, LayerIO]:
        """What the kernel and the recurrent kernel multiply in a call, each once. Graph code."""
        for known, unfolded in self._known:
            if known is flow:
                return unfolded
        unfolded = _unfold(self._layer, flow)
        self._known.append((flow, unfolded))
        return unfolded


class _InputRule(MatrixRule):
    """The kernel, for the inputs of all time steps, with a bias unless there are two."""

    def __init__(self, unfolded: _Unfolded):
        self._unfolded = unfolded

    def matrix(self, layer: keras.Layer) -> MatrixForm | None:
        bias = None if layer.bias is None or _has_two_biases(layer) else tuple(layer.bias.shape)
        return _form(layer.kernel, bias)

    def over_time(self, layer: keras.Layer) -> bool:
        return True

    def rows(self, layer: keras.Layer, flow: LayerIO) -> tuple[tf.Tensor, tf.Tensor]:
        projection, _ = self._unfolded.of(flow)
        return projection.inputs[0], projection.gradient


class _StateRule(_InputRule):
    """The recurrent kernel, for the states before all time steps."""

    def matrix(self, layer: keras.Layer) -> MatrixForm | None:
        return _form(layer.recurrent_kernel, None)

    def rows(self, layer: keras.Layer, flow: LayerIO) -> tuple[tf.Tensor, tf.Tensor]:
        _, projection = self._unfolded.of(flow)
        return projection.inputs[0], projection.gradient


class _BiasesRule(Rule):
    """The two biases of a `GRU` with `reset_after`, one for each kernel, in one variable."""

    def __init__(self, unfolded: _Unfolded):
        self._unfolded = unfolded

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        return {
            "bias": tf.stack([tf.reduce_sum(f.gradient, 1) for f in self._unfolded.of(flow)], 1)
        }


def _form(kernel: keras.Variable, bias: tuple[int, ...] | None) -> MatrixForm:
    shape = tuple(kernel.shape)
    return MatrixForm((shape[0], shape[1]), shape, (0, 1), bias)


def _has_two_biases(cell: keras.Layer) -> bool:
    return cell.bias is not None and len(cell.bias.shape) == 2


def _unfold(layer: keras.Layer, flow: LayerIO) -> tuple[LayerIO, LayerIO]:
    """Run the recurrence again, and differentiate it by the products with the kernels.

    Args:
        layer: The recurrent layer.
        flow: A call of it.

    Returns:
        The inputs of all time steps and the gradients at their products with the kernel, and the
        same for the states and the recurrent kernel: `(batch, time, …)`.
    """
    cell, inputs = layer.cell, flow.inputs[0]
    projected = tf.matmul(inputs, _value(cell.kernel))
    if cell.bias is not None:
        bias = _value(cell.bias)
        projected += bias[0] if _has_two_biases(cell) else bias
    loop = layers.RNN(
        _Recurrence(cell),
        return_sequences=True,
        return_state=True,
        go_backwards=layer.go_backwards,
        unroll=layer.unroll,
        zero_output_for_mask=layer.zero_output_for_mask,
        dtype="float32",
    )
    states = flow.initial_state or loop.get_initial_state(tf.shape(inputs)[0])
    with tf.GradientTape() as tape:
        tape.watch(projected)
        per_step, *last = loop(projected, initial_state=list(states), mask=flow.mask)
        output = per_step[..., : cell.units]
        output = output if layer.return_sequences else output[:, -1]
        outputs = [output, *last] if layer.return_state else [output]
    gradient = tape.gradient(outputs, projected, output_gradients=tf.nest.flatten(flow.gradient))
    if layer.go_backwards:  # the recurrence gives its results in the order of its steps
        per_step = tf.reverse(per_step, [1])
    _, state, *reset = tf.split(per_step, per_step.shape[-1] // cell.units, -1)
    rows, at_state = _products_with_state(cell, state, *reset, gradient=gradient)
    return LayerIO((inputs,), gradient, flow.first), LayerIO((rows,), at_state, flow.first)


def _products_with_state(
    cell: keras.Layer, state: tf.Tensor, reset: tf.Tensor | None = None, *, gradient: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """What the recurrent kernel multiplies, and the gradient at the products.

    Args:
        cell: The cell.
        state: The states before all time steps.
        reset: The reset gates of a GRU.
        gradient: The gradient at the products of the inputs, which are added to those of the state.
    """
    if reset is None:
        return state, gradient
    gates, candidate = gradient[..., : 2 * cell.units], gradient[..., 2 * cell.units :]
    if cell.reset_after:  # the product is multiplied by the gate
        return state, tf.concat([gates, reset * candidate], -1)
    # Two products at each step, each for a part of the columns.
    of_gates = tf.concat([gates, tf.zeros_like(candidate)], -1)
    of_candidate = tf.concat([tf.zeros_like(gates), candidate], -1)
    return tf.concat([state, reset * state], 1), tf.concat([of_gates, of_candidate], 1)


class _Recurrence(layers.Layer):
    """A cell without its product with the inputs, which it is given.

    Its output is the new state, the previous one, and the reset gate of a GRU.
    """

    def __init__(self, cell: keras.Layer):
        super().__init__(dtype="float32")
        kind = next(kind for kind in _RECURRENCES if isinstance(cell, kind))
        # Not by `setattr`, which would track the cell.
        self.__dict__.update(cell=cell, step=_RECURRENCES[kind])
        self.state_size = cell.state_size
        self.output_size = cell.units * (3 if kind is layers.GRUCell else 2)

    def call(self, projected: tf.Tensor, states: Any) -> tuple[tf.Tensor, list[tf.Tensor]]:
        new, *gates = self.step(self.cell, projected, *states)
        carried = new if isinstance(new, list) else [new]
        return tf.concat([carried[0], states[0], *gates], -1), carried


def _simple_step(cell: Any, x: tf.Tensor, h: tf.Tensor) -> tuple[Any, ...]:
    return (cell.activation(x + tf.matmul(h, _value(cell.recurrent_kernel))),)


def _lstm_step(cell: Any, x: tf.Tensor, h: tf.Tensor, c: tf.Tensor) -> tuple[Any, ...]:
    z = tf.split(x + tf.matmul(h, _value(cell.recurrent_kernel)), 4, -1)
    i, f, o = (cell.recurrent_activation(z[k]) for k in (0, 1, 3))
    c = f * c + i * cell.activation(z[2])
    return ([o * cell.activation(c), c],)


def _gru_step(cell: Any, x: tf.Tensor, h: tf.Tensor) -> tuple[Any, ...]:
    kernel, n = _value(cell.recurrent_kernel), 2 * cell.units
    biases = _value(cell.bias)[1] if _has_two_biases(cell) else tf.zeros(kernel.shape[1:])
    gates = tf.matmul(h, kernel[:, :n]) + biases[:n]
    z, r = tf.split(cell.recurrent_activation(x[:, :n] + gates), 2, -1)
    if cell.reset_after:
        from_state = r * (tf.matmul(h, kernel[:, n:]) + biases[n:])
    else:
        from_state = tf.matmul(r * h, kernel[:, n:])
    candidate = cell.activation(x[:, n:] + from_state)
    return z * h + (1 - z) * candidate, r


_RECURRENCES = {
    layers.SimpleRNNCell: _simple_step,
    layers.LSTMCell: _lstm_step,
    layers.GRUCell: _gru_step,
}


def _value(variable: keras.Variable) -> tf.Tensor:
    return tf.cast(variable.value, "float32")
