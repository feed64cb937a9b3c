"""Models, data and helpers for a model's state that several test files share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_dwd import DiagonalFisher, DWDModel
from keras_dwd.curvature.fisher import Fisher
from keras_dwd.groupings.grouping import GroupingResult
from keras_dwd.precision.block import Block
from keras_dwd.training.batch_statistics import BatchStatistics
from keras_dwd.training.boundary_pass import BoundaryPass


def sweep(cases, *core):
    """The cases of a test; `make test` runs it on the core, `make test-long` on the others.

    A case is named by its value or, where it has several, by the first.
    """
    names = [case[0] if isinstance(case, tuple) else case for case in cases]
    assert {*core} <= {*names}, {*core} - {*names}
    return [
        case if name in core else long(*(case if isinstance(case, tuple) else (case,)))
        for case, name in zip(cases, names, strict=True)
    ]


def long(*case):
    """A case that `make test-long` runs, and `make test` does not."""
    return pytest.param(*case, marks=pytest.mark.long)


def blobs(count=64, features=6, classes=3, seed=0):
    """Points around one centre for each class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, count).astype("int32")
    centres = rng.normal(size=(classes, features))
    return (centres[y] + 0.3 * rng.normal(size=(count, features))).astype("float32"), y


def mlp(features=6, classes=3, **dense):
    """A small network on `blobs`."""
    return keras.Sequential(
        [
            keras.Input((features,)),
            keras.layers.Dense(8, activation="tanh", name="hidden", **dense),
            keras.layers.Dense(classes, name="head"),
        ]
    )


# The settings of a `DWDModel` that is given none, for tests that are about these.
DEFAULTS: dict[str, Any] = {"fisher": None, "grouping": "gmm"}


def compiled(model=None, optimizer="sgd", compile_settings=None, **settings):
    """A compiled `DWDModel`, ready for `fit` on `blobs`.

    Unless the settings say otherwise, it has the estimate that is made fastest, and no groups:
    TensorFlow takes seconds to trace those that a `DWDModel` has by default, `DEFAULTS`.
    """
    settings = {"fisher": DiagonalFisher("batch"), "grouping": None} | settings
    made = DWDModel.from_model(mlp() if model is None else model, **settings)
    made.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **(compile_settings or {}),
    )
    return made


def moved(model, by=0.1):
    """The model with its weights changed, as training would, but without a step to trace."""
    for variable in model.trainable_variables:
        variable.assign_add(by * keras.random.normal(variable.shape, seed=1))
    return model


def weights(model):
    return [np.array(w) for w in model.weights]


def stepped(optimizer, values, gradients):
    """What one step of a new optimizer of Keras makes of some values."""
    variables = [keras.Variable(value) for value in values]
    optimizer.build(variables)
    optimizer.apply([tf.constant(g, "float32") for g in gradients], variables)
    return [np.array(variable, "float64") for variable in variables]


def gentle():
    """An optimizer that takes the pull in the gradient, with steps about linear in it."""
    return keras.optimizers.Adam(1.0, epsilon=10.0)


@contextmanager
def dtype_policy(policy: str) -> Iterator[None]:
    """Within this, Keras makes layers with another dtype policy."""
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def pass_statistics(
    model: DWDModel, data: Any, batch_size: int, fisher: Fisher | None = None
) -> dict[str, np.ndarray]:
    """The statistics that a pass over `data` at a boundary gives, by `NAME/PATH`.

    Args:
        model: A compiled model.
        data: Of the task.
        batch_size: Of the pass.
        fisher: Another estimate than that of the model; its graph is traced anew.
    """
    if fisher is None:
        return model._consolidation.pass_statistics(model, data, batch_size)
    variables = model._consolidation.pulled_variables(model)
    boundary_pass = BoundaryPass(BatchStatistics())
    return boundary_pass(model, fisher, variables, data, batch_size, model.workers.communicator)


def blocks_of(model: DWDModel, statistics: dict[str, np.ndarray]) -> dict[str, Block]:
    """The Fisher information that these statistics give, block by block."""
    return model.fisher.blocks(model, model._consolidation.pulled_variables(model), statistics)


def grouped(model: DWDModel, blocks: dict[str, Block]) -> GroupingResult:
    """What the grouping of a model makes of its Fisher information."""
    return model.grouping.apply(model._consolidation.boundary_context(model, blocks))


def state_of(model: DWDModel) -> dict[str, np.ndarray]:
    """The whole consolidation state, by `NAME/PATH` or `NAME`."""
    return model._consolidation.state(model)


def saved(model: DWDModel) -> dict[str, np.ndarray]:
    """The consolidation state in the form in which it is written to files."""
    return model._consolidation.save(model)


def load(model: DWDModel, arrays: dict[str, np.ndarray]) -> None:
    """Load a state that `saved` returned."""
    model._consolidation.load(model, arrays)
