"""The interface through which the package accesses a model."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import keras
import tensorflow as tf

# Methods of the user's class that a wrapper or a functional copy would bypass.
_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")


class Learner(Protocol):
    """A compiled functional Keras model: its forward pass, its loss and its variables.

    `curvature/`, `training/`, `task_graph/` and `distributed/` access a model only through this
    interface and `variables.by_path`; they do not import `DWDModel`.
    """

    input: Any
    inputs: Sequence[Any]
    output: Any
    outputs: Sequence[Any]
    output_names: Sequence[str]
    loss: Any
    losses: Sequence[Any]
    added_losses_hidden: bool
    metrics: Sequence[Any]
    optimizer: Any
    weights: Sequence[keras.Variable]
    trainable_variables: Sequence[keras.Variable]
    non_trainable_variables: Sequence[keras.Variable]
    run_eagerly: bool
    steps_per_execution: int
    train_function: Any

    def __call__(self, inputs: Any, training: bool = False) -> Any: ...
    def stateless_call(
        self,
        trainable_variables: Sequence[Any],
        non_trainable_variables: Sequence[Any],
        inputs: Any,
        training: bool = False,
    ) -> tuple[Any, Any]: ...
    def compute_loss(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True
    ) -> Any: ...
    def make_train_function(self, force: bool = False) -> Any: ...
    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any: ...


def has_own_loss(model: Learner) -> bool:
    """Whether the model's class overrides `compute_loss`, which may then need no `loss`."""
    return type(model).compute_loss is not keras.Model.compute_loss


def overridden_steps(model: keras.Model) -> list[str]:
    """The steps of training, evaluation and prediction that the model's class overrides."""
    return [n for n in _STEPS if getattr(type(model), n) is not getattr(keras.Model, n)]


def runs_its_graph(model: keras.Model) -> bool:
    """Whether calling the model is running its graph of layers: it is functional or sequential."""
    definer = next(c for c in type(model).__mro__ if "call" in vars(c))
    return bool(getattr(model, "inputs", None)) and definer.__module__.startswith("keras.")


def total_loss(
    model: Learner, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool
) -> tf.Tensor:
    """`model.compute_loss`, whose `training` an override may leave out. Graph code."""
    takes_training = "training" in inspect.signature(model.compute_loss).parameters
    phase = {"training": training} if takes_training else {}
    return model.compute_loss(x, y, y_pred, sample_weight, **phase)


def data_loss(
    model: Learner,
    x: Any,
    y: Any,
    y_pred: Any,
    sample_weight: Any = None,
    training: bool = False,
) -> tf.Tensor:
    """The data loss, without penalty and regularization losses. Graph code."""
    if has_own_loss(model):  # which need not have the added losses in it
        with _without_added_losses(model):
            return total_loss(model, x, y, y_pred, sample_weight, training)
    loss = total_loss(model, x, y, y_pred, sample_weight, training)
    # `compute_loss` includes the added losses; subtracting them leaves exactly zero gradient.
    added = added_loss(model, loss)
    return loss if added is None else loss - added


@contextmanager
def _without_added_losses(model: Learner) -> Iterator[None]:
    """Within this, `model.losses` is empty."""
    model.added_losses_hidden = True
    try:
        yield
    finally:
        model.added_losses_hidden = False


def added_loss(model: Learner, loss: tf.Tensor) -> tf.Tensor | None:
    """The sum of the losses added by layers, in the dtype of `loss`, or `None`. Graph code."""
    terms = [tf.reduce_sum(tf.cast(term, loss.dtype)) for term in model.losses]
    return tf.add_n(terms) if terms else None
