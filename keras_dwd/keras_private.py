"""Functions that wrap the private attributes and methods of Keras used by this package.

All other modules use the public API of Keras only. This module uses a private name only if the
public API offers no alternative, and imports no other module of the package.
`tests/test_keras_private.py` tests the behavior of these functions: if a new version of Keras
changes a private name, the failing test shows which function to fix.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras


class KerasChangedError(AttributeError):
    """Raised if the installed Keras lacks a private attribute that this package depends on."""


def _of(owner: Any, name: str) -> Any:
    """Returns a private attribute of an object.

    Raises:
        KerasChangedError: If the installed version of Keras does not have the attribute.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise KerasChangedError(
            f"Keras {keras.__version__} has no `{type(owner).__name__}.{name}`, which keras_dwd "
            "depends on. Install a version of Keras that keras_dwd has been tested with."
        ) from None


def within_hdf5() -> bool:
    """Whether a whole model is being saved to, or loaded from, the older HDF5 format."""
    from keras.src.backend.common import global_state

    return bool(_of(global_state, "get_global_attribute")("use_legacy_config", False))


# Layers and their variables.


def layers_within(layer: keras.Layer) -> list[keras.Layer]:
    """All layers nested inside a layer or model, at any depth, without the layer itself.

    Each layer is listed once. The public `Model.layers` lists only the outermost layers, and a
    layer that is not a model has no such attribute.
    """
    return list(_of(layer, "_flatten_layers")(include_self=False))


def own_trainable_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The trainable variables a layer created itself, without the variables of nested layers.

    The list does not depend on `layer.trainable`: for a frozen layer it is the same as before
    freezing, whereas `layer.trainable_variables` is empty.
    """
    return list(_of(layer, "_trainable_variables"))


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The variables a layer created itself, without the variables of nested layers.

    Trainable variables come first. The state of random seed generators and of metrics is not
    included.
    """
    return [*own_trainable_variables(layer), *_of(layer, "_non_trainable_variables")]


def own_metrics(layer: keras.Layer) -> list[keras.metrics.Metric]:
    """The metrics a layer or model created itself, without those of `compile` and nested layers.

    The public `Model.metrics` leaves out those of a model within a model.
    """
    return list(_of(layer, "_metrics"))


def set_dtype_policy(model: keras.Model, policy: Any) -> None:
    """Give a model another dtype policy, without quantizing its layers if that is a quantized one.

    The constructor of a functional model has no argument for it, and takes the global policy.

    Args:
        model: A model. Its layers keep their policies.
        policy: A dtype policy, its name or its configuration.
    """
    _of(model, "_dtype_policy")
    model._dtype_policy = keras.dtype_policies.get(policy)


def takes_training(layer: keras.Layer) -> bool:
    """Whether the `call` method of a layer has a `training` argument.

    The signature is read from the class because `call` of the instance may be temporarily replaced
    by a function that records calls.
    """
    return "training" in inspect.signature(type(layer).call).parameters


def recomputes(layer: keras.Layer) -> bool:
    """Whether a layer was created in a `keras.RematScope`.

    Such a layer may run a second time during the backward pass.
    """
    return _of(layer, "_remat_mode") is not None


def in_stateless_scope() -> bool:
    """Whether a `keras.StatelessScope` is active, in which variables may have other values."""
    try:
        from keras.src.backend.common import stateless_scope
    except ImportError:
        raise KerasChangedError(
            f"Keras {keras.__version__} has no `keras.src.backend.common.stateless_scope`, which "
            "keras_dwd depends on. Install a version of Keras that keras_dwd has been tested with."
        ) from None
    return bool(_of(stateless_scope, "in_stateless_scope")())


def inputs_of_calls(layer: keras.Layer) -> list[list[keras.KerasTensor]]:
    """The symbolic input tensors of a layer, one list for each call on symbolic tensors.

    The public `layer.input` raises an error if the layer was called several times.
    """
    return [list(node.input_tensors) for node in _of(layer, "_inbound_nodes")]


