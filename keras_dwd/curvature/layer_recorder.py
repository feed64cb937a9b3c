"""Records the inputs and outputs of layers during an ordinary forward pass of any model."""

import inspect
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_dwd.keras_private import in_stateless_scope, own_trainable_variables
from keras_dwd.learner import Learner


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        inputs: The tensors the layer was called on, after autocasting.
        output: The tensor before the layer's activation, or its output if it has no activation. A
            list of all outputs for a recurrent layer that returns its states.
        plain: Whether the layer was called with these tensors only, not to train, and returned a
            single tensor.
        trains: Whether it was called with `training=True`.
        arguments: Those after the first that differ from their defaults, by name; without
            `training` and masks.
        initial_state: The states that a recurrent layer was given or had kept; `None` for neither.
        mask: The mask that a recurrent layer was given.
    """

    inputs: tuple[Any, ...]
    output: Any
    plain: bool
    trains: bool
    arguments: Mapping[str, Any]
    initial_state: tuple[Any, ...] | None = None
    mask: Any = None


class LayerRecorder:
    """Records the calls of layers while active, without changing their results.

    A gradient tape that is active too can then differentiate with respect to `Call.output`. This
    works for every kind of model, because it wraps `call` of the layers. Layers that are shared
    have several calls; layers with a fused activation are recorded before the activation.

    Args:
        layers: The layers to record.
        activated: Those of `layers` to record after their activation instead.
        cut: Whether to stop gradients at what is recorded as the outputs of the layers.
        methods: By id of a layer, the name of a method whose result is recorded in place of the
            output. It is repeated along its first axis, of size one, for each example.

    Example:

    ```python
    with tf.GradientTape() as tape, LayerRecorder([dense]) as recorder:
        loss = loss_of(model(x))
    g = tape.gradient(loss, [call.output for call in recorder.calls(dense)])
    ```
    """

    def __init__(
        self,
        layers: Iterable[keras.Layer],
        activated: Iterable[keras.Layer] = (),
        cut: bool = False,
        methods: Mapping[int, str] | None = None,
    ):
        self._layers = list({id(layer): layer for layer in layers}.values())
        self._cut = cut
        self._attributes_before: dict[int, dict[str, Any]] = {}  # by id of the layer
        self._cell_attributes_before: dict[int, dict[str, Any]] = {}  # of its cell
        self.entered: list[tf.Tensor] = []  # the inputs of layers, if `cut`
        self._activated = {id(layer) for layer in activated}
        self._methods = dict(methods or {})
        self._calls: dict[int, list[Call]] = {}
        self._hidden: set[int] = set()
        self._graph: Any = None
        self._thread = threading.get_ident()  # other threads may run the model too

    def __enter__(self) -> "LayerRecorder":
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        for layer in self._layers:
            self._attributes_before[id(layer)] = dict(layer.__dict__)
            if isinstance(layer, keras.layers.RNN):
                self._cell_attributes_before[id(layer)] = dict(layer.cell.__dict__)
            layer.__dict__["call"] = self._recording(layer, layer.call)
            if "use_cudnn" in layer.__dict__:  # else `Bidirectional` computes both layers itself
                layer.__dict__["use_cudnn"] = False
        return self

    def __exit__(self, *error: Any) -> None:
        for layer in self._layers:
            layer.__dict__.pop("call", None)
            before = self._attributes_before[id(layer)]
            for name in {"call", "use_cudnn"} & before.keys():  # `call` was replaced already
                layer.__dict__[name] = before[name]

    def calls(self, layer: keras.Layer) -> list[Call] | None:
        """The recorded calls of a layer, or `None` if no gradient can be taken at their outputs.

        That is the case if the layer ran inside a loop or mapped function, whose tensors belong to
        another graph, if it has several outputs, or if its variables had been replaced.
        """
        return None if id(layer) in self._hidden else self._calls.get(id(layer), [])

    def _recording(self, layer: keras.Layer, call: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return call(*args, **kwargs)
            if self._has_other_values(layer):
                self._hidden.add(id(layer))
            bound = inspect.signature(call).bind(*args, **kwargs)
            states, mask = _of_recurrent(layer, bound)
            recorded_within: list[tf.Tensor] = []
            with self._recording_within(layer, _inputs(bound), recorded_within):
                result = call(*args, **kwargs)
            if id(layer) in self._methods and not recorded_within:
                return result  # has not used the variables
            output = recorded_within[0] if recorded_within else result
            outputs = [output]
            if isinstance(layer, keras.layers.RNN) and tf.nest.is_nested(result):
                output = outputs = tf.nest.flatten(result)
            first = outputs[0]
            graph = first.graph if _is_dense(first) and tf.is_symbolic_tensor(first) else None
            inputs = _inputs(bound)
            if graph is not self._graph or not all(map(_is_dense, (*inputs, *outputs))):
                self._hidden.add(id(layer))
            others = [value for name, value in kwargs.items() if name != "training"]
            trains = kwargs.get("training") not in (None, False)
            plain = (
                not trains
                and _is_dense(result)
                and all(map(_is_dense, args))
                and not any(value is not None for value in others)
            )
            recorded_call = Call(inputs, output, plain, trains, _arguments(bound), states, mask)
            self._calls.setdefault(id(layer), []).append(recorded_call)
            if self._cut and graph is self._graph:
                self.entered += filter(_is_dense, tf.nest.flatten((args, kwargs)))
            if self._cut and not recorded_within:
                result = tf.nest.map_structure(
                    lambda t: tf.stop_gradient(t) if tf.is_tensor(t) else t,
                    result,
                    expand_composites=True,
                )
            return result

        return recorded

    @contextmanager
    def _recording_within(
        self, layer: keras.Layer, inputs: tuple[Any, ...], recordings: list[tf.Tensor]
    ) -> Iterator[None]:
        """Record what goes into the activation of a layer, or comes out of its method."""
        attributes = vars(layer)  # `setattr` would track an activation that is a layer again
        method = self._methods.get(id(layer))
        name = method or "activation"
        original = attributes.get(name)
        function = getattr(layer, method) if method else original
        if function is None or id(layer) in self._activated:
            yield
            return

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            z = _repeated(function(*args, **kwargs), inputs[0]) if method else args[0]
            recordings.append(z)
            z = tf.stop_gradient(z) if self._cut else z
            return z if method else function(z)

        attributes[name] = recorded
        try:
            yield
        finally:
            if original is None:
                del attributes[name]
            else:
                attributes[name] = original

    def _has_other_values(self, layer: keras.Layer) -> bool:
        """Whether a layer that contains this one has replaced the values of its variables.

        So a layer can be called with normalized or generated weights, which no gradient taken of
        the layer alone would know of.
        """
        if in_stateless_scope():
            return True
        known = [(layer.__dict__, self._attributes_before[id(layer)])]
        if id(layer) in self._cell_attributes_before:
            known.append((layer.cell.__dict__, self._cell_attributes_before[id(layer)]))
        return any(
            value is not before.get(name) and any(map(_is_value, (value, before.get(name))))
            for now, before in known
            for name, value in now.items()
        )


def _is_value(attribute: Any) -> bool:
    return isinstance(attribute, (keras.Variable, keras.KerasTensor)) or tf.is_tensor(attribute)


def _inputs(bound: inspect.BoundArguments) -> tuple[Any, ...]:
    """The tensors a layer was called on, by position or by name, without masks."""
    named = (value for name, value in bound.arguments.items() if not name.endswith("mask"))
    return tuple(_dense(value) for value in named if tf.is_tensor(value))


def _arguments(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments after the first that differ from their defaults, see `Call`."""
    non_default = {}
    for name, value in list(bound.arguments.items())[1:]:
        default = bound.signature.parameters[name].default
        same = value is default or (type(value) is type(default) and value == default)
        if not (same or name == "training" or name.endswith("mask")):
            non_default[name] = value
    return non_default


