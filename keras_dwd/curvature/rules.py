"""How the gradient of one example looks, for each type of layer.

In inference mode examples do not see each other. The gradient of one example by a layer's variables
then follows in closed form from what went into the layer and from the gradient of the loss by what
came out of it, both of which one ordinary backward pass gives for a whole batch at once.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.curvature.taps import follow
from keras_dwd.variables import Variables, by_path


@dataclass(frozen=True)
class Flow:
    """One call of a layer, with gradients.

    Attributes:
        inputs: The tensors the layer was called on.
        gradient: Of the loss of each example by the layer's output before the activation, of the
            output's shape, float32.
        first: How many examples of the task were looked at before the first of these.
    """

    inputs: tuple[tf.Tensor, ...]
    gradient: tf.Tensor
    first: Any = 0


class Rule:
    """Closed forms for one type of layer; subclass it and `register_rule` it for your own.

    Example:

    ```python
    @register_rule(Scale)
    class ScaleRule(Rule):  # y = w * x, x and y of shape (batch, features)
        def gradients(self, layer, flow):
            return {layer.w.name: flow.inputs[0] * flow.gradient}
    ```
    """

    def supports(self, layer: keras.Layer) -> bool:
        """Whether the closed form holds for this layer as it is configured."""
        return True

    def gradients(self, layer: keras.Layer, flow: Flow) -> dict[str, tf.Tensor]:
        """The gradient of each example by each of the layer's trainable variables.

        Returns:
            By `variable.name`, of shape `(batch, *variable.shape)`.
        """
        raise TypeError(f"{type(self).__name__} gives squares alone, no gradients.")

    def squares(
        self, layer: keras.Layer, flows: list[Flow], weights: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Σ_b w_b (∂ℓ_b/∂θ)² by variable name.

        Args:
            layer: The layer.
            flows: Its calls; a layer that is called twice has the sum of two gradients.
            weights: `(batch,)`, of the examples.
        """
        total: dict[str, tf.Tensor] = {}
        for flow in flows:
            found = self.gradients(layer, flow)
            total = {name: g + total[name] if total else g for name, g in found.items()}
        return {name: tf.tensordot(weights, g**2, axes=1) for name, g in total.items()}

    def matrix(self, layer: keras.Layer) -> "MatrixForm | None":
        """How the layer is a matrix product, if it is one: then it has Kronecker factors."""
        return None

    def rows(self, layer: keras.Layer, flow: Flow) -> tuple[tf.Tensor, tf.Tensor]:
        """What the layer's matrix multiplies, and the gradient by the product.

        Returns:
            `(batch, positions, fan_in)` and `(batch, positions, fan_out)`.
        """
        raise TypeError(f"{type(self).__name__} is no rule of a matrix product.")


class GenericRule(Rule):
    """For any layer of one output: differentiates the layer alone, for each example.

    In a loop: `tf.vectorized_map` is faster, but gives wrong gradients of biases at some ranks, and
    ends the process in attention layers (TensorFlow 2.21 with oneDNN).
    """

    def gradients(self, layer: keras.Layer, flow: Flow) -> dict[str, tf.Tensor]:
        own = {v.name: v.value for v in layer._trainable_variables}
        inference = {"training": False} if layer._call_has_training_arg else {}

        def of_example(example: Any) -> list[tf.Tensor]:
            inputs, gradient = example
            with tf.GradientTape() as tape:
                output = layer(*(x[None] for x in inputs), **inference)
            wanted = tf.cast(gradient[None], output.dtype)
            found = tape.gradient(output, list(own.values()), wanted, unconnected_gradients="zero")
            return [tf.cast(tf.convert_to_tensor(g), "float32") for g in found]

        kinds = [tf.TensorSpec(v.shape, "float32") for v in own.values()]
        found = tf.map_fn(of_example, (flow.inputs, flow.gradient), fn_output_signature=kinds)
        return dict(zip(own, found, strict=True))


GENERIC = GenericRule()


@dataclass(frozen=True)
class MatrixForm:
    """A kernel seen as a matrix of fan_in × fan_out, a bias as one more row of it.

    Attributes:
        shape: `(fan_in, fan_out)`, the bias not counted.
        kernel_shape: Of the variable.
        permutation: Of the kernel's axes: those of the fan-in come first, then the fan-out's.
        bias_shape: Of the variable; `None` without a bias, or with one that some outputs share.
    """

    shape: tuple[int, int]
    kernel_shape: tuple[int, ...]
    permutation: tuple[int, ...]
    bias_shape: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        """Of the matrix, the bias included."""
        return self.shape[0] + (self.bias_shape is not None)

    def join(self, kernel: Any, bias: Any = None) -> Any:
        """The matrix of `rows` × fan_out, from arrays or tensors alike."""
        ops = tf if tf.is_tensor(kernel) else np
        matrix = ops.reshape(ops.transpose(kernel, self.permutation), self.shape)
        if self.bias_shape is None:
            return matrix
        join = tf.concat if ops is tf else np.concatenate
        return join([matrix, ops.reshape(bias, (1, -1))], 0)

    def split(self, matrix: Any) -> list[Any]:
        """The inverse of `join`: the kernel, and the bias if it is in the matrix."""
        ops = tf if tf.is_tensor(matrix) else np
        permuted = [self.kernel_shape[axis] for axis in self.permutation]
        kernel = ops.reshape(matrix[: self.shape[0]], permuted)
        parts = [ops.transpose(kernel, np.argsort(self.permutation))]
        if self.bias_shape is not None:
            parts.append(ops.reshape(matrix[self.shape[0]], self.bias_shape))
        return parts