# Tensors.


def mask_of(tensor: Any) -> Any:
    """The mask that Keras attached to a tensor, or `None` if the tensor has no mask."""
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: Any, mask: Any) -> None:
    """Attach a mask to a tensor so that losses apply it; `None` removes the mask."""
    tensor._keras_mask = mask


def is_output_of_layer(tensor: Any) -> bool:
    """Whether a tensor is symbolic and was created by a layer, as in a functional model.

    False for symbolic tensors that only describe a shape and a dtype, such as the results of
    `keras.Layer.compute_output_spec`.
    """
    return keras.utils.is_keras_tensor(tensor) and hasattr(tensor, "_keras_history")


def layer_of(tensor: keras.KerasTensor) -> keras.Layer | None:
    """The layer or operation that made a symbolic tensor; `None` for one that is only described."""
    history = getattr(tensor, "_keras_history", None)
    return None if history is None else history.operation


# Models in training.


def loss_metric(model: keras.Model) -> keras.metrics.Metric:
    """The metric of a compiled model whose mean `fit` reports as `loss`.

    Each call of `compile` creates a new metric, so a different metric shows that the model was
    compiled again.
    """
    # Read the property of `keras.Model` because a subclass may override `metrics`.
    metrics = keras.Model.metrics.fget(model)
    if not metrics or metrics[0].name != "loss":
        raise KerasChangedError(
            f"In Keras {keras.__version__} the first of `Model.metrics` of a compiled model is not "
            "that of the loss, which keras_dwd depends on. Install a version of Keras that "
            "keras_dwd has been tested with."
        )
    return metrics[0]


def higher_is_better(metric: Any) -> bool | None:
    """Whether higher values of a metric are better; `None` if Keras does not know."""
    direction = getattr(metric, "_direction", None)
    return None if direction is None else direction == "up"


def loss_weights(model: keras.Model) -> Any:
    """The argument `loss_weights` of `compile`, which the public API does not give back."""
    loss = _of(model, "_compile_loss")
    return None if loss is None else _of(loss, "_user_loss_weights")


def weighted_metrics(model: keras.Model) -> Any:
    """The argument `weighted_metrics` of `compile`, which the public API does not give back."""
    metrics = _of(model, "_compile_metrics")
    return None if metrics is None else _of(metrics, "_user_weighted_metrics")


def build_before_tracing(model: keras.Model, batch: Any) -> None:
    """Create the variables of the metrics, the loss and the optimizer before the first step.

    Otherwise the first training step creates them, and TensorFlow traces that step twice.

    Args:
        model: A compiled model.
        batch: Symbolic tensors as `(x, y)` or `(x, y, sample_weight)`.
    """
    _of(model, "_symbolic_build")(data_batch=batch)


def evaluates_within_fit(arguments: Mapping[str, Any]) -> bool:
    """Whether `evaluate` was called by `fit` on the validation data.

    In that case Keras evaluates a dataset that `fit` created earlier and ignores the data in the
    arguments.

    Args:
        arguments: The arguments of `evaluate` by name.
    """
    return bool(arguments.get("_use_cached_eval_dataset"))


def loss_arguments(loss: keras.losses.Loss) -> Mapping[str, Any]:
    """The arguments of the function that one of Keras's own losses wraps, such as `from_logits`.

    `get_config` of a subclass may leave them out.
    """
    return dict(_of(loss, "_fn_kwargs"))


def class_axis(loss: keras.losses.SparseCategoricalCrossentropy) -> int:
    """The axis of the model outputs that indexes the classes."""
    return int(loss_arguments(loss).get("axis", -1))


# Optimizers.