def _repeated(tensor: tf.Tensor, inputs: tf.Tensor) -> tf.Tensor:
    """A tensor with a first axis of size one, once for each example of the inputs."""
    count = inputs.shape[0] or tf.shape(inputs)[0]
    return tf.tile(tensor, [count, *(1 for _ in tensor.shape[1:])])


def _of_recurrent(layer: keras.Layer, bound: inspect.BoundArguments) -> tuple[Any, Any]:
    """The states that a recurrent layer starts from, if not from its own, and its mask."""
    if not isinstance(layer, keras.layers.RNN):
        return None, None
    states = bound.arguments.get("initial_state")
    if states is None and layer.stateful:
        states = [tf.identity(state) for state in tf.nest.flatten(layer.states)]
    states = None if states is None else tuple(tf.nest.flatten(states))
    masks = [m for m in tf.nest.flatten(bound.arguments.get("mask")) if m is not None]
    return states, masks[0] if masks else None


def _is_dense(value: Any) -> bool:
    return tf.is_tensor(value) and not isinstance(value, (tf.SparseTensor, tf.RaggedTensor))


def _dense(tensor: Any) -> Any:
    """A tensor or variable as a tensor; a sparse one dense, but a ragged one as it is."""
    if isinstance(tensor, tf.RaggedTensor):
        return tensor
    if isinstance(tensor, tf.SparseTensor):  # its indices need not be in order, nor differ
        dense = tf.scatter_nd(tensor.indices, tensor.values, tensor.dense_shape)
        return tf.ensure_shape(dense, tensor.shape)
    return tf.convert_to_tensor(tensor)


