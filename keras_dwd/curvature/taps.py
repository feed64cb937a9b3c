"""What goes into a layer and what comes out of it, during an ordinary pass of any model."""

import inspect
import threading
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        inputs: The tensors it was called on, as the layer computes with them (autocast included).
        output: The tensor before the activation, the layer's output where it has none.
        plain: Whether there was nothing but those, and one output.
    """

    inputs: tuple[Any, ...]
    output: tf.Tensor
    plain: bool


class Taps:
    """Records the calls of layers while active, and changes nothing in their results.

    A gradient tape that is active too can then be asked for the gradient by `Call.output`. Works
    for every kind of model, since it is the layers that are tapped: shared layers have several
    calls, layers with a fused activation are recorded before it.

    Args:
        layers: What to record.
        activated: Layers of these to record behind their activation.
        cut: Whether no gradient passes through a layer.

    Example:

    ```python
    with tf.GradientTape() as tape, Taps([dense]) as taps:
        loss = loss_of(model(x))
    g = tape.gradient(loss, [call.output for call in taps.calls(dense)])
    ```
    """

    def __init__(
        self,
        layers: Iterable[keras.Layer],
        activated: Iterable[keras.Layer] = (),
        cut: bool = False,
    ):
        self._layers = list(layers)
        self._cut = cut
        self._own: dict[int, Any] = {}
        self.entered: list[tf.Tensor] = []  # where gradients are cut: all that went into layers
        self._activated = {id(layer) for layer in activated}
        self._calls: dict[int, list[Call]] = {}
        self._hidden: set[int] = set()
        self._graph: Any = None
        self._thread = threading.get_ident()  # others may run the model at the same time

    def __enter__(self) -> "Taps":
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        for layer in self._layers:
            if "call" in layer.__dict__:  # of this one layer, not of its class
                self._own[id(layer)] = layer.__dict__["call"]
            layer.__dict__["call"] = self._recording(layer, layer.call)
        return self

    def __exit__(self, *error: Any) -> None:
        for layer in self._layers:
            layer.__dict__.pop("call", None)
            if id(layer) in self._own:
                layer.__dict__["call"] = self._own[id(layer)]

    def calls(self, layer: keras.Layer) -> list[Call] | None:
        """The calls seen, or `None` where no gradient can be asked for.

        That is where the layer ran inside a loop or mapped function, with tensors of another graph,
        or has several outputs.
        """
        return None if id(layer) in self._hidden else self._calls.get(id(layer), [])

    def _recording(self, layer: keras.Layer, call: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return call(*args, **kwargs)
            activation = layer.__dict__.get("activation")
            activation = None if id(layer) in self._activated else activation
            before: list[tf.Tensor] = []
            if activation is not None:

                def noting(z: Any) -> Any:
                    if threading.get_ident() == self._thread:
                        before.append(z)
                    return activation(z)

                # Not by setattr, which would track an activation that is a layer once more.
                layer.__dict__["activation"] = noting
            try:
                result = call(*args, **kwargs)
            finally:
                if activation is not None:
                    layer.__dict__["activation"] = activation
            output = before[0] if before else result
            graph = output.graph if tf.is_symbolic_tensor(output) else None
            if graph is not self._graph:
                self._hidden.add(id(layer))
            inputs = _inputs(inspect.signature(call).bind(*args, **kwargs))
            others = [value for name, value in kwargs.items() if name != "training"]
            plain = (
                tf.is_tensor(result)
                and all(map(tf.is_tensor, args))
                and not any(value is not None for value in others)
            )
            self._calls.setdefault(id(layer), []).append(Call(inputs, output, plain))
            if self._cut:
                if graph is self._graph:
                    self.entered += filter(tf.is_tensor, tf.nest.flatten((args, kwargs)))
                result = tf.nest.map_structure(
                    lambda t: tf.stop_gradient(t) if tf.is_tensor(t) else t, result
                )
            return result

        return recorded


def _inputs(given: inspect.BoundArguments) -> tuple[Any, ...]:
    """The tensors a layer was called on, whether by position or by name; not masks."""
    named = (value for name, value in given.arguments.items() if not name.endswith("mask"))
    return tuple(tf.convert_to_tensor(value) for value in named if tf.is_tensor(value))


# Of a model: the layers that were asked about, and the ids of those that can be followed.
_followed: weakref.WeakKeyDictionary[keras.Model, tuple[dict[int, Any], set[int]]]
_followed = weakref.WeakKeyDictionary()


def follow(model: keras.Model, layers: Iterable[keras.Layer]) -> set[int]:
    """The ids of those layers whose calls have one gradient per example to be asked for.

    Left out are layers that run inside a loop or mapped function, those whose output has another
    first axis than the batch (positions that all examples share, or windows of them), and those
    with a variable that is also used elsewhere, outside of a call of theirs. What follows the batch
    is seen by running the model with batches of two sizes, where it has none of its own.
    """
    layers = list(layers)
    # Quantised, a layer is called in another way.
    asked = {id(layer): getattr(layer, "quantization_mode", None) for layer in layers}
    if model not in _followed or _followed[model][0] != asked:
        owners = {id(v.value): id(layer) for layer in layers for v in layer._trainable_variables}
        values = [v.value for layer in layers for v in layer._trainable_variables]
        found = set(asked)
        fixed = {i.shape[0] for i in model.inputs} - {None}
        for size in fixed or (2, 3):

            @tf.function
            def run(x: Any, size: int = size) -> None:
                with tf.GradientTape() as tape, Taps(layers, cut=True) as taps:
                    outputs = model(x, training=False)
                for layer in layers:
                    calls = taps.calls(layer)
                    if calls is None or not all(_is_batch(c, size) for c in calls):
                        found.discard(id(layer))
                reached = map(tf.convert_to_tensor, [*tf.nest.flatten(outputs), *taps.entered])
                elsewhere = tape.gradient([t for t in reached if t.dtype.is_floating], values)
                for value, gradient in zip(values, elsewhere, strict=True):
                    if gradient is not None:
                        found.discard(owners[id(value)])

            batch = tf.nest.map_structure(
                lambda i, size=size: tf.TensorSpec((size, *i.shape[1:]), i.dtype), model.input
            )
            try:
                run.get_concrete_function(batch)
            except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
                found.clear()  # a model that other sizes do not fit: nothing is known of it
                warnings.warn(
                    f"The model cannot be run on a batch of {size} examples: {error}. So it is not "
                    "known how its layers are used, and the Fisher information is a diagonal, made "
                    "by running the model for each example, which is slow.",
                    stacklevel=2,
                )
                break
        _followed[model] = (asked, found)
    return _followed[model][1]


def _is_batch(call: Call, size: int) -> bool:
    return all(t.shape[:1] == (size,) for t in (*call.inputs, call.output))