def has_schedule(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an optimizer uses a learning rate schedule, so that its rate cannot be assigned.

    The public API is not enough: `optimizer.learning_rate` is the current value of the schedule,
    and `optimizer.get_config` fails for a schedule that does not implement `get_config`.
    """
    schedule = keras.optimizers.schedules.LearningRateSchedule
    return isinstance(_of(optimizer, "_learning_rate"), schedule)


Around = Callable[[Callable[[], None], list[Any], list[Any], Any], None]


@contextmanager
def around_each_update(optimizer: keras.optimizers.Optimizer, around: Around) -> Iterator[None]:
    """A context in which `around` is called in place of each update of variables by an optimizer.

    The call happens inside `optimizer.apply`, before the optimizer updates the moving averages of
    the weights (`use_ema`). There is no call for steps that only accumulate gradients
    (`gradient_accumulation_steps`).

    Args:
        optimizer: An optimizer that does not wrap another optimizer.
        around: Called with a function that does the update, the gradients, the variables that had
            one, and the learning rate.
    """
    update = _of(optimizer, "_backend_update_step")

    def call_around(gradients: Any, variables: Any, learning_rate: Any) -> None:
        gradients, variables = list(gradients), list(variables)
        around(
            lambda: update(gradients, variables, learning_rate), gradients, variables, learning_rate
        )

    # Assign without `setattr` because Keras tracks attributes that are set with it.
    vars(optimizer)["_backend_update_step"] = call_around
    try:
        yield
    finally:
        del vars(optimizer)["_backend_update_step"]


def trained_by(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that a built optimizer was built for."""
    return list(_of(optimizer, "_trainable_variables"))


@contextmanager
def shifted_iterates(
    optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable], learning_rate: Any
) -> Iterator[None]:
    """A context that moves the state from which an optimizer derives variables along with these.

    Most optimizers add a step to a variable. Ftrl computes it from a sum of gradients, and
    ScheduleFreeAdamW from two sequences: both would take back at the next step how a variable is
    moved here.

    Args:
        optimizer: Any optimizer that does not wrap another.
        variables: The variables that may be moved within the context.
        learning_rate: Learning rate of the step.
    """
    ftrl = isinstance(optimizer, keras.optimizers.Ftrl)
    schedule_free = getattr(keras.optimizers, "ScheduleFreeAdamW", ())  # not in older versions
    if not (ftrl or isinstance(optimizer, schedule_free)):
        yield
        return
    before = [keras.ops.copy(v) for v in variables]
    yield
    for variable, value in zip(variables, before, strict=True):
        move = value - keras.ops.convert_to_tensor(variable)
        if ftrl:
            rate = keras.ops.cast(learning_rate, move.dtype)
            sums = keras.ops.convert_to_tensor(_slot(optimizer, "_accumulators", variable))
            # As in its `update_step`, θ = −linear / quadratic.
            quadratic = keras.ops.power(sums, -optimizer.learning_rate_power) / rate
            quadratic += 2 * optimizer.l2_regularization_strength + optimizer.beta / rate
            _slot(optimizer, "_linears", variable).assign_add(move * quadratic)
        else:
            _slot(optimizer, "_momentums", variable).assign_sub(move)