# For each model: how each layer is called and recorded, by id, and the ids of the traceable layers.
_traceable: weakref.WeakKeyDictionary[keras.Model, tuple[dict[int, Any], set[int]]]
_traceable = weakref.WeakKeyDictionary()


def traceable_layers(
    model: Learner,
    layers: Iterable[keras.Layer],
    activated: Iterable[keras.Layer],
    methods: Mapping[int, str],
) -> set[int]:
    """The ids of those of `layers` whose calls yield per-example gradients.

    Left out are layers that run inside a loop or mapped function, layers whose inputs or output
    have another first axis than the batch (such as positions shared by all examples, or windows),
    and layers with a variable that is also used outside their calls. To tell the batch axis from
    others, a model without a fixed batch size is traced with batches of two sizes.

    Args:
        model: The model.
        layers: Layers of the model.
        activated: Those of `layers` that are recorded after their activation.
        methods: See `LayerRecorder`.

    Raises:
        ValueError: If a batch normalization is called to train, always: examples then have no
            gradients of their own.
    """
    layers = list({id(layer): layer for layer in layers}.values())
    activated = list(activated)
    recorded_after = {id(layer) for layer in activated}
    # Quantization changes how a layer is called.
    modes = {
        id(layer): (
            getattr(layer, "quantization_mode", None),
            id(layer) in recorded_after,
            methods.get(id(layer)),
        )
        for layer in layers
    }
    if model not in _traceable or _traceable[model][0] != modes:
        owners = {id(v.value): id(layer) for layer in layers for v in _variables_of(layer)}
        values = [v.value for layer in layers for v in _variables_of(layer)]
        traceable = set(modes)
        mixing: set[str] = set()
        batch_sizes = {i.shape[0] for i in model.inputs} - {None}
        for size in batch_sizes or (2, 3):

            @tf.function(autograph=False)  # as Keras does in `fit`
            def run(x: Any, size: int = size) -> None:
                recorder = LayerRecorder(layers, activated, cut=True, methods=methods)
                with tf.GradientTape() as tape, recorder:
                    outputs = model(x, training=False)
                for layer in layers:
                    calls = recorder.calls(layer)
                    if isinstance(layer, keras.layers.BatchNormalization) and any(
                        call.trains for call in calls or ()
                    ):
                        mixing.add(layer.name)
                    if calls is None or not all(_is_batch(c, size) for c in calls):
                        traceable.discard(id(layer))
                tensors = map(tf.convert_to_tensor, [*tf.nest.flatten(outputs), *recorder.entered])
                gradients = tape.gradient([t for t in tensors if t.dtype.is_floating], values)
                for value, gradient in zip(values, gradients, strict=True):
                    if gradient is not None:
                        traceable.discard(owners[id(value)])

            batch = tf.nest.map_structure(lambda i, size=size: _spec(i, size), model.input)
            try:
                run.get_concrete_function(batch)
            except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
                traceable.clear()  # the model does not run on this batch size: nothing is known
                warnings.warn(
                    f"The model cannot be run on a batch of {size} examples: {error}. So it is not "
                    "known how its layers are used, and the Fisher information is a diagonal, made "
                    "by running the model for each example, which is slow.",
                    stacklevel=2,
                )
                break
        if mixing:
            raise ValueError(
                f"The model calls {', '.join(sorted(mixing))} with `training=True` even in "
                "inference: a BatchNormalization that normalizes by the batch lets examples "
                "influence each other, so that the Fisher information of single examples is not "
                "defined. Leave `training` out, or use `DiagonalFisher('batch')`."
            )
        _traceable[model] = (modes, traceable)
    return _traceable[model][1]


def _spec(symbolic: keras.KerasTensor, size: int) -> tf.TypeSpec:
    """The specification of a batch of this size for an input of a model."""
    shape = (size, *symbolic.shape[1:])
    if getattr(symbolic, "ragged", False):
        ragged_rank = getattr(symbolic, "ragged_rank", None) or 1
        return tf.RaggedTensorSpec(shape, symbolic.dtype, ragged_rank)
    if getattr(symbolic, "sparse", False):
        return tf.SparseTensorSpec(shape, symbolic.dtype)
    return tf.TensorSpec(shape, symbolic.dtype)


def _is_batch(call: Call, size: int) -> bool:
    """Whether the first axis of all inputs and of the output has the size of the batch."""
    tensors = (*call.inputs, *tf.nest.flatten(call.output), *(call.initial_state or ()))
    return all(t.shape[:1] == (size,) for t in tensors)


def _variables_of(layer: keras.Layer) -> list[keras.Variable]:
    """The trainable variables of a recorded layer: its own, and those of its recurrent cell."""
    cell = [layer.cell] if isinstance(layer, keras.layers.RNN) else []
    return [v for owner in (layer, *cell) for v in own_trainable_variables(owner)]
