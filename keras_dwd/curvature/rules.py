"""Rules for per-example gradients, by type of layer.

In inference mode the examples of a batch do not influence each other. The per-example gradients of
a layer's variables then follow in closed form from the inputs of the layer and from the loss
gradient at its output. One ordinary backward pass gives both for a whole batch.
"""

import abc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_dwd.curvature.layer_recorder import traceable_layers
from keras_dwd.keras_private import (
    layers_within,
    own_trainable_variables,
    own_variables,
    recomputes,
    takes_training,
)
from keras_dwd.learner import Learner
from keras_dwd.precision.block import Place
from keras_dwd.precision.matrix_form import MatrixForm
from keras_dwd.variables import Variables, by_path


@dataclass(frozen=True)
class LayerIO:
    """The inputs of one call of a layer, and the loss gradient at its output.

    Rules receive it as the argument `flow`.

    Attributes:
        inputs: The tensors the layer was called on.
        gradient: Per-example gradient of the loss with respect to the layer's output before the
            activation, in the shape of the output, float32. A list of them for a recurrent layer
            with several outputs.
        first: The number of examples of the task that were processed before this batch.
        initial_state: The states that a recurrent layer was given; `None` for its own.
        mask: The mask that it was given.

    Example:

    ```python
    @register_rule(Scale)
    class ScaleRule(Rule):
        def gradients(self, layer, flow):  # a LayerIO
            return {"w": flow.inputs[0] * flow.gradient}
    ```
    """

    inputs: tuple[tf.Tensor, ...]
    gradient: Any
    first: Any = 0
    initial_state: tuple[tf.Tensor, ...] | None = None
    mask: tf.Tensor | None = None