def second_moment(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> keras.Variable:
    """The moving mean of squared gradients in Adam, AdamW, Nadam or RMSprop, not bias-corrected."""
    return _slot(optimizer, "_velocities", variable)


def largest_second_moment(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> keras.Variable:
    """The maximum over all steps of `second_moment`, in Adam or AdamW with `amsgrad=True`."""
    return _slot(optimizer, "_velocity_hats", variable)


def largest_gradient(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> keras.Variable:
    """The maximum of absolute gradients in Adamax, which decays by `beta_2` at each step."""
    return _slot(optimizer, "_u", variable)


def mean_gradient(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> keras.Variable:
    """The moving mean of gradients in RMSprop with `centered=True`."""
    return _slot(optimizer, "_average_gradients", variable)


def sum_of_squares(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> keras.Variable:
    """The sum of all squared gradients in Adagrad, plus its `initial_accumulator_value`."""
    return _slot(optimizer, "_accumulators", variable)


def _slot(optimizer: Any, name: str, variable: keras.Variable) -> keras.Variable:
    """The optimizer state for one variable, from the list of states with the given name."""
    return _of(optimizer, name)[_of(optimizer, "_get_variable_index")(variable)]


class OptimizerWrapper(keras.optimizers.Optimizer):
    """A base class for optimizers that leave the whole step to the optimizer they wrap.

    All settings and the state are those of the wrapped optimizer, to read and to set: Keras and its
    callbacks use them as attributes, such as `loss_scale_factor` in a `LossScaleOptimizer`. Only
    the name is the wrapper's own, and two variables that every Keras optimizer has.
    """

    # What a callback reads from the optimizer that it finds in a `LossScaleOptimizer`.
    _READ_BY_CALLBACKS = frozenset({"_trainable_variables", "_model_variables_moving_average"})

    def __init__(self, inner_optimizer: keras.optimizers.Optimizer, name: str | None = None):
        super().__init__(learning_rate=0.0, name=name)
        # Settings that Keras has set here would hide those of the wrapped optimizer.
        for attribute in list(vars(self)):
            if attribute != "name" and self._is_of_inner(attribute):
                del self.__dict__[attribute]
        self.inner_optimizer: Any = inner_optimizer

    def _is_of_inner(self, name: str) -> bool:
        return not name.startswith("_") or name in self._READ_BY_CALLBACKS

    def __getattr__(self, name: str) -> Any:
        """An attribute of the wrapped optimizer; called for what the wrapper does not have."""
        if "inner_optimizer" in vars(self) and self._is_of_inner(name):
            return getattr(self.inner_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in vars(self) or hasattr(type(self), name) or not self._is_of_inner(name)
        inner = vars(self).get("inner_optimizer")
        if own or inner is None or not hasattr(inner, name):
            super().__setattr__(name, value)
        else:
            setattr(inner, name, value)

    def build(self, variables: Any) -> None:
        self.inner_optimizer.build(variables)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        self.inner_optimizer.apply(grads, trainable_variables)

    def apply_gradients(self, grads_and_vars: Any) -> Any:
        return self.inner_optimizer.apply_gradients(grads_and_vars)

    def scale_loss(self, loss: Any) -> Any:
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list: Any) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

    @property
    def learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        return self.inner_optimizer.iterations

    @property
    def variables(self) -> Any:
        return super().variables + self.inner_optimizer.variables

    def set_weights(self, weights: Any) -> None:
        """Set the values of `variables`.

        Raises:
            ValueError: If the optimizer is not built, or if `weights` does not have their number or
                their shapes. Nothing is changed then.
        """
        if not self.built:
            raise ValueError(
                "You are calling `set_weights()` on an optimizer that has not yet been built: call "
                "`build(trainable_variables)` first."
            )
        received = [tuple(weight.shape) for weight in weights]
        expected = [tuple(variable.shape) for variable in self.variables]
        if received != expected:
            raise ValueError(
                "`weights` must have the number and the shapes of the `variables` of "
                f"{self.name!r}, {expected}. Received: {received}"
            )
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)


# Clones.


class CloneAware(keras.Model):
    """A base class for models that pass information on to their clones.

    `keras.models.clone_model` creates the clone from its input and output tensors only. A subclass
    can override `_prepare_clone` to attach information to the output tensors, which the clone reads
    when it is created. `CloneAware` must come before other model classes in the list of bases.
    """

    def _prepare_clone(self, outputs: list[keras.KerasTensor]) -> None:
        """Called before a clone is created from `outputs`; does nothing by default.

        Args:
            outputs: The flat list of the output tensors of the clone.
        """

    def _run_through_graph(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._run_through_graph(*args, **kwargs)
        symbolic = [tensor for tensor in keras.tree.flatten(outputs) if is_output_of_layer(tensor)]
        if symbolic:
            self._prepare_clone(symbolic)
        return outputs