_RULES: dict[type, Rule] = {}


_FORMS = ("gradients", "squares", "matrix", "rows")


def register_rule(*types: type[keras.Layer]) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: use this `Rule` for layers of these types.

    It also holds for their subclasses, unless those have a `call` of their own.

    Raises:
        ValueError: If a type is no layer, or the rule has neither `gradients` nor `squares`, or of
            `matrix` and `rows` only one.
    """
    for layer_type in types:
        if not (isinstance(layer_type, type) and issubclass(layer_type, keras.Layer)):
            raise ValueError(f"`types` must be types of Keras layers. Received: {layer_type!r}")

    def register(rule: type[Rule]) -> type[Rule]:
        own = {name for name in _FORMS if getattr(rule, name) is not getattr(Rule, name)}
        if not own & {"gradients", "squares"} or len(own & {"matrix", "rows"}) == 1:
            raise ValueError(
                "A rule must define `gradients` or `squares`, and both or none of `matrix` and "
                f"`rows`. {rule.__name__} defines {', '.join(sorted(own)) or 'none of these'}."
            )
        _RULES.update(dict.fromkeys(types, rule()))
        return rule

    return register


def rule_for(layer: keras.Layer) -> Rule:
    """The rule of a layer: its closed form, or the generic, slower one."""
    # With these a layer computes with something other than its variables as they are.
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return GENERIC
    return _rule_of_type(layer)


def _rule_of_type(layer: keras.Layer) -> Rule:
    for parent in type(layer).__mro__:
        if parent in _RULES:
            same = all(
                getattr(type(layer), name, None) is getattr(parent, name, None)
                for name in ("call", "convolution_op")
            )
            return _RULES[parent] if same and _RULES[parent].supports(layer) else GENERIC
    return GENERIC


@dataclass(frozen=True)
class RuledLayer:
    """A layer of a model and its rule.

    Attributes:
        layer: The layer.
        rule: Its rule.
        paths: Of its variables, by their names.
    """

    layer: keras.Layer
    rule: Rule
    paths: dict[str, str]

    def __hash__(self) -> int:
        return id(self.layer)

    @property
    def form(self) -> MatrixForm | None:
        """How the layer is a matrix product, if it is one."""
        return self.rule.matrix(self.layer)

    @property
    def kernel(self) -> str:
        """The path of the kernel of a layer that is a matrix product."""
        return self.paths["kernel"]

    @property
    def matrix_paths(self) -> tuple[str, ...]:
        """The variables that are in the matrix."""
        return self._paths_in(self.form)

    def _paths_in(self, form: MatrixForm | None) -> tuple[str, ...]:
        has_bias = form is not None and form.bias_shape is not None
        return (self.kernel, self.paths["bias"]) if has_bias else (self.kernel,)

    @property
    def earlier_matrix(self) -> "Matrix | None":
        """The matrix that the layer is, or was before LoRA or quantisation, and what is in it."""
        form = _rule_of_type(self.layer).matrix(self.layer)
        return None if form is None else (self._paths_in(form), form)

    @property
    def beside(self) -> bool:
        """Whether there is a variable besides those in the matrix."""
        return len(self.paths) > len(self.matrix_paths)

    def trains(self, variables: Variables) -> bool:
        """Whether any of the layer's variables is among these."""
        return any(path in variables for path in self.paths.values())

    def all_rows(self, flows: list[Flow]) -> tuple[tf.Tensor, tf.Tensor]:
        """`rule.rows`, those of several calls after each other as further positions."""
        rows = [self.rule.rows(self.layer, flow) for flow in flows]
        a, g = (tf.concat(parts, 1) for parts in zip(*rows, strict=True))
        return a, g


def ruled_layers(model: keras.Model) -> list[RuledLayer]:
    """The layers of a model, at any depth, that have variables of their own.

    Left out are layers that share a variable, which follows from neither alone, those whose calls
    cannot be followed (see `follow`), and those that compute their activations again in the
    backward pass.
    """
    found = _layers_with_variables(model)
    followed = follow(model, [ruled.layer for ruled in found])
    return [ruled for ruled in found if id(ruled.layer) in followed]


def _layers_with_variables(model: keras.Model) -> list[RuledLayer]:
    paths = {id(v): path for path, v in by_path(model).items()}
    found, owners = [], Counter[int]()
    for layer in model._flatten_layers(include_self=False):
        # Its own, without those of layers inside it.
        own = [*layer._trainable_variables, *layer._non_trainable_variables]
        owners.update(id(v) for v in own)
        recomputed = getattr(layer, "_remat_mode", None) is not None  # nothing to tap in there
        if own and not recomputed and all(id(v) in paths for v in own):
            names = {v.name: paths[id(v)] for v in own}
            found.append(RuledLayer(layer, rule_for(layer), names))
    shared = {path for i, path in paths.items() if owners[i] > 1}
    return [ruled for ruled in found if not shared & set(ruled.paths.values())]


Matrix = tuple[tuple[str, ...], MatrixForm]
"""The paths of a kernel and, where it is part of the matrix, its bias, and how they are one."""


def matrices(model: keras.Model) -> dict[str, Matrix]:
    """What Kronecker factors may be held of, by the path of the kernel.

    Also of layers that have become something else since, by LoRA or quantisation.
    """
    found = {ruled: ruled.earlier_matrix for ruled in _layers_with_variables(model)}
    return {ruled.kernel: matrix for ruled, matrix in found.items() if matrix is not None}