class Rule:
    """Closed forms for one type of layer; subclass and `register_rule` it for your own layers.

    Example:

    ```python
    @register_rule(Scale)
    class ScaleRule(Rule):  # y = w * x, x and y of shape (batch, features)
        def gradients(self, layer, flow):
            return {"w": flow.inputs[0] * flow.gradient}
    ```

    Attributes:
        variables: The names of the layer's variables. Each is held by an attribute of that name,
            or, in a dictionary from names to attributes, by another. Layers with other variables
            get the generic rule. `None` for any variables: those that the rule gives no gradients
            of are then differentiated example by example.
        method: The name of a method of the layer whose result holds everything that the variables
            do to the output, and is the same for all examples, with a first axis of size one. The
            rule then gets the gradient by this result, example by example, not by the output.
        table: The name of a variable that is a table of vectors, for which the rule defines
            `row_factors`.
    """

    variables: tuple[str, ...] | Mapping[str, str] | None = None
    method: str | None = None
    table: str | None = None

    def takes(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the closed form holds for a call with these arguments.

        Args:
            arguments: Those after the first that differ from their defaults, by name; without
                `training` and masks.
        """
        return True

    def supports(self, layer: keras.Layer) -> bool:
        """Whether the closed form holds for this layer as it is configured."""
        return True

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        """The per-example gradients of the layer's trainable variables.

        Args:
            layer: The layer.
            flow: One call of it.

        Returns:
            The gradients by `variable.name`, of shape `(batch, *variable.shape)`.
        """
        raise TypeError(f"{type(self).__name__} gives squares alone, no gradients.")

    def squares(
        self, layer: keras.Layer, flows: list[LayerIO], weights: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Σ_b w_b (∂ℓ_b/∂θ)² by variable name.

        Args:
            layer: The layer.
            flows: Its calls; the gradient of an example is the sum over all calls.
            weights: `(batch,)`, the weights w_b of the examples.
        """
        total: dict[str, tf.Tensor] = {}
        for flow in flows:
            gradients = self.gradients(layer, flow)
            total = {name: g + total[name] if total else g for name, g in gradients.items()}
        return {name: tf.tensordot(weights, g**2, axes=1) for name, g in total.items()}

    def matrix(self, layer: keras.Layer) -> "MatrixForm | None":
        """How the layer's variables form a matrix, which then gets Kronecker factors, or `None`."""
        return None

    def over_time(self, layer: keras.Layer) -> bool:
        """Whether the matrix multiplies the features of each position of a sequence or a set.

        The factor of its inputs is then damped. Not so for the patches of a convolution.
        """
        return False

    def rows(self, layer: keras.Layer, flow: LayerIO) -> tuple[tf.Tensor, tf.Tensor]:
        """The rows that the layer multiplies by its matrix, and the loss gradients at the products.

        Returns:
            `(batch, positions, fan_in)` and `(batch, positions, fan_out)`.
        """
        raise TypeError(f"{type(self).__name__} is no rule of a matrix product.")

    def row_factors(
        self, layer: keras.Layer, flows: list[LayerIO], weights: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """What the Kronecker factors of the table are made of, without a tensor of its size.

        With D_b the gradient of an example by the table:

        Returns:
            The diagonal of Σ_b w_b D_b D_bᵀ, and two matrices L and R, of as many rows as the table
            has columns, with L Rᵀ = Σ_b w_b D_bᵀ D_b.
        """
        raise TypeError(f"{type(self).__name__} is no rule of a table.")


class GenericRule(Rule):
    """For any layer with one output: differentiates the layer alone, example by example.

    Uses a loop: `tf.vectorized_map` is faster, but computes wrong gradients of biases at some ranks
    and crashes the process in attention layers (TensorFlow 2.21 with oneDNN).
    """

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        own = {v.name: v.value for v in own_trainable_variables(layer)}
        inference = {"training": False} if takes_training(layer) else {}

        def example_gradients(example: Any) -> list[tf.Tensor]:
            inputs, gradient = example
            with tf.GradientTape() as tape:
                output = layer(*(x[None] for x in inputs), **inference)
            upstream = tf.cast(gradient[None], output.dtype)
            gradients = tape.gradient(
                output, list(own.values()), upstream, unconnected_gradients="zero"
            )
            return [tf.cast(tf.convert_to_tensor(g), "float32") for g in gradients]

        specs = [tf.TensorSpec(v.shape, "float32") for v in own.values()]
        gradients = tf.map_fn(
            example_gradients, (flow.inputs, flow.gradient), fn_output_signature=specs
        )
        return dict(zip(own, gradients, strict=True))


GENERIC = GenericRule()


# By type or, for types of packages that this one does not import, by the name of the type. Those of
# layers with LoRA are apart.
_RULES: dict[type | str, Rule] = {}
_LORA_RULES: dict[type | str, Rule] = {}


@dataclass(frozen=True)
class Part:
    """Some variables of a layer, and the rule for them.

    Attributes:
        rule: The rule.
        variables: The variables, by the names that they have in the rule.
    """

    rule: Rule
    variables: dict[str, keras.Variable]


class NestedRule(abc.ABC):
    """For layers that call another layer in a loop: closed forms for the variables of that one."""

    @abc.abstractmethod
    def supports(self, layer: keras.Layer) -> bool:
        """Whether the closed forms hold for this layer as it is configured."""

    @abc.abstractmethod
    def within(self, layer: keras.Layer) -> keras.Layer:
        """The layer that is called in the loop."""

    @abc.abstractmethod
    def random(self, layer: keras.Layer) -> bool:
        """Whether the layer is random in training: the forms hold in inference alone."""

    @abc.abstractmethod
    def parts(self, layer: keras.Layer) -> list[Part]:
        """The variables and their rules, which are given the calls of `layer`."""


_NESTED: dict[type, NestedRule] = {}


def register_nested(*types: type[keras.Layer]) -> Callable[[type[NestedRule]], type[NestedRule]]:
    """Class decorator that registers a `NestedRule` for layers of these types."""

    def register(rule: type[NestedRule]) -> type[NestedRule]:
        _NESTED.update(dict.fromkeys(types, rule()))
        return rule

    return register


_FORMS = ("gradients", "squares", "matrix", "rows")


def register_rule(
    *types: type[keras.Layer] | str, lora: bool = False
) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator that registers a `Rule` for layers of these types.

    With the first batch of each task the rule is compared with the gradients of single examples; if
    it gives others, `consolidate` refuses it.

    The rule also applies to subclasses that compute the same: those that override nothing that the
    layer could use in its forward pass. They may have another `__init__`, `build` or `get_config`,
    and methods of new names.

    Args:
        *types: Types of Keras layers, or their names, such as `"package.module.Scale"`, so that
            the package need not be imported.
        lora: Whether the rule is that of such layers with LoRA, instead of those without.

    Raises:
        ValueError: If a type is not a Keras layer, if the rule defines neither `gradients` nor
            `squares`, or if it defines only one of `matrix` and `rows`.

    Example:

    ```python
    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1],), name="w")

        def call(self, x):
            return x * self.w

    @register_rule(Scale)
    class ScaleRule(Rule):
        def gradients(self, layer, flow):
            return {"w": flow.inputs[0] * flow.gradient}
    ```
    """
    for layer_type in types:
        is_layer = isinstance(layer_type, type) and issubclass(layer_type, keras.Layer)
        if not (is_layer or (isinstance(layer_type, str) and "." in layer_type)):
            raise ValueError(
                "`types` must be types of Keras layers, or their names with those of their "
                f"modules. Received: {layer_type!r}"
            )

    def register(rule: type[Rule]) -> type[Rule]:
        own = {name for name in _FORMS if getattr(rule, name) is not getattr(Rule, name)}
        if not own & {"gradients", "squares"} or len(own & {"matrix", "rows"}) == 1:
            raise ValueError(
                "A rule must define `gradients` or `squares`, and both or none of `matrix` and "
                f"`rows`. {rule.__name__} defines {', '.join(sorted(own)) or 'none of these'}."
            )
        (_LORA_RULES if lora else _RULES).update(dict.fromkeys(types, rule()))
        return rule

    return register


# What a subclass or an instance may override without changing what the layer computes.
_HARMLESS = {
    *("__init__", "build", "quantize", "get_config", "from_config", "get_build_config"),
    *("build_from_config", "save_own_variables", "load_own_variables", "count_params"),
    *("compute_output_shape", "compute_output_spec", "compute_mask", "__repr__", "__str__"),
    *("__doc__", "__module__", "__qualname__", "__dict__", "__weakref__", "__slots__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
    *("__parameters__", "__orig_bases__", "__type_params__"),
    *("__static_attributes__", "__firstlineno__", "__abstractmethods__", "_abc_impl"),
}


def rule_for(layer: keras.Layer) -> Rule:
    """The rule of a layer: the one with closed forms, or else the slower generic one.

    A closed form was derived from the code of one class. It holds for layers that run that code
    and no other, on the variables that the rule knows.
    """
    parent = _registered(type(layer), _RULES)
    if parent is None or not computes_as(layer, parent):
        return GENERIC
    # With LoRA a layer does not compute with its kernel directly.
    rule = _of_type(parent, _LORA_RULES if getattr(layer, "lora_enabled", False) else _RULES)
    if rule is None:
        return GENERIC
    known = rule.variables is None or has_variables(layer, rule.variables)
    return rule if known and rule.supports(layer) else GENERIC


def nested_rule_for(layer: keras.Layer) -> NestedRule | None:
    """The rule for the variables of the layer within a layer, if there is one."""
    parent = _registered(type(layer), _NESTED)
    if parent is None or not computes_as(layer, parent):
        return None
    return _NESTED[parent] if _NESTED[parent].supports(layer) else None


def _registered(layer_type: type, rules: Mapping[Any, Any]) -> type | None:
    """The closest type with a rule that a type is or inherits from."""
    return next((t for t in layer_type.__mro__ if _of_type(t, rules) is not None), None)


def _of_type(layer_type: type, rules: Mapping[Any, Any]) -> Any:
    """What is registered for a type itself, or for its name; `None` if nothing is."""
    by_name = rules.get(f"{layer_type.__module__}.{layer_type.__qualname__}")
    return rules.get(layer_type, by_name)


def computes_as(layer: keras.Layer, parent: type) -> bool:
    """Whether the forward pass of a layer runs the code of `parent`, its type or a base of it."""
    if getattr(layer, "quantization_mode", None):  # it computes with other variables
        return False
    for added in type(layer).__mro__:
        if added in parent.__mro__:
            continue
        for name, value in vars(added).items():
            # A descriptor such as a property may take the place of an attribute of the instance.
            new = not hasattr(parent, name) and not hasattr(type(value), "__set__")
            if name not in _HARMLESS and not (new and not name.startswith("__")):
                return False
    replaced = (name for name in vars(layer) if name not in _HARMLESS)
    return not any(callable(getattr(parent, name, None)) for name in replaced)


def has_variables(layer: keras.Layer, names: tuple[str, ...] | Mapping[str, str]) -> bool:
    """Whether the layer has the variables that a rule knows, in their attributes, and no others.

    Others that are not trained do not matter: they are part of what a layer computes, which
    `computes_as` is about.
    """
    attributes = names if isinstance(names, Mapping) else {name: name for name in names}
    values = {name: getattr(layer, attribute, None) for name, attribute in attributes.items()}
    known = all(values.get(v.name) is v for v in own_trainable_variables(layer))
    own = {id(v) for v in own_variables(layer)}
    return known and all(v is None or id(v) in own for v in values.values())


@dataclass(frozen=True)
class RuledLayer:
    """A layer of a model and its rule, or the rule of some of its variables.

    Attributes:
        layer: The layer that has the variables.
        rule: Its rule.
        paths: Paths of the layer's variables, by variable name.
        caller: The layer whose calls the rule is given, if it calls `layer` in a loop.
        random: Whether the rule holds for calls in inference alone.
    """

    layer: keras.Layer
    rule: Rule
    paths: dict[str, str]
    caller: keras.Layer | None = None
    random: bool = False

    def __hash__(self) -> int:
        return hash((id(self.layer), id(self.rule)))

    @property
    def recorded(self) -> keras.Layer:
        """The layer whose calls the rule is given."""
        return self.layer if self.caller is None else self.caller

    @property
    def form(self) -> MatrixForm | None:
        """How the layer's variables form a matrix; `None` if they do not."""
        return self.rule.matrix(self.layer)

    @property
    def kernel(self) -> str:
        """The path of the kernel, for a layer with a matrix."""
        return self.paths["kernel"]

    @property
    def matrix_paths(self) -> tuple[str, ...]:
        """Paths of the variables in the matrix: the kernel and, if it is a row, the bias."""
        return self._paths_in(self.form)

    def _paths_in(self, form: MatrixForm | None) -> tuple[str, ...]:
        has_bias = form is not None and form.bias_shape is not None
        return (self.kernel, self.paths["bias"]) if has_bias else (self.kernel,)

    @property
    def earlier_form(self) -> MatrixForm | None:
        """The form of the matrix of a layer of this type, however this layer computes with it.

        It is that of blocks from before LoRA or quantization, and in files of earlier versions.
        """
        if self.caller is not None:
            return self.form
        layer, parent = self.layer, _registered(type(self.layer), _RULES)
        if parent is None or getattr(type(layer), "call", None) is not getattr(
            parent, "call", None
        ):
            return None
        rule = _of_type(parent, _RULES)
        form = rule.matrix(layer) if rule is not None and rule.supports(layer) else None
        needed = {"kernel"} if form is None or form.bias_shape is None else {"kernel", "bias"}
        return form if needed <= self.paths.keys() else None

    @property
    def beside(self) -> bool:
        """Whether the layer has variables that are not in the matrix."""
        return len(self.paths) > len(self.matrix_paths)

    def trains(self, variables: Variables) -> bool:
        """Whether any of the layer's variables is in `variables`."""
        return any(path in variables for path in self.paths.values())

    def all_rows(self, flows: list[LayerIO]) -> tuple[tf.Tensor, tf.Tensor]:
        """`rule.rows` of all calls, concatenated along the axis of positions."""
        rows = [self.rule.rows(self.layer, flow) for flow in flows]
        a, g = (tf.concat(parts, 1) for parts in zip(*rows, strict=True))
        return a, g


def ruled_layers(model: Learner) -> list[RuledLayer]:
    """The layers of a model, at any depth, that have variables of their own, with their rules.

    Left out are layers that share a variable with another layer, whose gradient depends on both,
    layers whose calls yield no per-example gradients (see `traceable_layers`), layers that change
    what goes into `call` or comes out of it, and layers that recompute their activations in the
    backward pass.
    """
    candidates = [
        ruled
        for ruled in _layers_with_variables(model)
        if type(ruled.recorded).__call__ is keras.Layer.__call__
    ]
    generic = [ruled.layer for ruled in candidates if ruled.rule is GENERIC]
    methods = methods_of(candidates)
    layers = [ruled.recorded for ruled in candidates]
    traceable = traceable_layers(model, layers, activated=generic, methods=methods)
    return [ruled for ruled in candidates if id(ruled.recorded) in traceable]


def methods_of(layers: Iterable[RuledLayer]) -> dict[int, str]:
    """By id of a layer, the method whose result is recorded in place of the layer's output."""
    return {id(r.recorded): r.rule.method for r in layers if r.rule.method is not None}


def _layers_with_variables(model: Learner) -> list[RuledLayer]:
    paths = {id(v): path for path, v in by_path(model).items()}
    all_layers = layers_within(model)
    nested = {id(layer): rule for layer in all_layers if (rule := nested_rule_for(layer))}
    callers = Counter(
        id(nested[id(layer)].within(layer)) for layer in all_layers if id(layer) in nested
    )
    candidates, owners = [], Counter[int]()
    for layer in all_layers:
        if id(layer) in nested:
            candidates += _parts(layer, nested[id(layer)], paths)
        # Without the variables of nested layers.
        own = own_variables(layer)
        owners.update(id(v) for v in own)
        recomputed = recomputes(layer)  # calls cannot be recorded
        known = all(id(v) in paths for v in own)
        if own and known and not recomputed and id(layer) not in callers:
            names = {v.name: paths[id(v)] for v in own}
            candidates.append(RuledLayer(layer, rule_for(layer), names))
    candidates = [ruled for ruled in candidates if callers[id(ruled.layer)] < 2]
    shared = {path for i, path in paths.items() if owners[i] > 1}
    return [ruled for ruled in candidates if not shared & set(ruled.paths.values())]


def _parts(layer: keras.Layer, rule: NestedRule, paths: Mapping[int, str]) -> list[RuledLayer]:
    """The layer within a layer, once for each rule of its variables."""
    parts = [
        RuledLayer(
            rule.within(layer),
            part.rule,
            {name: paths.get(id(v), "") for name, v in part.variables.items()},
            caller=layer,
            random=rule.random(layer),
        )
        for part in rule.parts(layer)
    ]
    return [
        ruled
        for ruled in parts
        if all(ruled.paths.values()) and not recomputes(layer) and not recomputes(ruled.layer)
    ]


def places_of(model: Learner) -> dict[str, Place]:
    """The `Place` of each variable, or of the matrix that it is the kernel of, by path.

    Layers with LoRA or quantization count as what they were before.
    """
    variables = by_path(model)
    places = {path: Place((path,), (tuple(v.shape),)) for path, v in variables.items()}
    for ruled in _layers_with_variables(model):
        form = ruled.earlier_form
        if form is not None:
            paths = ruled._paths_in(form)
            shapes = tuple(tuple(variables[path].shape) for path in paths)
            if form.kernel_shape == shapes[0]:
                places[ruled.kernel] = Place(paths, shapes, form)
    return places
